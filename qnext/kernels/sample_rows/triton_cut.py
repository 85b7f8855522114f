"""For rows with filters: gather what can be kept, find the exact cut, draw."""

import triton
import triton.language as tl

from qnext.kernels.sample_rows.triton_mass import (
    KEY_OF_MINUS_INFINITY,
    exponent_parts,
    log_share,
    mass_of,
    order_key,
    random_bits,
    row_scale,
    share_of,
    store_sample,
    value_of_key,
)
from qnext.kernels.sample_rows.triton_stats import ROW_DONE, min_p_key

# What a search sums, and by which key.
COUNT_BY_VALUE = tl.constexpr(0)
MASS_BY_VALUE = tl.constexpr(1)
TIES_BY_ID = tl.constexpr(2)
KEPT_MASS_BY_ID = tl.constexpr(3)
SEARCH_WAYS = tl.constexpr(8)


@triton.jit
def _keyed(
    p_x: tl.tensor,
    p_id: tl.tensor,
    o_x: tl.tensor,
    mask: tl.tensor,
    is_row: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    tau: tl.tensor,
    last_id: tl.tensor,
    MODE: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Of some logits: search key (int32), mass, and whether the search looks at them."""
    x = tl.load(p_x + o_x, mask=mask, other=-float("inf"))
    key = order_key(x)
    mass = key.to(tl.int64)
    if MODE == MASS_BY_VALUE or MODE == KEPT_MASS_BY_ID:
        mass = mass_of(x, c, whole, extra)
    seen = mask
    if MODE >= TIES_BY_ID:
        ids = tl.load(p_id + o_x, mask=mask & (is_row == 0), other=0)
        ids = tl.where(is_row != 0, o_x, ids)
        seen = mask & (key == tau)
        if MODE == KEPT_MASS_BY_ID:
            seen = mask & ((key > tau) | ((key == tau) & (ids <= last_id)))
        key = -ids
    return key, mass, seen


@triton.jit
def _narrow(
    p_x: tl.tensor,
    p_id: tl.tensor,
    num_x: tl.tensor,
    is_row: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    goal: tl.tensor,
    most_inside: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    tau: tl.tensor,
    last_id: tl.tensor,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Shrink [lo, hi) around the greatest key K with sum(keys >= K) >= goal.

    It stops at one key, or at most_inside numbers. Holds throughout: sum(keys >= lo) >= goal >
    sum(keys >= hi).

    Returns:
        lo, hi, and the sum and the count of the keys from hi on.
    """
    above = tl.full((), 0, tl.int64)
    num_above = tl.full((), 0, tl.int64)
    num_inside = tl.full((), 1 << 40, tl.int64)
    ways = tl.arange(0, SEARCH_WAYS)
    while (hi - lo > 1) & (num_inside > most_inside):
        step = (hi - lo + SEARCH_WAYS - 1) // SEARCH_WAYS
        marks = lo + step * ways
        begin = tl.full((), 0, tl.int64)
        end = num_x.to(tl.int64)
        base = tl.full((), 0, tl.int64)
        num_base = tl.full((), 0, tl.int64)
        if MODE >= TIES_BY_ID:
            # A row lies in the order of its ids: only those inside are looked at again.
            begin = tl.where(is_row != 0, 1 - hi, 0)
            end = tl.where(is_row != 0, 1 - lo, end)
            base = tl.where(is_row != 0, above, 0)
            num_base = tl.where(is_row != 0, num_above, 0)
        marks32 = marks.to(
            tl.int32
        )  # a finite key is more than SEARCH_WAYS below the largest int32
        masses = tl.zeros([BLOCK, SEARCH_WAYS], tl.int64)
        counts = tl.zeros([BLOCK, SEARCH_WAYS], tl.int32)
        for start in range(begin, end, BLOCK):
            o_x = (start + tl.arange(0, BLOCK)).to(tl.int32)
            key, mass, seen = _keyed(
                p_x, p_id, o_x, o_x < end, is_row, c, whole, extra, tau, last_id, MODE
            )
            reached = (key[:, None] >= marks32[None, :]) & seen[:, None]
            counts += reached.to(tl.int32)
            if MODE == MASS_BY_VALUE or MODE == KEPT_MASS_BY_ID:
                masses += tl.where(reached, mass[:, None], 0)
        nums = num_base + tl.sum(counts, 0).to(tl.int64)
        if MODE == MASS_BY_VALUE or MODE == KEPT_MASS_BY_ID:
            sums = base + tl.sum(masses, 0)
        else:
            sums = nums
        passed = tl.sum(((sums >= goal) & (marks < hi)).to(tl.int32), 0)
        passed = tl.maximum(passed, 1)
        next_lo = lo + step * (passed - 1)
        next_hi = lo + step * passed
        if (passed < SEARCH_WAYS) & (next_hi < hi):
            hi = next_hi
            above = tl.sum(tl.where(ways == passed, sums, 0), 0)
            num_above = tl.sum(tl.where(ways == passed, nums, 0), 0)
        lo = next_lo
        num_inside = tl.sum(tl.where(ways == passed - 1, nums, 0), 0) - num_above
    return lo, hi, above, num_above


@triton.jit
def _greatest_below(
    p_x: tl.tensor,
    p_id: tl.tensor,
    num_x: tl.tensor,
    is_row: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    tau: tl.tensor,
    last_id: tl.tensor,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The greatest key in [lo, hi), or lo."""
    best = lo
    if hi - lo > 1:
        begin = tl.full((), 0, tl.int64)
        end = num_x.to(tl.int64)
        if MODE >= TIES_BY_ID:
            begin = tl.where(is_row != 0, 1 - hi, 0)
            end = tl.where(is_row != 0, 1 - lo, end)
        for start in range(begin, end, BLOCK):
            o_x = (start + tl.arange(0, BLOCK)).to(tl.int32)
            key, _, seen = _keyed(
                p_x, p_id, o_x, o_x < end, is_row, c, whole, extra, tau, last_id, MODE
            )
            inside = tl.where(seen & (key < hi), key, lo.to(tl.int32))
            best = tl.maximum(best, tl.max(inside, 0).to(tl.int64))
    return best


@triton.jit
def _find_id(
    p_x: tl.tensor,
    p_id: tl.tensor,
    num_x: tl.tensor,
    is_row: tl.tensor,
    W: tl.tensor,
    goal: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    tau: tl.tensor,
    last_id: tl.tensor,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The least id at which the running sum, by id, reaches the goal. int64"""
    lo = 1 - W.to(tl.int64)
    hi = tl.full((), 1, tl.int64)
    lo, hi, _, _ = _narrow(
        p_x, p_id, num_x, is_row, lo, hi, goal, 1, c, whole, extra, tau, last_id, MODE, BLOCK
    )
    return -_greatest_below(
        p_x, p_id, num_x, is_row, lo, hi, c, whole, extra, tau, last_id, MODE, BLOCK
    )


@triton.jit
def _collect(
    p_row: tl.tensor,
    W: tl.tensor,
    p_out: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Copy the logits of a row with keys in [lo, hi), at most as many as there is room for."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, W, BLOCK):
        o_x = start + tl.arange(0, BLOCK)
        x = tl.load(p_row + o_x, mask=o_x < W, other=-float("inf"))
        key = order_key(x).to(tl.int64)
        inside = (o_x < W) & (key >= lo) & (key < hi)
        place = count + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(p_out + place, x, mask=inside)
        count += tl.sum(inside.to(tl.int32), 0)
    return count


@triton.jit
def _find_value(
    p_row: tl.tensor,
    W: tl.tensor,
    p_x: tl.tensor,
    num_x: tl.tensor,
    is_row: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    goal: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The greatest key K with sum(keys >= K) >= goal, and the sum of the keys above it."""
    above = tl.full((), 0, tl.int64)
    if is_row != 0:
        lo, hi, above, _ = _narrow(
            p_row, p_x, W, is_row, lo, hi, goal, ROOM, c, whole, extra, 0, 0, MODE, BLOCK
        )
        num_x = tl.full((), 0, tl.int32)
        if hi - lo > 1:
            tl.debug_barrier()  # the last readers of the room are done
            num_x = _collect(p_row, W, p_x, lo, hi, BLOCK)
            tl.debug_barrier()
    lo, hi, more, _ = _narrow(
        p_x, p_x, num_x, 0, lo, hi, goal - above, 1, c, whole, extra, 0, 0, MODE, BLOCK
    )
    best = _greatest_below(p_x, p_x, num_x, 0, lo, hi, c, whole, extra, 0, 0, MODE, BLOCK)
    return best, above + more


@triton.jit
def _tally(
    p_x: tl.tensor,
    num_x: tl.tensor,
    tau: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Mass of the logits above a key, and the number of those at it. int64 both"""
    masses = tl.zeros([BLOCK], tl.int64)
    ties = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_x, BLOCK):
        o_x = start + tl.arange(0, BLOCK)
        x = tl.load(p_x + o_x, mask=o_x < num_x, other=-float("inf"))
        key = order_key(x).to(tl.int64)
        masses += tl.where(key > tau, mass_of(x, c, whole, extra), 0)
        ties += ((key == tau) & (o_x < num_x)).to(tl.int32)
    return tl.sum(masses, 0), tl.sum(ties, 0).to(tl.int64)


@triton.jit
def _kept_of_row(
    p_row: tl.tensor,
    p_x: tl.tensor,
    p_id: tl.tensor,
    count: tl.tensor,
    W: tl.tensor,
    bound: tl.tensor,
    row_mass: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The exact cut: key and last id that are kept, and the mass kept.

    count is the number of logits that reach the bound, in the candidates if there is room.
    """
    is_row = (count > ROOM).to(tl.int32)
    # Pointers to the logits that are searched: those of the row, or its candidates.
    num_x = tl.where(is_row != 0, W, count)
    p_from = p_x
    if is_row != 0:
        p_from = p_row
    hi = order_key(largest).to(tl.int64) + 1
    tau = tl.full((), KEY_OF_MINUS_INFINITY, tl.int64)
    max_ties = W.to(tl.int64)
    if min_p > 0.0:
        tau = min_p_key(largest, min_p, temperature)
    if (top_k > 0) & (top_k < W):
        tau = tl.maximum(tau, bound)  # all that is kept, where no more than top_k reach the bound
    if (top_k > 0) & (top_k < count):
        key, num_above = _find_value(
            p_row, W, p_x, count, is_row, bound, hi, top_k.to(tl.int64),
            c, whole, extra, 0, BLOCK, ROOM,
        )  # fmt: skip
        if key >= tau:
            tau = key
            max_ties = top_k.to(tl.int64) - num_above
    if top_p < 1.0:
        total = row_mass
        if ((top_k > 0) & (top_k < W)) | (min_p > 0.0):
            mass_above, ties = _tally(p_from, num_x, tau, c, whole, extra, BLOCK)
            tie_mass = mass_of(value_of_key(tau.to(tl.int32)), c, whole, extra)
            total = mass_above + tl.minimum(ties, max_ties) * tie_mass
        goal = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        goal = tl.maximum(tl.minimum(goal, total), 1)
        key, mass_above = _find_value(
            p_row, W, p_x, count, is_row, tl.maximum(tau, bound), hi, goal,
            c, whole, extra, 1, BLOCK, ROOM,
        )  # fmt: skip
        tie_mass = mass_of(value_of_key(key.to(tl.int32)), c, whole, extra)
        tie_mass = tl.maximum(tie_mass, 1)
        needed = (goal - mass_above + tie_mass - 1) // tie_mass
        max_ties = tl.where(key == tau, tl.minimum(needed, max_ties), needed)
        tau = key
    mass_above, ties = _tally(p_from, num_x, tau, c, whole, extra, BLOCK)
    kept = tl.minimum(ties, max_ties)
    total = mass_above + kept * mass_of(value_of_key(tau.to(tl.int32)), c, whole, extra)
    last_id = W.to(tl.int64)
    if kept < ties:
        last_id = _find_id(p_from, p_id, num_x, is_row, W, kept, c, whole, extra, tau, 0, 2, BLOCK)
    return tau, last_id, total


@triton.jit(do_not_specialize=["num_inside"], do_not_specialize_on_alignment=["p_counts"])
def row_gather_kernel(
    p_logits: tl.tensor,
    p_chunk_max: tl.tensor,
    p_plan: tl.tensor,
    p_counts: tl.tensor,
    p_candidate_x: tl.tensor,
    p_candidate_id: tl.tensor,
    s_logits: tl.tensor,
    W: tl.tensor,
    num_chunks: tl.tensor,
    num_inside: tl.tensor,
    BW: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """Copy the logits that reach the row's bound; one program per (num_inside chunks, row)."""
    i_t = tl.program_id(1).to(tl.int64)
    bound = tl.load(p_plan + i_t * 2)
    if bound == ROW_DONE:
        return
    p_row = p_logits + i_t * s_logits
    p_x = p_candidate_x + i_t * ROOM
    p_id = p_candidate_id + i_t * ROOM
    first_chunk = tl.program_id(0) * num_inside
    for i_c in range(first_chunk, tl.minimum(first_chunk + num_inside, num_chunks)):
        chunk_max = tl.load(p_chunk_max + i_t * num_chunks + i_c)
        if order_key(chunk_max).to(tl.int64) >= bound:
            o_w = i_c * BW + tl.arange(0, BW)
            x = tl.load(p_row + o_w, mask=o_w < W, other=-float("inf"))
            found = (o_w < W) & (order_key(x).to(tl.int64) >= bound)
            rank = tl.cumsum(found.to(tl.int32), 0)
            # Places go out in the order of arrival; nothing after this depends on it.
            first = tl.atomic_add(p_counts + i_t, tl.sum(found.to(tl.int32), 0), sem="relaxed")
            place = first + rank - 1
            tl.store(p_x + place, x, mask=found & (place < ROOM))
            tl.store(p_id + place, o_w, mask=found & (place < ROOM))


@triton.jit(
    do_not_specialize=["Q", "purpose", "position_offset"],
    do_not_specialize_on_alignment=[
        "p_temperature",
        "p_top_k",
        "p_top_p",
        "p_min_p",
        "p_seed",
        "p_position",
        "p_tokens",
        "p_logprobs",
        "p_cuts",
        "p_counts",
    ],  # fmt: skip
)
def row_cut_kernel(
    p_logits: tl.tensor,
    p_temperature: tl.tensor,
    p_top_k: tl.tensor,
    p_top_p: tl.tensor,
    p_min_p: tl.tensor,
    p_seed: tl.tensor,
    p_position: tl.tensor,
    p_tokens: tl.tensor,
    p_logprobs: tl.tensor,
    p_cuts: tl.tensor,
    p_chunk_max: tl.tensor,
    p_plan: tl.tensor,
    p_counts: tl.tensor,
    p_candidate_x: tl.tensor,
    p_candidate_id: tl.tensor,
    s_logits: tl.tensor,
    s_cuts: tl.tensor,
    W: tl.tensor,
    Q: tl.tensor,
    num_chunks: tl.tensor,
    purpose: tl.tensor,
    position_offset: tl.tensor,
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """Find the exact cut of a row among its candidates, and its token; one program per row."""
    i_t = tl.program_id(0).to(tl.int64)
    bound = tl.load(p_plan + i_t * 2)
    if bound == ROW_DONE:
        return
    p_row = p_logits + i_t * s_logits
    p_x = p_candidate_x + i_t * ROOM
    p_id = p_candidate_id + i_t * ROOM
    count = tl.load(p_counts + i_t)
    tl.debug_barrier()  # all threads have the count before one sets it back
    tl.store(p_counts + i_t, 0)

    i_n = i_t // Q
    temperature = tl.load(p_temperature + i_n)
    c = row_scale(temperature)
    o_c = tl.arange(0, BC)
    largest = tl.max(
        tl.load(p_chunk_max + i_t * num_chunks + o_c, mask=o_c < num_chunks, other=-float("inf")),
        0,
    )
    whole, extra = exponent_parts(largest, c)
    tau, last_id, total = _kept_of_row(
        p_row, p_x, p_id, count, W, bound, tl.load(p_plan + i_t * 2 + 1), largest, temperature,
        tl.load(p_top_k + i_n), tl.load(p_top_p + i_n), tl.load(p_min_p + i_n),
        c, whole, extra, BLOCK, ROOM,
    )  # fmt: skip
    position = tl.load(p_position + i_n) + position_offset + (i_t % Q).to(tl.int32)
    target = share_of(random_bits(tl.load(p_seed + i_n), position, purpose), total)
    is_row = (count > ROOM).to(tl.int32)
    p_from = p_x
    if is_row != 0:
        p_from = p_row
    token = _find_id(
        p_from, p_id, tl.where(is_row != 0, W, count), is_row, W, target + 1,
        c, whole, extra, tau, last_id, 3, BLOCK,
    )  # fmt: skip
    token = tl.minimum(tl.maximum(token, 0), W - 1)
    logprob = log_share(mass_of(tl.load(p_row + token), c, whole, extra), total)
    store_sample(
        p_tokens + i_t, p_logprobs + i_t, p_cuts + i_t * s_cuts,
        token, logprob, largest, tau, last_id, total,
    )  # fmt: skip
