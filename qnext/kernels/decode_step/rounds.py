"""Rounds that compiled code takes by itself: drafts, their verification, tokens decided.

Between two rounds nothing comes back to Python. A round without drafts is a plain step.
"""

import time
from typing import Any

import numpy as np
import torch

from qnext.kernels.cpu_lanes import call_at, doubles_at, floats_at, inner, ints_at, offset, words_at
from qnext.kernels.cpu_team import TeamKernel, meet, share, thread_idx
from qnext.kernels.decide_token.step import (
    WEIGH,
    is_accepted,
    pick_token,
    room_size,
    subtract_draft,
    uniform_draw,
    weigh,
)
from qnext.kernels.decode_step import fields as F
from qnext.kernels.decode_step.layers import best_of, workplaces
from qnext.kernels.decode_step.numba import (
    MAX_END_IDS,
    MAX_STEPS,
    Prepared,
    fill_rows,
    fill_threads,
    place,
    prepare,
)
from qnext.kernels.decode_step.reference import (
    NOT_NUMBERS,
    DecodeStep,
    LaunchedRounds,
    Rounds,
    RoundsOutput,
)
from qnext.runtime.random_bits import Purpose

_TARGET, _DRAFT = int(Purpose.TARGET), int(Purpose.DRAFT)
_ACCEPT, _RESIDUAL = int(Purpose.ACCEPT), int(Purpose.RESIDUAL)
TAKES_PENALTIES = False
_DRAFTING = 1 << 20  # keeps the times of rounds with drafts apart from those of windows


@inner
def _decide_room(t: Any) -> Any:
    return offset(doubles_at(t[F.DECIDE_ROOM]), thread_idx() * t[F.STRIDE_DECIDE])


@inner
def _choose(t: Any, step: Any, row: Any, n: Any, draw: Any, weights: Any) -> Any:
    """Decide a token from one row of a step's logits; returns it and the sum of the weights.

    Args:
        t: table of the trunk, which holds how to draw.
        step: table of the step that has the logits.
        draw: (position of the token, purpose of the random number)
    """
    best = best_of(step, row)
    cuts = offset(doubles_at(t[F.CUTS]), 4 * n)
    if best < 0 or cuts[0] == 0.0:
        return best, 0.0
    size, room = step[F.VOCAB], _decide_room(t)
    logits = offset(floats_at(step[F.LOGITS]), row * size)
    total = weigh(t[F.WEIGH], logits, logits[best], size, cuts, weights, room)
    position, purpose = draw
    u = uniform_draw(words_at(t[F.SEEDS])[n], position, purpose)
    return pick_token(weights, size, total, u, room), total


@inner
def _next_depth(t: Any, d: Any, depth: Any) -> None:
    """Make the drafts of this depth the draft layer's rows, one a sequence."""
    starts, contexts, ids = ints_at(d[F.STARTS]), ints_at(d[F.CONTEXTS]), ints_at(d[F.TOKEN_IDS])
    scored, drafts, size = ints_at(d[F.SCORED]), ints_at(t[F.DRAFT_IDS]), d[F.C]
    states, hidden = floats_at(d[F.HIDDEN_IN]), floats_at(d[F.HIDDEN])
    num_drafts, start = t[F.NUM_DRAFTS], 0
    for n in range(t[F.NUM_SEQS]):
        end = starts[n + 1]
        for c in range(size):
            states[n * size + c] = hidden[(end - 1) * size + c]
        ids[n] = drafts[n * num_drafts + depth]
        contexts[n] += end - start
        start = end
        starts[n + 1], scored[n] = n + 1, n
    d[F.NUM_ROWS] = t[F.NUM_SEQS]


@inner
def _fill_windows(t: Any) -> None:
    """Each sequence's last token and its drafts, as rows of the trunk."""
    ids, last, drafts = ints_at(t[F.TOKEN_IDS]), ints_at(t[F.LAST_IDS]), ints_at(t[F.DRAFT_IDS])
    num_drafts = t[F.NUM_DRAFTS]
    for n in range(t[F.NUM_SEQS]):
        row = n * (num_drafts + 1)
        ids[row] = max(last[n], 0)
        for depth in range(num_drafts):
            ids[row + 1 + depth] = drafts[n * num_drafts + depth]


@inner
def _draft(t: Any, d: Any) -> None:
    """Draft all tokens of a round. d: table of the draft's step"""
    team = ints_at(t[F.TEAM])
    normed, arranged = workplaces(d)
    num_drafts, contexts = t[F.NUM_DRAFTS], ints_at(t[F.CONTEXTS])
    totals, drafts = doubles_at(t[F.DRAFT_TOTALS]), ints_at(t[F.DRAFT_IDS])
    for depth in range(num_drafts):
        call_at(d[F.ONE_STEP], d, 0, normed, arranged)
        start, end = share(t[F.NUM_SEQS], 1)
        for n in range(start, end):
            item = n * num_drafts + depth
            weights = offset(floats_at(t[F.DRAFT_WEIGHTS]), item * t[F.VOCAB])
            draw = (contexts[n] + depth + 1, _DRAFT)
            token_id, total = _choose(t, d, n, n, draw, weights)
            if token_id < 0:  # for Python to report
                ints_at(t[F.LAST_IDS])[n], t[F.MAX_STEPS] = -1, 0
            drafts[item], totals[item] = max(token_id, 0), total
        meet(team)
        if thread_idx() == 0:
            if depth + 1 < num_drafts:
                _next_depth(t, d, depth)
            else:
                _fill_windows(t)
        meet(team)


@inner
def _verify(t: Any, n: Any, decided: Any) -> Any:
    """Decide a sequence's tokens from its window; returns how many."""
    num_drafts, size = t[F.NUM_DRAFTS], t[F.VOCAB]
    context, first = ints_at(t[F.CONTEXTS])[n], n * (t[F.NUM_DRAFTS] + 1)
    target = offset(floats_at(t[F.TARGET_WEIGHTS]), thread_idx() * size)
    cuts, room = offset(doubles_at(t[F.CUTS]), 4 * n), _decide_room(t)
    seed = words_at(t[F.SEEDS])[n]
    for depth in range(num_drafts):
        item, row, position = n * num_drafts + depth, first + depth, context + depth + 1
        draft_id, best = ints_at(t[F.DRAFT_IDS])[item], best_of(t, row)
        token_id = best
        if best >= 0 and cuts[0] > 0.0:
            logits = offset(floats_at(t[F.LOGITS]), row * size)
            total = weigh(t[F.WEIGH], logits, logits[best], size, cuts, target, room)
            draft = offset(floats_at(t[F.DRAFT_WEIGHTS]), item * size)
            draft_total = doubles_at(t[F.DRAFT_TOTALS])[item]
            u = uniform_draw(seed, position, _ACCEPT)
            token_id = draft_id
            if not is_accepted(target, total, draft, draft_total, draft_id, u):
                total = subtract_draft(target, total, draft, draft_total, size, room)
                u = uniform_draw(seed, position, _RESIDUAL)
                decided[depth] = pick_token(target, size, total, u, room)
                return depth + 1
        decided[depth] = token_id
        if token_id != draft_id:
            return depth + 1
    draw = (context + num_drafts + 1, _TARGET)
    token_id, _ = _choose(t, t, first + num_drafts, n, draw, target)
    decided[num_drafts] = token_id
    return num_drafts + 1


@inner
def _is_over(t: Any, decided: Any, counts: Any) -> Any:
    """Whether a decided token ends its text, or is none."""
    window, end_ids = t[F.NUM_DRAFTS] + 1, ints_at(t[F.END_IDS])
    for n in range(t[F.NUM_SEQS]):
        for j in range(counts[n]):
            token_id = decided[n * window + j]
            if token_id < 0:
                return True
            for i in range(t[F.NUM_END_IDS]):
                if token_id == end_ids[i]:
                    return True
    return False


@inner
def _advance(t: Any, d: Any, step: Any) -> None:
    """Commit a round, and make what it decided the rows of the next one, if there is one."""
    num_seqs, window, size = t[F.NUM_SEQS], t[F.NUM_DRAFTS] + 1, t[F.C]
    decided = offset(ints_at(t[F.DECIDED]), step * num_seqs * window)
    counts = offset(ints_at(t[F.COUNTS]), step * num_seqs)
    if t[F.HOLDS_STATES]:
        pending, slots = ints_at(t[F.PENDING]), ints_at(t[F.SLOTS])
        for n in range(num_seqs):
            pending[slots[n]] = counts[n]
    if step + 1 >= t[F.MAX_STEPS] or _is_over(t, decided, counts):
        return
    contexts, last = ints_at(t[F.CONTEXTS]), ints_at(t[F.LAST_IDS])
    row = 0
    for n in range(num_seqs):
        if window > 1:
            ids, states, hidden = (
                ints_at(d[F.TOKEN_IDS]),
                floats_at(d[F.HIDDEN_IN]),
                floats_at(t[F.HIDDEN]),
            )
            ints_at(d[F.CONTEXTS])[n] = contexts[n]
            for j in range(counts[n]):
                for c in range(size):
                    states[row * size + c] = hidden[(n * window + j) * size + c]
                ids[row] = decided[n * window + j]
                row += 1
            ints_at(d[F.STARTS])[n + 1], ints_at(d[F.SCORED])[n] = row, row - 1
        else:
            ints_at(t[F.TOKEN_IDS])[n] = decided[n]
        last[n] = decided[n * window + counts[n] - 1]
        contexts[n] += counts[n]
    if window > 1:
        d[F.NUM_ROWS] = row
    t[F.NUM_STEPS] = step + 2


@TeamKernel
def run_rounds(t: Any) -> None:
    """Rounds of drafts and verification, or of plain steps. t: table of the trunk"""
    team, d = ints_at(t[F.TEAM]), ints_at(t[F.DRAFT_TABLE])
    normed, arranged = workplaces(t)
    num_seqs, window = t[F.NUM_SEQS], t[F.NUM_DRAFTS] + 1
    step = 0
    while step < t[F.NUM_STEPS]:
        if window > 1:
            _draft(t, d)
        call_at(t[F.ONE_STEP], t, 0 if window > 1 else step, normed, arranged)
        start, end = share(num_seqs, 1)
        for n in range(start, end):
            item = step * num_seqs + n
            decided = offset(ints_at(t[F.DECIDED]), item * window)
            ints_at(t[F.COUNTS])[item] = _verify(t, n, decided)
        meet(team)
        if thread_idx() == 0:
            _advance(t, d, step)
        meet(team)
        step += 1


def decode_rounds(trunk: DecodeStep, draft: DecodeStep | None, rounds: Rounds) -> RoundsOutput:
    """Take rounds until a text ends or `max_rounds`; all but the last are committed, and it is too.

    Args:
        trunk: the model's layers and head.
        draft: its MTP layer, where num_drafts > 0.

    Raises:
        ValueError: logits are not numbers.
    """
    prepared: Prepared = trunk.prepared or prepare(trunk)
    num_seqs, window = len(rounds.cuts), rounds.num_drafts + 1
    table, room = prepared.table, prepared.room
    fill_rows(trunk, prepared, rounds.rows, num_seqs * window)
    _make_room(prepared, num_seqs, window)
    table[F.NUM_ROWS] = table[F.NUM_SCORED] = num_seqs * window
    room[F.STARTS][: num_seqs + 1] = np.arange(num_seqs + 1) * window
    room[F.SCORED][: num_seqs * window] = np.arange(num_seqs * window)
    room[F.LAST_IDS][:num_seqs] = rounds.rows.token_ids
    room[F.SEEDS][:num_seqs] = np.array(rounds.seeds, dtype=np.uint64)
    for n, cuts in enumerate(rounds.cuts):
        room[F.CUTS][n] = cuts or 0.0
    end_ids = rounds.end_token_ids[:MAX_END_IDS]
    table[F.NUM_END_IDS], room[F.END_IDS][: len(end_ids)] = len(end_ids), end_ids
    table[F.NUM_DRAFTS] = rounds.num_drafts
    table[F.MAX_STEPS], table[F.NUM_STEPS] = min(rounds.max_rounds, MAX_STEPS), 1
    table[F.DRAFT_TABLE], table[F.WEIGH] = 0, WEIGH.address
    num_threads = fill_threads(prepared, num_seqs * window + (window > 1) * _DRAFTING)
    if window > 1:
        assert draft is not None and rounds.draft_rows is not None, "drafts without a draft layer"
        prepared_draft: Prepared = draft.prepared or prepare(draft)
        fill_rows(draft, prepared_draft, rounds.draft_rows, num_seqs * window)
        fill_threads(prepared_draft, num_seqs)
        table[F.DRAFT_TABLE] = prepared_draft.table.ctypes.data
    began = time.perf_counter()
    run_rounds(table, num_threads)
    num_rounds = int(table[F.NUM_STEPS])
    seconds = (time.perf_counter() - began) / num_rounds
    prepared.pace.record(num_seqs * window + (window > 1) * _DRAFTING, num_threads, seconds)
    counts = room[F.COUNTS][: num_rounds * num_seqs].tolist()
    decided = room[F.DECIDED][: num_rounds * num_seqs * window].reshape(-1, window).tolist()
    tokens = [row[:count] for row, count in zip(decided, counts, strict=True)]
    if min(map(min, tokens)) < 0 or int(room[F.LAST_IDS][:num_seqs].min()) < 0:
        raise ValueError(NOT_NUMBERS)
    states = num_seqs * (window if window > 1 else num_rounds)
    hidden = torch.from_numpy(room[F.HIDDEN][:states].copy())
    return RoundsOutput(
        [tokens[i : i + num_seqs] for i in range(0, len(tokens), num_seqs)],
        hidden.view(-1, window, hidden.shape[1])
        if window > 1
        else hidden.view(num_rounds, num_seqs, -1),
    )


def launch_rounds(trunk: DecodeStep, draft: DecodeStep | None, rounds: Rounds) -> LaunchedRounds:
    """As `decode_rounds`: a CPU has taken the rounds when this returns."""
    return LaunchedRounds(decode_rounds(trunk, draft, rounds))


def _make_room(prepared: Prepared, num_seqs: int, window: int) -> None:
    """Grow what holds the decisions of a call, if it is too small."""
    vocab, threads = int(prepared.table[F.VOCAB]), prepared.num_threads
    known = prepared.decide_sizes
    needed = (prepared.max_seqs, window, threads)
    if all(have >= want for have, want in zip(known[:2], needed[:2], strict=True)):
        if known[2] == threads:
            return
    # The largest seen of each: sequences and drafts vary by themselves.
    seqs, window = max(known[0], needed[0]), max(known[1], window)
    prepared.decide_sizes = (seqs, window, threads)
    decided, weights = MAX_STEPS * seqs * window, seqs * (window - 1) * vocab
    prepared.table[F.STRIDE_DECIDE] = room_size(vocab)
    place(prepared, F.SEEDS, np.zeros(seqs, dtype=np.uint64))
    place(prepared, F.CUTS, np.zeros((seqs, 4)))
    place(prepared, F.LAST_IDS, np.zeros(seqs, dtype=np.int64))
    place(prepared, F.DRAFT_IDS, np.zeros(seqs * window, dtype=np.int64))
    # Pages that greedy texts never touch take no memory.
    place(prepared, F.DRAFT_WEIGHTS, np.zeros(max(weights, 1), dtype=np.float32))
    place(prepared, F.DRAFT_TOTALS, np.zeros(seqs * window))
    place(prepared, F.TARGET_WEIGHTS, np.zeros(threads * vocab, dtype=np.float32))
    place(prepared, F.DECIDE_ROOM, np.zeros(threads * room_size(vocab)))
    place(prepared, F.DECIDED, np.zeros(decided, dtype=np.int64))
    place(prepared, F.COUNTS, np.zeros(MAX_STEPS * seqs, dtype=np.int64))
