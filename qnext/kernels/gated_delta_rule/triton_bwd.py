"""Gradients of the gated delta rule: the pass back through the chunks, and what follows from it.

The derivation, with the names used here, is in this folder's README.
"""

import torch
import triton
import triton.language as tl

from qnext.kernels.gated_delta_rule.triton_chunks import (
    CHUNK,
    DECAYS,
    Chunks,
    Inputs,
    block_size,
    decay_between,
    product,
)
from qnext.kernels.gated_delta_rule.triton_scan import (
    HAS_GLUON,
    States,
    kernels,
    scan_states,
    value_block,
)

if HAS_GLUON:
    from qnext.kernels.gated_delta_rule import gluon_bwd

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

    # One chunk ahead: a load of a single number is not pipelined.
    p_through = p_decay + ((i_slot + num_chunks - 1) * Hv + i_h) * DECAYS * BT + BT - 1
    through = tl.load(p_through, mask=num_chunks > 0, other=0.0)
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
        p_row = p_decay + DECAYS * i_tile + o_t
        b_from_start = tl.load(p_row)[:, None]
        b_write = tl.load(p_row + 2 * BT)[:, None]
        p_through -= Hv * DECAYS * BT
        through_next = tl.load(p_through, mask=i_c > 0, other=0.0)

        b_rounded = b_dstate.to(dtype)
        p_after = p_dstates + ((i_slot + i_c) * Hv + i_h) * K * V + o_state
        tl.store(p_after, b_rounded, mask=m_kv)
        b_de = product(b_k, b_rounded, IS_FP32) * b_write
        b_de += product(tl.trans(b_scores), b_dout, IS_FP32)
        b_dz = product(tl.trans(b_inverse), b_de.to(dtype), IS_FP32)
        tl.store(p_dv + i_out + o_out, b_dz.to(dtype), mask=m_tv)
        b_dstate *= through
        through = through_next
        b_reads = (b_dout.to(tl.float32) * b_from_start).to(dtype)
        b_dstate += product(tl.trans(b_q), b_reads, IS_FP32)
        b_dstate += product(tl.trans(b_k), (-b_dz * b_from_start).to(dtype), IS_FP32)

    if HAS_STATE:
        tl.store(p_dinitial + o_edge, b_dstate, mask=m_kv)


@triton.jit(do_not_specialize=["num_slots"])
def gated_delta_rule_bwd_scores_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_dout: tl.tensor,
    p_dv: tl.tensor,
    p_change: tl.tensor,
    p_decay: tl.tensor,
    p_table: tl.tensor,
    p_dscores: tl.tensor,
    p_sums: tl.tensor,
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
    """Gradients of q k^T, or of k k^T, inside a chunk, and what they give to G and beta.

    The value heads of a key head share both products, so their gradients are summed here.
    """
    is_erase = tl.program_id(0) % 2 == 1  # neighbours share E and k
    i_hk = tl.program_id(0) // 2 % Hk
    i_slot = (tl.program_id(0) // (2 * Hk)).to(tl.int64)
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
    o_out = o_i[:, None] * (Hv * V) + o_v[None, :]
    o_tile = o_i[:, None] * BT + o_i[None, :]
    # The kind's own rows, and whether a token pairs with itself.
    p_left = tl.where(is_erase, p_dv, p_dout)
    p_x = tl.where(is_erase, p_k, p_q) + i_hk * K
    stride_x = tl.where(is_erase, stride_k, stride_q)
    nearest = tl.where(is_erase, 1, 0)
    sign = tl.where(is_erase, -1.0, 1.0)  # dA = -dZ E^T

    p_x += row * stride_x
    b_x = tl.load(p_x + o_i[:, None] * stride_x + o_k[None, :], mask=m_tk, other=0.0)
    p_y = p_k + row * stride_k + i_hk * K
    b_k = tl.load(p_y + o_i[:, None] * stride_k + o_k[None, :], mask=m_tk, other=0.0)
    b_overlap = product(b_x, tl.trans(b_k), IS_FP32)
    b_total = tl.zeros([BT, BT], dtype=tl.float32)
    for i_h in range(i_hk * (Hv // Hk), (i_hk + 1) * (Hv // Hk)):
        i_out = (row * Hv + i_h) * V
        b_left = tl.load(p_left + i_out + o_out, mask=m_tv, other=0.0)
        b_change = tl.load(p_change + i_out + o_out, mask=m_tv, other=0.0)
        i_tile = (i_slot * Hv + i_h) * BT
        p_row = p_decay + DECAYS * i_tile + o_i
        b_decay = decay_between(tl.load(p_row + 3 * BT), tl.load(p_row + 4 * BT), nearest, BT)
        b_beta = tl.load(p_row + 5 * BT)
        b_pairs = product(b_left, tl.trans(b_change), IS_FP32) * (sign * b_decay)
        b_total += b_pairs * b_beta[None, :]
        b_pairs *= b_overlap
        p_sum = p_sums + (nearest * num_slots.to(tl.int64) * Hv * BT + i_tile) * 2 + o_i
        tl.store(p_sum, tl.sum(b_pairs * b_beta[None, :], axis=1))
        tl.store(p_sum + BT, tl.sum(b_pairs, axis=0))
    p_tile = p_dscores + ((i_slot * Hk + i_hk) * 2 + nearest) * BT * BT
    tl.store(p_tile + o_tile, b_total.to(p_dscores.dtype.element_ty))


@triton.jit(do_not_specialize=["num_slots"])
def gated_delta_rule_bwd_key_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_dout: tl.tensor,
    p_dv: tl.tensor,
    p_change: tl.tensor,
    p_states: tl.tensor,
    p_dstates: tl.tensor,
    p_dscores: tl.tensor,
    p_decay: tl.tensor,
    p_table: tl.tensor,
    p_dq: tl.tensor,
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
    """dq and dk of one chunk, one key head and BK columns, summed over the head's value heads."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    i_hk = tl.program_id(0) // NK % Hk
    i_slot = (tl.program_id(0) // (NK * Hk)).to(tl.int64)
    start = tl.load(p_table + 2 * i_slot)
    end = tl.load(p_table + 2 * i_slot + 1)
    if end <= start:
        return
    o_i = tl.arange(0, BT)
    m_t = (start + o_i < end)[:, None]
    row = start.to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = (o_k < K)[:, None]
    m_tk = m_t & (o_k < K)[None, :]
    o_tile = o_i[:, None] * BT + o_i[None, :]
    p_x = p_q + row * stride_q + i_hk * K
    p_queries = p_x + o_i[:, None] * stride_q + o_k[None, :]
    p_x = p_k + row * stride_k + i_hk * K
    p_keys = p_x + o_i[:, None] * stride_k + o_k[None, :]
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    for i_h in range(i_hk * (Hv // Hk), (i_hk + 1) * (Hv // Hk)):
        i_head = i_slot * Hv + i_h
        o_out = (row * Hv + i_h) * V + o_i[:, None] * (Hv * V)
        o_state = i_head * K * V + o_k[:, None] * V
        p_row = p_decay + DECAYS * i_head * BT + o_i
        p_part = p_parts + (i_k * num_slots * Hv + i_head) * 3 * BT + o_i
        b_write = tl.zeros([BT, BK], dtype=tl.float32)  # E dS_L^T
        b_carried = tl.zeros([BK], dtype=tl.float32)  # rows of <S_0, dS_L>
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)[None, :]
            b_dstate = tl.load(p_dstates + o_state + o_v, mask=m_k & (o_v < V), other=0.0)
            b_change = tl.load(p_change + o_out + o_v, mask=m_t & (o_v < V), other=0.0)
            b_state = tl.load(p_states + o_state + o_v, mask=m_k & (o_v < V), other=0.0)
            b_write += product(b_change, tl.trans(b_dstate), IS_FP32)
            b_carried += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), axis=1)
        b_k = tl.load(p_keys, mask=m_tk, other=0.0).to(tl.float32)
        tl.store(p_part + BT, tl.sum(b_write * b_k, axis=1) * tl.load(p_row + BT))
        b_from_start = tl.load(p_row)
        b_last = tl.where(o_i == BT - 1, b_from_start * tl.sum(b_carried, axis=0), 0.0)
        tl.store(p_part + 2 * BT, b_last)
        b_dk += b_write * tl.load(p_row + 2 * BT)[:, None]

        # A second loop over the same columns holds fewer products in registers at a time.
        b_read = tl.zeros([BT, BK], dtype=tl.float32)  # dO S_0^T
        b_erase = tl.zeros([BT, BK], dtype=tl.float32)  # dZ S_0^T
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)[None, :]
            b_state = tl.load(p_states + o_state + o_v, mask=m_k & (o_v < V), other=0.0)
            b_dout = tl.load(p_dout + o_out + o_v, mask=m_t & (o_v < V), other=0.0)
            b_dz = tl.load(p_dv + o_out + o_v, mask=m_t & (o_v < V), other=0.0)
            b_read += product(b_dout, tl.trans(b_state), IS_FP32)
            b_erase += product(b_dz, tl.trans(b_state), IS_FP32)
        b_from_start = tl.load(p_row)
        b_q = tl.load(p_queries, mask=m_tk, other=0.0).to(tl.float32)
        b_sum = tl.sum(b_read * b_q, axis=1)
        b_dq += b_read * b_from_start[:, None]
        b_k = tl.load(p_keys, mask=m_tk, other=0.0).to(tl.float32)
        tl.store(p_part, (b_sum - tl.sum(b_erase * b_k, axis=1)) * b_from_start)
        b_dk -= b_erase * b_from_start[:, None]

    b_q = tl.load(p_queries, mask=m_tk, other=0.0)
    b_k = tl.load(p_keys, mask=m_tk, other=0.0)
    p_tile = p_dscores + (i_slot * Hk + i_hk) * 2 * BT * BT + o_tile
    b_dscores = tl.load(p_tile)
    b_dq += product(b_dscores, b_k, IS_FP32)
    b_dk += product(tl.trans(b_dscores), b_q, IS_FP32)
    b_doverlap = tl.load(p_tile + BT * BT)
    b_dk += product(b_doverlap, b_k, IS_FP32)
    b_dk += product(tl.trans(b_doverlap), b_k, IS_FP32)
    o_grad = (row * Hk + i_hk) * K + o_i[:, None] * (Hk * K) + o_k[None, :]
    tl.store(p_dq + o_grad, b_dq.to(p_dq.dtype.element_ty), mask=m_tk)
    tl.store(p_dk + o_grad, b_dk.to(p_dk.dtype.element_ty), mask=m_tk)


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
    NS: tl.constexpr,
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
    b_rows = tl.zeros([BH, BT], dtype=tl.float32)
    b_dbeta = tl.zeros([BH, BT], dtype=tl.float32)
    for i_s in range(NS):
        p_sum = p_sums + (i_s * num_slots.to(tl.int64) * Hv + i_row) * 2 * BT + o_t
        b_rows += tl.load(p_sum, mask=m_h, other=0.0)
        b_dbeta += tl.load(p_sum + BT, mask=m_h, other=0.0)
    b_to_end = tl.zeros([BH, BT], dtype=tl.float32)
    for i_k in range(NK):
        p_part = p_parts + (i_k * num_slots.to(tl.int64) * Hv + i_row) * 3 * BT + o_t
        b_rows += tl.load(p_part, mask=m_h, other=0.0)
        b_columns = tl.load(p_part + BT, mask=m_h, other=0.0)
        b_dbeta += b_columns
        b_to_end += b_columns * b_beta + tl.load(p_part + 2 * BT, mask=m_h, other=0.0)
    # Each e^-G_j stands beside a beta_j, and e^G_L beside all that reaches the chunk's end.
    b_rows += tl.where(o_t == BT - 1, tl.sum(b_to_end, axis=1)[:, None], 0.0) - b_beta * b_dbeta
    tl.store(p_dbeta + o_gate, b_dbeta, mask=m_gate)
    tl.store(p_dg + o_gate, tl.cumsum(b_rows, axis=1, reverse=True), mask=m_gate)


def gated_delta_rule_bwd(
    inputs: Inputs,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    kept: States | None,
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v, g, beta and, if there is one, of the initial state.

    kept: what the forward kept of the pass over the chunks; without it, the pass runs again.
    """
    assert inputs.q is not None
    states = kept or scan_states(inputs, chunks, initial_state)
    dv, dstates, dinitial = _state_gradients(inputs, chunks, dout, dfinal)
    dq, dk = inputs.q.new_empty(inputs.q.shape), inputs.k.new_empty(inputs.k.shape)
    takes_gluon = kernels(inputs)[0] == "gluon" and gluon_bwd.takes(inputs, dout)
    key_gradients = gluon_bwd.key_gradients_gluon if takes_gluon else key_gradients_triton
    tokens, ends = (dout, dv, states.change), (states.before, dstates)
    sums, parts = key_gradients(inputs, chunks, tokens, ends, (dq, dk))
    num_slots, num_heads = inputs.num_slots, inputs.sizes[1]
    dg, dbeta = inputs.g.new_empty(inputs.g.shape), inputs.g.new_empty(inputs.g.shape)
    heads = min(HEADS, triton.next_power_of_2(num_heads))
    gated_delta_rule_bwd_gates_kernel[(num_slots * triton.cdiv(num_heads, heads),)](
        *(inputs.beta, sums, parts, chunks.table, dg, dbeta, num_slots),
        Hv=num_heads,
        NS=sums.shape[0],
        NK=parts.shape[0],
        BT=CHUNK,
        BH=heads,
    )
    return dq, dk, dv, dg, dbeta, dinitial


def key_gradients_triton(
    inputs: Inputs,
    chunks: Chunks,
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    states: tuple[torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the gradients of queries and keys; returns what the gates' are made of.

    Args:
        tokens: dO, dV, E. [T, Hv, V]
        states: before chunks, and gradients of those after chunks. [slots, Hv, K, V]
        grads: dq, dk. [T, Hk, K]

    Returns:
        Row and column sums of C, in parts to be added [*, slots, Hv, 2, 64]; what goes to the rows'
        sums, c, and what goes to G_L, in parts to be added [*, slots, Hv, 3, 64].
    """
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
        "num_stages": 1 if inputs.is_fp32 else 3,
    }
    strides = (q.stride(0), k.stride(0))
    # Of q k^T and of k k^T.
    dscores = k.new_empty(num_slots, num_key_heads, 2, CHUNK, CHUNK)
    sums = inputs.g.new_empty(2, num_slots, num_heads, 2, CHUNK)
    gated_delta_rule_bwd_scores_kernel[(2 * num_key_heads * num_slots,)](
        *(q, k, *tokens, chunks.decay, chunks.table, dscores, sums),
        *(*strides, num_slots),
        BK=block_size(key_dim),
        BV=columns,
        **sizes,
    )
    width = min(block_size(key_dim), 16 if inputs.is_fp32 else 64)
    parts_k = -(-key_dim // width)
    parts = inputs.g.new_empty(parts_k, num_slots, num_heads, 3, CHUNK)
    gated_delta_rule_bwd_key_kernel[(parts_k * num_key_heads * num_slots,)](
        *(q, k, *tokens, *states, dscores, chunks.decay, chunks.table, *grads, parts),
        *(*strides, num_slots),
        BK=width,
        BV=min(columns, 64),
        **sizes,
    )
    return sums, parts


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
