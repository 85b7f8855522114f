"""Zero-centred RMSNorm on a CPU."""

import torch

from qnext.kernels.cpu_norms import norm_rows, rows_objection


def supports(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Say why this backend cannot run, or None."""
    return rows_objection(x)


def rms_norm_numba(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_reference`."""
    return norm_rows(x, weight=weight, shift=1.0, is_mean=True, eps=eps)
