"""What `qnext inspect` says about a model, as one record that all of its forms are drawn from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qnext.config.model import ModelConfig
from qnext.config.presets import PRESETS, preset
from qnext.inspect.names import Comparison, compare_shapes
from qnext.io.header import TensorEntry
from qnext.io.hf_config import read_model_config
from qnext.io.hub import resolve_checkpoint, shipped_folder
from qnext.io.names import (
    Layout,
    Shape,
    checkpoint_shapes,
    fused_names,
    has_mtp_tensors,
    mixture_prefixes,
)
from qnext.io.shards import INDEX_NAME, has_weights, read_entries, read_weight_map
from qnext.model.accounting import (
    DTYPE_BYTES,
    ParameterCounts,
    conv_state_bytes,
    count_parameters,
    forward_flops_per_token,
    kv_bytes_per_token,
    recurrent_state_bytes,
    training_flops_per_token,
)


@dataclass(frozen=True)
class Block:
    """Layers that follow one another and are alike."""

    first_layer: int
    num_layers: int
    is_attention: bool
    is_moe: bool


@dataclass(frozen=True)
class ModelSummary:
    """One model at one context length."""

    name: str
    config: ModelConfig
    has_mtp: bool
    counts: ParameterCounts
    shapes: Mapping[str, Shape]
    """Of the checkpoint's tensors, as found, or as they would be where there are no weights."""
    stored_bytes: Mapping[str, int] | None
    """Bytes by the format's dtype code; None without weights."""
    num_files: int
    comparison: Comparison | None
    """Weights against config.json; None without weights."""
    context: int

    @property
    def state_bytes(self) -> int:
        """DeltaNet's recurrent states of one sequence, fp32."""
        return recurrent_state_bytes(self.config)

    @property
    def conv_bytes(self) -> int:
        """DeltaNet's convolution inputs of one sequence, 2 bytes each."""
        return conv_state_bytes(self.config)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, 2 bytes each, the MTP head's included."""
        return kv_bytes_per_token(self.config, has_mtp=self.has_mtp)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one sequence at the context length."""
        return self.context * self.kv_bytes_per_token

    @property
    def sequence_bytes(self) -> int:
        """All memory of one sequence at the context length."""
        return self.state_bytes + self.conv_bytes + self.kv_bytes

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights, as stored, or in each dtype they could be held in."""
        if self.stored_bytes is not None:
            return dict(self.stored_bytes)
        return {dtype: self.counts.total * DTYPE_BYTES[dtype] for dtype in ("float32", "bfloat16")}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": self.name,
            "num_tensors": len(self.shapes),
            "num_files": self.num_files,
            "has_mtp": self.has_mtp,
            "parameters": {
                "total": self.counts.total,
                "main": self.counts.main,
                "active": self.counts.active,
                "parts": {
                    name: {"total": part.total, "active": part.active}
                    for name, part in self.counts.parts.items()
                },
            },
            "is_stored": self.stored_bytes is not None,
            "weight_bytes": self.weight_bytes(),
            "context_tokens": self.context,
            "recurrent_state_bytes": self.state_bytes,
            "conv_state_bytes": self.conv_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes": self.kv_bytes,
            "sequence_bytes": self.sequence_bytes,
            "forward_flops_per_token": forward_flops_per_token(self.config, self.context),
            "training_flops_per_token": training_flops_per_token(self.config, self.context),
            "differences": list(self.comparison.lines()) if self.comparison else [],
            "config": self.config.to_hf() if self.config.quant_method is None else None,
        }


def summarise(name: str, context: int | None = None) -> ModelSummary:
    """Looks at a folder, a preset, a shipped model or a hub id; of weights, headers alone are read.

    Args:
        name: a folder comes first, then a shipped model, a preset, a hub id.
        context: tokens; None is the model's own limit.

    Raises:
        ValueError: nothing of that name, a broken file, or a context below 1.
    """
    if context is not None and context < 1:
        raise ValueError(f"context = {context}: it must be at least 1 token")
    folder = None
    is_folder = Path(name).expanduser().is_dir() or shipped_folder(name) is not None
    if is_folder or name not in PRESETS:
        folder = resolve_checkpoint(name, with_weights=False)
    config = preset(name) if folder is None else read_model_config(folder)
    has_files = folder is not None and is_folder and has_weights(folder)
    entries = read_entries(folder) if folder is not None and has_files else {}
    has_mtp = has_mtp_tensors(entries) if has_files else _names_mtp(folder)
    expected = expected_shapes(config, entries, has_mtp=has_mtp)
    found = {tensor: entry.shape for tensor, entry in entries.items()}
    return ModelSummary(
        name=name,
        config=config,
        has_mtp=has_mtp,
        counts=count_parameters(config, has_mtp=has_mtp),
        shapes=found if has_files else expected,
        stored_bytes=_bytes_by_dtype(entries) if has_files else None,
        num_files=len({entry.file for entry in entries.values()}),
        comparison=compare_shapes(expected, found) if has_files else None,
        context=config.max_position_embeddings if context is None else context,
    )


def expected_shapes(
    config: ModelConfig, entries: Mapping[str, TensorEntry], *, has_mtp: bool
) -> dict[str, Shape]:
    """Returns what a checkpoint should hold, each mixture in the layout that its names show."""
    per_expert = checkpoint_shapes(config, has_mtp=has_mtp)
    fused_prefixes = [
        prefix
        for prefix in mixture_prefixes(config, has_mtp=has_mtp)
        if any(name in entries for name in fused_names(prefix))
    ]
    if not fused_prefixes:
        return per_expert
    layout: Layout = "fused"
    fused = checkpoint_shapes(config, has_mtp=has_mtp, layout=layout)
    starts = tuple(prefix + "experts." for prefix in fused_prefixes)
    shapes = {name: shape for name, shape in per_expert.items() if not name.startswith(starts)}
    return shapes | {name: shape for name, shape in fused.items() if name.startswith(starts)}


def blocks_of(config: ModelConfig) -> list[Block]:
    """Returns the layers as runs of like ones, from the first on."""
    kinds = [
        (config.is_attention_layer(i), config.is_moe_layer(i))
        for i in range(config.num_hidden_layers)
    ]
    blocks: list[Block] = []
    first_layer = 0
    for (is_attention, is_moe), run in groupby(kinds):
        num_layers = len(list(run))
        blocks.append(Block(first_layer, num_layers, is_attention, is_moe))
        first_layer += num_layers
    return blocks


def repeated_blocks(config: ModelConfig) -> tuple[int, list[Block]]:
    """Returns how often the stack repeats its shortest pattern, and the blocks of the first."""
    kinds = [
        (config.is_attention_layer(i), config.is_moe_layer(i))
        for i in range(config.num_hidden_layers)
    ]
    num_layers = len(kinds)
    period = next(
        size
        for size in range(1, num_layers + 1)
        if num_layers % size == 0 and kinds == kinds[:size] * (num_layers // size)
    )
    blocks, covered = [], 0
    for block in blocks_of(config):
        if covered >= period:
            break
        taken = min(block.num_layers, period - covered)
        blocks.append(Block(block.first_layer, taken, block.is_attention, block.is_moe))
        covered += taken
    return num_layers // period, blocks


def _names_mtp(folder: Path | None) -> bool:
    """Whether an index, fetched without its shards, names an MTP head; without one, yes."""
    index = None if folder is None else folder / INDEX_NAME
    return index is None or not index.is_file() or has_mtp_tensors(read_weight_map(index))


def _bytes_by_dtype(entries: Mapping[str, TensorEntry]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.num_bytes
    return dict(sizes.most_common())
