"""Matrix product with a weight, row by row where rows must not influence one another."""

import torch
import torch.nn.functional as F

from qnext.kernels.int8_rows import widened

VECTOR_BYTES = 64  # widest vector, and the alignment of torch's allocations


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if row_stable and x.requires_grad:
        return "row by row it writes into one buffer, which has no gradient"
    return None


def linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As `linear_reference`; row_stable takes one matrix-vector product per row.

    A wider out_dtype is what a GPU's product sums in anyway. On a CPU, which has no such product,
    and where a gradient is wanted, the result is rounded to the dtype of x first.
    """
    weight = widened(weight, x.dtype)
    if row_stable:
        out = matrix_times_rows(weight, x)
    elif out_dtype in (None, x.dtype) or not x.is_cuda or _wants_gradient(x, weight):
        out = F.linear(x, weight)
    else:
        return torch.mm(x, weight.t(), out_dtype=out_dtype)
    return out.to(out_dtype or x.dtype)


def _wants_gradient(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def matrix_times_rows(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """weight [N, C] times each row of x [T, C] in a call of its own. Returns [T, N]

    All rows are read and written at the same alignment, which vector code may depend on.
    """
    x = aligned_rows(x)
    out = empty_rows(x, x.shape[0], weight.shape[0])
    for row, row_out in zip(x.unbind(), out.unbind(), strict=True):
        torch.mv(weight, row, out=row_out)
    return out.contiguous()  # one layout whatever N is, as later element-wise loops depend on it


def empty_rows(like: torch.Tensor, num_rows: int, size: int) -> torch.Tensor:
    """Uninitialised [num_rows, size], each row starting at a multiple of VECTOR_BYTES."""
    per_vector = VECTOR_BYTES // like.element_size()
    return like.new_empty(num_rows, -(-size // per_vector) * per_vector)[:, :size]


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """The same rows [T, C], each starting at a multiple of VECTOR_BYTES."""
    row_bytes = x.stride(0) * x.element_size()
    if x.stride(1) == 1 and x.data_ptr() % VECTOR_BYTES == 0 == row_bytes % VECTOR_BYTES:
        return x
    return empty_rows(x, *x.shape).copy_(x)
