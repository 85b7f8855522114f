"""Gated linear unit with SiLU, plain PyTorch."""

import torch
import torch.nn.functional as F

from qnext.kernels.linear.reference import linear_reference


def swiglu_reference(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """y = down(silu(gate x) * up x).

    Args:
        x: rows. [T, C]
        gate_up: gate rows, then up rows. [2I, C]
        down: [C, I]

    Returns:
        [T, C] in the dtype of x.

    Source: GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202
    """
    gate, up = linear_reference(x, gate_up).chunk(2, dim=-1)
    return linear_reference(F.silu(gate) * up, down)
