"""Pairs (token, rank) grouped by expert on a GPU, and the tiles that grouped products run over."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Up to this many pairs each program counts all of them itself, which saves a launch.
ONE_LAUNCH_PAIRS = 4096
# Each program of the second launch reads every span's counts: NUM_SPANS^2 * E integers in all.
NUM_SPANS = 128
BLOCK_PAIRS = 256
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

    span = BLOCK_PAIRS * triton.cdiv(triton.cdiv(num_pairs, BLOCK_PAIRS), NUM_SPANS)
    num_spans = triton.cdiv(num_pairs, span)
    table = PairTable(
        ints(num_pairs),
        ints(num_pairs),
        ints(num_experts + 1),
        ints(tile_room(num_pairs, num_experts), 3),
    )
    counts, rooms = ints(num_spans, num_experts), ints(num_spans, 3, num_experts)
    has_counts = num_pairs > ONE_LAUNCH_PAIRS
    width = triton.next_power_of_2(num_experts)
    if has_counts:
        count_pairs_kernel[(num_spans,)](
            top_ids, counts, num_pairs, span,
            E=num_experts, EP=width, BP=BLOCK_PAIRS, num_warps=8,
        )  # fmt: skip
    place_pairs_kernel[(num_spans,)](
        top_ids, counts, rooms, *table, num_pairs, span, num_spans, num_tiles,
        E=num_experts, EP=width, BP=BLOCK_PAIRS, BQ=16, BH=1024, BS=16, BT=16, BM=block_m,
        HAS_COUNTS=has_counts, num_warps=8,
    )  # fmt: skip
    return table


@triton.jit(do_not_specialize=["num_pairs", "span"])
def count_pairs_kernel(
    p_ids: "Any", p_counts: "Any", num_pairs: "Any", span: "Any",
    E: tl.constexpr, EP: tl.constexpr, BP: tl.constexpr,
) -> None:  # fmt: skip
    """Pairs of each expert within one span of pairs."""
    i_s = tl.program_id(0)
    end = tl.minimum((i_s + 1) * span, num_pairs)
    b_count = tl.zeros([EP], dtype=tl.int32)
    for p in range(i_s * span, end, BP):
        o_p = p + tl.arange(0, BP)
        b_id = tl.load(p_ids + o_p, mask=o_p < end, other=0).to(tl.int32)
        b_count += tl.histogram(b_id, EP, mask=o_p < end)
    o_e = tl.arange(0, EP)
    tl.store(p_counts + i_s * E + o_e, b_count, mask=o_e < E)


@triton.jit(do_not_specialize=["num_pairs", "span", "num_spans", "num_tiles"])
def place_pairs_kernel(
    p_ids: "Any", p_counts: "Any", p_rooms: "Any", p_order: "Any", p_inverse: "Any",
    p_starts: "Any", p_tiles: "Any", num_pairs: "Any", span: "Any", num_spans: "Any",
    num_tiles: "Any",
    E: tl.constexpr, EP: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr,
    BS: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, HAS_COUNTS: tl.constexpr,
) -> None:  # fmt: skip
    """Position of each pair of one span, and this program's share of the tiles."""
    i_s = tl.program_id(0)
    o_e = tl.arange(0, EP)
    b_total = tl.zeros([EP], dtype=tl.int32)
    b_before = tl.zeros([EP], dtype=tl.int32)  # pairs of earlier spans
    if HAS_COUNTS:
        for s in range(0, num_spans, BS):
            o_s = s + tl.arange(0, BS)
            m_s = (o_s[:, None] < num_spans) & (o_e[None, :] < E)
            b_c = tl.load(p_counts + o_s[:, None] * E + o_e[None, :], mask=m_s, other=0)
            b_total += tl.sum(b_c, 0)
            b_before += tl.sum(tl.where(o_s[:, None] < i_s, b_c, 0), 0)
    else:
        for p in range(0, num_pairs, BH):
            o_h = p + tl.arange(0, BH)
            b_h = tl.load(p_ids + o_h, mask=o_h < num_pairs, other=0).to(tl.int32)
            b_total += tl.histogram(b_h, EP, mask=o_h < num_pairs)
            b_before += tl.histogram(b_h, EP, mask=o_h < tl.minimum(i_s * span, num_pairs))
    b_start = tl.cumsum(b_total, 0) - b_total
    if i_s == 0:
        tl.store(p_starts + o_e, b_start, mask=o_e < E)
        tl.store(p_starts + E, num_pairs)

    # Per-expert values go through memory, where tiles and pairs can look them up by expert.
    p_own = p_rooms + i_s * 3 * E
    tl.store(p_own + o_e, b_start, mask=o_e < E)
    tl.store(p_own + E + o_e, b_start + b_total, mask=o_e < E)
    b_tile_end = tl.cumsum((b_total + BM - 1) // BM, 0)
    tl.store(p_own + 2 * E + o_e, b_tile_end, mask=o_e < E)
    tl.debug_barrier()
    for t in range(i_s * BT, num_tiles, num_spans * BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < num_tiles
        b_done = (b_tile_end[None, :] <= o_t[:, None]) & (o_e[None, :] < E)
        b_e = tl.minimum(tl.sum(b_done.to(tl.int32), 1), E - 1)
        b_end = tl.load(p_own + E + b_e)
        b_first = tl.load(p_own + b_e)
        b_num_tiles = (b_end - b_first + BM - 1) // BM
        # Past the last expert's tiles this lies past its rows, so that the tile is empty.
        b_first += (o_t - tl.load(p_own + 2 * E + b_e) + b_num_tiles) * BM
        tl.store(p_tiles + 3 * o_t, b_e, mask=m_t)
        tl.store(p_tiles + 3 * o_t + 1, b_first, mask=m_t)
        tl.store(p_tiles + 3 * o_t + 2, tl.minimum(b_first + BM, b_end), mask=m_t)
    tl.debug_barrier()

    b_next = b_start + b_before  # the next free place of each expert
    end = tl.minimum((i_s + 1) * span, num_pairs)
    for p in range(i_s * span, end, BP):
        tl.store(p_own + o_e, b_next, mask=o_e < E)
        tl.debug_barrier()
        o_p = p + tl.arange(0, BP)
        m_p = o_p < end
        b_id = tl.load(p_ids + o_p, mask=m_p, other=0).to(tl.int32)
        b_place = tl.load(p_own + b_id, mask=m_p, other=0)
        for q in range(0, BP, BQ):
            o_q = p + q + tl.arange(0, BQ)
            b_other = tl.load(p_ids + o_q, mask=o_q < end, other=0).to(tl.int32)
            is_earlier = (b_other[None, :] == b_id[:, None]) & (o_q[None, :] < o_p[:, None])
            b_place += tl.sum(is_earlier.to(tl.int32), 1)
        tl.store(p_order + b_place, o_p, mask=m_p)
        tl.store(p_inverse + o_p, b_place, mask=m_p)
        b_next += tl.histogram(b_id, EP, mask=m_p)
        tl.debug_barrier()
