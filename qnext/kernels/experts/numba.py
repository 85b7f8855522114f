"""Sum of the chosen experts on a CPU, in bfloat16 tiles: many rows, each expert read once."""

from typing import Any

import numpy as np
import torch

from qnext.kernels import cpu_products, cpu_tiles
from qnext.kernels.cpu_lanes import floats_at, inner, ints_at, offset
from qnext.kernels.cpu_team import TeamKernel, meet, share, team_size, thread_idx
from qnext.kernels.cpu_tiles import (
    GROUP_PANELS,
    TILE_ROWS,
    block_panels,
    multiply,
    multiply_rows,
    pack_panel,
    scale_tile,
    weight_rows,
)
from qnext.kernels.cpu_vectors import LANES, pack_swiglu, pairs_at

TEAM, NUM_TOKENS, C, E, A, I = range(6)
X, X_STRIDE, GATE_UP, DOWN, WEIGHTS, IDS, OUT = range(6, 13)
STARTS, ORDER, INVERSE, SLOTS, PANELS, HIDDEN, TILES, ROWS = range(13, 21)
CODE, GATE_UP_SCALES, DOWN_SCALES, ROOM, NUM_FIELDS = range(21, 26)
GROUP_ROWS = GROUP_PANELS * LANES


def supports(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    row_stable: bool = False,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if row_stable:
        return "windows take their rows in fp32"
    if x.device.type != "cpu" or x.dtype != torch.float32 or top_weights.dtype != torch.float32:
        return f"rows are fp32 on a CPU here, not {x.dtype} on {x.device}"
    if gate_up.dtype != down.dtype or down.dtype not in (torch.bfloat16, torch.int8):
        return f"weights are bfloat16 or int8 here, not {gate_up.dtype}"
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return "weights are contiguous here"
    if x.shape[1] % 2 or down.shape[2] % 2 or x.stride(-1) != 1 or top_ids.numel() == 0:
        return "rows are multiplied in pairs of neighbouring columns"
    return cpu_products.dual_objection()


def experts_numba(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    row_stable: bool = False,
) -> torch.Tensor:
    """As `experts_reference`, factors of the products rounded to bfloat16, all sums in fp32."""
    num_tokens, num_active = top_ids.shape
    num_experts, size, width = down.shape
    num_pairs, num_threads = num_tokens * num_active, torch.get_num_threads()
    out = torch.empty(num_tokens, size)
    top_weights, top_ids = top_weights.contiguous(), top_ids.contiguous()
    room: dict[int, np.ndarray] = {
        TEAM: np.zeros(1, dtype=np.int64),
        STARTS: np.zeros(num_experts + 1, dtype=np.int64),
        ORDER: np.empty(num_pairs, dtype=np.int64),
        INVERSE: np.empty(num_pairs, dtype=np.int64),
        SLOTS: np.empty(num_pairs * size, dtype=np.float32),
        PANELS: np.empty(num_threads * GROUP_ROWS * size // 2, dtype=np.uint32),
        HIDDEN: np.empty(num_threads * GROUP_ROWS * width // 2, dtype=np.uint32),
        TILES: np.empty(num_threads * 2 * GROUP_ROWS * TILE_ROWS, dtype=np.float32),
        ROWS: np.empty(num_threads * LANES, dtype=np.int64),
        ROOM: np.empty(num_threads * TILE_ROWS * max(size, width), dtype=np.uint16),
    }
    tensors = {
        X: x,
        GATE_UP: gate_up,
        DOWN: down,
        WEIGHTS: top_weights,
        IDS: top_ids,
        OUT: out,
    }
    scales = (cpu_tiles.scales_of(gate_up), cpu_tiles.scales_of(down))
    table = np.zeros(NUM_FIELDS, dtype=np.int64)
    table[[NUM_TOKENS, C, E, A, I]] = num_tokens, size, num_experts, num_active, width
    table[X_STRIDE], table[CODE] = x.stride(0), cpu_tiles.code_address()
    for field, memory in room.items():
        table[field] = memory.ctypes.data
    for field, tensor in tensors.items():
        table[field] = tensor.data_ptr()
    for field, scale in zip((GATE_UP_SCALES, DOWN_SCALES), scales, strict=True):
        table[field] = 0 if scale is None else scale.data_ptr()
    _experts(table, num_threads)
    return out


@inner
def _sort_pairs(t: Any) -> None:
    """Order the (token, rank) pairs by expert, and within one as they come."""
    starts, order, inverse = ints_at(t[STARTS]), ints_at(t[ORDER]), ints_at(t[INVERSE])
    ids, num_pairs = ints_at(t[IDS]), t[NUM_TOKENS] * t[A]
    for pair in range(num_pairs):
        starts[ids[pair] + 1] += 1
    for e in range(t[E]):
        starts[e + 1] += starts[e]
    for pair in range(num_pairs):
        place = starts[ids[pair]]
        starts[ids[pair]] += 1
        order[place] = pair
        inverse[pair] = place
    for e in range(t[E], 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0


@inner
def _activate(gate: Any, up: Any, num_outputs: Any, width: Any, stride: Any, out: Any) -> None:
    """silu(gate) * up of two tiles [num_outputs, width] to pairs of panels `stride` apart."""
    for n in range(0, num_outputs, 2):
        for panel in range(width // LANES):
            start = n * width + panel * LANES
            target = offset(out, panel * stride + n // 2 * LANES)
            pack_swiglu(offset(gate, start), offset(up, start), width, target)


@inner
def _expert_weight(
    t: Any, weight: Any, scales: Any, expert: Any, num_outputs: Any, size: Any
) -> Any:
    """One expert's matrix [num_outputs, size], as `weight_rows` takes it."""
    room = t[ROOM] + thread_idx() * TILE_ROWS * max(t[C], t[I]) * 2
    count = expert * num_outputs * size
    if scales == 0:
        return weight + count * 2, scales, room
    return weight + count, scales + expert * num_outputs * 4, room


@inner
def _activated_outputs(
    t: Any, weight: Any, n: Any, panels: Any, num_panels: Any, gate: Any, hidden: Any
) -> None:
    """Gate and up rows from n on times all panels; their activation goes to the hidden panels."""
    size, width = t[C], t[I]
    in_stride, hidden_stride = size // 2 * LANES, width // 2 * LANES  # pairs of a panel
    num_outputs = min(TILE_ROWS, width - n)
    for half in range(2):
        part = weight_rows(t[CODE], weight, size, half * width + n, num_outputs)
        panel = 0
        while panel < num_panels:
            count = block_panels(num_panels - panel)
            tile = gate + (half * num_panels + panel) * TILE_ROWS * LANES * 4
            multiply(
                t[CODE], part, size, 2, num_outputs,
                panels + panel * in_stride * 4, in_stride, count, size // 2, 0, tile,
            )  # fmt: skip
            scale_tile(weight, half * width + n, num_outputs, count * LANES, tile)
            panel += count
    panel = 0
    while panel < num_panels:
        count = block_panels(num_panels - panel)
        tile = gate + panel * TILE_ROWS * LANES * 4
        up = tile + num_panels * TILE_ROWS * LANES * 4
        target = offset(pairs_at(hidden), panel * hidden_stride + n // 2 * LANES)
        width_lanes = count * LANES
        _activate(floats_at(tile), floats_at(up), num_outputs, width_lanes, hidden_stride, target)
        panel += count


@inner
def _expert(t: Any, expert: Any, start: Any, num_rows: Any) -> None:
    """Up to GROUP_ROWS neighbouring pairs of one expert, from their tokens' rows to SLOTS."""
    size, width, thread = t[C], t[I], thread_idx()
    in_stride, hidden_stride = size // 2 * LANES, width // 2 * LANES  # pairs of a panel
    panels = t[PANELS] + thread * GROUP_PANELS * in_stride * 4
    hidden = t[HIDDEN] + thread * GROUP_PANELS * hidden_stride * 4
    gate = t[TILES] + thread * 2 * GROUP_ROWS * TILE_ROWS * 4
    rows, order = t[ROWS] + thread * LANES * 8, ints_at(t[ORDER])
    num_panels = (num_rows + LANES - 1) // LANES
    for panel in range(num_panels):
        for lane in range(LANES):
            pair = order[start + min(panel * LANES + lane, num_rows - 1)]
            ints_at(rows)[lane] = t[X] + pair // t[A] * t[X_STRIDE] * 4
        pack_panel(t[CODE], rows, size, panels + panel * in_stride * 4)
    weight = _expert_weight(t, t[GATE_UP], t[GATE_UP_SCALES], expert, 2 * width, size)
    for n in range(0, width, TILE_ROWS):
        _activated_outputs(t, weight, n, panels, num_panels, gate, hidden)
    weight = _expert_weight(t, t[DOWN], t[DOWN_SCALES], expert, size, width)
    out = t[SLOTS] + start * size * 4
    span = (0, num_panels)
    multiply_rows(t[CODE], weight, width, (0, size), hidden, span, gate, out, size, num_rows)


@inner
def _combine(t: Any) -> None:
    """Each token's experts, weighted and added in the order of their rank."""
    size, num_active = t[C], t[A]
    weights, inverse, slots = floats_at(t[WEIGHTS]), ints_at(t[INVERSE]), floats_at(t[SLOTS])
    start, end = share(t[NUM_TOKENS], 1)
    for token in range(start, end):
        out = offset(floats_at(t[OUT]), token * size)
        for rank in range(num_active):
            pair = token * num_active + rank
            weight, slot = weights[pair], offset(slots, inverse[pair] * size)
            if rank == 0:
                for c in range(size):
                    out[c] = weight * slot[c]
            else:
                for c in range(size):
                    out[c] += weight * slot[c]


def _run(t: Any) -> None:
    """All experts: the sorted pairs are split evenly, since a row's bits depend on no company."""
    if thread_idx() == 0:
        _sort_pairs(t)
    meet(ints_at(t[TEAM]))
    starts = ints_at(t[STARTS])
    num_pairs = t[NUM_TOKENS] * t[A]
    first = num_pairs * thread_idx() // team_size()
    last = num_pairs * (thread_idx() + 1) // team_size()
    for expert in range(t[E]):
        start, end = max(starts[expert], first), min(starts[expert + 1], last)
        while start < end:
            num_rows = min(end - start, GROUP_ROWS)
            _expert(t, expert, start, num_rows)
            start += num_rows
    meet(ints_at(t[TEAM]))
    _combine(t)


_experts = TeamKernel(_run)
