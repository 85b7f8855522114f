"""Matrix product with a weight, plain PyTorch."""

import torch
import torch.nn.functional as F

from qnext.kernels.int8_rows import widened


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiply rows by a weight: y = x W^T.

    Args:
        x: rows. [T, C]
        weight: [N, C]; cast to the dtype of x, so that fp32 masters serve bf16 activations. An
            int8 one has its rows' scales as `row_scale`.
        row_stable: each row's sum runs in one order whatever the other rows are. A matrix
            product picks its blocking from the number of rows; one call per row cannot.
        out_dtype: dtype of the result, computed without rounding to a narrower one; None for
            the dtype of x.

    Returns:
        [T, N]
    """
    x = x.to(out_dtype or x.dtype)
    weight = widened(weight, x.dtype)
    if not row_stable or x.shape[0] == 1:
        return F.linear(x, weight)
    # clone() starts every row at the allocator's alignment, which vector code may depend on.
    return torch.cat([F.linear(row.clone(), weight) for row in x.split(1)])
