"""Zero-centred RMSNorm, plain PyTorch."""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row to unit mean square, then by one plus the weight.

        y = x * rsqrt(mean(x^2) + eps) * (1 + weight)

    The weight starts at 0 and is decayed towards 0, so that the norm's scale stays near one.
    The mean is not subtracted.

    Args:
        x: rows to normalise. [..., C]
        weight: zero-centred scale. [C]
        eps: added to the mean square, before the root.

    Returns:
        Normalised rows in the dtype of x. [..., C]

    Source: Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    # The cast comes last: rounding before the weight would lose what the weight adds to one.
    return (wide * inverse * (1.0 + weight.to(wide.dtype))).to(x.dtype)
