"""A mixture of experts with its shared expert's output, plain PyTorch."""

import torch

from qnext.kernels.experts.reference import experts_reference


def experts_shared_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor,
    shared_gate: torch.Tensor,
) -> torch.Tensor:
    """Sum of the chosen experts, plus sigmoid(shared_gate) * shared.

    Args:
        x, gate_up, down, top_weights, top_ids: as for `experts_reference`.
        shared: output of the shared expert. [T, C]
        shared_gate: logits of its gate. [T, 1]

    Returns:
        [T, C] in the dtype of x.
    """
    routed = experts_reference(x, gate_up, down, top_weights, top_ids)
    return add_shared(routed, shared, shared_gate)


def add_shared(
    routed: torch.Tensor, shared: torch.Tensor, shared_gate: torch.Tensor
) -> torch.Tensor:
    """routed + sigmoid(shared_gate) * shared, in fp32 at least and rounded once. [T, C]"""
    wide = torch.promote_types(routed.dtype, torch.float32)
    gate = torch.sigmoid(shared_gate.to(wide))
    return (routed.to(wide) + gate * shared.to(wide)).to(routed.dtype)
