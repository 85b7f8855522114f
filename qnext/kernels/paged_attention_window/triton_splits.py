"""The kernels of paged attention over splits of the keys: see the README."""

from typing import Any

import triton
import triton.language as tl

from qnext.kernels.gpu_decode import wait_for_previous


@triton.jit
def count_tokens(
    p_contexts: tl.tensor, p_query_lens: tl.tensor, num_seqs: tl.tensor, BS: tl.constexpr
) -> tl.tensor:
    """Tokens of all sequences with rows, at least 1."""
    total = num_seqs * 0
    for i_s in range(0, num_seqs, BS):
        o_n = i_s + tl.arange(0, BS)
        b_len = tl.load(p_query_lens + o_n, mask=o_n < num_seqs, other=0)
        b_context = tl.load(p_contexts + o_n, mask=o_n < num_seqs, other=0)
        total += tl.sum(tl.where(b_len > 0, b_context + b_len, 0), 0)
    return tl.maximum(total, 1)


@triton.jit
def keys_of_split(
    length: tl.tensor,
    total: tl.tensor,
    target: tl.tensor,
    KEYS: tl.constexpr,
    MIN: tl.constexpr,
    BN: tl.constexpr,
) -> tl.tensor:
    """Keys of each split of a sequence: whole blocks."""
    if KEYS > 0:
        keys = length * 0 + KEYS
    else:
        # A sequence gets its share of the programs, so that all programs read about as much.
        share = tl.maximum(length * target // total, 1)
        keys = tl.maximum(tl.cdiv(tl.cdiv(length, share), BN) * BN, MIN)
    return keys


@triton.jit
def find_item(
    i_item: tl.tensor,
    p_contexts: tl.tensor,
    p_query_lens: tl.tensor,
    num_seqs: tl.tensor,
    total: tl.tensor,
    target: tl.tensor,
    KEYS: tl.constexpr,
    MIN: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
) -> Any:
    """Sequence of a split, index of that sequence's first split, and number of all splits."""
    i_n, first, before = num_seqs * 0, num_seqs * 0, num_seqs * 0
    for i_s in range(0, num_seqs, BS):
        o_n = i_s + tl.arange(0, BS)
        b_len = tl.load(p_query_lens + o_n, mask=o_n < num_seqs, other=0)
        b_length = tl.load(p_contexts + o_n, mask=o_n < num_seqs, other=0) + b_len
        # A padding sequence has one split, which zeroes its rows.
        b_length = tl.where(b_len > 0, b_length, 1)
        b_keys = keys_of_split(b_length, total, target, KEYS, MIN, BN)
        b_splits = tl.where(o_n < num_seqs, tl.cdiv(b_length, b_keys), 0)
        b_end = before + tl.cumsum(b_splits, 0)
        is_before = (b_end <= i_item) & (o_n < num_seqs)
        i_n += tl.sum(is_before.to(tl.int32), 0)
        first += tl.sum(tl.where(is_before, b_splits, 0), 0)
        before += tl.sum(b_splits, 0)
    return i_n, first, before


@triton.jit
def rotated_heads(
    p_row: tl.tensor,
    is_row: tl.tensor,
    o_position: tl.tensor,
    p_norm: tl.tensor,
    p_cos: tl.tensor,
    p_sin: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BD: tl.constexpr,
    HALF: tl.constexpr,
) -> tl.tensor:
    """Norm and rotation of heads [R, BD] at p_row [R]; rounded between them as the layers do."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.load(p_row[:, None] + o_d[None, :], mask=is_row[:, None] & m_d[None, :], other=0.0)
    dtype: tl.constexpr = b_x.dtype
    b_x = b_x.to(tl.float32)
    b_norm = 1.0 + tl.load(p_norm + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
    b_y = (b_x * b_inverse[:, None] * b_norm[None, :]).to(dtype)
    if HALF > 0:
        is_first = o_d < HALF
        o_pair = tl.where(is_first, o_d, o_d - HALF)
        o_other = tl.where(is_first, o_d + HALF, o_pair)
        m_r = o_d < 2 * HALF
        m_x = is_row[:, None] & m_r[None, :]
        b_other = tl.load(p_row[:, None] + o_other[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_norm = 1.0 + tl.load(p_norm + o_other, mask=m_r, other=0.0).to(tl.float32)
        b_other = (b_other * b_inverse[:, None] * b_norm[None, :]).to(dtype).to(tl.float32)
        o_angle = o_position.to(tl.int64)[:, None] * HALF + o_pair[None, :]
        b_cos = tl.load(p_cos + o_angle, mask=m_x, other=1.0)
        b_sin = tl.load(p_sin + o_angle, mask=m_x, other=0.0)
        b_other = tl.where(is_first[None, :], -b_other, b_other)
        b_y = (b_y.to(tl.float32) * b_cos + b_other * b_sin).to(dtype)
    return b_y


@triton.jit
def gated(b_acc: tl.tensor, b_sum: tl.tensor, b_gate: tl.tensor) -> tl.tensor:
    """Read-out of complete sums, times the sigmoid of its gate."""
    return b_acc / b_sum * tl.sigmoid(b_gate.to(tl.float32))


@triton.jit
def write_keys(
    p_window: tl.tensor,
    p_pages: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_k_norm: tl.tensor,
    p_cos: tl.tensor,
    p_sin: tl.tensor,
    eps: tl.tensor,
    i_h: tl.tensor,
    context: tl.tensor,
    query_len: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    BQ: tl.constexpr,
) -> None:
    """Keys and values of the window's rows at positions start to end, to the cache."""
    o_w, o_d = tl.arange(0, BQ), tl.arange(0, BD)
    m_d = o_d < D
    o_key = context + o_w
    is_new = (o_w < query_len) & (o_key >= start) & (o_key < end)
    p_key = p_window + o_w * (2 * (HQ + HKV) * D) + (2 * HQ + i_h) * D
    b_k = rotated_heads(p_key, is_new, o_key, p_k_norm, p_cos, p_sin, eps, D, BD, HALF)
    m_k = is_new[:, None] & m_d[None, :]
    o_slot = tl.load(p_pages + o_key // PAGE, mask=is_new, other=0).to(tl.int64) * PAGE
    o_place = ((o_slot + o_key % PAGE) * HKV + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_k + o_place, b_k.to(p_k.dtype.element_ty), mask=m_k)
    b_v = tl.load(p_key[:, None] + HKV * D + o_d[None, :], mask=m_k, other=0.0)
    tl.store(p_v + o_place, b_v.to(p_v.dtype.element_ty), mask=m_k)


@triton.jit
def attend_split(
    i_item: tl.tensor,
    i_n: tl.tensor,
    first: tl.tensor,
    total: tl.tensor,
    p_fused: tl.tensor,
    p_q_norm: tl.tensor,
    p_k_norm: tl.tensor,
    p_cos: tl.tensor,
    p_sin: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_table: tl.tensor,
    p_contexts: tl.tensor,
    p_query_lens: tl.tensor,
    p_out: tl.tensor,
    p_items: tl.tensor,
    p_acc: tl.tensor,
    p_max: tl.tensor,
    p_sum: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    target: tl.tensor,
    stride_table: tl.tensor,
    Q: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    MIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One split of sequence i_n, whose first split is `first`, for BM query rows of a key head."""
    G: tl.constexpr = HQ // HKV
    WIDTH: tl.constexpr = 2 * (HQ + HKV) * D
    dtype: tl.constexpr = p_fused.dtype.element_ty
    # Mixed pairs of half precisions meet in fp32.
    dot_dtype: tl.constexpr = dtype if p_k.dtype.element_ty == dtype else tl.float32
    i_h = tl.program_id(0) % HKV
    o_m = tl.program_id(0) // HKV * BM + tl.arange(0, BM)
    o_row = o_m // G  # row of the window
    o_head = i_h * G + o_m % G
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    m_d = o_d < D
    query_len = tl.load(p_query_lens + i_n)
    context = tl.load(p_contexts + i_n)
    length = tl.where(query_len > 0, context + query_len, 1)
    keys = keys_of_split(length, total, target, KEYS, MIN, BN)
    num_splits = tl.cdiv(length, keys)
    start = (i_item - first) * keys
    end = tl.where(query_len > 0, tl.minimum(start + keys, length), 0)
    p_window = p_fused + i_n.to(tl.int64) * Q * WIDTH
    p_pages = p_table + i_n.to(tl.int64) * stride_table
    is_row = o_row < query_len
    b_q = rotated_heads(
        p_window + o_row * WIDTH + o_head * D,
        is_row, context + o_row, p_q_norm, p_cos, p_sin, eps, D, BD, HALF,
    ).to(dot_dtype)  # fmt: skip
    if end > context:
        write_keys(
            p_window, p_pages, p_k, p_v, p_k_norm, p_cos, p_sin, eps, i_h,
            context, query_len, start, end, HQ, HKV, D, BD, HALF, PAGE, BQ,
        )  # fmt: skip
        # The loop below reads them back. Nobody else reads or writes a split's slots but programs
        # of other rows of the window, which write the same bits.
        tl.debug_barrier()

    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_page = tl.load(p_pages + (start + o_n) // PAGE, mask=start + o_n < end, other=0)
    for i_k in range(start, end, BN):
        o_key = i_k + o_n
        is_key = o_key < end
        o_slot = b_page.to(tl.int64) * PAGE + o_key % PAGE
        # Asked for a block ahead, so that keys never wait for their page.
        b_page = tl.load(p_pages + (o_key + BN) // PAGE, mask=o_key + BN < end, other=0)
        o_place = (o_slot * HKV + i_h)[:, None] * D + o_d[None, :]
        m_k = is_key[:, None] & m_d[None, :]
        b_k = tl.load(p_k + o_place, mask=m_k, other=0.0).to(dot_dtype)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_s *= scale * 1.4426950408889634  # so that exp2 gives exp
        is_seen = (o_key[None, :] <= context + o_row[:, None]) & is_row[:, None]
        b_s = tl.where(is_seen & is_key[None, :], b_s, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_s, 1))
        # A row that has seen no key yet keeps -inf, and -inf - -inf would be NaN.
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_p = tl.exp2(b_s - b_base[:, None])
        b_shrink = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = tl.load(p_v + o_place, mask=m_k, other=0.0).to(dot_dtype)
        b_acc = b_acc * b_shrink[:, None]
        b_acc = tl.dot(b_p.to(dot_dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_top

    o_out = (i_n.to(tl.int64) * Q + o_row) * HQ + o_head
    p_head = p_out + o_out[:, None] * D + o_d[None, :]
    if i_item == first:
        m_zero = (~is_row & (o_row < Q))[:, None] & m_d[None, :]
        tl.store(p_head, tl.zeros([BM, BD], dtype), mask=m_zero)
        tl.store(p_items + 2 * i_n, first)
        tl.store(p_items + 2 * i_n + 1, num_splits)
    m_out = is_row[:, None] & m_d[None, :]
    if num_splits == 1:
        p_gate = p_window + (o_row * WIDTH + (HQ + o_head) * D)[:, None] + o_d[None, :]
        b_sum = tl.where(is_row, b_sum, 1.0)
        b_out = gated(b_acc, b_sum[:, None], tl.load(p_gate, mask=m_out, other=0.0))
        tl.store(p_head, b_out.to(dtype), mask=m_out)
    else:
        o_part = ((i_item * Q + o_row) * HQ + o_head).to(tl.int64)
        tl.store(p_acc + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_out)
        tl.store(p_max + o_part, b_max, mask=is_row)
        tl.store(p_sum + o_part, b_sum, mask=is_row)


@triton.jit(do_not_specialize=["num_seqs", "target", "stride_table"])
def paged_attention_window_fwd_kernel(
    p_fused: tl.tensor,
    p_q_norm: tl.tensor,
    p_k_norm: tl.tensor,
    p_cos: tl.tensor,
    p_sin: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_table: tl.tensor,
    p_contexts: tl.tensor,
    p_query_lens: tl.tensor,
    p_out: tl.tensor,
    p_items: tl.tensor,
    p_acc: tl.tensor,
    p_max: tl.tensor,
    p_sum: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    num_seqs: tl.tensor,
    target: tl.tensor,
    stride_table: tl.tensor,
    Q: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    MIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BS: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """One split of a sequence for BM query rows of one key head; of fixed splits maybe several."""
    i_item = tl.program_id(1)
    wait_for_previous(USE_PDL)
    total = 1
    if KEYS == 0:
        total = count_tokens(p_contexts, p_query_lens, num_seqs, BS)
    i_n, first, num_items = find_item(
        i_item, p_contexts, p_query_lens, num_seqs, total, target, KEYS, MIN, BN, BS
    )
    if KEYS == 0:
        # No loop here: the addresses that it would carry cost a third of the registers.
        if i_item < num_items:
            attend_split(
                i_item, i_n, first, total, p_fused, p_q_norm, p_k_norm, p_cos, p_sin, p_k, p_v,
                p_table, p_contexts, p_query_lens, p_out, p_items, p_acc, p_max, p_sum, eps, scale,
                target, stride_table, Q, HQ, HKV, D, HALF, PAGE, KEYS, MIN, BM, BN, BD, BQ,
                PRECISION,
            )  # fmt: skip
    else:
        for i_work in range(i_item, num_items, tl.num_programs(1)):
            attend_split(
                i_work, i_n, first, total, p_fused, p_q_norm, p_k_norm, p_cos, p_sin, p_k, p_v,
                p_table, p_contexts, p_query_lens, p_out, p_items, p_acc, p_max, p_sum, eps, scale,
                target, stride_table, Q, HQ, HKV, D, HALF, PAGE, KEYS, MIN, BM, BN, BD, BQ,
                PRECISION,
            )  # fmt: skip
            i_n, first, num_items = find_item(
                i_work + tl.num_programs(1),
                p_contexts, p_query_lens, num_seqs, total, target, KEYS, MIN, BN, BS,
            )  # fmt: skip


@triton.jit
def paged_attention_window_combine_kernel(
    p_fused: tl.tensor,
    p_query_lens: tl.tensor,
    p_items: tl.tensor,
    p_acc: tl.tensor,
    p_max: tl.tensor,
    p_sum: tl.tensor,
    p_out: tl.tensor,
    Q: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
    USE_PDL: tl.constexpr,
) -> None:
    """BD dimensions of one head's row: partial sums in the order of their splits, then the gate."""
    i_r, i_d, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_row, i_head = i_r // HQ, i_r % HQ
    wait_for_previous(USE_PDL)
    query_len = tl.load(p_query_lens + i_n)
    first = tl.load(p_items + 2 * i_n)
    num_splits = tl.load(p_items + 2 * i_n + 1)
    if (i_row < query_len) & (num_splits > 1):
        top = float("-inf")
        b_sum = tl.zeros([1], tl.float32)
        b_acc = tl.zeros([BD], tl.float32)
        for i_s in range(0, num_splits, BP):
            o_s = i_s + tl.arange(0, BP)
            m_s = o_s < num_splits
            o_part = (first + o_s).to(tl.int64) * (Q * HQ) + i_r
            b_max = tl.load(p_max + o_part, mask=m_s, other=float("-inf"))
            b_part = tl.load(p_sum + o_part, mask=m_s, other=0.0)
            p_part = p_acc + o_part[:, None] * D + o_d[None, :]
            b_read = tl.load(p_part, mask=m_s[:, None] & m_d[None, :], other=0.0)
            # Finite from the first split on: every row sees key 0.
            new_top = tl.maximum(top, tl.max(b_max, 0))
            b_weight = tl.exp2(b_max - new_top)
            shrink = tl.exp2(top - new_top)
            b_sum = b_sum * shrink + tl.sum(b_weight * b_part, 0)
            b_acc = b_acc * shrink + tl.sum(b_weight[:, None] * b_read, 0)
            top = new_top
        o_row = i_n.to(tl.int64) * Q + i_row
        p_gate = p_fused + o_row * (2 * (HQ + HKV) * D) + (HQ + i_head) * D + o_d
        b_out = gated(b_acc, b_sum, tl.load(p_gate, mask=m_d, other=0.0))
        p_head = p_out + (o_row * HQ + i_head) * D + o_d
        tl.store(p_head, b_out.to(p_out.dtype.element_ty), mask=m_d)
