"""The pass over a sequence's chunks that carries the state, for a block of value columns."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qnext.kernels.gated_delta_rule.triton_chunks import (
    CHUNK,
    DECAYS,
    Chunks,
    Inputs,
    block_size,
    product,
)

# Triton reads the same variable when it is imported. Gluon compiles for GPUs only, and its names
# were others in older releases.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GLUON = not IS_INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
if HAS_GLUON:
    from qnext.kernels.gated_delta_rule import gluon_fwd

FEW_PROGRAMS = 132  # of a GPU's processors; fewer programs than that leave some idle


@triton.jit
def gated_delta_rule_fwd_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_inverse: tl.tensor,
    p_scores: tl.tensor,
    p_decay: tl.tensor,
    p_cu_seqlens: tl.tensor,
    p_first: tl.tensor,
    p_initial: tl.tensor,
    p_out: tl.tensor,
    p_final: tl.tensor,
    p_change: tl.tensor,
    p_states: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    stride_v: tl.tensor,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    START: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    IS_FP32: tl.constexpr,
) -> None:
    """Carry the state; write outputs, and what the backward needs: states before chunks and E.

    START is what the state starts from: "zero", "given" or "identity".
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV  # neighbours share keys, inverse and scores
    i_h = tl.program_id(0) // NV % Hv
    i_n = tl.program_id(0) // (NV * Hv)
    start = tl.load(p_cu_seqlens + i_n)
    end = tl.load(p_cu_seqlens + i_n + 1)
    i_slot = tl.load(p_first + i_n).to(tl.int64)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    o_value = o_t[:, None] * stride_v + i_h * V + o_v[None, :]
    o_out = o_t[:, None] * (Hv * V) + o_v[None, :]
    o_query = o_t[:, None] * stride_q + (i_h // (Hv // Hk)) * K + o_k[None, :]
    o_key = o_t[:, None] * stride_k + (i_h // (Hv // Hk)) * K + o_k[None, :]
    dtype = p_k.dtype.element_ty
    if START == "given":
        p_start = p_initial + (i_n.to(tl.int64) * Hv + i_h) * K * V + o_state
        b_state = tl.load(p_start, mask=m_kv, other=0.0).to(tl.float32)
    elif START == "identity":
        b_state = tl.where(o_k[:, None] == o_v[None, :], 1.0, 0.0)
    else:
        b_state = tl.zeros([BK, BV], dtype=tl.float32)

    # One chunk ahead: a load of a single number is not pipelined.
    num_chunks = (end - start + BT - 1) // BT
    p_through = p_decay + (i_slot * Hv + i_h) * DECAYS * BT + BT - 1
    through = tl.load(p_through, mask=num_chunks > 0, other=0.0)
    for i_c in range(num_chunks):
        m_t = start + i_c * BT + o_t < end
        row = (start + i_c * BT).to(tl.int64)
        i_tile = ((i_slot + i_c) * Hv + i_h) * BT
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_k = tl.load(p_k + row * stride_k + o_key, mask=m_tk, other=0.0)
        b_inverse = tl.load(p_inverse + i_tile * BT + o_tt)
        p_row = p_decay + DECAYS * i_tile + o_t
        b_from_start = tl.load(p_row)
        b_write = tl.load(p_row + 2 * BT)
        p_through += Hv * DECAYS * BT
        through_next = tl.load(p_through, mask=i_c + 1 < num_chunks, other=0.0)

        b_rounded = b_state.to(dtype)
        if HAS_STATES:
            p_before = p_states + ((i_slot + i_c) * Hv + i_h) * K * V + o_state
            tl.store(p_before, b_rounded, mask=m_kv)
        b_z = -product(b_k, b_rounded, IS_FP32) * b_from_start[:, None]
        if HAS_V:
            b_v = tl.load(p_v + row * stride_v + o_value, mask=m_tv, other=0.0)
            b_z += b_v.to(tl.float32)
        b_e = product(b_inverse, b_z.to(dtype), IS_FP32)
        i_out = (row * Hv + i_h) * V
        b_state *= through
        through = through_next
        b_state += product(tl.trans(b_k), (b_e * b_write[:, None]).to(dtype), IS_FP32)
        if HAS_STATES:
            tl.store(p_change + i_out + o_out, b_e.to(dtype), mask=m_tv)
        if HAS_OUT:
            b_q = tl.load(p_q + row * stride_q + o_query, mask=m_tk, other=0.0)
            b_scores = tl.load(p_scores + i_tile * BT + o_tt)
            b_o = product(b_q, b_rounded, IS_FP32) * b_from_start[:, None]
            b_o += product(b_scores, b_e.to(dtype), IS_FP32)
            tl.store(p_out + i_out + o_out, b_o.to(p_out.dtype.element_ty), mask=m_tv)

    if HAS_FINAL:
        p_end = p_final + (i_n.to(tl.int64) * Hv + i_h) * K * V + o_state
        tl.store(p_end, b_state, mask=m_kv)


def kernels(inputs: Inputs) -> list[str]:
    """Kernels that can run the scan for outputs alone, the faster one first."""
    _, _, key_dim, value_dim = inputs.sizes
    tokens = [x for x in (inputs.q, inputs.k, inputs.v) if x is not None]
    takes_gluon = (
        HAS_GLUON
        and not inputs.is_fp32
        and (key_dim, value_dim % 64) == (128, 0)
        # A thread copies 16 bytes at a time, and the products are Hopper's own.
        and all(x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in tokens)
        and torch.cuda.get_device_capability(inputs.k.device)[0] == 9
    )
    return ["gluon", "triton"] if takes_gluon else ["triton"]


def value_block(inputs: Inputs, value_dim: int) -> tuple[int, int]:
    """Value columns of a program, and stages of its loop.

    A chunk's steps wait for one another, so one program of 32 columns per processor is fastest
    when there are few programs; when there are many, 64 columns halve what is read.
    """
    width = block_size(value_dim)
    if inputs.is_fp32:
        return min(width, 16), 1
    programs = inputs.num_seqs * inputs.sizes[1] * -(-value_dim // 64)
    wide = programs >= FEW_PROGRAMS and block_size(inputs.sizes[2]) <= 128
    # Two stages wait for the loads that they issue last; a third one hides them.
    return min(width, 64 if wide else 32), 3 if block_size(inputs.sizes[2]) <= 128 else 2


class States(NamedTuple):
    """What the backward needs of the pass over the chunks, in the dtype of v.

    Attributes:
        before: the state before each chunk. [slots, Hv, K, V]
        change: E. [T, Hv, V]
    """

    before: torch.Tensor
    change: torch.Tensor


def empty_states(inputs: Inputs) -> States:
    """Memory that `scan` fills."""
    _, num_heads, key_dim, value_dim = inputs.sizes
    return States(
        inputs.v.new_empty(inputs.num_slots, num_heads, key_dim, value_dim),
        inputs.v.new_empty(inputs.v.shape[0], num_heads, value_dim),
    )


def scan_states(inputs: Inputs, chunks: Chunks, initial_state: torch.Tensor | None) -> States:
    """The pass for `States` alone."""
    states = empty_states(inputs)
    scan(inputs, chunks, initial_state, states=states)
    return states


def scan_summary(inputs: Inputs, chunks: Chunks) -> tuple[torch.Tensor, torch.Tensor]:
    """M [N, Hv, K, K] and U [N, Hv, K, V] of each sequence, fp32."""
    _, num_heads, key_dim, value_dim = inputs.sizes
    shape = (inputs.num_seqs, num_heads, key_dim)
    through = inputs.g.new_empty(*shape, key_dim)
    written = inputs.g.new_empty(*shape, value_dim)
    scan(inputs, chunks, None, final=through, is_from_identity=True)
    scan(inputs, chunks, None, final=written)
    return through, written


def scan(
    inputs: Inputs,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    *,
    is_from_identity: bool = False,
    is_alone: bool = False,
    out: torch.Tensor | None = None,
    final: torch.Tensor | None = None,
    states: States | None = None,
) -> None:
    """Carry the state through the chunks, from zero if none is given, and fill what is given.

    out: outputs [T, Hv, V]; final: states after each sequence [N, Hv, K, V], fp32, which may be
    initial_state itself; is_from_identity: start from the identity and take values to be zero;
    is_alone: share no processor with other kernels, where the scan's own kernel can see to that.
    """
    if out is not None and states is None and kernels(inputs)[0] == "gluon":
        gluon_fwd.scan_gluon(inputs, chunks, initial_state, out, final, is_alone=is_alone)
        return
    start = "zero" if initial_state is None else "given"
    start = "identity" if is_from_identity else start
    num_key_heads, num_heads, key_dim, value_dim = inputs.sizes
    columns = key_dim if start == "identity" else value_dim
    width, num_stages = value_block(inputs, columns)
    q, k, v = inputs.q if inputs.q is not None else inputs.k, inputs.k, inputs.v

    def given(x: torch.Tensor | None) -> torch.Tensor:
        return v if x is None else x  # a pointer that the kernel never follows

    gated_delta_rule_fwd_kernel[(-(-columns // width) * num_heads * inputs.num_seqs,)](
        q,
        k,
        v,
        chunks.inverse,
        chunks.scores,
        chunks.decay,
        inputs.cu_seqlens,
        chunks.first,
        given(initial_state),
        given(out),
        given(final),
        *((v, v) if states is None else (states.change, states.before)),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        Hk=num_key_heads,
        Hv=num_heads,
        K=key_dim,
        V=columns,
        BT=CHUNK,
        BK=block_size(key_dim),
        BV=width,
        START=start,
        HAS_V=start != "identity",
        HAS_OUT=out is not None,
        HAS_FINAL=final is not None,
        HAS_STATES=states is not None,
        IS_FP32=inputs.is_fp32,
        num_warps=4,
        num_stages=num_stages,
    )
