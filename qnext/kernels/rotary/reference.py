"""Partial rotary position embedding, plain PyTorch."""

import torch


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R of D dimensions of each head; the rest pass through.

    Dimension i < R/2 is paired with i + R/2 ("rotate half").

    Args:
        x: queries or keys. [T, H, D]
        cos, sin: of the angles, one per pair and position. [T, R/2], fp32 or wider

    Returns:
        Rotated heads in the dtype of x. [T, H, D]

    Source: RoFormer, https://arxiv.org/abs/2104.09864
    """
    half = cos.shape[-1]
    first = x[..., :half].to(cos.dtype)
    second = x[..., half : 2 * half].to(cos.dtype)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, R/2]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(x.dtype) for part in rotated] + [x[..., 2 * half :]], dim=-1)
