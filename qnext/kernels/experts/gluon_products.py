"""Grouped products of the experts for many rows on Hopper: persistent programs with async copies.

A program of 8 warps takes one block [128, 256] of outputs after another. Its loads run some steps
ahead of the products, across the end of a block into the next one, so that the tensor cores wait
for memory once and not per block. Triton's kernels start every block with an empty pipeline.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qnext.kernels.experts.triton_config import Tile
from qnext.kernels.experts.triton_sort import PairTable, max_tiles
from qnext.kernels.gluon_copies import describe
from qnext.kernels.gpu_rows import num_processors

NUM_WARPS = 8
BM: gl.constexpr = gl.constexpr(128)  # rows of a tile
BN: gl.constexpr = gl.constexpr(256)  # columns of its sums: gate and up, or two parts of down
PART: gl.constexpr = gl.constexpr(128)  # columns that are loaded and stored at once
BK: gl.constexpr = gl.constexpr(64)  # 128 bytes of a row, the widest that shared memory swizzles


def takes(rows: torch.Tensor, num_columns: int, block_n: int, block_m: int, tile: Tile) -> bool:
    """Whether the kernel here can make a product of rows [.., depth], in blocks of block_n columns.

    They need the warpgroups and copies of compute capability 9, and whole blocks.
    """
    depth = rows.shape[-1]
    return (
        rows.device.type == "cuda"
        and torch.cuda.get_device_capability(rows.device)[0] == 9
        and rows.dtype in (torch.bfloat16, torch.float16)
        and (block_m, tile.block_n, tile.block_k) == (BM.value, block_n, BK.value)
        and tile.num_warps == NUM_WARPS
        and num_columns % block_n == 0
        and depth % BK.value == 0
        and depth >= BK.value * tile.num_stages
    )


def multiply_up(
    x: torch.Tensor, gate_up: torch.Tensor, table: PairTable, num_active: int, num_stages: int,
    saves_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `triton_products.multiply_up`, for blocks of 128 rows and 128 columns."""
    num_experts, double, size = gate_up.shape
    width, num_pairs = double // 2, table.order.shape[0]
    hidden = x.new_empty(num_pairs, width)
    pre = x.new_empty(num_pairs if saves_pre else 0, double)
    num_items = max_tiles(num_pairs, num_experts, BM.value) * (width // PART.value)
    out = describe(hidden, BM.value, PART.value)
    experts_persistent_kernel[(min(num_items, num_processors(x.device)),)](
        x, describe(gate_up.view(2 * num_experts, width, size), 2, PART.value, BK.value),
        table.order, table.tiles, num_items,
        out, hidden, describe(pre, BM.value, PART.value) if saves_pre else out, pre,
        N=width, K=size, A=num_active, IS_UP=True, SAVES_PRE=saves_pre, STAGES=num_stages,
        OUT_BUFFERS=1, num_warps=NUM_WARPS,
    )  # fmt: skip
    return hidden, pre


def multiply_rows(
    rows: torch.Tensor, weight: torch.Tensor, table: PairTable, num_stages: int
) -> torch.Tensor:
    """As `triton_products.multiply_rows`, for blocks of 128 rows and 256 columns."""
    num_pairs, depth = rows.shape
    num_experts, num_columns, _ = weight.shape
    slots = rows.new_empty(num_pairs, num_columns)
    num_items = max_tiles(num_pairs, num_experts, BM.value) * (num_columns // BN.value)
    out = describe(slots, BM.value, PART.value)
    experts_persistent_kernel[(min(num_items, num_processors(rows.device)),)](
        describe(rows, BM.value, BK.value),
        describe(weight.view(-1, PART.value, depth), 2, PART.value, BK.value),
        table.order, table.tiles, num_items, out, slots, out, slots,
        N=num_columns, K=depth, A=1, IS_UP=False, SAVES_PRE=False, STAGES=num_stages,
        OUT_BUFFERS=2 if num_stages <= 3 else 1, num_warps=NUM_WARPS,
    )  # fmt: skip
    return slots


@gluon.jit
def load_tile(
    p_tiles: tl.tensor, item: tl.tensor, num_items: tl.tensor, N: gl.constexpr, IS_UP: gl.constexpr
) -> tl.tensor:  # fmt: skip
    """First and end position of an item's tile, and the place of its weights; empty past the end.

    The weights are two parts of 128 rows: of gate and of up, which are matrices on their own here,
    or two neighbours of down, whose parts are.
    """
    NUM_N: gl.constexpr = N // PART if IS_UP else N // BN
    p_tile = p_tiles + 3 * (item // NUM_N)
    i_n = item % NUM_N
    is_there = item < num_items
    expert = gl.load(p_tile, mask=is_there, other=0)
    first = gl.load(p_tile + 1, mask=is_there, other=0)
    last = gl.load(p_tile + 2, mask=is_there, other=0)
    if IS_UP:
        return first, last, 2 * expert, i_n * PART
    else:
        return first, last, 2 * (expert * NUM_N + i_n), 0


@gluon.jit
def row_pointers(
    rows: tl.tensor, p_order: tl.tensor, first: tl.tensor, last: tl.tensor,
    K: gl.constexpr, A: gl.constexpr, IS_UP: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Start of the row of x at each position of a tile; of no use where rows are in order."""
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    if IS_UP:
        o_m = first + gl.arange(0, BM, gl.SliceLayout(1, GATHER))
        token = gl.load(p_order + o_m, mask=o_m < last, other=0) // A
        return rows + token.to(gl.int64) * K
    else:
        return first


@gluon.jit
def load_step(
    rows: tl.tensor, weight: tl.tensor, a: gl.shared_memory_descriptor,
    b: gl.shared_memory_descriptor, bars: gl.shared_memory_descriptor,
    tile: tl.tuple, p_rows: tl.tensor, k: tl.tensor, step: tl.tensor,
    IS_UP: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """Start the copies of a tile's rows and weights, columns from k on, for the step `step`.

    An empty tile's are none, and nobody waits for them.
    """
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    NUM_BYTES: gl.constexpr = BN * BK * 2 if IS_UP else (BN + BM) * BK * 2
    first, last, w_part, w_row = tile
    is_there = first < last
    stage = step % STAGES
    bar = bars.index(stage)
    mbarrier.expect(bar, NUM_BYTES, pred=is_there)
    tma.async_copy_global_to_shared(
        weight, [w_part, w_row, k], bar, b.index(stage), pred=is_there
    )  # fmt: skip
    if IS_UP:
        o_m = first + gl.arange(0, BM, gl.SliceLayout(1, GATHER))
        o_k = k + gl.arange(0, BK, gl.SliceLayout(0, GATHER))
        # Rows past `last` become zeros.
        async_copy.async_copy_global_to_shared(
            a.index(stage), p_rows[:, None] + o_k[None, :], mask=(o_m < last)[:, None]
        )
        async_copy.commit_group()
    else:
        # Rows past `last` are another expert's; they are not stored.
        tma.async_copy_global_to_shared(rows, [first, k], bar, a.index(stage), pred=is_there)


@gluon.jit
def multiply_step(
    acc: tl.tensor, a: gl.shared_memory_descriptor, b: gl.shared_memory_descriptor,
    bars: gl.shared_memory_descriptor, step: tl.tensor,
    ROWS: gl.constexpr, IS_UP: gl.constexpr, STAGES: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Wait for a step's copies, start its product, and wait for the product before it."""
    LAYOUT: gl.constexpr = a.layout
    stage = step % STAGES
    mbarrier.wait(bars.index(stage), (step // STAGES) & 1)
    if IS_UP:
        async_copy.wait_group(STAGES - 2)
        tl.debug_barrier()
        # Products read through another path than these copies wrote.
        fence_async_shared()
    both = b.index(stage).reshape([BN, BK])
    parts = a._reinterpret(a.dtype, [STAGES * (BM // ROWS), ROWS, BK], LAYOUT)
    sums = warpgroup_mma(
        parts.index(stage * (BM // ROWS)), both.permute((1, 0)), acc, is_async=True
    )
    acc = warpgroup_mma_wait(1, deps=[sums])
    # All warps' products of the step before are done: its memory is free.
    tl.debug_barrier()
    return acc


@gluon.jit
def multiply_tile(
    rows: tl.tensor, weight: tl.tensor, p_order: tl.tensor, a: gl.shared_memory_descriptor,
    b: gl.shared_memory_descriptor, bars: gl.shared_memory_descriptor,
    tile: tl.tuple, p_rows: tl.tensor, following: tl.tuple, step: tl.tensor,
    K: gl.constexpr, A: gl.constexpr, ROWS: gl.constexpr,
    IS_UP: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sums [ROWS, 256] of one tile, whose first copies are on their way, from `step` on.

    Starts the first copies of the tile that follows, whose rows' pointers are returned too.
    """
    NUM_STEPS: gl.constexpr = K // BK
    AHEAD: gl.constexpr = STAGES - 1
    acc = gl.zeros([ROWS, BN], gl.float32, LAYOUT)
    for i in range(NUM_STEPS - AHEAD):
        acc = multiply_step(acc, a, b, bars, step + i, ROWS, IS_UP, STAGES)
        load_step(
            rows, weight, a, b, bars, tile, p_rows, (i + AHEAD) * BK, step + i + AHEAD,
            IS_UP, STAGES,
        )  # fmt: skip
    step += NUM_STEPS - AHEAD
    p_next = row_pointers(rows, p_order, following[0], following[1], K, A, IS_UP)
    for i in range(AHEAD):
        acc = multiply_step(acc, a, b, bars, step + i, ROWS, IS_UP, STAGES)
        load_step(
            rows, weight, a, b, bars, following, p_next, i * BK, step + i + AHEAD,
            IS_UP, STAGES,
        )  # fmt: skip
    return warpgroup_mma_wait(0, deps=[acc]), p_next


@gluon.jit
def store_part(
    out: tl.tensor, p_out: tl.tensor, memory: gl.shared_memory_descriptor, value: tl.tensor,
    first: tl.tensor, last: tl.tensor, n: tl.tensor,
    WIDTH: gl.constexpr, ROWS: gl.constexpr, PENDING: gl.constexpr,
) -> None:  # fmt: skip
    """Rows first to last of `value`, as 128 columns from n on, by way of shared memory.

    A full tile is written by the copy engine while the program goes on. Others' next rows are
    another expert's, so that these are written by threads.
    """
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    LAYOUT: gl.constexpr = memory.layout
    value = value.to(memory.dtype)
    if ROWS == BM and last - first == BM:
        tma.store_wait(PENDING)
        tl.debug_barrier()
        memory.store(value)
        fence_async_shared()
        tl.debug_barrier()
        tma.async_copy_shared_to_global(out, [first, n], memory)
    else:
        part = memory._reinterpret(memory.dtype, [BM // ROWS, ROWS, PART], LAYOUT).index(0)
        # Without copies of this tile, buffers are no longer taken in turns.
        tma.store_wait(0)
        tl.debug_barrier()
        part.store(value)
        tl.debug_barrier()
        o_m = first + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
        o_n = n + gl.arange(0, PART, gl.SliceLayout(0, LINES))
        p_rows = p_out + o_m.to(gl.int64)[:, None] * WIDTH + o_n[None, :]
        gl.store(p_rows, part.load(LINES), mask=(o_m < last)[:, None])


@gluon.jit
def store_tile(
    acc: tl.tensor, out: tl.tensor, p_out: tl.tensor, pre: tl.tensor, p_pre: tl.tensor,
    memory: gl.shared_memory_descriptor, tile: tl.tuple, n: tl.tensor,
    N: gl.constexpr, ROWS: gl.constexpr, IS_UP: gl.constexpr, SAVES_PRE: gl.constexpr,
    BUFFERS: gl.constexpr,
) -> None:  # fmt: skip
    """SwiGLU of gate and up, or both parts of down, of one tile."""
    first, last, _, _ = tile
    left, right = gl.split(gl.permute(gl.reshape(acc, [ROWS, 2, PART]), (0, 2, 1)))
    own = memory.index(0)
    if IS_UP:
        if SAVES_PRE:
            store_part(pre, p_pre, own, left, first, last, n, 2 * N, ROWS, 0)
            store_part(pre, p_pre, own, right, first, last, N + n, 2 * N, ROWS, 0)
        hidden = left / (1.0 + gl.exp(-left)) * right
        store_part(out, p_out, own, hidden, first, last, n, N, ROWS, 0)
    else:
        other = memory.index(BUFFERS - 1)
        store_part(out, p_out, own, left, first, last, n, N, ROWS, BUFFERS - 1)
        store_part(out, p_out, other, right, first, last, n + PART, N, ROWS, BUFFERS - 1)


@gluon.jit
def run_tile(
    rows: tl.tensor, weight: tl.tensor, p_order: tl.tensor, a: gl.shared_memory_descriptor,
    b: gl.shared_memory_descriptor, bars: gl.shared_memory_descriptor,
    tile: tl.tuple, p_rows: tl.tensor, following: tl.tuple, step: tl.tensor,
    out: tl.tensor, p_out: tl.tensor, pre: tl.tensor, p_pre: tl.tensor,
    memory: gl.shared_memory_descriptor, n: tl.tensor,
    N: gl.constexpr, K: gl.constexpr, A: gl.constexpr, ROWS: gl.constexpr,
    IS_UP: gl.constexpr, SAVES_PRE: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products of one block and their stores, in ROWS rows; the following tile's row pointers."""
    acc, p_next = multiply_tile(
        rows, weight, p_order, a, b, bars, tile, p_rows, following, step,
        K, A, ROWS, IS_UP, STAGES, LAYOUT,
    )  # fmt: skip
    store_tile(
        acc, out, p_out, pre, p_pre, memory, tile, n, N, ROWS, IS_UP, SAVES_PRE, BUFFERS
    )  # fmt: skip
    return p_next


@gluon.jit(do_not_specialize=["num_items"])
def experts_persistent_kernel(
    rows: tl.tensor,
    weight: tl.tensor,
    p_order: tl.tensor,
    p_tiles: tl.tensor,
    num_items: tl.tensor,
    out: tl.tensor,
    p_out: tl.tensor,
    pre: tl.tensor,
    p_pre: tl.tensor,
    N: gl.constexpr,
    K: gl.constexpr,
    A: gl.constexpr,
    IS_UP: gl.constexpr,
    SAVES_PRE: gl.constexpr,
    STAGES: gl.constexpr,
    OUT_BUFFERS: gl.constexpr,
) -> None:
    """Blocks of gate and up with their SwiGLU, or of down, those of one tile side by side.

    Programs take blocks in turns, so at any time they work on neighbours, and find each other's
    rows and weights in the L2 cache. Tiles in use come first, and an empty one ends the work. An
    expert's last tile of at most 64 rows runs as half a tile, in half the time.
    """
    COLUMNS: gl.constexpr = PART if IS_UP else BN
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PARTS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    # A thread has gate and up of the same column in both: 64 columns at a time for each half.
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 256, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    dtype: gl.constexpr = p_out.dtype.element_ty
    a = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], LAYOUT)
    b = gl.allocate_shared_memory(dtype, [STAGES, 2, PART, BK], PARTS)
    memory = gl.allocate_shared_memory(dtype, [OUT_BUFFERS, BM, PART], LAYOUT)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    tl.debug_barrier()
    item = gl.program_id(0)
    tile = load_tile(p_tiles, item, num_items, N, IS_UP)
    p_rows = row_pointers(rows, p_order, tile[0], tile[1], K, A, IS_UP)
    for i in gl.static_range(STAGES - 1):
        load_step(rows, weight, a, b, bars, tile, p_rows, i * BK, i, IS_UP, STAGES)
    step = 0
    while tile[0] < tile[1]:
        n = item % (N // COLUMNS) * COLUMNS
        item += gl.num_programs(0)
        following = load_tile(p_tiles, item, num_items, N, IS_UP)
        if tile[1] - tile[0] <= BM // 2:
            p_rows = run_tile(
                rows, weight, p_order, a, b, bars, tile, p_rows, following, step,
                out, p_out, pre, p_pre, memory, n,
                N, K, A, BM // 2, IS_UP, SAVES_PRE, STAGES, OUT_BUFFERS, HALF,
            )  # fmt: skip
        else:
            p_rows = run_tile(
                rows, weight, p_order, a, b, bars, tile, p_rows, following, step,
                out, p_out, pre, p_pre, memory, n,
                N, K, A, BM, IS_UP, SAVES_PRE, STAGES, OUT_BUFFERS, WHOLE,
            )  # fmt: skip
        step += K // BK
        tile = following
    # The copies of what would have followed, and the last stores.
    if IS_UP:
        async_copy.wait_group(0)
    tma.store_wait(0)
