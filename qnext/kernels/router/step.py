"""Choice of experts for the rows of a window, inside a whole step."""

from typing import Any

import numpy as np

from qnext.kernels.cpu_lanes import inner, offset
from qnext.kernels.cpu_math import exp
from qnext.kernels.decode_step import fields as F

_NONE, _ZERO = np.float32(-np.inf), np.float32(0.0)


@inner
def _choose(logits: Any, t: Any, ids: Any, weights: Any) -> None:
    """Ids of the A most probable experts, best first, and their weights; logits become scores."""
    num_experts, num_active = t[F.E], t[F.A]
    top = _NONE
    for e in range(num_experts):
        top = logits[e] if logits[e] > top else top
    for e in range(num_experts):
        logits[e] = exp(logits[e] - top)
    total = _ZERO
    for e in range(num_experts):
        total += logits[e]
    chosen = _ZERO
    for a in range(num_active):
        best = 0
        for e in range(1, num_experts):
            if logits[e] > logits[best]:
                best = e
        ids[a], weights[a] = best, logits[best]
        chosen += logits[best]
        logits[best] = np.float32(-1.0)  # below every exponential: not chosen again
    divisor = chosen if t[F.NORM_TOPK] else total
    for a in range(num_active):
        weights[a] = weights[a] / divisor


@inner
def route_window(t: Any, logits: Any, weights: Any, routes: Any) -> Any:
    """Routes of all rows, grouped by expert; every thread works them out for itself.

    Args:
        t: table of the step.
        logits: [T, E + 1]; spoilt.
        weights: of each row's experts, the best first. [T, A]
        routes: room for E + 1 bounds of the experts' groups of pairs (row * A + rank), then four
            lists of T * A: the row of each pair in the order of groups, each pair's place in that
            order, the experts that have any, and the experts' ids by pair. int64

    Returns:
        How many experts have any.
    """
    num_rows, num_experts, num_active = t[F.NUM_ROWS], t[F.E], t[F.A]
    num_pairs = num_rows * num_active
    bounds = routes
    rows = offset(routes, num_experts + 1)
    places, chosen = offset(rows, num_pairs), offset(rows, 2 * num_pairs)
    ids = offset(rows, 3 * num_pairs)
    for row in range(num_rows):
        own = offset(logits, row * (num_experts + 1))
        _choose(own, t, offset(ids, row * num_active), offset(weights, row * num_active))
    for e in range(num_experts + 1):
        bounds[e] = 0
    for pair in range(num_pairs):
        bounds[ids[pair] + 1] += 1
    num_chosen = 0
    for e in range(num_experts):
        if bounds[e + 1] > 0:
            chosen[num_chosen] = e
            num_chosen += 1
        bounds[e + 1] += bounds[e]
    for pair in range(num_pairs):
        e = ids[pair]
        place = bounds[e]
        rows[place], places[pair] = pair // num_active, place
        bounds[e] = place + 1
    # Each bound has moved to its group's end, which is the next one's start.
    for e in range(num_experts, 0, -1):
        bounds[e] = bounds[e - 1]
    bounds[0] = 0
    return num_chosen
