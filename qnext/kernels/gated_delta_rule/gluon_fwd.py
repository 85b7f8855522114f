"""The forward scan for 16-bit heads with K = 128, its chain of products in registers.

The state stands transposed, value columns as rows, and so do the lookups, the errors and the
outputs: each is the accumulator of one product and, rounded, the left factor of the next one, in
the same registers. Nothing on the chain from chunk to chunk goes through shared memory.

Assemblers before CUDA 13.3 may reuse the registers of a left factor before its product has read
them. So every wait for a product also names its left factor, which keeps those registers taken.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from qnext.kernels.gated_delta_rule.gluon_tiles import copy_decay, copy_rows, hidden, store_rows
from qnext.kernels.gated_delta_rule.triton_chunks import DECAYS, Chunks, Inputs

STAGES = 3  # chunks in shared memory: one at work, two on their way
# Of 64 x 64 outputs, for a scan beside other kernels: what more memory keeps off its processor.
OUT_TILES = 3
COLUMNS = 64  # of values in a program, the rows of a product: 16 for each of 4 warps


@gluon.jit
def copy_chunk(
    tiles: tl.tuple, pointers: tl.tuple, i_stage: tl.tensor, i_c: tl.tensor, rows: tl.tensor,
    HV: gl.constexpr, STRIDE_K: gl.constexpr, STRIDE_Q: gl.constexpr, STRIDE_V: gl.constexpr,
) -> None:  # fmt: skip
    """Start copying chunk i_c, of `rows` tokens, as one group; of none, nothing is read.

    Tiles and pointers: keys, queries, values, inverse, scores, decays; pointers to chunk 0.
    """
    whole = gl.where(rows > 0, 64, 0)
    i_x = i_c.to(gl.int64) * 64
    copy_rows(tiles[0].index(i_stage), pointers[0] + i_x * STRIDE_K, STRIDE_K, rows, 128)
    copy_rows(tiles[2].index(i_stage), pointers[2] + i_x * STRIDE_V, STRIDE_V, rows, 64)
    copy_decay(tiles[5].index(i_stage), pointers[5] + i_x * (HV * DECAYS), rows)
    copy_rows(tiles[3].index(i_stage), pointers[3] + i_x * (HV * 64), 64, whole, 64)
    copy_rows(tiles[1].index(i_stage), pointers[1] + i_x * STRIDE_Q, STRIDE_Q, rows, 128)
    copy_rows(tiles[4].index(i_stage), pointers[4] + i_x * (HV * 64), 64, whole, 64)
    async_copy.commit_group()


@gluon.jit
def chunk_pointers(
    p_k: tl.tensor, p_q: tl.tensor, p_v: tl.tensor, p_inverse: tl.tensor, p_scores: tl.tensor,
    p_decay: tl.tensor, row: tl.tensor, i_slot: tl.tensor, i_h: tl.tensor, i_v: tl.tensor,
    HK: gl.constexpr, HV: gl.constexpr, V: gl.constexpr,
    STRIDE_K: gl.constexpr, STRIDE_Q: gl.constexpr, STRIDE_V: gl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Where a value head's first chunk lies, as `copy_chunk` takes it."""
    i_hk = i_h // (HV // HK)
    i_tile = i_slot * HV + i_h
    return (
        p_k + row * STRIDE_K + i_hk * 128,
        p_q + row * STRIDE_Q + i_hk * 128,
        p_v + row * STRIDE_V + i_h * V + i_v * 64,
        p_inverse + i_tile * (64 * 64),
        p_scores + i_tile * (64 * 64),
        p_decay + i_tile * (DECAYS * 64),
    )


@gluon.jit
def chunk_tiles(dtype: gl.constexpr, STAGES: gl.constexpr) -> tl.tuple:
    """Shared memory for STAGES chunks, as `copy_chunk` takes it, and the decays row by row."""
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN_2D: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 64, 128], TILE)
    s_q = gl.allocate_shared_memory(dtype, [STAGES, 64, 128], TILE)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    s_inverse = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    s_scores = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    s_decay = gl.allocate_shared_memory(gl.float32, [STAGES * 4, 64], PLAIN)
    s_decays = s_decay._reinterpret(gl.float32, [STAGES, 4, 64], PLAIN_2D)
    return s_k, s_q, s_v, s_inverse, s_scores, s_decays, s_decay


@gluon.jit(do_not_specialize_on_alignment=["p_cu_seqlens", "p_first"])
def gated_delta_rule_gluon_fwd_kernel(
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
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    STRIDE_V: gl.constexpr,
    HK: gl.constexpr,
    HV: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    OUT_TILES: gl.constexpr,
    HAS_START: gl.constexpr,
    HAS_FINAL: gl.constexpr,
) -> None:
    """As `gated_delta_rule_fwd_kernel`, for 64 value columns in a program.

    A chunk's outputs are stored while the next chunk's lookup runs.
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
    i_v = gl.program_id(0) % (V // 64)
    i_h = gl.program_id(0) // (V // 64) % HV
    i_n = gl.program_id(0) // (V // 64 * HV)
    start = gl.load(p_cu_seqlens + i_n)
    length = gl.load(p_cu_seqlens + i_n + 1) - start
    row = start.to(gl.int64)
    i_slot = gl.load(p_first + i_n).to(gl.int64)
    pointers = chunk_pointers(
        p_k, p_q, p_v, p_inverse, p_scores, p_decay, row, i_slot, i_h, i_v,
        HK, HV, V, STRIDE_K, STRIDE_Q, STRIDE_V,
    )  # fmt: skip
    p_out += (row * HV + i_h) * V + i_v * 64

    tiles = chunk_tiles(dtype, STAGES)
    s_k, s_q, s_v, s_inverse, s_scores, _, s_decay = tiles
    # Outputs on their way out; more than one tile only keeps other programs off this processor.
    s_out = gl.allocate_shared_memory(dtype, [OUT_TILES, BT, 64], TILE).index(0)

    o_v = gl.arange(0, 64, gl.SliceLayout(1, STATE))[:, None]
    o_k = gl.arange(0, K, gl.SliceLayout(0, STATE))[None, :]
    zeros = gl.full([64, BT], 0.0, gl.float32, TOKENS)
    if HAS_START:
        p_start = p_initial + (i_n.to(gl.int64) * HV + i_h) * (K * V) + i_v * 64
        b_state = gl.load(p_start + (o_k * V + o_v))
    else:
        b_state = gl.full([64, K], 0.0, gl.float32, STATE)
    b_rounded = gl.convert_layout(b_state.to(dtype), LEFT)
    for i_c in gl.static_range(STAGES - 1):
        copy_chunk(
            tiles, pointers, i_c, gl.to_tensor(i_c), length - i_c * BT,
            HV, STRIDE_K, STRIDE_Q, STRIDE_V,
        )  # fmt: skip

    i_now = 0
    b_out = zeros.to(dtype)
    for i_c in range((length + BT - 1) // BT):
        async_copy.wait_group(STAGES - 2)
        hopper.fence_async_shared()
        tl.debug_barrier()
        b_k = s_k.index(i_now)
        b_z = hopper.warpgroup_mma(
            b_rounded, b_k.permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        s_out.permute((1, 0)).store(b_out)
        i_later = i_c + STAGES - 1
        i_next = gl.where(i_now == 0, STAGES - 1, i_now - 1)  # the oldest chunk's place
        copy_chunk(
            tiles, pointers, i_next, i_later, length - i_later * BT,
            HV, STRIDE_K, STRIDE_Q, STRIDE_V,
        )  # fmt: skip
        store_rows(p_out - BT * HV * V, s_out, HV * V, gl.minimum(i_c * BT, BT), 64)
        b_v = s_v.index(i_now).permute((1, 0)).load(TOKENS)
        b_from_start = s_decay.index(i_now * 4).load(ALONG_T)[None, :]
        b_z, b_rounded = hopper.warpgroup_mma_wait(0, deps=[b_z, b_rounded])
        b_z = b_v.to(gl.float32) - b_z * b_from_start
        b_z = gl.convert_layout(b_z.to(dtype), LEFT)
        b_e = hopper.warpgroup_mma(
            b_z, s_inverse.index(i_now).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        b_o = hopper.warpgroup_mma(
            b_rounded, s_q.index(i_now).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        b_write = s_decay.index(i_now * 4 + 2).load(ALONG_T)[None, :]
        through = s_decay.index(i_now * 4).slice(BT - 1, 1).load(gl.SliceLayout(0, STATE))
        b_state *= through[None, :]
        b_e, b_z = hopper.warpgroup_mma_wait(1, deps=[b_e, b_z])
        b_written = gl.convert_layout((b_e * b_write).to(dtype), LEFT_STATE)
        b_state = hopper.warpgroup_mma(b_written, b_k, b_state, is_async=True)
        b_change = gl.convert_layout(b_e.to(dtype), LEFT)
        b_o, b_rounded = hopper.warpgroup_mma_wait(1, deps=[b_o, b_rounded])
        b_o = hopper.warpgroup_mma(
            b_change, s_scores.index(i_now).permute((1, 0)), b_o * b_from_start, is_async=True
        )
        b_state, b_written = hopper.warpgroup_mma_wait(1, deps=[b_state, b_written])
        b_rounded = gl.convert_layout(b_state.to(dtype), LEFT)
        b_o, b_change = hopper.warpgroup_mma_wait(0, deps=[b_o, b_change])
        b_out = b_o.to(dtype)
        i_now = gl.where(i_now == STAGES - 1, 0, i_now + 1)
        p_out += BT * HV * V

    async_copy.wait_group(0)
    rest = gl.where(length > 0, (length - 1) % BT + 1, 0)
    s_out.permute((1, 0)).store(b_out)
    store_rows(p_out - BT * HV * V, s_out, HV * V, rest, 64)
    if HAS_FINAL:
        p_end = p_final + (hidden(i_n).to(gl.int64) * HV + i_h) * (K * V) + i_v * 64
        gl.store(p_end + (o_k * V + o_v), b_state)


def scan_gluon(
    inputs: Inputs,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    out: torch.Tensor,
    final: torch.Tensor | None,
    *,
    is_alone: bool,
) -> None:
    """Launch the scan, which writes out and, if it is given, final.

    is_alone: no program of another kernel shares a processor with this one's.
    """
    num_key_heads, num_heads, _, value_dim = inputs.sizes
    q, k, v = inputs.q, inputs.k, inputs.v
    assert q is not None, "outputs without queries"

    def given(x: torch.Tensor | None) -> torch.Tensor:
        return v if x is None else x  # a pointer that the kernel never follows

    gated_delta_rule_gluon_fwd_kernel[(value_dim // COLUMNS * num_heads * inputs.num_seqs,)](
        *(q, k, v, chunks.inverse, chunks.scores, chunks.decay),
        *(inputs.cu_seqlens, chunks.first, given(initial_state), out, given(final)),
        STRIDE_Q=q.stride(0),
        STRIDE_K=k.stride(0),
        STRIDE_V=v.stride(0),
        HK=num_key_heads,
        HV=num_heads,
        V=value_dim,
        STAGES=STAGES,
        OUT_TILES=OUT_TILES if is_alone else 1,
        HAS_START=initial_state is not None,
        HAS_FINAL=final is not None,
        num_warps=4,
    )
