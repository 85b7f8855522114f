"""DeltaNet's output norm on a CPU."""

import torch

from qnext.kernels.cpu_norms import norm_rows, rows_objection


def supports(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Say why this backend cannot run, or None."""
    return rows_objection(x, z)


def gated_rms_norm_numba(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `gated_rms_norm_reference`."""
    return norm_rows(x, weight=weight, shift=0.0, is_mean=True, eps=eps, gate=z)
