"""DeltaNet's output norm, plain PyTorch."""

import torch
import torch.nn.functional as F


def gated_rms_norm_reference(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Normalise, scale by a plain weight, then gate.

        y = x * rsqrt(mean(x^2) + eps) * weight * silu(z)

    This is the one norm of the model whose weight is not zero-centred.

    Args:
        x: read-out of the state. [..., V]
        z: gate before its activation. [..., V]
        weight: scale, 1 at the start. [V]
        eps: added to the mean square, before the root.

    Returns:
        Gated rows in the dtype of x. [..., V]

    Source: Gated Delta Networks, https://arxiv.org/abs/2412.06464
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    gated = wide * inverse * weight.to(wide.dtype) * F.silu(z.to(wide.dtype))
    return gated.to(x.dtype)
