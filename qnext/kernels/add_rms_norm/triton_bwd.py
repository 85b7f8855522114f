"""Backward of a residual sum and the RMSNorm after it on a GPU."""

import torch

from qnext.kernels.rms_norm.triton_bwd import rms_norm_bwd


def add_rms_norm_bwd(
    d_normed: torch.Tensor,
    summed: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    d_summed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the sum, which both of its terms have in common, and of the weight.

    The kernel is the norm's own: it adds the stream's gradient where it writes the norm's.

    Args:
        d_normed: gradient of the normalised rows. [..., C]
        summed: the stream after the sum. [..., C]
        weight: zero-centred scale. [C]
        eps: as in the forward.
        d_summed: gradient of the stream from what comes later, or None. [..., C]

    Returns:
        [..., C] in the dtype of summed, and [C] in the weight's.
    """
    return rms_norm_bwd(d_normed, summed, weight, eps, d_summed)
