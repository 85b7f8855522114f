"""The grouped products of `experts`, whose last pass adds the shared expert too."""

import torch

from qnext.kernels.experts import triton_fwd as experts


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


def experts_shared_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor,
    shared_gate: torch.Tensor,
) -> torch.Tensor:
    """As `experts_shared_reference`."""
    return experts.experts_shared_triton(
        x, gate_up, down, top_weights, top_ids, shared, shared_gate
    )
