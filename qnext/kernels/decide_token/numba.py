"""One token from one row of logits, by the compiled code that whole steps contain."""

from typing import Any

import numpy as np

from qnext.kernels.cpu_lanes import doubles_at, floats_at
from qnext.kernels.cpu_team import TeamKernel
from qnext.kernels.decide_token.reference import Choice, Cuts, Draws, FloatArray
from qnext.kernels.decide_token.step import (
    WEIGH,
    is_accepted,
    pick_token,
    room_size,
    subtract_draft,
    weigh,
)

# Places in the kernel's table. NUMBERS: temperature, top_k, top_p, min_p; three draws; the draft's
# sum of weights; the sum of weights that comes back.
_SIZE, _LOGITS, _WEIGHTS, _ROOM, _NUMBERS, _DRAFT, _DRAFT_ID, _BEST, _TOKEN, _WEIGH, _NUM_FIELDS = (
    range(11)
)
_DRAWS, _DRAFT_TOTAL, _TOTAL, _NUM_NUMBERS = 4, 7, 8, 9


def supports(
    logits: FloatArray, cuts: Cuts, draws: Draws, draft: Choice | None = None
) -> str | None:
    """Say why this backend cannot run, or None."""
    if draft is not None and draft.weights.dtype != np.float32:
        return f"the draft's weights are {draft.weights.dtype}, not float32"
    return None


@TeamKernel
def _decide(t: Any) -> None:
    size, weights, room = t[_SIZE], floats_at(t[_WEIGHTS]), doubles_at(t[_ROOM])
    numbers, logits = doubles_at(t[_NUMBERS]), floats_at(t[_LOGITS])
    total = weigh(t[_WEIGH], logits, logits[t[_BEST]], size, numbers, weights, room)
    draw = numbers[_DRAWS]
    t[_TOKEN] = -1
    if t[_DRAFT]:
        draft, draft_total = floats_at(t[_DRAFT]), numbers[_DRAFT_TOTAL]
        token_id, u = t[_DRAFT_ID], numbers[_DRAWS + 1]
        if is_accepted(weights, total, draft, draft_total, token_id, u):
            t[_TOKEN] = token_id
        else:
            total = subtract_draft(weights, total, draft, draft_total, size, room)
            draw = numbers[_DRAWS + 2]
    if t[_TOKEN] < 0:
        t[_TOKEN] = pick_token(weights, size, total, draw, room)
    numbers[_TOTAL] = total


def decide_token_numba(
    logits: FloatArray, cuts: Cuts, draws: Draws, draft: Choice | None = None
) -> Choice:
    """As `decide_token_reference`, with fp32 weights."""
    row = np.ascontiguousarray(logits, dtype=np.float32)
    weights = np.empty(row.size, dtype=np.float32)
    room = np.empty(room_size(row.size))
    numbers = np.zeros(_NUM_NUMBERS)
    numbers[:_DRAWS], numbers[_DRAWS:_DRAFT_TOTAL] = cuts, draws
    table = np.zeros(_NUM_FIELDS, dtype=np.int64)
    table[_SIZE], table[_LOGITS], table[_WEIGHTS] = row.size, row.ctypes.data, weights.ctypes.data
    table[_ROOM], table[_NUMBERS] = room.ctypes.data, numbers.ctypes.data
    table[_BEST], table[_WEIGH] = row.argmax(), WEIGH.address
    if draft is not None:
        draft_weights = np.ascontiguousarray(draft.weights)
        table[_DRAFT], table[_DRAFT_ID] = draft_weights.ctypes.data, draft.token_id
        numbers[_DRAFT_TOTAL] = draft.total
    _decide(table, 1)
    return Choice(int(table[_TOKEN]), weights, float(numbers[_TOTAL]))
