"""Product of a few rows with a weight, plain PyTorch."""

import torch
import torch.nn.functional as F

from qnext.kernels.fp8_blocks import dequantized
from qnext.kernels.rms_norm.reference import rms_norm_reference


def row_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiply the rows of a decode step by a weight: y = norm(x) W^T + residual.

    Norm and residual are there when their tensors are. The norm rounds to the dtype of x, as it
    does where it is an op of its own; nothing else is rounded before the end.

    Args:
        x: rows. [T, C]
        weight: in the dtype of x, or e4m3 with its scales. [O, C]
        norm_weight: zero-centred scale of an RMS norm of x. [C]
        residual: added to the product. [T, O]
        scale: of each block of 128 x 128 of an e4m3 weight. [ceil(O / 128), ceil(C / 128)], fp32
        eps: of the norm.
        out_dtype: dtype of the result; None for the dtype of x.

    Returns:
        [T, O]
    """
    rows = x if norm_weight is None else rms_norm_reference(x, norm_weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(rows.to(wide), dequantized(weight, scale).to(wide))
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(out_dtype or x.dtype)
