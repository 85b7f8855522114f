"""Matrices held as int8 with a scale for each row: a quarter of fp32 to read, for a CPU.

The scales travel with the matrix as its attribute `row_scale`, of the matrix's shape but for a last
dimension of 1, fp32.
"""

import torch

from qnext.kernels import fp8_blocks

LARGEST = 127


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest int8 rows and their scales, so that the largest element of a row becomes 127.

    Args:
        rows: any float dtype. [..., C]

    Returns:
        int8 [..., C]; fp32 scales [..., 1], 1 for a row of zeros.

    Raises:
        ValueError: an element is no finite number, which no scale could hold.
    """
    wide = rows.float()
    largest = wide.abs().amax(-1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise ValueError("a row holds NaN or infinities, which int8 cannot hold")
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return (wide / scale).round().to(torch.int8), scale


def widened(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A matrix in a float dtype; one of int8 or e4m3 is multiplied by its scales."""
    if weight.dtype == fp8_blocks.DTYPE:
        return fp8_blocks.widened_blocks(weight, dtype)
    if weight.dtype != torch.int8:
        return weight.to(dtype)
    return weight.to(dtype) * scale_of(weight).to(dtype)


def scale_of(weight: torch.Tensor) -> torch.Tensor:
    """Scales of an int8 matrix's rows. [..., 1]

    Raises:
        ValueError: it has lost them, as views and copies of it do.
    """
    scale: torch.Tensor | None = getattr(weight, "row_scale", None)
    if scale is None:
        raise ValueError(f"an int8 matrix of shape {tuple(weight.shape)} without its row_scale")
    return scale
