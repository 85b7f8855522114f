"""Matrices held as e4m3 with one fp32 scale per block of 128 x 128: half of bf16 to read.

The layout of the published FP8 checkpoints: weight[o, c] * scale[o // 128, c // 128].
"""

import torch

BLOCK = 128
DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


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


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows = scale.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
    return rows.repeat_interleave(BLOCK, -1)[..., : shape[-1]]
