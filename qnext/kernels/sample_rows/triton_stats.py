"""First pass over the logits: maxima and masses, the tokens of rows without filters, bounds."""

import triton
import triton.language as tl

from qnext.kernels.sample_rows.triton_mass import (
    GREEDY_TEMPERATURE,
    KEY_OF_MINUS_INFINITY,
    MASS_BITS,
    exponent_parts,
    log_share,
    mass_of,
    order_key,
    random_bits,
    row_scale,
    scale_gap,
    share_of,
    store_sample,
)

ROW_DONE = tl.constexpr(1 << 40)  # in place of a bound: the row has its token


@triton.jit
def min_p_key(largest: tl.tensor, min_p: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Order key of the least logit whose weight is min_p times the largest, min_p > 0. int64"""
    least = largest.to(tl.float64) + tl.log(min_p.to(tl.float64)) * temperature.to(tl.float64)
    rounded = least.to(tl.float32)
    key = order_key(rounded).to(tl.int64)
    return tl.where(rounded.to(tl.float64) < least, key + 1, key)


@triton.jit
def _top_k_bound(sub_keys: tl.tensor, top_k: tl.tensor, num_subs: tl.tensor) -> tl.tensor:
    """A key that at least top_k logits reach: top_k maxima of parts of the row do."""
    lo = tl.min(sub_keys, 0).to(tl.int64)
    hi = tl.max(sub_keys, 0).to(tl.int64) + 1
    # Not to the end: a bound may be loose, and what is left of the interval is 2^-18 of it.
    for _ in range(18):
        middle = (lo + hi) >> 1
        reached = tl.sum((sub_keys >= middle.to(tl.int32)).to(tl.int32), 0)
        is_enough = reached >= top_k
        lo = tl.where(is_enough, middle, lo)
        hi = tl.where(is_enough, hi, middle)
    return tl.where(top_k > num_subs, KEY_OF_MINUS_INFINITY, lo)


@triton.jit
def _top_p_bound(
    sub_mass: tl.tensor,
    top_p: tl.tensor,
    total: tl.tensor,
    c: tl.tensor,
    exponent: tl.tensor,
    SUB: tl.constexpr,
) -> tl.tensor:
    """A key below which lies less than the share that top_p may leave out.

    The logits below weight 2^l hold at most min(mass, SUB 2^l) of each part of the row.
    """
    budget = (1.0 - top_p) * total.to(tl.float32) * 0.9999  # the factor covers fp32 rounding
    level = tl.full((), 0.0, tl.float32)
    step = tl.full((), 32.0, tl.float32)
    for _ in range(9):
        most = tl.sum(tl.minimum(sub_mass, tl.exp2(level + step) * SUB), 0)
        level += tl.where(most <= budget, step, 0.0)
        step *= 0.5
    # Rounded down by more than the weights' own error.
    least = (exponent.to(tl.float64) + level.to(tl.float64) - MASS_BITS - 0.001) / c.to(tl.float64)
    least -= tl.abs(least) * 1e-6
    key = order_key(least.to(tl.float32)).to(tl.int64)
    is_known = (level > 0.0) & (key > KEY_OF_MINUS_INFINITY)
    return tl.where(is_known, key, KEY_OF_MINUS_INFINITY)


@triton.jit
def _draw_in_chunk(
    p_row: tl.tensor,
    W: tl.tensor,
    chunk: tl.tensor,
    target: tl.tensor,
    c: tl.tensor,
    whole: tl.tensor,
    extra: tl.tensor,
    BW: tl.constexpr,
) -> tl.tensor:
    """First id of a chunk at which the running mass exceeds the target."""
    o_w = chunk * BW + tl.arange(0, BW)
    x = tl.load(p_row + o_w, mask=o_w < W, other=-float("inf"))
    running = tl.cumsum(mass_of(x, c, whole, extra), 0)
    return tl.minimum(chunk * BW + tl.sum((running <= target).to(tl.int32), 0), W - 1)


@triton.jit(
    do_not_specialize=["Q", "purpose", "position_offset"],
    do_not_specialize_on_alignment=[
        "p_temperature",
        "p_top_k",
        "p_top_p",
        "p_min_p",
        "p_seed",
        "p_position",
        "p_query_lens",
        "p_tokens",
        "p_logprobs",
        "p_cuts",
        "p_arrivals",
    ],  # fmt: skip
)
def row_stats_kernel(
    p_logits: tl.tensor,
    p_temperature: tl.tensor,
    p_top_k: tl.tensor,
    p_top_p: tl.tensor,
    p_min_p: tl.tensor,
    p_seed: tl.tensor,
    p_position: tl.tensor,
    p_query_lens: tl.tensor,
    p_tokens: tl.tensor,
    p_logprobs: tl.tensor,
    p_cuts: tl.tensor,
    p_chunk_max: tl.tensor,
    p_chunk_id: tl.tensor,
    p_chunk_mass: tl.tensor,
    p_sub_max: tl.tensor,
    p_sub_mass: tl.tensor,
    p_plan: tl.tensor,
    p_arrivals: tl.tensor,
    s_logits: tl.tensor,
    s_cuts: tl.tensor,
    W: tl.tensor,
    Q: tl.tensor,
    num_chunks: tl.tensor,
    purpose: tl.tensor,
    position_offset: tl.tensor,
    BW: tl.constexpr,
    SUB: tl.constexpr,
    BC: tl.constexpr,
    HAS_FILTERS: tl.constexpr,
    HAS_LENS: tl.constexpr,
) -> None:
    """One program per (chunk, row); the last one of a row to finish draws or bounds."""
    NS: tl.constexpr = BW // SUB
    i_c = tl.program_id(0)
    i_t = tl.program_id(1).to(tl.int64)
    i_n = i_t // Q
    if HAS_LENS:
        if i_t % Q >= tl.load(p_query_lens + i_n):
            if i_c == 0:
                tl.store(p_plan + i_t * 2, ROW_DONE)
            return
    temperature = tl.load(p_temperature + i_n)
    is_greedy = temperature < GREEDY_TEMPERATURE
    c = row_scale(temperature)
    top_k = tl.load(p_top_k + i_n)
    top_p = tl.load(p_top_p + i_n)
    min_p = tl.load(p_min_p + i_n)
    is_filtered = ((top_k > 0) & (top_k < W)) | (top_p < 1.0) | (min_p > 0.0)
    if not HAS_FILTERS:
        is_filtered = False
    p_row = p_logits + i_t * s_logits

    o_w = i_c * BW + tl.arange(0, BW)
    x = tl.load(p_row + o_w, mask=o_w < W, other=-float("inf"))
    largest = tl.max(x, 0)
    first_id = tl.min(tl.where(x == largest, o_w, W), 0)
    i_tc = i_t * num_chunks + i_c
    tl.store(p_chunk_max + i_tc, largest)
    tl.store(p_chunk_id + i_tc, first_id)
    if not is_greedy:
        whole, extra = exponent_parts(largest, c)
        mass = mass_of(x, c, whole, extra)
        tl.store(p_chunk_mass + i_tc, tl.sum(mass, 0))
        if is_filtered:
            o_s = i_tc * NS + tl.arange(0, NS)
            tl.store(p_sub_max + o_s, tl.max(tl.reshape(x, [NS, SUB]), 1))
            tl.store(p_sub_mass + o_s, tl.sum(tl.reshape(mass.to(tl.float32), [NS, SUB]), 1))
    # All threads' stores come before the one thread's release, and its acquire before all loads.
    tl.debug_barrier()
    if tl.atomic_add(p_arrivals + i_t, 1, sem="acq_rel", scope="gpu") != num_chunks - 1:
        return
    tl.debug_barrier()
    tl.store(p_arrivals + i_t, 0)

    o_c = tl.arange(0, BC)
    is_chunk = o_c < num_chunks
    o_tc = i_t * num_chunks + o_c
    maxima = tl.load(p_chunk_max + o_tc, mask=is_chunk, other=-float("inf"), cache_modifier=".cg")
    ids = tl.load(p_chunk_id + o_tc, mask=is_chunk, other=W, cache_modifier=".cg")
    largest = tl.max(maxima, 0)
    best_id = tl.min(tl.where(maxima == largest, ids, W), 0)
    whole, extra = exponent_parts(largest, c)
    p_token, p_logprob, p_cut = p_tokens + i_t, p_logprobs + i_t, p_cuts + i_t * s_cuts
    if is_greedy:
        best_id = tl.minimum(best_id, W - 1)
        mass = mass_of(largest, c, whole, extra)
        store_sample(
            p_token, p_logprob, p_cut, best_id, 0.0, largest, order_key(largest), best_id, mass
        )
        tl.store(p_plan + i_t * 2, ROW_DONE)
        return
    chunk_whole, chunk_extra = exponent_parts(maxima, c)
    gaps = scale_gap(whole, extra, chunk_whole, chunk_extra)
    masses = tl.load(p_chunk_mass + o_tc, mask=is_chunk, other=0, cache_modifier=".cg") >> gaps
    total = tl.sum(masses, 0)
    if is_filtered:
        NSP: tl.constexpr = BC * NS
        o_s = tl.arange(0, NSP)
        is_sub = o_s < num_chunks * NS
        o_ts = i_t * num_chunks * NS + o_s
        bound = tl.full((), KEY_OF_MINUS_INFINITY, tl.int64)
        if (top_k > 0) & (top_k < W):
            sub_max = tl.load(
                p_sub_max + o_ts, mask=is_sub, other=-float("inf"), cache_modifier=".cg"
            )
            bound = _top_k_bound(order_key(sub_max), top_k, num_chunks * NS)
        elif min_p == 0.0:
            sub_mass = tl.load(p_sub_mass + o_ts, mask=is_sub, other=0.0, cache_modifier=".cg")
            gap = tl.reshape(tl.broadcast_to(gaps[:, None], [BC, NS]), [NSP])
            sub_mass *= tl.exp2(-gap.to(tl.float32))
            bound = _top_p_bound(sub_mass, top_p, total, c, whole + extra, SUB)
        if min_p > 0.0:
            bound = tl.maximum(bound, min_p_key(largest, min_p, temperature))
        tl.store(p_plan + i_t * 2, bound)
        tl.store(p_plan + i_t * 2 + 1, total)
        return
    position = tl.load(p_position + i_n) + position_offset + (i_t % Q).to(tl.int32)
    target = share_of(random_bits(tl.load(p_seed + i_n), position, purpose), total)
    chunk = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
    chunk = tl.minimum(chunk, num_chunks - 1)
    local = (target - tl.sum(tl.where(o_c < chunk, masses, 0), 0)) << tl.sum(
        tl.where(o_c == chunk, gaps, 0), 0
    )
    chunk_max = tl.max(tl.where(o_c == chunk, maxima, -float("inf")), 0)
    chunk_whole, chunk_extra = exponent_parts(chunk_max, c)
    token = _draw_in_chunk(p_row, W, chunk, local, c, chunk_whole, chunk_extra, BW)
    logprob = log_share(mass_of(tl.load(p_row + token), c, whole, extra), total)
    last_key = tl.full((), KEY_OF_MINUS_INFINITY, tl.int64)
    store_sample(p_token, p_logprob, p_cut, token, logprob, largest, last_key, W, total)
    tl.store(p_plan + i_t * 2, ROW_DONE)
