"""Mixture of experts, or a dense MLP, for the rows of a window, inside a whole step."""

from typing import Any

import numpy as np

from qnext.kernels.cpu_lanes import floats_at, inner, ints_at, offset
from qnext.kernels.cpu_math import sigmoid, silu
from qnext.kernels.cpu_products import arrange, products, scale_rows
from qnext.kernels.cpu_team import layer_part, meet, share, thread_idx
from qnext.kernels.decode_step import fields as F
from qnext.kernels.router.step import route_window

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inner
def _up(
    t: Any, weight: Any, scale: Any, width: Any, x: Any, rows: Any, out: Any, following: Any
) -> None:
    """Gate and up rows of an MLP, this thread's part of its width.

    Args:
        rows: (of x, of out, how many).
        following: address of the weight that comes next.
    """
    size, stride = t[F.C], t[F.STRIDE_UP]
    own, targets, count = rows
    start, end = share(width, 8)
    row_bytes = size * t[F.WEIGHT_BYTES]
    for part in range(2):
        first, last = part * width + start, part * width + end
        ahead = (following if part == 1 else weight + width * row_bytes) + start * row_bytes
        products(
            t[F.PRODUCTS], weight, size, first, last, ahead, x, t[F.STRIDE_C], own, size,
            out, stride, targets, count,
        )  # fmt: skip
        scale_rows(scale, first, last, out, stride, targets, count)


@inner
def _activate(up: Any, stride: Any, num_rows: Any, width: Any) -> None:
    """SwiGLU of this thread's part of the width, in the gate's place."""
    start, end = share(width, 8)
    for i in range(num_rows):
        gate = offset(up, i * stride)
        for j in range(start, end):
            gate[j] = silu(gate[j]) * gate[width + j]


@inner
def _experts_up(t: Any, row: Any, x: Any, routes: Any, num_chosen: Any) -> None:
    """Hidden rows of all chosen experts, this thread's part of their width."""
    width, size = t[F.I], t[F.C]
    num_pairs = t[F.NUM_ROWS] * t[F.A]
    rows = offset(routes, t[F.E] + 1)
    chosen = offset(rows, 2 * num_pairs)
    identity, up = ints_at(t[F.IDENTITY]), floats_at(t[F.EXPERT_UP])
    expert_bytes = 2 * width * size * t[F.WEIGHT_BYTES]
    for i in range(num_chosen):
        e = chosen[i]
        first, count = routes[e], routes[e + 1] - routes[e]
        weight = row[F.EXPERTS_UP] + e * expert_bytes
        scale = row[F.EXPERTS_UP_SCALE]
        scale = scale + e * 2 * width * 4 if scale != 0 else scale
        following = row[F.EXPERTS_UP] + chosen[min(i + 1, num_chosen - 1)] * expert_bytes
        own = (offset(rows, first), offset(identity, first), count)
        _up(t, weight, scale, width, x, own, up, following)
    _activate(up, t[F.STRIDE_UP], num_pairs, width)


@inner
def _arranged(t: Any, field: Any, num_rows: Any, size: Any, first_row: Any) -> Any:
    """This thread's copy of hidden rows, laid out for products."""
    stride = t[F.STRIDE_I]
    work = offset(floats_at(t[F.ARRANGED]), thread_idx() * t[F.STRIDE_WORK] + first_row * stride)
    rows = floats_at(t[field])
    for i in range(num_rows):
        arrange(offset(rows, i * t[F.STRIDE_UP]), size, t[F.LAYOUT], offset(work, i * stride))
    return work


@inner
def _experts_down(t: Any, row: Any, routes: Any, num_chosen: Any, start: Any, end: Any) -> None:
    """Down rows [start, end) of all chosen experts, a row of EXPERT_OUT for each pair."""
    size, width, stride = t[F.C], t[F.I], t[F.STRIDE_C]
    num_pairs = t[F.NUM_ROWS] * t[F.A]
    chosen = offset(routes, t[F.E] + 1 + 2 * num_pairs)
    identity, out = ints_at(t[F.IDENTITY]), floats_at(t[F.EXPERT_OUT])
    hidden = _arranged(t, F.EXPERT_UP, num_pairs, width, 0)
    row_bytes = width * t[F.WEIGHT_BYTES]
    for i in range(num_chosen):
        e = chosen[i]
        first, count = routes[e], routes[e + 1] - routes[e]
        weight = row[F.EXPERTS_DOWN] + e * size * row_bytes
        scale = row[F.EXPERTS_DOWN_SCALE]
        scale = scale + e * size * 4 if scale != 0 else scale
        following = (chosen[min(i + 1, num_chosen - 1)] * size + start) * row_bytes
        own = offset(identity, first)
        products(
            t[F.PRODUCTS], weight, width, start, end, row[F.EXPERTS_DOWN] + following,
            hidden, t[F.STRIDE_I], own, width, out, stride, own, count,
        )  # fmt: skip
        scale_rows(scale, start, end, out, stride, own, count)


@inner
def _add_down(t: Any, row: Any, weights: Any, gates: Any, routes: Any, num_chosen: Any) -> None:
    """Down rows of this thread's part of C, weighted and added to the residual rows."""
    size, shared, stride = t[F.C], row[F.SHARED_WIDTH], t[F.STRIDE_C]
    num_rows, num_active = t[F.NUM_ROWS], t[F.A] if row[F.IS_MOE] else 0
    num_pairs = num_rows * num_active
    identity = ints_at(t[F.IDENTITY])
    out, shared_out = floats_at(t[F.EXPERT_OUT]), floats_at(t[F.SHARED_OUT])
    start, end = share(size, 8)
    if num_active > 0:
        _experts_down(t, row, routes, num_chosen, start, end)
    if shared > 0:
        hidden = _arranged(t, F.SHARED_HIDDEN, num_rows, shared, num_pairs)
        products(
            t[F.PRODUCTS], row[F.SHARED_DOWN], shared, start, end, row[F.SHARED_DOWN], hidden,
            t[F.STRIDE_I], identity, shared, shared_out, stride, identity, num_rows,
        )  # fmt: skip
        scale_rows(row[F.SHARED_DOWN_SCALE], start, end, shared_out, stride, identity, num_rows)
    places = offset(routes, t[F.E] + 1 + num_pairs)
    for i in range(num_rows):
        target, added = offset(floats_at(t[F.X]), i * stride), offset(shared_out, i * stride)
        for c in range(start, end):
            added[c] = gates[i] * added[c] if shared > 0 else _ZERO
        for a in range(num_active):
            factor = weights[i * num_active + a]
            part = offset(out, places[i * num_active + a] * stride)
            for c in range(start, end):
                added[c] += factor * part[c]
        for c in range(start, end):
            target[c] += added[c]


@layer_part
def mix_experts(t: Any, row: Any, normed: Any, arranged: Any) -> None:
    """Add the mixture, or the dense MLP, of normed rows to the residual rows X."""
    num_rows, num_experts = t[F.NUM_ROWS], t[F.E]
    team = ints_at(t[F.TEAM])
    routes = ints_at(t[F.ROUTES] + thread_idx() * t[F.STRIDE_ROUTES] * 8)
    num_probs = t[F.MAX_ROWS] * (num_experts + 1)
    probs = floats_at(t[F.PROBS])
    # Behind the router's logits: each thread's copy, which it works on, and its weights and gates.
    own = offset(probs, num_probs + thread_idx() * (num_probs + t[F.MAX_ROWS] * (t[F.A] + 1)))
    weights = offset(own, num_probs)
    gates = offset(weights, t[F.MAX_ROWS] * t[F.A])
    identity = ints_at(t[F.IDENTITY])
    shared, up = row[F.SHARED_WIDTH], floats_at(t[F.SHARED_HIDDEN])
    num_chosen = 0
    for i in range(num_rows):
        gates[i] = _ONE
    if row[F.IS_MOE]:
        start, end = share(num_experts + 1, 1)
        products(
            t[F.PRODUCTS_FLOAT], row[F.ROUTER], t[F.C], start, end, row[F.ROUTER], normed,
            t[F.STRIDE_C], identity, t[F.C], probs, num_experts + 1, identity, num_rows,
        )  # fmt: skip
    if shared > 0:
        rows = (identity, identity, num_rows)
        weight = row[F.SHARED_UP]
        _up(t, weight, row[F.SHARED_UP_SCALE], shared, arranged, rows, up, weight)
        _activate(up, t[F.STRIDE_UP], num_rows, shared)
    if row[F.IS_MOE]:
        meet(team)
        for i in range(num_rows * (num_experts + 1)):
            own[i] = probs[i]
        for i in range(num_rows):
            gates[i] = sigmoid(own[i * (num_experts + 1) + num_experts])
        num_chosen = route_window(t, own, weights, routes)
        _experts_up(t, row, arranged, routes, num_chosen)
    meet(team)
    _add_down(t, row, weights, gates, routes, num_chosen)
    meet(team)
