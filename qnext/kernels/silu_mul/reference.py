"""The gate of a gated linear unit, plain PyTorch."""

import torch
import torch.nn.functional as F


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in fp32 at least and rounded once.

    Args:
        gate_up: gate, then up. [T, 2I]

    Returns:
        [T, I] in the dtype of gate_up.

    Source: GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202
    """
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
