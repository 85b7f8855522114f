"""Rows of unit length, plain PyTorch."""

import torch


def l2_norm_reference(x: torch.Tensor, eps: float, scale: float = 1.0) -> torch.Tensor:
    """Scale each row to length `scale`, in fp32 at least.

        y = x * rsqrt(sum(x^2) + eps) * scale

    Args:
        x: heads. [T, H, K]
        eps: added to the sum of squares, before the root.
        scale: length of the result.

    Returns:
        [T, H, K] in fp32 or wider.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + eps) * scale
