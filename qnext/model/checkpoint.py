"""Loading a checkpoint into `Qwen3Next` and writing one, tensor by tensor, the whole or nothing."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qnext.config.generation import GenerationConfig
from qnext.config.model import DTYPES, ModelConfig
from qnext.io.header import tensor_bytes
from qnext.io.hf_config import (
    GENERATION_CONFIG_NAME,
    copy_companions,
    read_model_config,
    write_generation_config,
    write_model_config,
)
from qnext.io.hub import resolve_checkpoint
from qnext.io.names import (
    LAYOUTS,
    MTP_PREFIX,
    Layout,
    fused_names,
    has_mtp_tensors,
    mixture_prefixes,
)
from qnext.io.reader import DTYPE_CODES, CheckpointReader
from qnext.io.writer import DEFAULT_MAX_SHARD_SIZE, write_checkpoint
from qnext.kernels.fp8_blocks import device_objection, scale_shape
from qnext.model.fill import SCALE_SUFFIX, file_rows, fill, parameter_rows
from qnext.model.init import init_weights
from qnext.model.logical import LogicalTensor, map_tensors
from qnext.model.quantized import (
    FP8,
    ScaledMatrix,
    empty_blocks,
    fp8_names,
    num_tail_rows,
    refuse_quantised,
)
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.device import resolve_device

MAX_LISTED = 100
_TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
_EIGHT_BITS = {"int8": torch.int8, torch.int8: torch.int8, "fp8": FP8, FP8: FP8}
STORED_METHOD = "fp8"  # of a `quantization_config`, the one that is read


@dataclass(eq=False)
class CheckpointError(ValueError):
    """Checkpoint and configuration do not match; `missing`, `unexpected`, `misshapen` list how."""

    folder: Path
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    """Each as `name: shape found, shape expected`."""

    def __str__(self) -> str:
        lines = [f"{self.folder}: the tensors do not match config.json"]
        lines += _listed("missing", self.missing)
        lines += _listed("unexpected", self.unexpected)
        lines += _listed("misshapen", self.misshapen)
        return "\n".join(lines)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> Qwen3Next:
    """Opens a checkpoint; memory beyond the weights stays small, since tensors are mapped.

    Args:
        path_or_hub_id: a folder, the name of a shipped model, or `organisation/model`.
        dtype: "auto" keeps what is stored, so that saving writes the same bytes; otherwise all
            weights are converted. A_log and dt_bias are held in float32 at least. "int8" holds
            the large matrices in int8 with a scale for each row, to run on a CPU; "fp8" in e4m3
            with a scale for each block of 128 x 128, to run on a GPU. What is missing with
            strict=False then stays undefined. A checkpoint in fp8 is read as it is with "auto" and
            "fp8", and times its scales with any other.
        device: where the weights go; "auto" is the first GPU, else the CPU.
        strict: refuse any missing, unexpected or misshapen tensor. False loads what fits, draws
            what is missing anew, drops an incomplete MTP head, and warns with the names.

    Returns:
        The model; `has_mtp` says whether the checkpoint has an MTP head.

    Raises:
        CheckpointError: tensors and configuration do not match.
        ValueError: no such checkpoint, a corrupt file, an unsupported dtype or device, or
            weights quantised by another method than fp8 in blocks.
    """
    packed = _EIGHT_BITS.get(dtype)
    wanted = parse_dtype("auto" if packed else dtype)
    device = resolve_device(device)
    if packed == torch.int8 and device.type != "cpu":
        raise ValueError(f"dtype is int8 and device {device}; int8 weights run on a CPU")
    if device.type == "meta":
        raise ValueError("device is 'meta', which holds no weights; want auto, cpu, cuda or cuda:N")
    folder = resolve_checkpoint(path_or_hub_id)
    config = read_model_config(folder)
    if config.quant_method not in (None, STORED_METHOD):
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config: method {config.quant_method!r} is not "
            f"supported; weights in {', '.join(DTYPES)} and fp8 are"
        )
    if config.quant_method == STORED_METHOD and dtype == "auto":
        packed = FP8
    if packed == FP8:
        if (objection := device_objection(device)) is not None:
            raise ValueError(f"{objection}; dtype may be {', '.join(DTYPES)}, or int8 on a CPU")
        if device.type == "cuda":
            wanted = torch.bfloat16  # of what is not in 8 bits, as published
    reader = CheckpointReader(folder)
    has_mtp = has_mtp_tensors(reader.entries)
    tensors, report = match_tensors(config, reader, has_mtp=has_mtp)
    if report:
        if strict:
            raise report
        if any(name.startswith(MTP_PREFIX) for name in (*report.missing, *report.misshapen)):
            has_mtp = False
            tensors, report = match_tensors(config, reader, has_mtp=False)
        warnings.warn(f"skipped, since strict=False: {report}", UserWarning)
    stored = _stored_dtypes(reader, tensors)
    model = Qwen3Next(replace(config, quant_method=None), has_mtp=has_mtp, device="meta")
    held = _held_dtypes(model, tensors, stored, wanted)
    if packed is not None:
        names = fp8_names(model) if packed == FP8 else model.matrix_names()
        held |= dict.fromkeys(names, packed)
    _materialise(model, held, device, is_partial=bool(report.missing or report.misshapen))
    copy_in(model, reader, tensors.values())
    reader.close()
    is_as_stored = wanted is None and FP8 not in stored.values()
    model.stored_dtypes = stored if is_as_stored else {}
    model.source_folder = folder
    return model


def save_model(
    model: Qwen3Next,
    path: str | Path,
    *,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    layout: str = "per_expert",
    dtype: torch.dtype | str = "auto",
) -> None:
    """Writes shards, index, config, generation config and, where known, the tokenizer's files.

    A reader of the folder finds the old checkpoint or the new one, at any moment. Only one tensor
    is laid out anew in memory at a time.

    Args:
        model: on any device.
        path: the folder, made where it does not exist.
        max_shard_size: bytes, or text such as "5GB".
        layout: "per_expert", as published, or "fused", as transformers 5 holds the experts.
        dtype: "auto" writes each tensor as it was stored, or as it is held where it was never
            stored; otherwise all but A_log and dt_bias are converted.

    Raises:
        ValueError: an unknown layout, dtype or size.
    """
    refuse_quantised(model, "save")
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: allowed are {', '.join(LAYOUTS)}")
    folder, wanted = Path(path).expanduser(), parse_dtype(dtype)
    tensors = logical_tensors(model, "fused" if layout == "fused" else "per_expert")
    parameters = dict(model.named_parameters())
    stored = _still_stored(model, parameters)
    specs = {
        name: (_written_dtype(tensor, parameters, stored, wanted), tensor.shape)
        for name, tensor in tensors.items()
    }

    def write_companions() -> None:
        if model.source_folder is not None:
            copy_companions(model.source_folder, folder)
        config = replace(model.config, dtype=_dominant_dtype(specs))
        if not (folder / GENERATION_CONFIG_NAME).is_file():
            generation = GenerationConfig(
                bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
            )
            write_generation_config(folder, generation)
        write_model_config(folder, config)

    write_checkpoint(
        folder,
        specs,
        lambda name: gather(tensors[name], parameters, specs[name][0]),
        max_shard_size=max_shard_size,
        before_index=write_companions,
    )


def logical_tensors(model: Qwen3Next, layout: Layout = "per_expert") -> dict[str, LogicalTensor]:
    """Returns every checkpoint tensor of a model and the parameter rows that hold it."""
    return map_tensors(model.config, has_mtp=model.has_mtp, layout_of=lambda prefix: layout)


def match_tensors(
    config: ModelConfig, reader: CheckpointReader, *, has_mtp: bool
) -> tuple[dict[str, LogicalTensor], CheckpointError]:
    """Compares a checkpoint's tensors with those that a configuration asks for.

    Returns:
        The tensors that are there and fit, and a report, false in a boolean context when all do.
    """
    entries = reader.entries
    fused = {
        prefix
        for prefix in mixture_prefixes(config, has_mtp=has_mtp)
        if any(name in entries for name in fused_names(prefix))
    }
    expected = map_tensors(
        config,
        has_mtp=has_mtp,
        layout_of=lambda prefix: "fused" if prefix in fused else "per_expert",
    )
    misshapen = {
        name: f"{name}: {list(entries[name].shape)} found, {list(tensor.shape)} expected"
        for name, tensor in expected.items()
        if name in entries and entries[name].shape != tensor.shape
    }
    scales: dict[str, tuple[int, ...]] = {}
    if config.quant_method == STORED_METHOD:
        scales = {
            name + SCALE_SUFFIX: scale_shape(tensor.shape)
            for name, tensor in expected.items()
            if name in entries and reader.dtype(name) == FP8
        }
    misshapen |= {
        name.removesuffix(SCALE_SUFFIX): f"{name}: {list(entries[name].shape)} found, "
        f"{list(shape)} expected"
        for name, shape in scales.items()
        if name in entries and entries[name].shape != shape
    }
    known = expected.keys() | scales.keys()
    report = CheckpointError(
        reader.folder,
        missing=tuple(name for name in (*expected, *scales) if name not in entries),
        unexpected=tuple(name for name in entries if name not in known),
        misshapen=tuple(misshapen.values()),
    )
    fitting = {
        name: tensor
        for name, tensor in expected.items()
        if name in entries
        and name not in misshapen
        and (name + SCALE_SUFFIX in entries or name + SCALE_SUFFIX not in scales)
    }
    return fitting, report


@torch.no_grad()
def copy_in(model: Qwen3Next, reader: CheckpointReader, tensors: Iterable[LogicalTensor]) -> None:
    """Copies tensors from the mapped files into parameters, converting to the parameters' dtype.

    What the files hold in fp8 is copied as it is where a parameter is fp8, and times its scales
    elsewhere.

    Args:
        model: the parameters that the tensors' parts name are on a real device.
        reader: holds the tensors.
        tensors: those to copy.
    """
    parameters = dict(model.named_parameters())
    for tensor in tensors:
        source, scale = reader.read(tensor.name), None
        if source.dtype == FP8:
            scale = reader.read(tensor.name + SCALE_SUFFIX)
        fill(tensor, parameters, source, scale)
        del source
        reader.release(tensor.name)


@torch.no_grad()
def gather(
    tensor: LogicalTensor, parameters: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Returns one tensor as a checkpoint holds it, on the CPU.

    Args:
        tensor: which one.
        parameters: the model's, by name.
        dtype: to write it in.
    """
    result = torch.empty(tensor.shape, dtype=dtype)
    for part in tensor.parts:
        rows = file_rows(result, part)
        rows.copy_(parameter_rows(parameters[part.parameter], part).view(rows.shape))
    return result


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """Returns a torch dtype, None for "auto".

    Raises:
        ValueError: weights cannot be held in it.
    """
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else _TORCH_DTYPES.get(dtype)
    if found is None or found not in _DTYPE_NAMES:
        allowed = f"auto, {', '.join(DTYPES)}, and to run int8 on a CPU, fp8 on a GPU"
        raise ValueError(f"dtype = {dtype!r}: allowed are {allowed}")
    return found


def _listed(kind: str, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    lines = [f"  {len(names):,} {kind}:", *(f"    {name}" for name in names[:MAX_LISTED])]
    if len(names) > MAX_LISTED:
        lines.append(f"    and {len(names) - MAX_LISTED:,} more (all in `{kind}` of the exception)")
    return lines


def _is_decay(parameter: str) -> bool:
    return parameter.endswith((".A_log", ".dt_bias"))


def _stored_dtypes(
    reader: CheckpointReader, tensors: Mapping[str, LogicalTensor]
) -> dict[str, torch.dtype]:
    stored = {name: reader.dtype(name) for name in tensors}
    for name, dtype in stored.items():
        if dtype == FP8 and name + SCALE_SUFFIX in reader.entries:
            continue
        if dtype not in _DTYPE_NAMES:
            entry = reader.entries[name]
            raise ValueError(
                f"{entry.file}: {name} is stored as {entry.dtype}: "
                f"{', '.join(DTYPES)} are supported"
            )
    return stored


def _held_dtypes(
    model: Qwen3Next,
    tensors: Mapping[str, LogicalTensor],
    stored: Mapping[str, torch.dtype],
    wanted: torch.dtype | None,
) -> dict[str, torch.dtype]:
    """The dtype of each parameter: what holds all that is stored in it, or the one wanted.

    What is stored in fp8 follows the others.
    """
    held: dict[str, torch.dtype] = {}
    for name, tensor in tensors.items():
        if wanted is None and stored[name] == FP8:
            continue
        for part in tensor.parts:
            dtype = wanted or stored[name]
            held[part.parameter] = torch.promote_types(held.get(part.parameter, dtype), dtype)
    fallback = wanted or _most_common(held.values())
    for name, _ in model.named_parameters():
        dtype = held.get(name, fallback)
        held[name] = torch.promote_types(dtype, torch.float32) if _is_decay(name) else dtype
    return held


def _materialise(
    model: Qwen3Next,
    held: Mapping[str, torch.dtype],
    device: torch.device | str,
    is_partial: bool,
) -> None:
    """Gives every parameter memory; where some will not be filled, draws all of them first."""
    usual = held["embed_tokens"]

    def real_like(parameter: torch.Tensor, name: str) -> torch.Tensor:
        return torch.empty(parameter.shape, dtype=held[name], device=device)

    for name, parameter in list(model.named_parameters()):
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        made: torch.nn.Parameter
        if held[name] == FP8:
            tail_rows = num_tail_rows(model, name)
            made = empty_blocks(parameter.shape, tail_rows, usual, device)
        elif held[name] == torch.int8:
            packed = ScaledMatrix(real_like(parameter, name), requires_grad=False)
            packed.row_scale = torch.ones(*parameter.shape[:-1], 1)
            made = packed
        else:
            made = torch.nn.Parameter(real_like(parameter, name))
        setattr(module, own_name, made)
    if is_partial and not {torch.int8, FP8} & set(held.values()):
        init_weights(model, model.config, seed=0)


def _still_stored(
    model: Qwen3Next, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.dtype]:
    """The stored dtypes of tensors whose parameters have kept the dtype that loading gave them."""
    stored = {
        name: tensor
        for layout in LAYOUTS
        for name, tensor in logical_tensors(model, layout).items()
        if name in model.stored_dtypes
    }
    held = _held_dtypes(model, stored, model.stored_dtypes, None)
    return {
        name: model.stored_dtypes[name]
        for name, tensor in stored.items()
        if all(parameters[part.parameter].dtype == held[part.parameter] for part in tensor.parts)
    }


def _written_dtype(
    tensor: LogicalTensor,
    parameters: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.dtype],
    wanted: torch.dtype | None,
) -> torch.dtype:
    parameter = tensor.parts[0].parameter
    held = parameters[parameter].dtype
    if wanted is not None:
        return held if _is_decay(parameter) else wanted
    dtype = stored.get(tensor.name, held)
    if _is_decay(parameter) and dtype != held:
        # Written as it was read; but once trained further, narrower would round it again.
        values = parameters[parameter].detach()
        return dtype if torch.equal(values.to(dtype).to(held), values) else held
    return dtype


def _most_common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    counted = Counter(dtypes).most_common(1)
    return counted[0][0] if counted else torch.float32


def _dominant_dtype(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    """Name of the dtype that takes the most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for dtype, shape in specs.values():
        sizes[dtype] += tensor_bytes(DTYPE_CODES[dtype], shape)
    return _DTYPE_NAMES[sizes.most_common(1)[0][0]]
