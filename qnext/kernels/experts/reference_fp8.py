"""Experts with weights in blocks of 8-bit floats, plain PyTorch."""

import torch

from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.fp8_blocks import dequantized


def experts_fp8_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
) -> torch.Tensor:
    """As `experts_reference` with weights times their blocks' scales; rows are not rounded.

    Args:
        x: rows. [T, C]
        gate_up: [E, 2I, C], float8_e4m3fn
        gate_up_scale: [E, 2I / 128, C / 128], fp32
        down: [E, C, I], float8_e4m3fn
        down_scale: [E, C / 128, I / 128], fp32
        top_weights: [T, A]
        top_ids: [T, A], int64

    Returns:
        [T, C] in the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gate_up, down = (
        dequantized(weight, scale).to(wide)
        for weight, scale in ((gate_up, gate_up_scale), (down, down_scale))
    )
    return experts_reference(x.to(wide), gate_up, down, top_weights, top_ids).to(x.dtype)
