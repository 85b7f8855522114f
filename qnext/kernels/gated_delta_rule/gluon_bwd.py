"""The scan back through the chunks, as `gluon_fwd.py` has it forwards.

The state's gradient stands transposed, and with it dE and dZ; outputs' gradients are read
transposed, so they too are left factors in registers.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from qnext.kernels.gated_delta_rule.gluon_fwd import (
    COLUMNS,
    STAGES,
    chunk_pointers,
    chunk_tiles,
    copy_chunk,
)
from qnext.kernels.gated_delta_rule.gluon_tiles import hidden, store_rows
from qnext.kernels.gated_delta_rule.triton_chunks import Chunks, Inputs


@gluon.jit(do_not_specialize_on_alignment=["p_cu_seqlens", "p_first"])
def gated_delta_rule_gluon_bwd_state_kernel(
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
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    HK: gl.constexpr,
    HV: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_STATE: gl.constexpr,
) -> None:
    """As `gated_delta_rule_bwd_state_kernel`, for 64 value columns in a program.

    A chunk's dZ is stored while the first products of the chunk before it run.
    """
    K: gl.constexpr = 128
    BT: gl.constexpr = 64
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    TOKENS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, TOKENS, 2)
    LEFT_STATE: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    ALONG_T: gl.constexpr = gl.SliceLayout(0, TOKENS)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = p_k.dtype.element_ty
    NV: gl.constexpr = V // 64
    i_v = gl.program_id(0) % NV
    i_h = gl.program_id(0) // NV % HV
    i_n = gl.program_id(0) // (NV * HV)
    start = gl.load(p_cu_seqlens + i_n)
    length = gl.load(p_cu_seqlens + i_n + 1) - start
    num_chunks = (length + BT - 1) // BT
    row = start.to(gl.int64)
    i_slot = gl.load(p_first + i_n).to(gl.int64)
    pointers = chunk_pointers(
        p_k, p_q, p_dout, p_inverse, p_scores, p_decay, row, i_slot, i_h, i_v,
        HK, HV, V, STRIDE_K, STRIDE_Q, HV * V,
    )  # fmt: skip
    p_dstates += ((i_slot + num_chunks - 1) * HV + i_h) * (K * V) + i_v * 64
    p_dv += ((row + (num_chunks - 1) * BT) * HV + i_h) * V + i_v * 64

    tiles = chunk_tiles(dtype, STAGES)
    s_k, s_q, s_dout, s_inverse, s_scores, _, s_decay = tiles
    s_dv = gl.allocate_shared_memory(dtype, [BT, 64], TILE)
    s_dstate = gl.allocate_shared_memory(dtype, [K, 64], TILE)

    o_v = gl.arange(0, 64, gl.SliceLayout(1, STATE))[:, None]
    o_k = gl.arange(0, K, gl.SliceLayout(0, STATE))[None, :]
    zeros = gl.full([64, BT], 0.0, gl.float32, TOKENS)
    if HAS_STATE:
        p_edge = p_dfinal + (i_n.to(gl.int64) * HV + i_h) * (K * V) + i_v * 64
        b_dstate = gl.load(p_edge + (o_k * V + o_v))
    else:
        b_dstate = gl.full([64, K], 0.0, gl.float32, STATE)
    b_rounded = gl.convert_layout(b_dstate.to(dtype), LEFT)
    for i_back in gl.static_range(STAGES - 1):
        i_c = num_chunks - 1 - i_back
        copy_chunk(
            tiles, pointers, i_back, i_c, gl.where(i_c >= 0, length - i_c * BT, 0),
            HV, STRIDE_K, STRIDE_Q, HV * V, True,
        )  # fmt: skip

    b_done = zeros.to(dtype)  # dZ of the chunk after
    rows = 0  # of it
    i_now = 0
    for i_back in range(num_chunks):
        i_c = num_chunks - 1 - i_back
        async_copy.wait_group(STAGES - 2)
        hopper.fence_async_shared()
        tl.debug_barrier()
        b_k = s_k.index(i_now)
        b_de = hopper.warpgroup_mma(
            b_rounded, b_k.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        b_dout = s_dout.index(i_now).permute((1, 0)).load(LEFT)
        b_pairs = hopper.warpgroup_mma(
            b_dout, s_scores.index(i_now), zeros, use_acc=False, is_async=True
        )
        s_dstate.permute((1, 0)).store(gl.convert_layout(b_rounded, STATE))
        s_dv.permute((1, 0)).store(b_done)
        i_later = i_c - (STAGES - 1)
        i_next = gl.where(i_now == 0, STAGES - 1, i_now - 1)  # the oldest chunk's place
        copy_chunk(
            tiles, pointers, i_next, i_later, gl.where(i_later >= 0, BT, 0),
            HV, STRIDE_K, STRIDE_Q, HV * V, True,
        )  # fmt: skip
        store_rows(p_dstates, s_dstate, V, K, K)
        store_rows(p_dv + BT * HV * V, s_dv, HV * V, rows, BT)
        b_from_start = s_decay.index(i_now * 4).load(ALONG_T)[None, :]
        b_write = s_decay.index(i_now * 4 + 2).load(ALONG_T)[None, :]
        b_de, b_pairs, b_rounded, b_dout = hopper.warpgroup_mma_wait(
            0, deps=[b_de, b_pairs, b_rounded, b_dout]
        )
        b_de = gl.convert_layout((b_de * b_write + b_pairs).to(dtype), LEFT)
        b_dz = hopper.warpgroup_mma(
            b_de, s_inverse.index(i_now), zeros, use_acc=False, is_async=True
        )
        through = s_decay.index(i_now * 4).slice(BT - 1, 1).load(gl.SliceLayout(0, STATE))
        b_reads = gl.convert_layout(b_dout, TOKENS).to(gl.float32) * b_from_start
        b_reads = gl.convert_layout(b_reads.to(dtype), LEFT_STATE)
        b_dstate = hopper.warpgroup_mma(
            b_reads, s_q.index(i_now), b_dstate * through[None, :], is_async=True
        )
        b_dz, b_de = hopper.warpgroup_mma_wait(1, deps=[b_dz, b_de])
        b_done = b_dz.to(dtype)
        b_erase = gl.convert_layout((-b_dz * b_from_start).to(dtype), LEFT_STATE)
        b_dstate = hopper.warpgroup_mma(b_erase, b_k, b_dstate, is_async=True)
        b_dstate, b_reads, b_erase = hopper.warpgroup_mma_wait(0, deps=[b_dstate, b_reads, b_erase])
        b_rounded = gl.convert_layout(b_dstate.to(dtype), LEFT)
        rows = length - i_c * BT
        i_now = gl.where(i_now == STAGES - 1, 0, i_now + 1)
        p_dstates -= HV * K * V
        p_dv -= BT * HV * V

    async_copy.wait_group(0)
    s_dv.permute((1, 0)).store(b_done)
    store_rows(p_dv + BT * HV * V, s_dv, HV * V, rows, BT)
    if HAS_STATE:
        p_edge = p_dinitial + (hidden(i_n).to(gl.int64) * HV + i_h) * (K * V) + i_v * 64
        gl.store(p_edge + (o_k * V + o_v), b_dstate)


def state_gradients_gluon(
    inputs: Inputs,
    chunks: Chunks,
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    *,
    dv: torch.Tensor,
    dstates: torch.Tensor,
    dinitial: torch.Tensor | None,
) -> None:
    """Launch the scan back; it writes dv, dstates and, if there is a dfinal, dinitial."""
    assert inputs.q is not None
    num_key_heads, num_heads, _, value_dim = inputs.sizes
    edges = (dv, dv) if dfinal is None or dinitial is None else (dfinal, dinitial)
    gated_delta_rule_gluon_bwd_state_kernel[(value_dim // COLUMNS * num_heads * inputs.num_seqs,)](
        *(inputs.q, inputs.k, dout, chunks.inverse, chunks.scores, chunks.decay),
        *(inputs.cu_seqlens, chunks.first, edges[0], dv, dstates, edges[1]),
        STRIDE_Q=inputs.q.stride(0),
        STRIDE_K=inputs.k.stride(0),
        HK=num_key_heads,
        HV=num_heads,
        V=value_dim,
        STAGES=STAGES,
        HAS_STATE=dfinal is not None,
        num_warps=4,
    )
