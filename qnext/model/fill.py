"""Rows of a checkpoint's tensors into the parameters that hold them, in whatever type these are."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from qnext.kernels.fp8_blocks import BLOCK, block_scale_of, dequantized, tail_of
from qnext.kernels.int8_rows import quantize_rows, scale_of
from qnext.model.logical import LogicalTensor, Part
from qnext.model.quantized import FP8, quantize_into

SCALE_SUFFIX = "_scale_inv"  # after the name of an e4m3 tensor: that of its blocks' scales


@torch.no_grad()
def fill(
    tensor: LogicalTensor,
    parameters: Mapping[str, torch.Tensor],
    source: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    """Copy one tensor into its parameters, converting, quantising or dequantising it on the way.

    Args:
        tensor: which one.
        parameters: the model's, by name, on a real device.
        source: as the checkpoint holds it.
        scale: of its blocks, if it is e4m3.

    Raises:
        ValueError: a part begins or ends inside of a block of an e4m3 matrix.
    """
    wide: torch.Tensor | None = source if scale is None else None
    for part in tensor.parts:
        parameter = parameters[part.parameter]
        in_blocks = parameter.dtype == FP8 and part.start < parameter.shape[-2]
        if in_blocks and scale is not None:
            _copy_blocks(tensor.name, parameter, part, source, scale)
            continue
        if wide is None:
            assert scale is not None, "what has no scales is wide"
            wide = dequantized(source, scale)
        rows = file_rows(wide, part)
        if in_blocks:
            _require_whole_blocks(tensor.name, part.start, part.stop or 0)
            held = parameter_rows(parameter, part)
            blocks = parameter_rows(block_scale_of(parameter), _in_blocks(part))
            quantize_into(held, blocks, rows.reshape(held.shape))
            continue
        if parameter.dtype == FP8:
            tail, first = tail_of(parameter), parameter.shape[-2]
            assert tail is not None, f"{tensor.name} goes past the rows of {part.parameter}"
            stop = None if part.stop is None else part.stop - first
            parameter, part = tail, replace(part, start=part.start - first, stop=stop)
        elif parameter.dtype == torch.int8:
            rows, row_scale = quantize_rows(rows)
            held_scale = parameter_rows(scale_of(parameters[part.parameter]), part)
            held_scale.view(row_scale.shape).copy_(row_scale)
        parameter_rows(parameter, part).view(rows.shape).copy_(rows)


def file_rows(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The rows of a checkpoint's tensor that a part takes; a view."""
    if part.num_groups == 1 and part.group_stop is None:
        return tensor
    grouped = tensor.view(part.num_groups, tensor.shape[0] // part.num_groups, *tensor.shape[1:])
    return grouped[:, part.group_start : part.group_stop]


def parameter_rows(parameter: torch.Tensor, part: Part) -> torch.Tensor:
    """The rows of a parameter that a part fills; a contiguous view."""
    rows = parameter if part.expert_idx is None else parameter[part.expert_idx]
    return rows[part.start : part.stop]


def _copy_blocks(
    name: str, parameter: torch.Tensor, part: Part, source: torch.Tensor, scale: torch.Tensor
) -> None:
    """Bytes and scales as they are; only the order of blocks changes."""
    group_rows = source.shape[0] // part.num_groups
    bounds = (part.start, part.stop or 0, part.group_start, part.group_stop or 0)
    _require_whole_blocks(name, *bounds, group_rows if part.num_groups > 1 else 0)
    rows = file_rows(source.view(torch.uint8), part)
    parameter_rows(parameter.view(torch.uint8), part).view(rows.shape).copy_(rows)
    blocks = file_rows(scale, _in_blocks(part))
    held = parameter_rows(block_scale_of(parameter), _in_blocks(part))
    held.view(blocks.shape).copy_(blocks)


def _in_blocks(part: Part) -> Part:
    """The same part of the blocks' scales."""
    return replace(
        part,
        start=part.start // BLOCK,
        stop=None if part.stop is None else part.stop // BLOCK,
        group_start=part.group_start // BLOCK,
        group_stop=None if part.group_stop is None else part.group_stop // BLOCK,
    )


def _require_whole_blocks(name: str, *rows: int) -> None:
    for row in rows:
        if row % BLOCK:
            raise ValueError(
                f"{name}: its rows are divided at {row}; fp8 weights need multiples of {BLOCK}"
            )
