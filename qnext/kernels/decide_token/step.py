"""One token from a row of logits inside compiled code: weights, cuts, a draw, the test of a draft.

Weights are fp32, their sums float64 and in one order, so a row decides alike wherever it is run.
"""

from typing import Any

import numpy as np
from numba import types

from qnext.kernels.cpu_lanes import call_at, inner, offset, to_bits
from qnext.kernels.cpu_math import exp
from qnext.kernels.cpu_team import CompiledFunction, Floats
from qnext.runtime.random_bits import PHILOX_KEY_STEPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS

BLOCK = 64  # weights summed together, so that a draw need not walk through all of them
NUM_BINS = 4096  # of the first digit of a cut; the two others have fewer
# Room begins with what goes in and out of `WEIGH`: sizes, the largest logit, the sum of weights.
_SIZE, _TOP, _TOTAL, _HEADER = range(4)
_ZERO, _LOWEST = np.float32(0.0), np.float32(-87.0)
_MULTIPLIER_0, _MULTIPLIER_1 = map(np.uint64, PHILOX_MULTIPLIERS)
_STEP_0, _STEP_1 = map(np.uint64, PHILOX_KEY_STEPS)
_MASK, _HALF, _LOST = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(11)
_UNIT = 2.0**-53


def room_size(vocab_size: int) -> int:
    """Numbers of float64 that deciding a token takes to work in."""
    return _HEADER + max(NUM_BINS, -(-vocab_size // BLOCK))


@inner
def uniform_draw(seed: Any, position: Any, purpose: Any) -> Any:
    """As `runtime.random_bits.uniform`. seed: uint64"""
    c0, c1, c2, c3 = np.uint64(position), np.uint64(purpose), np.uint64(0), np.uint64(0)
    k0, k1 = seed & _MASK, seed >> _HALF
    for _ in range(PHILOX_ROUNDS):
        first, second = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1 = (second >> _HALF) ^ c1 ^ k0, second & _MASK
        c2, c3 = (first >> _HALF) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + _STEP_0) & _MASK, (k1 + _STEP_1) & _MASK
    return np.float64(((c0 << _HALF) | c1) >> _LOST) * _UNIT


@inner
def _sum_blocks(weights: Any, size: Any, room: Any) -> Any:
    """Sum of all weights; room gets the sum of each block."""
    total = 0.0
    for block in range((size + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        end = min(start + BLOCK, size)
        s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
        whole = start + (end - start) // 4 * 4
        for i in range(start, whole, 4):
            s0 += np.float64(weights[i])
            s1 += np.float64(weights[i + 1])
            s2 += np.float64(weights[i + 2])
            s3 += np.float64(weights[i + 3])
        for i in range(whole, end):
            s0 += np.float64(weights[i])
        room[block] = (s0 + s2) + (s1 + s3)
        total += room[block]
    return total


@inner
def _order(value: Any) -> Any:
    """32 bits, as a number from 0 on, that are ordered as the values are."""
    bits = np.int64(to_bits(value))
    return (bits ^ ((bits >> 63) & 0x7FFFFFFF)) + 0x80000000


@inner
def _cut(values: Any, size: Any, is_counting: Any, goal: Any, weights: Any, room: Any) -> None:
    """Zero the weights of all but the largest values that together reach `goal`.

    The value at the cut is found digit by digit of its bits, without sorting.

    Args:
        is_counting: each value counts as 1, not as its weight.
    """
    above = 0.0
    prefix = 0
    for level in range(3):
        shift = 20 - 10 * level
        num_bins = NUM_BINS if level == 0 else 1024
        for i in range(num_bins):
            room[i] = 0.0
        for i in range(size):
            key = _order(values[i])
            if weights[i] > _ZERO and (level == 0 or key >> (shift + 10) == prefix):
                place = (key >> shift) & (num_bins - 1)
                room[place] += 1.0 if is_counting else np.float64(weights[i])
        place = lowest = num_bins - 1
        before = above
        while place >= 0:
            if room[place] > 0.0:
                lowest, before = place, above
                if above + room[place] >= goal:
                    break
                above += room[place]
            place -= 1
        # Sums of other orders may fall short of the goal by a rounding: then the last digit counts.
        prefix, above = (prefix << 10) + lowest, before
    for i in range(size):
        key = _order(values[i])
        if key < prefix or (key == prefix and above >= goal):
            weights[i] = _ZERO
        elif key == prefix:
            above += 1.0 if is_counting else np.float64(weights[i])


def _weigh(logits: Any, weights: Any, cuts: Any, room: Any) -> None:
    """See `weigh`."""
    size, top, work = np.int64(room[_SIZE]), np.float32(room[_TOP]), offset(room, _HEADER)
    inverse = np.float32(1.0 / cuts[0])
    for i in range(size):
        x = (logits[i] - top) * inverse
        weights[i] = exp(x) if x >= _LOWEST else _ZERO
    top_k, top_p, min_p = cuts[1], cuts[2], np.float32(cuts[3])
    if min_p > _ZERO:
        for i in range(size):
            weights[i] = weights[i] if weights[i] >= min_p else _ZERO
    if 0.0 < top_k < size:
        _cut(logits, size, True, top_k, weights, work)
    if top_p < 1.0:
        goal = top_p * _sum_blocks(weights, size, work)
        _cut(weights, size, False, goal, weights, work)
    room[_TOTAL] = _sum_blocks(weights, size, work)


_DOUBLES = types.CPointer(types.float64)
# Called by its address: it is long, and a step decides in several places.
WEIGH = CompiledFunction(_weigh, types.void(Floats, Floats, _DOUBLES, _DOUBLES))


@inner
def weigh(
    address: Any, logits: Any, top: Any, size: Any, cuts: Any, weights: Any, room: Any
) -> Any:
    """Weights of the tokens that may be drawn, as `token_weights`; returns their sum.

    Args:
        address: of `WEIGH`.
        logits: fp32. [W]
        top: the largest of them.
        cuts: temperature, top_k, top_p, min_p. float64
        weights: is filled. fp32 [W]
        room: float64 [room_size]; keeps the sum of each block of the weights.
    """
    room[_SIZE], room[_TOP] = np.float64(size), np.float64(top)
    call_at(address, logits, weights, cuts, room)
    return room[_TOTAL]


@inner
def pick_token(weights: Any, size: Any, total: Any, u: Any, room: Any) -> Any:
    """The token whose share of the unit interval holds u; -1 if no weight is positive.

    Args:
        room: sums of the blocks, as `weigh` leaves them.
    """
    if not total > 0.0:
        return -1
    sums = offset(room, _HEADER)
    goal, reached = u * total, 0.0
    block, num_blocks = 0, (size + BLOCK - 1) // BLOCK
    while block < num_blocks - 1 and reached + sums[block] <= goal:
        reached += sums[block]
        block += 1
    found = -1
    # Within a block sums run in another order: what is missing at its end goes to the next token.
    for i in range(block * BLOCK, size):
        if weights[i] > _ZERO:
            found = i
            reached += np.float64(weights[i])
            if reached > goal:
                return i
    if found < 0:  # u * total was rounded up to the total
        for i in range(block * BLOCK):
            if weights[i] > _ZERO:
                found = i
    return found


@inner
def is_accepted(
    target: Any, total: Any, draft: Any, draft_total: Any, token_id: Any, u: Any
) -> Any:
    """Whether a draft stands: u q(d) < p(d)."""
    q = np.float64(draft[token_id]) / draft_total
    return u * q < np.float64(target[token_id]) / total


@inner
def subtract_draft(
    target: Any, total: Any, draft: Any, draft_total: Any, size: Any, room: Any
) -> Any:
    """Make the target's weights those of max(p - q, 0); returns their sum.

    Where rounding leaves nothing, the distributions are equal, and the target's stay.
    """
    scale, draft_scale = np.float32(1.0 / total), np.float32(1.0 / draft_total)
    top = _ZERO
    for i in range(size):
        rest = target[i] * scale - draft[i] * draft_scale
        top = rest if rest > top else top
    if top > _ZERO:
        for i in range(size):
            rest = target[i] * scale - draft[i] * draft_scale
            target[i] = rest if rest > _ZERO else _ZERO
    return _sum_blocks(target, size, offset(room, _HEADER))
