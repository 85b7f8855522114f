"""Writing a checkpoint as a set: a reader finds the whole old one or the whole new one.

New shards get names that no file in the folder has, the index is renamed into place after they are
on disk, and the old shards are removed last. Tensors are asked for one at a time.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qnext.io.atomic import atomic_file, flush_to_disk
from qnext.io.header import encode_header, tensor_bytes
from qnext.io.json_file import write_json
from qnext.io.reader import DTYPE_CODES
from qnext.io.shards import INDEX_NAME, read_weight_map, saved_files

DEFAULT_MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

TensorSpecs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def parse_size(size: float | str) -> int:
    """Returns bytes from a number, or from text such as "5GB" (10^9) or "200MiB" (2^20).

    Raises:
        ValueError: no such size, or less than one byte.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        unit = match.group(2).upper() if match else None
        if match is None or unit not in _UNITS:
            raise ValueError(
                f"max_shard_size = {size!r}: a number of bytes or text such as '5GB' or '200MiB' "
                "is allowed"
            )
        size = float(match.group(1)) * _UNITS[unit]
    is_number = isinstance(size, int | float) and not isinstance(size, bool)
    if not is_number or not math.isfinite(size):
        raise ValueError(
            f"max_shard_size = {size!r}: a number of bytes or text such as '5GB' is allowed"
        )
    size = int(size)
    if size < 1:
        raise ValueError(f"max_shard_size = {size}: it must be at least 1 byte")
    return size


def plan_shards(specs: TensorSpecs, max_shard_bytes: int) -> list[list[str]]:
    """Splits names, in their order, into shards; a tensor above the limit gets its own."""
    shards: list[list[str]] = []
    used_bytes = 0
    for name, (dtype, shape) in specs.items():
        num_bytes = tensor_bytes(DTYPE_CODES[dtype], shape)
        if not shards or (used_bytes + num_bytes > max_shard_bytes and used_bytes > 0):
            shards.append([])
            used_bytes = 0
        shards[-1].append(name)
        used_bytes += num_bytes
    return shards


def write_checkpoint(
    folder: Path,
    specs: TensorSpecs,
    get: Callable[[str], torch.Tensor],
    *,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    before_index: Callable[[], None] | None = None,
) -> None:
    """Writes shards and index, then removes the weights that the folder held before.

    Args:
        folder: made where it does not exist.
        specs: dtype and shape by name, in the order of writing.
        get: called once per name, in shard order; its tensor has the dtype and shape of `specs`.
        max_shard_size: bytes, or text such as "5GB".
        before_index: writes the folder's other files, once all shards are on disk.

    Raises:
        ValueError: max_shard_size is no size, there is no tensor to write, or `folder` cannot be
            made.
    """
    max_shard_bytes = parse_size(max_shard_size)
    if not specs:
        raise ValueError(f"{folder}: there is no tensor to write")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise ValueError(f"{folder}: no folder can be made here: {reason}") from error
    old_files = saved_files(folder)
    shards = plan_shards(specs, max_shard_bytes)
    names = _new_names(folder, len(shards))
    weight_map: dict[str, str] = {}
    written: list[Path] = []
    try:
        for file_name, shard in zip(names, shards, strict=True):
            written.append(folder / file_name)
            _write_shard(folder / file_name, {name: specs[name] for name in shard}, get)
            weight_map.update(dict.fromkeys(shard, file_name))
        if before_index is not None:
            before_index()
        _write_index(folder, specs, weight_map)
    except BaseException:
        # An interrupt can come just after the index's rename: what it names stays.
        index = folder / INDEX_NAME
        in_use = set(read_weight_map(index).values()) if index.is_file() else set()
        for path in written:
            if path.name not in in_use:
                path.unlink(missing_ok=True)
        raise
    for path in old_files - set(written):
        path.unlink(missing_ok=True)
    flush_to_disk(folder)


def _write_index(folder: Path, specs: TensorSpecs, weight_map: Mapping[str, str]) -> None:
    sizes = [tensor_bytes(DTYPE_CODES[dtype], shape) for dtype, shape in specs.values()]
    table = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / INDEX_NAME, table)


def _new_names(folder: Path, num_shards: int) -> list[str]:
    present = {path.name.removesuffix(".tmp") for path in folder.iterdir()}
    version = 1
    while True:
        mark = "" if version == 1 else f"v{version}-"
        names = [
            f"model-{mark}{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)
        ]
        if present.isdisjoint(names):
            return names
        version += 1


def _write_shard(path: Path, specs: TensorSpecs, get: Callable[[str], torch.Tensor]) -> None:
    # Wider dtypes first, so that every tensor stays aligned to its own size.
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1][0].itemsize))
    header = {name: (DTYPE_CODES[dtype], shape) for name, (dtype, shape) in ordered.items()}
    with atomic_file(path) as file:
        file.write(encode_header(header))
        for name, (dtype, shape) in ordered.items():
            tensor = get(name).detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), (
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} was planned as {dtype} {shape}"
            )
            if tensor.numel() > 0:
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
