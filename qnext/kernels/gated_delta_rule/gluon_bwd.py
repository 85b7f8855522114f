"""Gradients inside chunks and of queries and keys, for 16-bit heads with K = V = 128.

One kernel instead of `gated_delta_rule_bwd_scores_kernel` and `..._bwd_key_kernel`: what belongs to
a chunk of a value head is read once. A program takes a whole multiprocessor, and one chunk after
another; while it works on a value head, the copy engine brings the next one's tiles to shared
memory. Keys and queries, of which there is one place, come while a chunk's first states are read.

All factors of products lie in shared memory. Where a tile lies is hidden from the compiler: it
would keep the addresses of all of them in registers through the loops. What then does not fit is
spilled to the second cache, since shared memory leaves next to nothing of the first.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from qnext.kernels.gated_delta_rule.gluon_tiles import hidden, store_rows
from qnext.kernels.gated_delta_rule.triton_chunks import CHUNK, DECAYS, Chunks, Inputs
from qnext.kernels.gluon_copies import describe
from qnext.kernels.gpu_rows import num_processors

COLUMNS = 128  # of keys and values
WARPS = 8  # two groups: each has half of every product's columns
TILE_BYTES: gl.constexpr = gl.constexpr(64 * 128 * 2)
STATE_ROWS: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))


@gluon.jit
def count_chunks(p_first: tl.tensor, p_cu_seqlens: tl.tensor, num_seqs: tl.tensor) -> tl.tensor:
    """Slots that have tokens: the first ones. A batch with room for more sequences has others."""
    p_last = p_cu_seqlens + num_seqs - 1
    length = gl.load(p_last + 1) - gl.load(p_last)
    return gl.load(p_first + num_seqs - 1) + (length + 63) // 64


@gluon.jit
def barriers(COUNT: gl.constexpr) -> gl.shared_memory_descriptor:
    """Barriers that wait for bytes, one for each place of a tile."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i_bar in gl.static_range(COUNT):
        mbarrier.init(bars.index(i_bar), count=1)
    return bars


@gluon.jit
def copy_state(
    states: tl.tensor, i_state: tl.tensor, bar: gl.shared_memory_descriptor,
    tile: gl.shared_memory_descriptor, is_there: tl.tensor,
) -> None:  # fmt: skip
    """Start copying a state [128, 128]."""
    mbarrier.expect(bar, 2 * TILE_BYTES, pred=is_there)
    tma.async_copy_global_to_shared(states, [i_state * 128, 0], bar, tile, pred=is_there)


@gluon.jit
def expect_tokens(bars: tl.tuple, i_stage: tl.tensor, is_there: tl.tensor) -> None:
    """Announce tiles. All of them before any is copied: each change of kind costs a wait."""
    for i_x in gl.static_range(len(bars)):
        mbarrier.expect(bars[i_x].index(i_stage), TILE_BYTES, pred=is_there)


@gluon.jit
def copy_tokens(
    tokens: tl.tuple, start: tl.tensor, i_h: tl.tensor, bars: tl.tuple, tiles: tl.tuple,
    i_stage: tl.tensor, is_there: tl.tensor,
) -> None:  # fmt: skip
    """Start copying 64 rows of a head of each of `tokens`."""
    for i_x in gl.static_range(len(tokens)):
        tma.async_copy_global_to_shared(
            tokens[i_x], [start, i_h * 128], bars[i_x].index(i_stage),
            tiles[i_x].index(i_stage), pred=is_there,
        )  # fmt: skip


@gluon.jit
def clear_behind(tiles: tl.tuple, rows: tl.tensor) -> None:
    """Zeros for all but the first `rows` rows: what was copied is another sequence's."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    if rows < 64:
        m_t = gl.arange(0, 64, gl.SliceLayout(1, ROWS)) < rows
        for i_x in gl.static_range(len(tiles)):
            b_x = gl.where(m_t[:, None], tiles[i_x].load(ROWS), 0.0)
            tiles[i_x].store(b_x.to(tiles[i_x].dtype))
        hopper.fence_async_shared()
        tl.debug_barrier()


@gluon.jit
def copy_decays(tile: gl.shared_memory_descriptor, p_rows: tl.tensor) -> None:
    """Start copying rows of 64 decays."""
    NUM_ROWS: gl.constexpr = tile.shape[0]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [NUM_ROWS, 8 // NUM_ROWS], [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    o_r = gl.arange(0, NUM_ROWS, gl.SliceLayout(1, ROWS))[:, None]
    o_t = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    whole = tile._reinterpret(gl.float32, [NUM_ROWS, 64], PLAIN)
    async_copy.async_copy_global_to_shared(whole, p_rows + (o_r * 64 + o_t))


@gluon.jit
def decay_between(
    s_high: gl.shared_memory_descriptor, s_low: gl.shared_memory_descriptor, PAIRS: gl.constexpr
) -> tl.tensor:
    """e^(G_i - G_j) for j <= i, else 0, of the two words of G. [64, 64]"""
    ALONG_I: gl.constexpr = gl.SliceLayout(1, PAIRS)
    ALONG_J: gl.constexpr = gl.SliceLayout(0, PAIRS)
    m_pairs = gl.arange(0, 64, ALONG_I)[:, None] >= gl.arange(0, 64, ALONG_J)[None, :]
    b_high = s_high.load(ALONG_I)[:, None] - s_high.load(ALONG_J)[None, :]
    b_low = s_low.load(ALONG_I)[:, None] - s_low.load(ALONG_J)[None, :]
    return gl.exp(gl.where(m_pairs, b_high + b_low, float("-inf")))


@gluon.jit
def inner_of_states(
    s_state: gl.shared_memory_descriptor, s_dstate: gl.shared_memory_descriptor
) -> tl.tensor:
    """Parts of <S_0, dS_L>, [64]: their sum is what counts, not which values pair up where."""
    TILE: gl.constexpr = s_state.layout
    state = s_state._reinterpret(s_state.dtype, [4, 64, 64], TILE)
    dstate = s_dstate._reinterpret(s_state.dtype, [4, 64, 64], TILE)
    b_sum = gl.full([64, 64], 0.0, gl.float32, STATE_ROWS)
    for i_part in gl.static_range(4):
        b_state = state.index(i_part).load(STATE_ROWS).to(gl.float32)
        b_sum += b_state * dstate.index(i_part).load(STATE_ROWS).to(gl.float32)
    return gl.sum(b_sum, axis=1)


@gluon.jit
def state_products(
    dout: gl.shared_memory_descriptor, dz: gl.shared_memory_descriptor,
    state: gl.shared_memory_descriptor, WIDE: gl.constexpr,
) -> tl.tuple:  # fmt: skip
    """dO S_0^T and dZ S_0^T. [64, 128]"""
    zeros = gl.full([64, 128], 0.0, gl.float32, WIDE)
    columns = state.permute((1, 0))
    b_read = hopper.warpgroup_mma(dout, columns, zeros, use_acc=False, is_async=True)
    b_erase = hopper.warpgroup_mma(dz, columns, zeros, use_acc=False, is_async=True)
    b_read, b_erase = hopper.warpgroup_mma_wait(0, deps=[b_read, b_erase])
    return b_read, b_erase


@gluon.jit
def add_pairs(
    b_dq: tl.tensor, b_dk: tl.tensor, tiles: tl.tuple, pairs: tl.tuple,
    s_decay: gl.shared_memory_descriptor, s_more: gl.shared_memory_descriptor,
    p_sum: tl.tensor, PAIRS: gl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Add to dq and dk what pairs of tokens inside the chunk give; store the sums of C.

    pairs: tiles for R and X times diag(beta), in the place of dO, which nothing reads after R.
    """
    q, k, dout, dz, change = tiles
    s_r, s_x = pairs
    dtype: gl.constexpr = q.dtype
    zeros = gl.full([64, 64], 0.0, gl.float32, PAIRS)
    o_i = gl.arange(0, 64, gl.SliceLayout(1, PAIRS))
    o_j = gl.arange(0, 64, gl.SliceLayout(0, PAIRS))
    change_columns, k_columns = change.permute((1, 0)), k.permute((1, 0))
    b_r = hopper.warpgroup_mma(dout, change_columns, zeros, use_acc=False, is_async=True)
    b_qk = hopper.warpgroup_mma(q, k_columns, zeros, use_acc=False, is_async=True)
    b_x = hopper.warpgroup_mma(dz, change_columns, zeros, use_acc=False, is_async=True)
    b_kk = hopper.warpgroup_mma(k, k_columns, zeros, use_acc=False, is_async=True)
    b_beta = s_more.index(1).load(gl.SliceLayout(0, PAIRS))[None, :]
    b_decay = decay_between(s_decay.index(3), s_more.index(0), PAIRS)
    b_r, b_qk = hopper.warpgroup_mma_wait(2, deps=[b_r, b_qk])
    b_r *= b_decay
    b_c = b_r * b_qk
    b_x, b_kk = hopper.warpgroup_mma_wait(0, deps=[b_x, b_kk])
    b_x *= gl.where(o_i[:, None] > o_j[None, :], -b_decay, 0.0)
    b_c += b_x * b_kk
    tl.debug_barrier()
    s_r.store((b_r * b_beta).to(dtype))
    s_x.store((b_x * b_beta).to(dtype))
    hopper.fence_async_shared()
    tl.debug_barrier()
    b_dq = hopper.warpgroup_mma(s_r, k, b_dq, is_async=True)
    b_dk = hopper.warpgroup_mma(s_r.permute((1, 0)), q, b_dk, is_async=True)
    b_dk = hopper.warpgroup_mma(s_x, k, b_dk, is_async=True)
    b_dk = hopper.warpgroup_mma(s_x.permute((1, 0)), k, b_dk, is_async=True)
    gl.store(p_sum + o_i, gl.sum(b_c * b_beta, axis=1))
    gl.store(p_sum + 64 + o_j, gl.sum(b_c, axis=0))
    b_dq, b_dk = hopper.warpgroup_mma_wait(0, deps=[b_dq, b_dk])
    return b_dq, b_dk


@gluon.jit(
    do_not_specialize=["num_seqs"],
    do_not_specialize_on_alignment=["p_table", "p_first", "p_cu_seqlens"],
)
def gated_delta_rule_gluon_bwd_kernel(
    q: tl.tensor,
    k: tl.tensor,
    dout: tl.tensor,
    dv: tl.tensor,
    change: tl.tensor,
    states: tl.tensor,
    dstates: tl.tensor,
    p_decay: tl.tensor,
    p_table: tl.tensor,
    p_first: tl.tensor,
    p_cu_seqlens: tl.tensor,
    p_dq: tl.tensor,
    p_dk: tl.tensor,
    p_sums: tl.tensor,
    p_parts: tl.tensor,
    num_seqs: tl.tensor,
    HK: gl.constexpr,
    HV: gl.constexpr,
) -> None:
    """dq and dk of chunks and key heads, and what they give to G and beta."""
    K: gl.constexpr = 128
    GROUP: gl.constexpr = HV // HK
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    PAIRS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ALONG_K: gl.constexpr = gl.SliceLayout(1, WIDE)
    ALONG_V: gl.constexpr = gl.SliceLayout(1, STATE_ROWS)
    dtype: gl.constexpr = p_dk.dtype.element_ty
    s_q = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
    s_k = gl.allocate_shared_memory(dtype, [1, 64, K], TILE)
    s_dout = gl.allocate_shared_memory(dtype, [2, 64, K], TILE)
    s_dz = gl.allocate_shared_memory(dtype, [2, 64, K], TILE)
    s_change = gl.allocate_shared_memory(dtype, [2, 64, K], TILE)
    s_states = gl.allocate_shared_memory(dtype, [2, K, K], TILE)
    s_pairs = s_dout._reinterpret(dtype, [4, 64, 64], TILE)
    s_decay = gl.allocate_shared_memory(gl.float32, [4, 64], PLAIN)
    s_more = gl.allocate_shared_memory(gl.float32, [2, 64], PLAIN)
    key_bars = (barriers(1), barriers(1))
    token_bars = (barriers(2), barriers(2), barriers(2))
    state_bar, dstate_bar = barriers(1).index(0), barriers(1).index(0)
    hopper.fence_async_shared()
    tl.debug_barrier()
    keys, key_tiles = (q, k), (s_q, s_k)
    tokens, token_tiles = (dout, dv, change), (s_dout, s_dz, s_change)

    o_i = gl.arange(0, 64, ALONG_K)
    o_part = gl.arange(0, 64, ALONG_V)
    zeros = gl.full([64, K], 0.0, gl.float32, WIDE)
    num_items = count_chunks(p_first, p_cu_seqlens, num_seqs) * HK
    first, step = gl.program_id(0), gl.num_programs(0)
    has_any = first < num_items
    start = gl.load(p_table + 2 * (first // HK))
    i_state = first // HK * HV + first % HK * GROUP
    expect_tokens(token_bars, 0, has_any)
    copy_tokens(tokens, start, first % HK * GROUP, token_bars, token_tiles, 0, has_any)
    copy_state(dstates, i_state, dstate_bar, s_states.index(1), has_any)
    copy_state(states, i_state, state_bar, s_states.index(0), has_any)
    next_item = first + 1 // GROUP * step
    next_start = gl.load(p_table + 2 * (next_item // HK), mask=next_item < num_items, other=0)

    i_head = 0  # of this program's
    for item in range(first, num_items, step):
        i_slot = item // HK
        i_hk = item % HK
        start = gl.load(p_table + 2 * i_slot)
        rows = gl.load(p_table + 2 * i_slot + 1) - start
        b_dq = zeros
        b_dk = zeros
        for i_g in range(GROUP):
            next_item = first + (i_head + 1) // GROUP * step
            next_h = next_item % HK * GROUP + (i_head + 1) % GROUP
            next_state = next_item // HK * HV + next_h
            has_next = next_item < num_items
            is_first = i_g == 0
            # All warps are past what the next tiles replace.
            hopper.fence_async_shared()
            tl.debug_barrier()
            i_next = (i_head + 1) & 1
            expect_tokens(key_bars, 0, is_first)
            expect_tokens(token_bars, i_next, has_next)
            copy_tokens(keys, start, i_hk, key_bars, key_tiles, 0, is_first)
            copy_tokens(tokens, next_start, next_h, token_bars, token_tiles, i_next, has_next)
            i_row = (i_slot.to(gl.int64) * HV + i_hk * GROUP + i_g) * 64
            p_rows = p_decay + DECAYS * i_row
            copy_decays(s_decay, p_rows)
            copy_decays(s_more, p_rows + 4 * 64)
            async_copy.commit_group()

            i_now = hidden(i_head & 1)
            i_zero = hidden(gl.to_tensor(0))
            t_q, t_k = s_q.index(i_zero), s_k.index(i_zero)
            t_dout, t_dz, t_change = s_dout.index(i_now), s_dz.index(i_now), s_change.index(i_now)
            for i_x in gl.static_range(3):
                mbarrier.wait(token_bars[i_x].index(i_head & 1), (i_head >> 1) & 1)
            clear_behind((t_dout, t_dz, t_change), rows)

            pairs = (s_pairs.index(2 * i_now), s_pairs.index(2 * i_now + 1))
            s_state, s_dstate = s_states.index(i_zero), s_states.index(i_zero + 1)
            mbarrier.wait(dstate_bar, i_head & 1)
            b_write = hopper.warpgroup_mma(
                t_change, s_dstate.permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            mbarrier.wait(state_bar, i_head & 1)
            b_inner = inner_of_states(s_state, s_dstate)
            b_write = hopper.warpgroup_mma_wait(0, deps=[b_write])
            hopper.fence_async_shared()
            tl.debug_barrier()
            copy_state(dstates, next_state, dstate_bar, s_dstate, has_next)
            after = first + (i_head + 2) // GROUP * step
            next_start = gl.load(p_table + 2 * (after // HK), mask=after < num_items, other=0)

            for i_x in gl.static_range(2):
                mbarrier.wait(key_bars[i_x].index(0), i_head // GROUP & 1)
            async_copy.wait_group(0)
            tl.debug_barrier()
            clear_behind((t_q, t_k), rows)
            p_part = p_parts + i_row * 3
            gl.store(p_part + 128 + o_part, b_inner * s_decay.index(0).slice(63, 1).load(ALONG_V))
            b_sum = gl.sum(b_write * t_k.load(WIDE).to(gl.float32), axis=1)
            gl.store(p_part + 64 + o_i, b_sum * s_decay.index(1).load(ALONG_K))
            b_dk += b_write * s_decay.index(2).load(ALONG_K)[:, None]
            b_read, b_erase = state_products(t_dout, t_dz, s_state, WIDE)
            tl.debug_barrier()
            copy_state(states, next_state, state_bar, s_state, has_next)
            b_from_start = s_decay.index(0).load(ALONG_K)
            b_sum = b_read * t_q.load(WIDE).to(gl.float32)
            b_sum -= b_erase * t_k.load(WIDE).to(gl.float32)
            gl.store(p_part + o_i, gl.sum(b_sum, axis=1) * b_from_start)
            b_dq += b_read * b_from_start[:, None]
            b_dk -= b_erase * b_from_start[:, None]
            b_dq, b_dk = add_pairs(
                b_dq, b_dk, (t_q, t_k, t_dout, t_dz, t_change), pairs, s_decay, s_more,
                p_sums + i_row * 2, PAIRS,
            )  # fmt: skip
            i_head += 1

        # By way of tiles that are done with.
        tl.debug_barrier()
        i_now = hidden((i_head - 1) & 1)
        s_dq, s_dk = s_dz.index(i_now), s_change.index(i_now)
        s_dq.store(b_dq.to(dtype))
        s_dk.store(b_dk.to(dtype))
        tl.debug_barrier()
        o_grad = (hidden(start).to(gl.int64) * HK + i_hk) * K
        store_rows(p_dq + o_grad, s_dq, HK * K, rows, K)
        store_rows(p_dk + o_grad, s_dk, HK * K, rows, K)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[N, ...] as [N, C], where each of N lies together."""
    width = x[0].numel()
    stride = x.stride(0) if x.shape[0] > 1 else width  # one row may have any
    return x.as_strided((x.shape[0], width), (stride, 1))


def takes(inputs: Inputs, dout: torch.Tensor) -> bool:
    """Whether the kernel runs where `kernels` names Gluon: V is 128, and no token's rows overlap.

    The copy engine wants 16-byte aligned rows; `kernels` has seen to those of the inputs.
    """
    apart = all(x.stride(0) >= x[0].numel() for x in (inputs.q, inputs.k) if x is not None)
    return inputs.sizes[3] == COLUMNS and apart and dout.data_ptr() % 16 == 0


def key_gradients_gluon(
    inputs: Inputs,
    chunks: Chunks,
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    states: tuple[torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `key_gradients_triton`, in one kernel."""
    num_key_heads, num_heads, _, _ = inputs.sizes
    assert inputs.q is not None, "gradients without queries"
    sums = inputs.g.new_empty(1, inputs.num_slots, num_heads, 2, CHUNK)
    parts = inputs.g.new_empty(1, inputs.num_slots, num_heads, 3, CHUNK)
    num_items = inputs.num_slots * num_key_heads
    gated_delta_rule_gluon_bwd_kernel[(min(num_processors(inputs.k.device), num_items),)](
        *(describe(rows_of(x), CHUNK, COLUMNS) for x in (inputs.q, inputs.k, *tokens)),
        *(describe(x.view(-1, COLUMNS), COLUMNS, COLUMNS) for x in states),
        *(chunks.decay, chunks.table, chunks.first, inputs.cu_seqlens, *grads, sums, parts),
        inputs.num_seqs,
        HK=num_key_heads,
        HV=num_heads,
        num_warps=WARPS,
    )
    return sums, parts
