"""A bfloat16 weight times many fp32 rows on a CPU, for prefill."""

from typing import Any

import numpy as np
import torch

from qnext.kernels.cpu_lanes import floats_at, ints_at, offset
from qnext.kernels.cpu_team import TeamKernel, meet, share, team_size, thread_idx
from qnext.kernels.cpu_tiles import (
    GROUP_PANELS,
    LANES,
    MULTIPLY,
    TILE_ROWS,
    TILE_SIZE,
    machine_objection,
    multiply_rows,
    pack_rows,
)
from qnext.kernels.cpu_vectors import pairs_at

(
    TEAM, X, X_STRIDE, NUM_ROWS, SIZE, WEIGHT, NUM_OUTPUTS, PANELS, WORK, OUT, ROWS, FUNCTION
) = range(12)  # fmt: skip


def objection(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why `rows_in_tiles` cannot take these, or None."""
    if weight.dtype != torch.bfloat16:
        return f"many rows times a weight of {weight.dtype} are faster as a matrix product"
    if x.shape[1] % 2 or x.shape[0] == 0 or x.stride(1) != 1:
        return "rows are multiplied in pairs of neighbouring columns"
    return machine_objection()


def rows_in_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T with x rounded to bfloat16 and sums in fp32. x: [T, C]; weight: [N, C], bfloat16"""
    out = torch.empty(x.shape[0], weight.shape[0])
    num_threads = torch.get_num_threads()
    num_panels = -(-x.shape[0] // LANES)
    panels = np.empty(num_panels * LANES * x.shape[1] // 2, dtype=np.uint32)
    work = np.empty(num_threads * TILE_SIZE, dtype=np.float32)
    rows = np.empty(num_threads * LANES, dtype=np.int64)
    team = np.zeros(1, dtype=np.int64)
    table = np.array(
        (
            team.ctypes.data,
            x.data_ptr(),
            x.stride(0),
            *x.shape,
            weight.data_ptr(),
            weight.shape[0],
            panels.ctypes.data,
            work.ctypes.data,
            out.data_ptr(),
            rows.ctypes.data,
            MULTIPLY.address,
        ),
        dtype=np.int64,
    )
    _multiply(table, num_threads)
    return out


@TeamKernel
def _multiply(t: Any) -> None:
    """Pack all rows, then multiply them: each thread some panels, or some outputs of few panels."""
    num_rows, size = t[NUM_ROWS], t[SIZE]
    num_panels = (num_rows + LANES - 1) // LANES
    rows = offset(ints_at(t[ROWS]), thread_idx() * LANES)
    span = share(num_panels, 1)
    pack_rows(t[X], t[X_STRIDE], size, span, num_rows, rows, pairs_at(t[PANELS]))
    meet(ints_at(t[TEAM]))
    outputs = (0, t[NUM_OUTPUTS])
    if num_panels < GROUP_PANELS * team_size():
        outputs, span = share(t[NUM_OUTPUTS], TILE_ROWS), (0, num_panels)
    tile = t[WORK] + thread_idx() * TILE_SIZE * 4
    multiply_rows(
        t[FUNCTION], t[WEIGHT], size, outputs, t[PANELS], span, tile, floats_at(t[OUT]),
        t[NUM_OUTPUTS], num_rows,
    )  # fmt: skip
