"""The model's norms."""

import torch
from torch import nn

from qnext.kernels import dispatch


class RMSNorm(nn.Module):
    """Zero-centred RMSNorm; its weight starts at 0 and is weight-decayed."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise rows. x: [..., C]"""
        out: torch.Tensor = dispatch.rms_norm(x, self.weight, self.eps)
        return out


class GatedRMSNorm(nn.Module):
    """DeltaNet's output norm: a plain weight that starts at 1, then the gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Normalise and gate. x, z: [..., V]"""
        out: torch.Tensor = dispatch.gated_rms_norm(x, z, self.weight, self.eps)
        return out
