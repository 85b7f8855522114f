"""Pairs (token, rank) grouped by expert on a GPU, and the tiles that grouped products run over."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Up to this many pairs each program counts all of them itself, which saves two launches.
ONE_LAUNCH_PAIRS = 4096
# Pairs whose ranks are found by comparing all with all, and most spans that pairs are split into:
# a span's counts are written, summed over spans and read again.
BLOCK_PAIRS = 128
NUM_SPANS = 640
SUMMED_SPANS = 256  # at a time
MIN_BLOCK_M = 16


class PairTable(NamedTuple):
    """Where the pairs of each expert lie once sorted; a position is a row of the sorted order.

    Attributes:
        order: pair at each position; token is pair // A. [T * A], int32
        inverse: position of each pair. [T * A], int32
        starts: first position of each expert, then T * A. [E + 1], int32
        tiles: expert, first position and end position of each tile. Of the unused ones those that
            a grid reaches are empty, and the others are not written. [tile_room, 3], int32
    """

    order: torch.Tensor
    inverse: torch.Tensor
    starts: torch.Tensor
    tiles: torch.Tensor


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Most tiles of block_m rows that num_pairs pairs can need, whatever their experts."""
    return min(num_pairs, num_pairs // block_m + num_experts)


def tile_room(num_pairs: int, num_experts: int) -> int:
    """Tiles that a table has room for: a plain sum, the same for all numbers of rows to a tile."""
    return num_pairs // MIN_BLOCK_M + num_experts


def sort_pairs(top_ids: torch.Tensor, num_experts: int, block_m: int) -> PairTable:
    """Group pairs by expert, in ascending order within one; nothing goes through the host.

    Args:
        top_ids: contiguous. [T, A], int64
        num_experts: E.
        block_m: rows of a tile, which holds pairs of one expert only; at least MIN_BLOCK_M.
    """
    num_pairs, device = top_ids.numel(), top_ids.device
    num_tiles = max_tiles(num_pairs, num_experts, block_m)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    has_counts = num_pairs > ONE_LAUNCH_PAIRS
    num_blocks = triton.cdiv(num_pairs, BLOCK_PAIRS)
    span = BLOCK_PAIRS * (triton.cdiv(num_blocks, NUM_SPANS) if has_counts else 1)
    num_spans = triton.cdiv(num_pairs, span)
    table = PairTable(
        ints(num_pairs),
        ints(num_pairs),
        ints(num_experts + 1),
        ints(tile_room(num_pairs, num_experts), 3),
    )
    counts = ints(num_spans + 1 if has_counts else 0, num_experts)
    width = max(16, triton.next_power_of_2(num_experts))
    if has_counts:
        rank_pairs_kernel[(num_spans,)](
            top_ids, counts, table.inverse, num_pairs, span,
            E=num_experts, EP=width, BP=BLOCK_PAIRS, num_warps=4,
        )  # fmt: skip
        sum_counts_kernel[(triton.cdiv(num_experts, 8),)](
            counts, num_spans, E=num_experts, BE=8, BS=SUMMED_SPANS, num_warps=4
        )
    place_pairs_kernel[(num_spans,)](
        top_ids, counts, *table, num_pairs, span, num_spans, num_tiles,
        E=num_experts, EP=width, BP=BLOCK_PAIRS, BH=1024, BT=16, BM=block_m,
        HAS_COUNTS=has_counts, num_warps=4,
    )  # fmt: skip
    return table


@triton.jit
def ranks_in_block(
    p_ids: "Any", b_id: "Any", p: "Any", end: "Any", BP: tl.constexpr
) -> "Any":  # fmt: skip
    """How many pairs of the block from p on are of a pair's expert and come before it."""
    o_p = p + tl.arange(0, BP)
    b_rank = tl.zeros([BP], dtype=tl.int32)
    for q in tl.static_range(0, BP, 32):
        o_q = p + q + tl.arange(0, 32)
        b_other = tl.load(p_ids + o_q, mask=o_q < end, other=0).to(tl.int32)
        is_earlier = (b_other[None, :] == b_id[:, None]) & (o_q[None, :] < o_p[:, None])
        b_rank += tl.sum(is_earlier.to(tl.int32), 1)
    return b_rank


@triton.jit(do_not_specialize=["num_pairs", "span"])
def rank_pairs_kernel(
    p_ids: "Any", p_counts: "Any", p_ranks: "Any", num_pairs: "Any", span: "Any",
    E: tl.constexpr, EP: tl.constexpr, BP: tl.constexpr,
) -> None:  # fmt: skip
    """Each pair's rank among the pairs of its expert within one span, and their number."""
    i_s = tl.program_id(0)
    end = tl.minimum((i_s + 1) * span, num_pairs)
    b_count = tl.zeros([EP], dtype=tl.int32)
    for p in range(i_s * span, end, BP):
        o_p = p + tl.arange(0, BP)
        b_id = tl.load(p_ids + o_p, mask=o_p < end, other=0).to(tl.int32)
        b_rank = tl.gather(b_count, b_id, 0) + ranks_in_block(p_ids, b_id, p, end, BP)
        tl.store(p_ranks + o_p, b_rank, mask=o_p < end)
        b_count += tl.histogram(b_id, EP, mask=o_p < end)
    o_e = tl.arange(0, EP)
    tl.store(p_counts + i_s * E + o_e, b_count, mask=o_e < E)


@triton.jit(do_not_specialize=["num_spans"])
def sum_counts_kernel(
    p_counts: "Any", num_spans: "Any", E: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr
) -> None:
    """Counts of BE experts become those of the spans before; behind the last span, of all."""
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    b_sum = tl.zeros([BE], dtype=tl.int32)
    for s in range(0, num_spans, BS):
        o_s = s + tl.arange(0, BS)
        p_block = p_counts + o_s[:, None] * E + o_e[None, :]
        mask = (o_s[:, None] < num_spans) & (o_e[None, :] < E)
        b_count = tl.load(p_block, mask=mask, other=0)
        tl.store(p_block, b_sum[None, :] + tl.cumsum(b_count, 0) - b_count, mask=mask)
        b_sum += tl.sum(b_count, 0)
    tl.store(p_counts + num_spans * E + o_e, b_sum, mask=o_e < E)


@triton.jit
def store_tiles(
    p_tiles: "Any", b_start: "Any", b_total: "Any", i_s: "Any", num_spans: "Any", num_tiles: "Any",
    E: tl.constexpr, EP: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
) -> None:  # fmt: skip
    """This program's share of the tiles."""
    o_e = tl.arange(0, EP)
    b_num_tiles = (b_total + BM - 1) // BM
    b_tile_end = tl.cumsum(b_num_tiles, 0)
    b_end = b_start + b_total
    for t in range(i_s * BT, num_tiles, num_spans * BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < num_tiles
        b_done = (b_tile_end[None, :] <= o_t[:, None]) & (o_e[None, :] < E)
        b_e = tl.minimum(tl.sum(b_done.to(tl.int32), 1), E - 1)
        b_tile = o_t - tl.gather(b_tile_end - b_num_tiles, b_e, 0)
        # Past the last expert's tiles this lies past its rows, so that the tile is empty.
        b_first = tl.gather(b_start, b_e, 0) + b_tile * BM
        b_last = tl.minimum(b_first + BM, tl.gather(b_end, b_e, 0))
        tl.store(p_tiles + 3 * o_t, b_e, mask=m_t)
        tl.store(p_tiles + 3 * o_t + 1, b_first, mask=m_t)
        tl.store(p_tiles + 3 * o_t + 2, b_last, mask=m_t)


@triton.jit(do_not_specialize=["num_pairs", "span", "num_spans", "num_tiles"])
def place_pairs_kernel(
    p_ids: "Any", p_counts: "Any", p_order: "Any", p_inverse: "Any", p_starts: "Any",
    p_tiles: "Any", num_pairs: "Any", span: "Any", num_spans: "Any", num_tiles: "Any",
    E: tl.constexpr, EP: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
    BM: tl.constexpr, HAS_COUNTS: tl.constexpr,
) -> None:  # fmt: skip
    """Position of each pair of one span, and this program's share of the tiles.

    With HAS_COUNTS p_inverse holds each pair's rank within its span; else a span is one block.
    """
    i_s = tl.program_id(0)
    o_e = tl.arange(0, EP)
    if HAS_COUNTS:
        b_before = tl.load(p_counts + i_s * E + o_e, mask=o_e < E, other=0)
        b_total = tl.load(p_counts + num_spans * E + o_e, mask=o_e < E, other=0)
    else:
        b_total = tl.zeros([EP], dtype=tl.int32)
        b_before = tl.zeros([EP], dtype=tl.int32)
        for p in range(0, num_pairs, BH):
            o_h = p + tl.arange(0, BH)
            b_h = tl.load(p_ids + o_h, mask=o_h < num_pairs, other=0).to(tl.int32)
            b_total += tl.histogram(b_h, EP, mask=o_h < num_pairs)
            b_before += tl.histogram(b_h, EP, mask=o_h < tl.minimum(i_s * span, num_pairs))
    b_start = tl.cumsum(b_total, 0) - b_total
    if i_s == 0:
        tl.store(p_starts + o_e, b_start, mask=o_e < E)
        tl.store(p_starts + E, num_pairs)
    b_place = b_start + b_before  # of a span's first pair of each expert
    end = tl.minimum((i_s + 1) * span, num_pairs)
    for p in range(i_s * span, end, BP):
        o_p = p + tl.arange(0, BP)
        m_p = o_p < end
        b_id = tl.load(p_ids + o_p, mask=m_p, other=0).to(tl.int32)
        if HAS_COUNTS:
            b_rank = tl.load(p_inverse + o_p, mask=m_p, other=0)
        else:
            b_rank = ranks_in_block(p_ids, b_id, p, end, BP)
        b_rank += tl.gather(b_place, b_id, 0)
        tl.store(p_order + b_rank, o_p, mask=m_p)
        tl.store(p_inverse + o_p, b_rank, mask=m_p)
    store_tiles(p_tiles, b_start, b_total, i_s, num_spans, num_tiles, E, EP, BT, BM)
