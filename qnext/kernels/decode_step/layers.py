"""A whole step on the rows of a window, as one function that all threads of a team run.

Each phase is split between the threads by outputs, heads or columns, never within a sum, and ends
where all meet. Norms of a few rows are cheaper than a meeting, so every thread takes them itself.
"""

from typing import Any

import numpy as np
from numba import types

from qnext.kernels.cpu_lanes import (
    bfloats_at,
    bytes_at,
    call_at,
    floats_at,
    from_bits,
    inner,
    ints_at,
    offset,
    widen,
)
from qnext.kernels.cpu_math import rms_norm_row
from qnext.kernels.cpu_products import arrange, products, scale_rows
from qnext.kernels.cpu_team import (
    CompiledFunction,
    Floats,
    Table,
    TeamKernel,
    layer_part,
    meet,
    share,
    team_size,
    thread_idx,
)
from qnext.kernels.decode_step import fields as F

_NONE = np.float32(-np.inf)


@inner
def _project(t: Any, weight: Any, scale: Any, shape: Any, x: Any, x_stride: Any, out: Any) -> None:
    """This thread's outputs of all rows. shape: (outputs, columns); out: rows of STRIDE_FUSED"""
    num_outputs, size = shape
    start, end = share(num_outputs, 8)
    identity = ints_at(t[F.IDENTITY])
    stride, num_rows = t[F.STRIDE_FUSED], t[F.NUM_ROWS]
    products(
        t[F.PRODUCTS], weight, size, start, end, weight, x, x_stride, identity, size,
        out, stride, identity, num_rows,
    )  # fmt: skip
    scale_rows(scale, start, end, out, stride, identity, num_rows)


@inner
def _workplace(t: Any) -> Any:
    """Where this thread lays rows out for products."""
    return offset(floats_at(t[F.ARRANGED]), thread_idx() * t[F.STRIDE_WORK])


@inner
def _norm_rows(t: Any, weight: Any, normed: Any, arranged: Any) -> None:
    """Zero-centred norm of the residual rows, plain and laid out for products."""
    eps, stride = from_bits(np.int32(t[F.EPS])), t[F.STRIDE_C]
    x = floats_at(t[F.X])
    for i in range(t[F.NUM_ROWS]):
        place = i * stride
        rms_norm_row(offset(x, place), floats_at(weight), t[F.C], eps, offset(normed, place))
        arrange(offset(normed, place), t[F.C], t[F.LAYOUT], offset(arranged, place))


@inner
def _add_output(t: Any, row: Any, num_columns: Any) -> None:
    """Project HEADS and add this thread's part to the residual rows."""
    stride = t[F.STRIDE_HEADS]
    arranged = _workplace(t)
    heads = floats_at(t[F.HEADS])
    for i in range(t[F.NUM_ROWS]):
        arrange(offset(heads, i * stride), num_columns, t[F.LAYOUT], offset(arranged, i * stride))
    out = floats_at(t[F.FUSED])
    _project(
        t,
        row[F.OUT_PROJ],
        row[F.OUT_PROJ_SCALE],
        (t[F.C], num_columns),
        arranged,
        stride,
        out,
    )
    start, end = share(t[F.C], 8)
    x = floats_at(t[F.X])
    for i in range(t[F.NUM_ROWS]):
        target, added = offset(x, i * t[F.STRIDE_C]), offset(out, i * t[F.STRIDE_FUSED])
        for c in range(start, end):
            target[c] += added[c]


@layer_part
def run_layer(t: Any, row: Any, normed: Any, arranged: Any) -> None:
    """One decoder layer on the residual rows X."""
    team = ints_at(t[F.TEAM])
    _norm_rows(t, row[F.LN1], normed, arranged)
    value_size = t[F.HV] * t[F.V]
    if row[F.IS_ATTENTION]:
        num_columns = t[F.HQ] * t[F.D]
        num_outputs = 2 * num_columns + 2 * t[F.HKV] * t[F.D]
    else:
        num_columns = value_size
        num_outputs = 2 * t[F.HK] * t[F.K] + 2 * value_size + 2 * t[F.HV]
    _project(
        t,
        row[F.IN_PROJ],
        row[F.IN_PROJ_SCALE],
        (num_outputs, t[F.C]),
        arranged,
        t[F.STRIDE_C],
        floats_at(t[F.FUSED]),
    )
    meet(team)
    if row[F.IS_ATTENTION]:
        call_at(t[F.ATTEND_WINDOW], t, row, normed, arranged)
    else:
        call_at(t[F.MIX_WINDOW], t, row, normed, arranged)
    meet(team)
    _add_output(t, row, num_columns)
    meet(team)
    _norm_rows(t, row[F.LN2], normed, arranged)
    call_at(t[F.MIX_EXPERTS], t, row, normed, arranged)


@inner
def _embed(t: Any, token_id: Any, out: Any) -> None:
    """A token's embedding, widened. out: [C]"""
    size = t[F.C]
    address = t[F.EMBEDDING] + token_id * size * t[F.WEIGHT_BYTES]
    if t[F.WEIGHT_BYTES] == 4:
        floats = floats_at(address)
        for c in range(size):
            out[c] = floats[c]
    elif t[F.WEIGHT_BYTES] == 2:
        bits = bfloats_at(address)
        for c in range(size):
            out[c] = widen(bits[c])
    else:
        numbers, scale = bytes_at(address), floats_at(t[F.EMBEDDING_SCALE])[token_id]
        for c in range(size):
            out[c] = np.float32(numbers[c]) * scale


@inner
def _combine(t: Any, joined: Any, arranged: Any) -> None:
    """The MTP head's entry: project [norm(embedding); norm(state)] to the residual rows."""
    size, eps = t[F.C], from_bits(np.int32(t[F.EPS]))
    hidden = floats_at(t[F.HIDDEN_IN])
    ids = ints_at(t[F.TOKEN_IDS])
    for i in range(t[F.NUM_ROWS]):
        _embed(t, ids[i], joined)
        rms_norm_row(joined, floats_at(t[F.NORM_EMBEDDING]), size, eps, joined)
        state = offset(joined, size)
        rms_norm_row(offset(hidden, i * size), floats_at(t[F.NORM_HIDDEN]), size, eps, state)
        arrange(joined, 2 * size, t[F.LAYOUT], offset(arranged, i * 2 * size))
    out = floats_at(t[F.FUSED])
    _project(t, t[F.FC], t[F.FC_SCALE], (size, 2 * size), arranged, 2 * size, out)
    start, end = share(size, 8)
    x = floats_at(t[F.X])
    for i in range(t[F.NUM_ROWS]):
        for c in range(start, end):
            x[i * t[F.STRIDE_C] + c] = out[i * t[F.STRIDE_FUSED] + c]


@inner
def _head(t: Any, arranged: Any) -> None:
    """Logits of this thread's part of the vocabulary, and the best of them for each scored row."""
    size, num_outputs, num_scored = t[F.C], t[F.VOCAB], t[F.NUM_SCORED]
    start, end = share(num_outputs, 8)
    identity, logits = ints_at(t[F.IDENTITY]), floats_at(t[F.LOGITS])
    products(
        t[F.PRODUCTS], t[F.HEAD], size, start, end, t[F.HEAD], arranged, t[F.STRIDE_C],
        ints_at(t[F.SCORED]), size, logits, num_outputs, identity, num_scored,
    )  # fmt: skip
    scale_rows(t[F.HEAD_SCALE], start, end, logits, num_outputs, identity, num_scored)
    values = offset(floats_at(t[F.BEST_VALUES]), thread_idx() * t[F.MAX_ROWS])
    ids = offset(ints_at(t[F.BEST_IDS]), thread_idx() * t[F.MAX_ROWS])
    for i in range(num_scored):
        row = offset(logits, i * num_outputs)
        top = _NONE
        for n in range(start, end):
            top = row[n] if row[n] > top else top
        best = -1
        for n in range(start, end):
            if row[n] == top:
                best = n
                break
        values[i], ids[i] = top, best


@inner
def best_of(t: Any, i: Any) -> Any:
    """The best of all threads; they hold ascending parts, so the first of equals is the lowest."""
    values, ids = floats_at(t[F.BEST_VALUES]), ints_at(t[F.BEST_IDS])
    top, best = _NONE, -1
    for thread in range(team_size()):
        place = thread * t[F.MAX_ROWS] + i
        if ids[place] >= 0 and (best < 0 or values[place] > top):
            top, best = values[place], ids[place]
    return best


def _one_step(t: Any, step: Any, normed: Any, arranged: Any) -> None:
    """All layers and the head on the rows of the table."""
    team = ints_at(t[F.TEAM])
    if t[F.FC]:
        _combine(t, normed, arranged)
    else:
        ids = ints_at(t[F.TOKEN_IDS])
        start, end = share(t[F.NUM_ROWS], 1)
        for i in range(start, end):
            _embed(t, ids[i], offset(floats_at(t[F.X]), i * t[F.STRIDE_C]))
    meet(team)
    layers = ints_at(t[F.LAYERS])
    for layer in range(t[F.NUM_LAYERS]):
        row = offset(layers, layer * F.NUM_COLUMNS)
        call_at(t[F.RUN_LAYER], t, row, normed, arranged)
    _norm_rows(t, t[F.FINAL_NORM], normed, arranged)
    if thread_idx() == 0:
        hidden = offset(floats_at(t[F.HIDDEN]), step * t[F.NUM_ROWS] * t[F.C])
        for i in range(t[F.NUM_ROWS]):
            for c in range(t[F.C]):
                hidden[i * t[F.C] + c] = normed[i * t[F.STRIDE_C] + c]
    _head(t, arranged)
    meet(team)


ONE_STEP = CompiledFunction(_one_step, types.void(Table, types.int64, Floats, Floats))


@inner
def workplaces(t: Any) -> Any:
    """This thread's copies of the normed rows, plain and laid out for products."""
    place = thread_idx() * t[F.MAX_ROWS] * t[F.STRIDE_C]
    return offset(floats_at(t[F.NORMED]), place), _workplace(t)


@TeamKernel
def run_step(t: Any) -> None:
    """A step with weights of any kind. t: table of `fields`"""
    normed, arranged = workplaces(t)
    call_at(t[F.ONE_STEP], t, 0, normed, arranged)
    if thread_idx() == 0:
        best = ints_at(t[F.BEST])
        for i in range(t[F.NUM_SCORED]):
            best[i] = best_of(t, i)
        if t[F.HOLDS_STATES]:
            pending, slots = ints_at(t[F.PENDING]), ints_at(t[F.SLOTS])
            for n in range(t[F.NUM_SEQS]):
                pending[slots[n]] = 0
