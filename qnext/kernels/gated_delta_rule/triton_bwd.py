"""Gradients of the gated delta rule: the pass back through the chunks, and what follows from it.

The derivation, with the names used here, is in this folder's README.
"""

import torch
import triton
import triton.language as tl

from qnext.kernels.gated_delta_rule.triton_chunks import (
    CHUNK,
    Chunks,
    Inputs,
    block_size,
    decay_between,
    product,
    running_log_decay,
)
from qnext.kernels.gated_delta_rule.triton_scan import scan_states, value_block

HEADS = 16  # heads of one program of the last kernel


@triton.jit
def gated_delta_rule_bwd_state_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_dout: tl.tensor,
    p_inverse: tl.tensor,
    p_scores: tl.tensor,
    p_decay: tl.tensor,
    p_cu_seqlens: tl.tensor,
    p_first: tl.tensor,
    p_dfinal: tl.tensor,
    p_dv: tl.tensor,
    p_dstates: tl.tensor,
    p_dinitial: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_STATE: tl.constexpr,
    IS_FP32: tl.constexpr,
) -> None:
    """Carry the state's gradient back; write it for the state after each chunk, and dZ = dV."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = tl.program_id(0) // NV % Hv
    i_n = tl.program_id(0) // (NV * Hv)
    start = tl.load(p_cu_seqlens + i_n)
    end = tl.load(p_cu_seqlens + i_n + 1)
    num_chunks = (end - start + BT - 1) // BT
    i_slot = tl.load(p_first + i_n).to(tl.int64)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    o_out = o_t[:, None] * (Hv * V) + o_v[None, :]
    o_query = o_t[:, None] * stride_q + (i_h // (Hv // Hk)) * K + o_k[None, :]
    o_key = o_t[:, None] * stride_k + (i_h // (Hv // Hk)) * K + o_k[None, :]
    o_edge = (i_n.to(tl.int64) * Hv + i_h) * K * V + o_state
    dtype = p_k.dtype.element_ty
    if HAS_STATE:
        b_dstate = tl.load(p_dfinal + o_edge, mask=m_kv, other=0.0).to(tl.float32)
    else:
        b_dstate = tl.zeros([BK, BV], dtype=tl.float32)

    for i_back in range(num_chunks):
        i_c = num_chunks - 1 - i_back
        m_t = start + i_c * BT + o_t < end
        row = (start + i_c * BT).to(tl.int64)
        i_tile = ((i_slot + i_c) * Hv + i_h) * BT
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        i_out = (row * Hv + i_h) * V
        b_k = tl.load(p_k + row * stride_k + o_key, mask=m_tk, other=0.0)
        b_q = tl.load(p_q + row * stride_q + o_query, mask=m_tk, other=0.0)
        b_dout = tl.load(p_dout + i_out + o_out, mask=m_tv, other=0.0)
        b_inverse = tl.load(p_inverse + i_tile * BT + o_tt)
        b_scores = tl.load(p_scores + i_tile * BT + o_tt)
        p_row = p_decay + 3 * i_tile + o_t
        b_from_start = tl.load(p_row)[:, None]
        b_write = tl.load(p_row + 2 * BT)[:, None]
        through = tl.load(p_decay + 3 * i_tile + BT - 1)

        b_rounded = b_dstate.to(dtype)
        p_after = p_dstates + ((i_slot + i_c) * Hv + i_h) * K * V + o_state
        tl.store(p_after, b_rounded, mask=m_kv)
        b_de = product(b_k, b_rounded, IS_FP32) * b_write
        b_de += product(tl.trans(b_scores), b_dout, IS_FP32)
        b_dz = product(tl.trans(b_inverse), b_de.to(dtype), IS_FP32)
        tl.store(p_dv + i_out + o_out, b_dz.to(dtype), mask=m_tv)
        b_dstate *= through
        b_reads = (b_dout.to(tl.float32) * b_from_start).to(dtype)
        b_dstate += product(tl.trans(b_q), b_reads, IS_FP32)
        b_dstate += product(tl.trans(b_k), (-b_dz * b_from_start).to(dtype), IS_FP32)

    if HAS_STATE:
        tl.store(p_dinitial + o_edge, b_dstate, mask=m_kv)


@triton.jit
def gated_delta_rule_bwd_scores_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_g: tl.tensor,
    p_beta: tl.tensor,
    p_dout: tl.tensor,
    p_dv: tl.tensor,
    p_change: tl.tensor,
    p_table: tl.tensor,
    p_dscores: tl.tensor,
    p_doverlap: tl.tensor,
    p_sums: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    IS_FP32: tl.constexpr,
) -> None:
    """Gradients of q k^T and k k^T inside a chunk, and what they give to G and beta."""
    i_slot = tl.program_id(0) // Hv
    i_h = tl.program_id(0) % Hv
    start = tl.load(p_table + 2 * i_slot)
    end = tl.load(p_table + 2 * i_slot + 1)
    if end <= start:
        return
    o_i = tl.arange(0, BT)
    m_t = start + o_i < end
    row = start.to(tl.int64)
    o_v = tl.arange(0, BV)
    o_k = tl.arange(0, BK)
    m_tv = m_t[:, None] & (o_v < V)[None, :]
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    i_out = (row * Hv + i_h) * V
    o_out = o_i[:, None] * (Hv * V) + o_v[None, :]
    i_hk = i_h // (Hv // Hk)
    dtype = p_k.dtype.element_ty

    b_change = tl.load(p_change + i_out + o_out, mask=m_tv, other=0.0)
    b_dout = tl.load(p_dout + i_out + o_out, mask=m_tv, other=0.0)
    b_read = product(b_dout, tl.trans(b_change), IS_FP32)
    b_dz = tl.load(p_dv + i_out + o_out, mask=m_tv, other=0.0)
    b_erase = product(b_dz, tl.trans(b_change), IS_FP32)

    b_high, b_low = running_log_decay(p_g, start, end, i_h, Hv, BT)
    b_decay = decay_between(b_high, b_low, BT)
    b_beta = tl.load(p_beta + row * Hv + i_h + o_i * Hv, mask=m_t, other=0.0)
    b_read *= b_decay
    # The minus of dA = -dZ E^T.
    b_erase = tl.where(o_i[:, None] > o_i[None, :], -b_erase * b_decay, 0.0)
    i_tile = (i_slot.to(tl.int64) * Hv + i_h) * BT
    o_tile = o_i[:, None] * BT + o_i[None, :]
    tl.store(p_dscores + i_tile * BT + o_tile, (b_read * b_beta[None, :]).to(dtype))
    tl.store(p_doverlap + i_tile * BT + o_tile, (b_erase * b_beta[None, :]).to(dtype))

    p_x = p_k + row * stride_k + i_hk * K
    b_k = tl.load(p_x + o_i[:, None] * stride_k + o_k[None, :], mask=m_tk, other=0.0)
    b_sum = b_erase * product(b_k, tl.trans(b_k), IS_FP32)
    p_x = p_q + row * stride_q + i_hk * K
    b_q = tl.load(p_x + o_i[:, None] * stride_q + o_k[None, :], mask=m_tk, other=0.0)
    b_sum += b_read * product(b_q, tl.trans(b_k), IS_FP32)
    p_sum = p_sums + 2 * i_tile + o_i
    tl.store(p_sum, tl.sum(b_sum * b_beta[None, :], axis=1))
    tl.store(p_sum + BT, tl.sum(b_sum, axis=0))


@triton.jit(do_not_specialize=["num_slots"])
def gated_delta_rule_bwd_query_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_dout: tl.tensor,
    p_states: tl.tensor,
    p_dstates: tl.tensor,
    p_dscores: tl.tensor,
    p_decay: tl.tensor,
    p_table: tl.tensor,
    p_dq: tl.tensor,
    p_parts: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    num_slots: tl.tensor,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    IS_FP32: tl.constexpr,
) -> None:
    """dq of one chunk, one key head and BK columns, summed over the head's value heads.

    Tiles are transposed, [columns, tokens], so that each product's left factor comes from memory.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    i_hk = tl.program_id(0) // NK % Hk
    i_slot = (tl.program_id(0) // (NK * Hk)).to(tl.int64)
    start = tl.load(p_table + 2 * i_slot)
    end = tl.load(p_table + 2 * i_slot + 1)
    if end <= start:
        return
    o_i = tl.arange(0, BT)
    m_t = start + o_i < end
    row = start.to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    m_tv = m_t[:, None] & (o_v < V)[None, :]
    o_out = o_i[:, None] * (Hv * V) + o_v[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    o_tile = o_i[:, None] * BT + o_i[None, :]
    p_x = p_q + row * stride_q + i_hk * K
    b_q = tl.load(p_x + o_i[:, None] * stride_q + o_k[None, :], mask=m_tk, other=0.0)
    p_x = p_k + row * stride_k + i_hk * K
    b_k = tl.load(p_x + o_i[:, None] * stride_k + o_k[None, :], mask=m_tk, other=0.0)
    b_dq = tl.zeros([BK, BT], dtype=tl.float32)
    for i_h in range(i_hk * (Hv // Hk), (i_hk + 1) * (Hv // Hk)):
        i_head = i_slot * Hv + i_h
        i_out = (row * Hv + i_h) * V
        b_state = tl.load(p_states + i_head * K * V + o_state, mask=m_kv, other=0.0)
        b_dstate = tl.load(p_dstates + i_head * K * V + o_state, mask=m_kv, other=0.0)
        carried = tl.sum(tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), axis=1), axis=0)
        p_row = p_decay + 3 * i_head * BT + o_i
        p_part = p_parts + (i_k * num_slots * Hv + i_head) * 4 * BT + o_i
        tl.store(p_part + 3 * BT, tl.where(o_i == BT - 1, tl.load(p_row) * carried, 0.0))
        b_dout = tl.load(p_dout + i_out + o_out, mask=m_tv, other=0.0)
        b_x = product(b_state, tl.trans(b_dout), IS_FP32) * tl.load(p_row)[None, :]
        tl.store(p_part, tl.sum(b_x * tl.trans(b_q).to(tl.float32), axis=0))
        b_dscores = tl.load(p_dscores + i_head * BT * BT + o_tile)
        b_dq += b_x
        b_dq += product(tl.trans(b_k), tl.trans(b_dscores), IS_FP32)
    p_x = p_dq + (row * Hk + i_hk) * K + o_i[None, :] * (Hk * K) + o_k[:, None]
    m_dq = (o_k < K)[:, None] & m_t[None, :]
    tl.store(p_x, b_dq.to(p_dq.dtype.element_ty), mask=m_dq)


@triton.jit(do_not_specialize=["num_slots"])
def gated_delta_rule_bwd_key_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_dv: tl.tensor,
    p_change: tl.tensor,
    p_states: tl.tensor,
    p_dstates: tl.tensor,
    p_dscores: tl.tensor,
    p_doverlap: tl.tensor,
    p_decay: tl.tensor,
    p_table: tl.tensor,
    p_dk: tl.tensor,
    p_parts: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    num_slots: tl.tensor,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    IS_FP32: tl.constexpr,
) -> None:
    """dk, as `gated_delta_rule_bwd_query_kernel` does dq."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    i_hk = tl.program_id(0) // NK % Hk
    i_slot = (tl.program_id(0) // (NK * Hk)).to(tl.int64)
    start = tl.load(p_table + 2 * i_slot)
    end = tl.load(p_table + 2 * i_slot + 1)
    if end <= start:
        return
    o_i = tl.arange(0, BT)
    m_t = start + o_i < end
    row = start.to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    m_tv = m_t[:, None] & (o_v < V)[None, :]
    o_out = o_i[:, None] * (Hv * V) + o_v[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    o_tile = o_i[:, None] * BT + o_i[None, :]
    p_x = p_q + row * stride_q + i_hk * K
    b_q = tl.load(p_x + o_i[:, None] * stride_q + o_k[None, :], mask=m_tk, other=0.0)
    p_x = p_k + row * stride_k + i_hk * K
    b_k = tl.load(p_x + o_i[:, None] * stride_k + o_k[None, :], mask=m_tk, other=0.0)
    b_dk = tl.zeros([BK, BT], dtype=tl.float32)
    # Unrolled: out of a loop, k in fp32 would be kept in registers, which then spill.
    for i_g in tl.static_range(Hv // Hk):
        i_h = i_hk * (Hv // Hk) + i_g
        i_head = i_slot * Hv + i_h
        i_out = (row * Hv + i_h) * V
        p_row = p_decay + 3 * i_head * BT + o_i
        p_part = p_parts + (i_k * num_slots * Hv + i_head) * 4 * BT + o_i
        b_state = tl.load(p_states + i_head * K * V + o_state, mask=m_kv, other=0.0)
        b_dz = tl.load(p_dv + i_out + o_out, mask=m_tv, other=0.0)
        b_x = -product(b_state, tl.trans(b_dz), IS_FP32) * tl.load(p_row)[None, :]
        tl.store(p_part + BT, tl.sum(b_x * tl.trans(b_k).to(tl.float32), axis=0))
        b_dk += b_x
        b_change = tl.load(p_change + i_out + o_out, mask=m_tv, other=0.0)
        b_dstate = tl.load(p_dstates + i_head * K * V + o_state, mask=m_kv, other=0.0)
        b_x = product(b_dstate, tl.trans(b_change), IS_FP32)
        b_columns = tl.sum(b_x * tl.trans(b_k).to(tl.float32), axis=0)
        tl.store(p_part + 2 * BT, b_columns * tl.load(p_row + BT))
        b_dk += b_x * tl.load(p_row + 2 * BT)[None, :]

        b_dscores = tl.load(p_dscores + i_head * BT * BT + o_tile)
        b_dk += product(tl.trans(b_q), b_dscores, IS_FP32)
        b_doverlap = tl.load(p_doverlap + i_head * BT * BT + o_tile)
        b_dk += product(tl.trans(b_k), b_doverlap, IS_FP32)
        b_dk += product(tl.trans(b_k), tl.trans(b_doverlap), IS_FP32)
    p_x = p_dk + (row * Hk + i_hk) * K + o_i[None, :] * (Hk * K) + o_k[:, None]
    m_dk = (o_k < K)[:, None] & m_t[None, :]
    tl.store(p_x, b_dk.to(p_dk.dtype.element_ty), mask=m_dk)


@triton.jit(do_not_specialize=["num_slots"])
def gated_delta_rule_bwd_gates_kernel(
    p_beta: tl.tensor,
    p_sums: tl.tensor,
    p_parts: tl.tensor,
    p_table: tl.tensor,
    p_dg: tl.tensor,
    p_dbeta: tl.tensor,
    num_slots: tl.tensor,
    Hv: tl.constexpr,
    NK: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
) -> None:
    """dbeta, and dg as the sum of dG from each token to the chunk's end."""
    NH: tl.constexpr = (Hv + BH - 1) // BH
    i_slot = tl.program_id(0) // NH
    start = tl.load(p_table + 2 * i_slot)
    end = tl.load(p_table + 2 * i_slot + 1)
    if end <= start:
        return
    o_h = tl.program_id(0) % NH * BH + tl.arange(0, BH)[:, None]
    o_t = tl.arange(0, BT)[None, :]
    m_h = o_h < Hv
    o_gate = (start + o_t).to(tl.int64) * Hv + o_h
    m_gate = m_h & (start + o_t < end)
    i_row = i_slot.to(tl.int64) * Hv + o_h
    b_beta = tl.load(p_beta + o_gate, mask=m_gate, other=0.0)
    b_rows = tl.load(p_sums + i_row * 2 * BT + o_t, mask=m_h, other=0.0)
    b_dbeta = tl.load(p_sums + (i_row * 2 + 1) * BT + o_t, mask=m_h, other=0.0)
    b_to_end = tl.zeros([BH, BT], dtype=tl.float32)
    for i_k in range(NK):
        p_part = p_parts + (i_k * num_slots.to(tl.int64) * Hv + i_row) * 4 * BT + o_t
        b_rows += tl.load(p_part, mask=m_h, other=0.0)
        b_rows += tl.load(p_part + BT, mask=m_h, other=0.0)
        b_columns = tl.load(p_part + 2 * BT, mask=m_h, other=0.0)
        b_dbeta += b_columns
        b_to_end += b_columns * b_beta + tl.load(p_part + 3 * BT, mask=m_h, other=0.0)
    # Each e^-G_j stands beside a beta_j, and e^G_L beside all that reaches the chunk's end.
    b_rows += tl.where(o_t == BT - 1, tl.sum(b_to_end, axis=1)[:, None], 0.0) - b_beta * b_dbeta
    tl.store(p_dbeta + o_gate, b_dbeta, mask=m_gate)
    tl.store(p_dg + o_gate, tl.cumsum(b_rows, axis=1, reverse=True), mask=m_gate)


def gated_delta_rule_bwd(
    inputs: Inputs,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, g, beta and, if there is one, of the initial state."""
    assert inputs.q is not None
    q, k = inputs.q, inputs.k
    num_key_heads, num_heads, key_dim, value_dim = inputs.sizes
    num_slots = inputs.num_slots
    columns = block_size(value_dim)
    sizes = {
        "Hk": num_key_heads,
        "Hv": num_heads,
        "K": key_dim,
        "V": value_dim,
        "BT": CHUNK,
        "IS_FP32": inputs.is_fp32,
        "num_warps": 4,  # with more, a wait for products does not hold back other warps' stores
    }
    strides = (q.stride(0), k.stride(0))
    states, change = scan_states(inputs, chunks, initial_state)
    dv, dstates, dinitial = _state_gradients(inputs, chunks, dout, dfinal)

    dscores = chunks.scores.new_empty(chunks.scores.shape)
    doverlap = torch.empty_like(dscores)
    sums = inputs.g.new_empty(num_slots, num_heads, 2, CHUNK)
    gated_delta_rule_bwd_scores_kernel[(num_slots * num_heads,)](
        *(q, k, inputs.g, inputs.beta, dout, dv, change, chunks.table, dscores, doverlap, sums),
        *strides,
        BK=block_size(key_dim),
        BV=columns,
        num_stages=1,
        **sizes,
    )
    width = min(block_size(key_dim), 16 if inputs.is_fp32 else 64)
    parts_k = -(-key_dim // width)
    parts = inputs.g.new_empty(parts_k, num_slots, num_heads, 4, CHUNK)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    grid = (parts_k * num_key_heads * num_slots,)
    gated_delta_rule_bwd_query_kernel[grid](
        *(q, k, dout, states, dstates, dscores, chunks.decay, chunks.table, dq, parts),
        *(*strides, num_slots),
        BK=width,
        BV=columns,
        num_stages=1,
        **sizes,
    )
    gated_delta_rule_bwd_key_kernel[grid](
        *(q, k, dv, change, states, dstates, dscores, doverlap, chunks.decay, chunks.table),
        *(dk, parts, *strides, num_slots),
        BK=width,
        BV=columns,
        num_stages=1,
        **sizes,
    )
    dg, dbeta = inputs.g.new_empty(inputs.g.shape), inputs.g.new_empty(inputs.g.shape)
    heads = min(HEADS, triton.next_power_of_2(num_heads))
    gated_delta_rule_bwd_gates_kernel[(num_slots * triton.cdiv(num_heads, heads),)](
        *(inputs.beta, sums, parts, chunks.table, dg, dbeta, num_slots),
        Hv=num_heads,
        NK=parts_k,
        BT=CHUNK,
        BH=heads,
    )
    return dq, dk, dv, dg, dbeta, dinitial


def _state_gradients(
    inputs: Inputs, chunks: Chunks, dout: torch.Tensor, dfinal: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dV, gradients of the states after each chunk [slots, Hv, K, V], and of the initial ones."""
    assert inputs.q is not None
    num_key_heads, num_heads, key_dim, value_dim = inputs.sizes
    width, num_stages = value_block(inputs, value_dim)
    dv = inputs.v.new_empty(inputs.v.shape)
    dstates = inputs.v.new_empty(inputs.num_slots, num_heads, key_dim, value_dim)
    dinitial = None if dfinal is None else torch.empty_like(dfinal)
    edges = (dv, dv) if dfinal is None else (dfinal, dinitial)
    gated_delta_rule_bwd_state_kernel[(-(-value_dim // width) * num_heads * inputs.num_seqs,)](
        *(inputs.q, inputs.k, dout, chunks.inverse, chunks.scores, chunks.decay),
        *(inputs.cu_seqlens, chunks.first, edges[0], dv, dstates, edges[1]),
        *(inputs.q.stride(0), inputs.k.stride(0)),
        Hk=num_key_heads,
        Hv=num_heads,
        K=key_dim,
        V=value_dim,
        BT=CHUNK,
        BK=block_size(key_dim),
        BV=width,
        HAS_STATE=dfinal is not None,
        IS_FP32=inputs.is_fp32,
        num_warps=4,
        num_stages=num_stages,
    )
    return dv, dstates, dinitial
