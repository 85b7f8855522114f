"""Gated linear unit on a CPU: one expert that every row chooses."""

import torch

from qnext.kernels.experts import numba as experts_module
from qnext.kernels.int8_rows import scale_of


def _choice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids that send every row to expert 0."""
    return torch.ones(x.shape[0], 1), torch.zeros(x.shape[0], 1, dtype=torch.int64)


def _as_expert(weight: torch.Tensor) -> torch.Tensor:
    """A matrix as that of one expert; scales of int8 rows do not come along by themselves."""
    expert = weight[None]
    if weight.dtype == torch.int8:
        expert.row_scale = scale_of(weight)[None]  # type: ignore[attr-defined]
    return expert


def supports(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Say why this backend cannot run, or None."""
    return experts_module.supports(x, gate_up[None], down[None], *_choice(x))


def swiglu_numba(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """As `swiglu_reference`, factors of the products rounded to bfloat16, all sums in fp32."""
    return experts_module.experts_numba(x, _as_expert(gate_up), _as_expert(down), *_choice(x))
