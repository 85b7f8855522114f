"""Matrix times each row, on the CPU."""

import torch

from qnext.kernels.cpu_lanes import array, rows_times_matrix


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if not row_stable:
        return "many rows at once are faster as a matrix product"
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"rows are fp32 on a CPU here, not {x.dtype} on {x.device}"
    if out_dtype not in (None, torch.float32):
        return f"the result is fp32 here, not {out_dtype}"
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        return f"a weight is contiguous fp32 or bf16 here, not {weight.dtype}"
    return None


def linear_numba(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As `linear_reference` with row_stable; bfloat16 weights are widened in registers."""
    out = torch.empty(x.shape[0], weight.shape[0])
    rows_times_matrix(array(x.contiguous()), array(weight), array(out))
    return out
