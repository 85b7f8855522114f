"""A residual sum and the zero-centred RMSNorm after it, plain PyTorch."""

import torch

from qnext.kernels.rms_norm.reference import rms_norm_reference


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream and normalise the sum for the next layer.

        summed = x + residual;  normed = summed * rsqrt(mean(summed^2) + eps) * (1 + weight)

    The norm reads the sum as it is stored, so that both outputs tell of the same numbers.

    Args:
        x: what a layer adds. [..., C]
        residual: the stream before it. [..., C]
        weight: zero-centred scale. [C]
        eps: added to the mean square, before the root.

    Returns:
        Normalised rows in the dtype of x; the sum in the dtype of residual. Both [..., C].
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    summed = (x.to(wide) + residual.to(wide)).to(residual.dtype)
    return rms_norm_reference(summed.to(wide), weight, eps).to(x.dtype), summed
