"""Attention's output gate, plain PyTorch."""

import torch


def sigmoid_gate_reference(heads: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """heads * sigmoid(gate), in fp32 at least and rounded once.

    Args:
        heads: read-out of attention. [T, Hq, D]
        gate: before its activation, flat by head. [T, Hq * D]

    Returns:
        Gated rows in the dtype of heads. [T, Hq * D]
    """
    wide = torch.promote_types(heads.dtype, torch.float32)
    return (heads.flatten(1).to(wide) * torch.sigmoid(gate.to(wide))).to(heads.dtype)
