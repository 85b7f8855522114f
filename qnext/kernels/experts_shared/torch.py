"""The grouped products of PyTorch, then the shared expert."""

import torch

from qnext.kernels.experts import torch as experts
from qnext.kernels.experts_shared.reference import add_shared


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
    return add_shared(routed, shared, shared_gate)
