"""Matrix times each row, on the CPU."""

from typing import Any

import numpy as np
import torch

from qnext.kernels.cpu_lanes import array, floats_at, ints_at, offset
from qnext.kernels.cpu_products import PAIRED, PRODUCTS, arrange, products
from qnext.kernels.cpu_team import TeamKernel, share
from qnext.kernels.linear.tiles import objection, rows_in_tiles

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"rows are fp32 on a CPU here, not {x.dtype} on {x.device}"
    if out_dtype not in (None, torch.float32):
        return f"the result is fp32 here, not {out_dtype}"
    if not row_stable:
        return objection(x, weight)
    if weight.dtype not in _KINDS or not weight.is_contiguous():
        return f"a weight is contiguous fp32 or bf16 here, not {weight.dtype}"
    return None


@TeamKernel
def _rows_times_matrix(t: Any) -> None:
    """t: products' address, weight, outputs, columns, x, rows, 0 1 2 ..., out"""
    identity = ints_at(t[6])
    start, end = share(t[2], 8)
    products(
        t[0], t[1], t[3], start, end, t[1], floats_at(t[4]), t[3], identity, t[3],
        floats_at(t[7]), t[2], identity, t[5],
    )  # fmt: skip


@TeamKernel
def _arrange_rows(t: Any) -> None:
    """t: x, rows, columns, out"""
    for i in range(t[1]):
        arrange(offset(floats_at(t[0]), i * t[2]), t[2], PAIRED, offset(floats_at(t[3]), i * t[2]))


def linear_numba(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As `linear_reference`.

    With row_stable bfloat16 weights are widened in registers. Without it the rows are rounded to
    bfloat16 for the products, as in a bf16 model; sums stay in fp32.
    """
    if not row_stable:
        return rows_in_tiles(x, weight)
    (num_rows, size), num_outputs = x.shape, weight.shape[0]
    out = torch.empty(num_rows, num_outputs)
    rows = array(x.contiguous())
    if weight.dtype == torch.bfloat16:
        plain, rows = rows, np.empty_like(rows)
        _arrange_rows(_table(plain.ctypes.data, num_rows, size, rows.ctypes.data), 1)
    identity = np.arange(num_rows + 1)
    function = PRODUCTS[_KINDS[weight.dtype]].address
    table = _table(
        function, weight.data_ptr(), num_outputs, size,
        rows.ctypes.data, num_rows, identity.ctypes.data, out.data_ptr(),
    )  # fmt: skip
    _rows_times_matrix(table, torch.get_num_threads())
    return out


def _table(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)
