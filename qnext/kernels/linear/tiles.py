"""A bfloat16 or int8 weight times many fp32 rows on a CPU, for prefill."""

from typing import Any

import numpy as np
import torch

from qnext.kernels.cpu_lanes import ints_at
from qnext.kernels.cpu_products import dual_objection
from qnext.kernels.cpu_team import TeamKernel, meet, share, team_size, thread_idx
from qnext.kernels.cpu_tiles import (
    GROUP_PANELS,
    TILE_ROWS,
    TILE_SIZE,
    code_address,
    multiply_rows,
    pack_rows,
    scales_of,
)
from qnext.kernels.cpu_vectors import LANES

(
    TEAM, X, X_STRIDE, NUM_ROWS, SIZE, WEIGHT, NUM_OUTPUTS, PANELS, WORK, OUT, ROWS, CODE, SCALES,
    ROOM,
) = range(14)  # fmt: skip


def objection(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why `rows_in_tiles` cannot take these, or None."""
    if weight.dtype not in (torch.bfloat16, torch.int8) or not weight.is_contiguous():
        return f"many rows times a weight of {weight.dtype} are faster as a matrix product"
    if weight.shape[0] < TILE_ROWS:
        return "so few outputs are not worth rearranging the rows"
    if x.shape[1] % 2 or x.shape[0] == 0 or x.stride(1) != 1:
        return "rows are multiplied in pairs of neighbouring columns"
    return dual_objection()


def rows_in_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T with x rounded to bfloat16, sums in fp32. x: [T, C]; weight: [N, C], bf16 or int8"""
    out = torch.empty(x.shape[0], weight.shape[0])
    num_threads = torch.get_num_threads()
    num_panels = -(-x.shape[0] // LANES)
    panels = np.empty(num_panels * LANES * x.shape[1] // 2, dtype=np.uint32)
    work = np.empty(num_threads * TILE_SIZE, dtype=np.float32)
    rows = np.empty(num_threads * LANES, dtype=np.int64)
    scales = scales_of(weight)
    room = np.empty(num_threads * TILE_ROWS * x.shape[1], dtype=np.uint16)
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
            code_address(),
            0 if scales is None else scales.data_ptr(),
            room.ctypes.data,
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
    rows = t[ROWS] + thread_idx() * LANES * 8
    span = share(num_panels, 1)
    pack_rows(t[CODE], t[X], t[X_STRIDE], size, span, num_rows, rows, t[PANELS])
    meet(ints_at(t[TEAM]))
    outputs = (0, t[NUM_OUTPUTS])
    if num_panels < GROUP_PANELS * team_size():
        outputs, span = share(t[NUM_OUTPUTS], TILE_ROWS), (0, num_panels)
    tile = t[WORK] + thread_idx() * TILE_SIZE * 4
    weight = (t[WEIGHT], t[SCALES], t[ROOM] + thread_idx() * TILE_ROWS * size * 2)
    multiply_rows(
        t[CODE], weight, size, outputs, t[PANELS], span, tile, t[OUT],
        t[NUM_OUTPUTS], num_rows,
    )  # fmt: skip
