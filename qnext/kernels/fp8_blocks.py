"""Matrices held as e4m3 with one fp32 scale per block of 128 x 128: half of bf16 to read.

The layout of the published FP8 checkpoints: weight[o, c] * scale[o // 128, c // 128]. In a model
the scales travel with the matrix as its attribute `block_scale`. Rows that are too sensitive for 8
bits may follow in a wider type, as its attribute `tail`: the matrix then counts as one of both.
"""

import os
from collections.abc import Iterable

import torch

BLOCK = 128
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
MIN_CAPABILITY = (8, 9)  # of GPUs that convert and multiply these numbers


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix, or of a stack of them: blocks at the edge may be short."""
    *stack, num_rows, num_columns = shape
    return (*stack, -(-num_rows // BLOCK), -(-num_columns // BLOCK))


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest e4m3 matrix and its scales, so that a block's largest element becomes 448.

    Args:
        weight: any float dtype. [..., O, C]

    Returns:
        e4m3 [..., O, C]; fp32 scales [..., ceil(O / 128), ceil(C / 128)], 1 for a block of zeros.
    """
    wide = weight.float()
    row_blocks, column_blocks = scale_shape(weight.shape)[-2:]
    padded = torch.nn.functional.pad(
        wide,
        [0, column_blocks * BLOCK - weight.shape[-1], 0, row_blocks * BLOCK - weight.shape[-2]],
    )
    blocks = padded.unflatten(-1, (column_blocks, BLOCK)).unflatten(-3, (row_blocks, BLOCK))
    largest = blocks.abs().amax((-3, -1))
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (wide / _spread(scale, weight.shape)).to(DTYPE), scale


def dequantized(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The matrix in fp32 where it has scales, and as it is where it has none."""
    if scale is None:
        return weight
    return weight.float() * _spread(scale, weight.shape)


def block_scale_of(weight: torch.Tensor) -> torch.Tensor:
    """Scales of an e4m3 matrix's blocks.

    Raises:
        ValueError: it has lost them, as views of it do.
    """
    scale: torch.Tensor | None = getattr(weight, "block_scale", None)
    if scale is None:
        raise ValueError(f"an e4m3 matrix of shape {tuple(weight.shape)} without its block_scale")
    return scale


def held_scale(weight: torch.Tensor) -> torch.Tensor | None:
    """Scales of a matrix, None where it is no e4m3."""
    return block_scale_of(weight) if weight.dtype == DTYPE else None


def tail_of(weight: torch.Tensor) -> torch.Tensor | None:
    """Wider rows that follow those of an e4m3 matrix, or None. [R, C]"""
    tail: torch.Tensor | None = getattr(weight, "tail", None)
    return tail


def widened_blocks(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An e4m3 matrix times its scales, its tail included, rounded once to another dtype."""
    wide = dequantized(weight, block_scale_of(weight)).to(dtype)
    tail = tail_of(weight)
    return wide if tail is None else torch.cat([wide, tail.to(dtype)])


def addresses_of(weights: Iterable[torch.Tensor]) -> list[int]:
    """Where weights lie, with scales and tails of e4m3 ones: all that a captured graph reads."""
    parts = [part for weight in weights for part in (weight, held_scale(weight), tail_of(weight))]
    return [part.data_ptr() for part in parts if part is not None]


def device_objection(device: torch.device) -> str | None:
    """Why e4m3 weights cannot run on a device, or None."""
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < MIN_CAPABILITY:
            return (
                f"{device} has compute capability {found[0]}.{found[1]}, fp8 weights need "
                f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
            )
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"fp8 weights run on a GPU, not on {device}"


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows = scale.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
    return rows.repeat_interleave(BLOCK, -1)[..., : shape[-1]]
