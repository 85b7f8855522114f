"""The grouped products of PyTorch, then the shared expert."""

import torch

from qnext.kernels.experts import torch as experts


def supports(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor,
    shared_gate: torch.Tensor,
) -> str | None:
    """Say why this backend cannot run, or None."""
    return experts.supports(x, gate_up, down, top_weights, top_ids)


def experts_shared_torch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor,
    shared_gate: torch.Tensor,
) -> torch.Tensor:
    """As `experts_shared_reference`, with no loop over experts and no wait for the device."""
    routed = experts.experts_torch(x, gate_up, down, top_weights, top_ids)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = torch.sigmoid(shared_gate.to(wide))
    return (routed.to(wide) + gate * shared.to(wide)).to(x.dtype)
