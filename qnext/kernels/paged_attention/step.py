"""Gated Attention between its projections, for the rows of a window, inside a whole step."""

from typing import Any

import numpy as np

from qnext.kernels.cpu_columns import add_weighted_rows
from qnext.kernels.cpu_lanes import floats_at, from_bits, inner, ints_at, offset
from qnext.kernels.cpu_math import exp, rms_norm_row, sigmoid
from qnext.kernels.cpu_products import products
from qnext.kernels.cpu_team import layer_part, share, thread_idx
from qnext.kernels.decode_step import fields as F

_NONE, _ZERO, _ONE = np.float32(-np.inf), np.float32(0.0), np.float32(1.0)


@inner
def _rotate(head: Any, weight: Any, size: Any, eps: Any, angles: Any, half: Any) -> None:
    """Zero-centred norm of one head [D], then rotation of its first 2 * half dimensions."""
    cos, sin = angles
    rms_norm_row(head, weight, size, eps, head)
    for i in range(half):
        first, second = head[i], head[half + i]
        head[i] = first * cos[i] - second * sin[i]
        head[half + i] = second * cos[i] + first * sin[i]


@inner
def _take_block(scores: Any, count: Any, scale: Any, running: Any, rows: Any, out: Any) -> Any:
    """Add a block of keys to a softmax over blocks, the oldest first.

    Args:
        scores: of the block's keys; become their weights.
        running: (largest score, sum of weights) so far.
        rows: (values of the block, their stride, D).
        out: weighted sum of values so far. [D]

    Returns:
        The new (largest score, sum of weights).
    """
    top, total = running
    highest = top
    for i in range(count):
        scores[i] = scores[i] * scale
        highest = scores[i] if scores[i] > highest else highest
    factor = exp(top - highest) if top > _NONE else _ZERO
    for i in range(count):
        scores[i] = exp(scores[i] - highest)
    added = _ZERO
    for i in range(count):
        added += scores[i]
    values, stride, size = rows
    add_weighted_rows(values, stride, count, scores, size, factor, out)
    return highest, total * factor + added


@inner
def _attend(t: Any, rows: Any, memory: Any, head: Any, room: Any) -> None:
    """Read out a group's queries page by page; each query sees the keys up to its own position."""
    start, count, context = rows
    keys, values, pages = memory
    scores, queries = room
    hkv, d, page_size = t[F.HKV], t[F.D], t[F.PAGE_SIZE]
    group = t[F.HQ] // hkv
    scale = _ONE / np.sqrt(np.float32(d))
    num_queries = count * group
    # Behind the queries: the largest score and the sum of each.
    running = offset(queries, num_queries * d)
    identity = ints_at(t[F.IDENTITY])
    heads = offset(floats_at(t[F.HEADS]), start * t[F.STRIDE_HEADS] + head * group * d)
    for i in range(num_queries):
        running[2 * i], running[2 * i + 1] = _NONE, _ZERO
        out = offset(heads, i // group * t[F.STRIDE_HEADS] + i % group * d)
        for j in range(d):
            out[j] = _ZERO
    length = context + count
    for first in range(0, length, page_size):
        num_keys = min(page_size, length - first)
        place = (pages[first // page_size] * page_size * hkv + head) * d
        block = keys + place * 4
        products(
            t[F.PRODUCTS_FLOAT], block, hkv * d, 0, num_keys, block, queries, d, identity, d,
            scores, page_size, identity, num_queries,
        )  # fmt: skip
        for i in range(num_queries):
            visible = min(num_keys, context + i // group + 1 - first)
            if visible > 0:
                out = offset(heads, i // group * t[F.STRIDE_HEADS] + i % group * d)
                running[2 * i], running[2 * i + 1] = _take_block(
                    offset(scores, i * page_size),
                    visible,
                    scale,
                    (running[2 * i], running[2 * i + 1]),
                    (offset(values, place), hkv * d, d),
                    out,
                )
    for i in range(num_queries):
        out = offset(heads, i // group * t[F.STRIDE_HEADS] + i % group * d)
        for j in range(d):
            out[j] = out[j] / running[2 * i + 1]


@layer_part
def attend_window(t: Any, row: Any, normed: Any, arranged: Any) -> None:
    """Attention heads of this thread: FUSED, the projected rows, to HEADS.

    The loop holds the work on a key-value head, with the query heads that share it.
    """
    first_item, last_item = share(t[F.NUM_SEQS] * t[F.HKV], 1)
    for item in range(first_item, last_item):
        n, head = item // t[F.HKV], item % t[F.HKV]
        hq, hkv, d, half = t[F.HQ], t[F.HKV], t[F.D], t[F.HALF_ROTARY]
        group = hq // hkv
        page_size, stride = t[F.PAGE_SIZE], t[F.STRIDE_FUSED]
        starts = ints_at(t[F.STARTS])
        start, count = starts[n], starts[n + 1] - starts[n]
        context = ints_at(t[F.CONTEXTS])[n]
        pages = offset(ints_at(t[F.PAGES]), n * t[F.PAGES_WIDTH])
        layer = row[F.MIXER_IDX] * t[F.KV_ROWS] * hkv * d
        key_address = t[F.KEYS] + layer * 4
        keys, values = floats_at(key_address), offset(floats_at(t[F.VALUES]), layer)
        eps = from_bits(np.int32(t[F.EPS]))
        cos, sin = floats_at(t[F.COS]), floats_at(t[F.SIN])
        fused = offset(floats_at(t[F.FUSED]), start * stride)
        # Rotated queries of all rows and heads of the group, side by side for the products.
        scores = offset(floats_at(t[F.SCORES]), thread_idx() * t[F.STRIDE_SCORES])
        queries = offset(scores, count * group * page_size)
        for step in range(count):
            position = context + step
            slot = pages[position // page_size] * page_size + position % page_size
            place = (slot * hkv + head) * d
            angles = (offset(cos, position * half), offset(sin, position * half))
            key = offset(fused, step * stride + (2 * hq + head) * d)
            _rotate(key, floats_at(row[F.K_NORM]), d, eps, angles, half)
            value = offset(fused, step * stride + (2 * hq + hkv + head) * d)
            for i in range(d):
                keys[place + i] = key[i]
                values[place + i] = value[i]
            for h in range(group):
                query = offset(fused, step * stride + (head * group + h) * d)
                _rotate(query, floats_at(row[F.Q_NORM]), d, eps, angles, half)
                own = offset(queries, (step * group + h) * d)
                for i in range(d):
                    own[i] = query[i]
        _attend(t, (start, count, context), (key_address, values, pages), head, (scores, queries))
        for step in range(count):
            for h in range(group):
                out = offset(
                    floats_at(t[F.HEADS]),
                    (start + step) * t[F.STRIDE_HEADS] + (head * group + h) * d,
                )
                gate = offset(fused, step * stride + (hq + head * group + h) * d)
                for i in range(d):
                    out[i] = out[i] * sigmoid(gate[i])
