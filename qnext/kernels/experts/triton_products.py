"""Grouped products over rows sorted by expert, and the sum of each token's rows."""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qnext.kernels.experts.triton_config import Tile
from qnext.kernels.experts.triton_sort import PairTable, max_tiles
from qnext.kernels.gpu_rows import IS_INTERPRETED

# Gluon compiles for GPUs only, and its names were others in older releases.
HAS_GLUON = not IS_INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
if HAS_GLUON:
    from qnext.kernels.experts import gluon_products


def precision_of(rows: torch.Tensor) -> str:
    """Input precision of tl.dot: fp32 rows multiply as fp32; others are exact either way."""
    return "ieee" if rows.dtype == torch.float32 else "tf32"


def fits_descriptors(dtype: torch.dtype, *sizes_and_blocks: tuple[int, int]) -> bool:
    """Whether the copy engine can load whole blocks of these (size, block) pairs.

    Sizes that are not multiples of the blocks would make a block reach into the next expert.
    """
    is_whole = all(size % block == 0 for size, block in sizes_and_blocks)
    return is_whole and dtype != torch.float32


def describe(matrix: torch.Tensor, *block: int) -> TensorDescriptor:
    """Descriptor of a contiguous tensor's rows as one matrix, for loads of `block`."""
    return TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), list(block))


def multiply_up(
    x: torch.Tensor, gate_up: torch.Tensor, table: PairTable, num_active: int,
    block_m: int, tile: Tile, saves_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Hidden rows silu(gate_e x) * up_e x at sorted positions, and what went into them.

    Args:
        x: contiguous rows. [T, C]
        gate_up: contiguous, in the dtype of x. [E, 2I, C]
        saves_pre: store the gate's and up's outputs too, for the backward pass.

    Returns:
        Hidden [T * A, I]; gate and up outputs [T * A, 2I], or an empty tensor.
    """
    num_experts, double, size = gate_up.shape
    width, num_pairs = double // 2, table.order.shape[0]
    if tile.is_persistent and HAS_GLUON and gluon_products.takes(x, width, 128, block_m, tile):
        return gluon_products.multiply_up(x, gate_up, table, num_active, tile.num_stages, saves_pre)
    hidden = x.new_empty(num_pairs, width)
    pre = x.new_empty(num_pairs if saves_pre else 0, double)
    use_tma = fits_descriptors(x.dtype, (width, tile.block_n), (size, tile.block_k))
    num_tiles = max_tiles(num_pairs, num_experts, block_m)
    experts_up_fwd_kernel[(num_tiles * triton.cdiv(width, tile.block_n),)](
        x, describe(gate_up, tile.block_n, tile.block_k) if use_tma else gate_up,
        table.order, table.tiles, hidden, pre,
        C=size, I=width, A=num_active, BM=block_m, BN=tile.block_n, BK=tile.block_k,
        USE_TMA=use_tma, SAVES_PRE=saves_pre, PRECISION=precision_of(x),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return hidden, pre


def multiply_rows(
    rows: torch.Tensor, weight: torch.Tensor, table: PairTable, block_m: int, tile: Tile,
    is_transposed: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rows at sorted positions times their experts' weights.

    Args:
        rows: contiguous. [T * A, K]
        weight: contiguous, in the dtype of rows; its last dimension is summed over. [E, N, K]
        is_transposed: the weight is [E, K, N], and its middle dimension is summed over.

    Returns:
        [T * A, N]
    """
    num_pairs, depth = rows.shape
    num_columns = weight.shape[2] if is_transposed else weight.shape[1]
    if tile.is_persistent and HAS_GLUON and not is_transposed:
        if gluon_products.takes(rows, num_columns, 256, block_m, tile):
            return gluon_products.multiply_rows(rows, weight, table, tile.num_stages)
    out = rows.new_empty(num_pairs, num_columns)
    use_tma = fits_descriptors(rows.dtype, (num_columns, tile.block_n), (depth, tile.block_k))
    block = (tile.block_k, tile.block_n) if is_transposed else (tile.block_n, tile.block_k)
    num_tiles = max_tiles(num_pairs, weight.shape[0], block_m)
    experts_rows_kernel[(num_tiles * triton.cdiv(num_columns, tile.block_n),)](
        describe(rows, block_m, tile.block_k) if use_tma else rows,
        describe(rows, block_m // 2, tile.block_k) if use_tma else rows,
        describe(weight, *block) if use_tma else weight,
        table.tiles, out,
        N=num_columns, K=depth, BM=block_m, BN=tile.block_n, BK=tile.block_k,
        USE_TMA=use_tma, IS_TRANSPOSED=is_transposed, PRECISION=precision_of(rows),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def combine(
    slots: torch.Tensor,
    inverse: torch.Tensor,
    num_active: int,
    top_weights: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum each token's rows in the order of their ranks, in fp32, weighted where weights are given.

    Args:
        slots: rows at sorted positions. [T * A, C]
        inverse: position of each pair. [T * A]
        top_weights: [T, A]
        shared: rows added behind a sigmoid gate in the same pass. [T, C]
        shared_gate: logits of that gate. [T, 1]

    Returns:
        [T, C] in the dtype of slots.
    """
    num_tokens, size = slots.shape[0] // num_active, slots.shape[1]
    out = slots.new_empty(num_tokens, size)
    # A program per token fills the GPU only where there are many.
    block = min(triton.next_power_of_2(size), 2048 if num_tokens >= 1024 else 512)
    experts_combine_kernel[(num_tokens, triton.cdiv(size, block))](
        slots, inverse, top_weights, shared, shared_gate, out,
        C=size, A=num_active, BC=block, HAS_WEIGHTS=top_weights is not None,
        HAS_SHARED=shared is not None, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out


@triton.jit
def load_weight(
    weight: "Any", expert: "Any", n: "Any", k: "Any",
    N: tl.constexpr, K: tl.constexpr, FULL_N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
) -> "Any":  # fmt: skip
    """Block [BK, BN] of one expert's weight, whose rows n below N count.

    An expert's matrix is [FULL_N, K], or [K, FULL_N] where IS_TRANSPOSED.
    """
    if USE_TMA:
        if IS_TRANSPOSED:
            return weight.load([expert * K + k, n])
        else:
            return weight.load([expert * FULL_N + n, k]).T
    else:
        o_n = n + tl.arange(0, BN)
        o_k = k + tl.arange(0, BK)
        mask = (o_k[:, None] < K) & (o_n[None, :] < N)
        p_expert = weight + expert.to(tl.int64) * FULL_N * K
        if IS_TRANSPOSED:
            return tl.load(p_expert + o_k[:, None] * FULL_N + o_n[None, :], mask=mask, other=0.0)
        else:
            return tl.load(p_expert + o_n[None, :] * K + o_k[:, None], mask=mask, other=0.0)


@triton.jit
def experts_up_fwd_kernel(
    p_x: "Any", weight: "Any", p_order: "Any", p_tiles: "Any", p_hidden: "Any", p_pre: "Any",
    C: tl.constexpr, I: tl.constexpr, A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, SAVES_PRE: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Gate and up columns n to n + BN of one tile, and their SwiGLU.

    Programs of one tile are neighbours, and so are tiles of one expert: they run at the same time
    and find each other's rows and weights in the L2 cache.
    """
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    i_tile = tl.program_id(0) // NUM_N
    n = (tl.program_id(0) % NUM_N) * BN
    expert = tl.load(p_tiles + 3 * i_tile)
    first = tl.load(p_tiles + 3 * i_tile + 1)
    last = tl.load(p_tiles + 3 * i_tile + 2)
    if first >= last:
        return
    # An expert's last tile is half empty on average, and half a tile takes half the time.
    if BM >= 128 and last - first <= BM // 2:
        up_tile(
            p_x, weight, p_order, p_hidden, p_pre, expert, first, last, n,
            C, I, A, BM // 2, BN, BK, USE_TMA, SAVES_PRE, PRECISION,
        )  # fmt: skip
    else:
        up_tile(
            p_x, weight, p_order, p_hidden, p_pre, expert, first, last, n,
            C, I, A, BM, BN, BK, USE_TMA, SAVES_PRE, PRECISION,
        )  # fmt: skip


@triton.jit
def up_tile(
    p_x: "Any", weight: "Any", p_order: "Any", p_hidden: "Any", p_pre: "Any",
    expert: "Any", first: "Any", last: "Any", n: "Any",
    C: tl.constexpr, I: tl.constexpr, A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, SAVES_PRE: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """As the kernel, for the BM positions from `first` on, of which those below `last` count."""
    o_m = first + tl.arange(0, BM)
    m_m = o_m < last
    token = tl.load(p_order + o_m, mask=m_m, other=0) // A
    p_rows = p_x + token.to(tl.int64)[:, None] * C
    b_gate = tl.zeros([BM, BN], dtype=tl.float32)
    b_up = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, C, BK):
        o_k = k + tl.arange(0, BK)
        if C % BK == 0:
            b_x = tl.load(p_rows + o_k[None, :], mask=m_m[:, None], other=0.0)
        else:
            b_x = tl.load(p_rows + o_k[None, :], mask=m_m[:, None] & (o_k < C)[None, :], other=0.0)
        b_w = load_weight(weight, expert, n, k, I, C, 2 * I, BN, BK, USE_TMA, False)
        b_gate = tl.dot(b_x, b_w, b_gate, input_precision=PRECISION)
        b_w = load_weight(weight, expert, I + n, k, 2 * I, C, 2 * I, BN, BK, USE_TMA, False)
        b_up = tl.dot(b_x, b_w, b_up, input_precision=PRECISION)
    o_n = n + tl.arange(0, BN)
    mask = m_m[:, None] & (o_n < I)[None, :]
    o_row = o_m.to(tl.int64)[:, None]
    if SAVES_PRE:
        p_gate = p_pre + o_row * (2 * I) + o_n[None, :]
        tl.store(p_gate, b_gate.to(p_pre.dtype.element_ty), mask=mask)
        tl.store(p_gate + I, b_up.to(p_pre.dtype.element_ty), mask=mask)
    b_hidden = b_gate * tl.sigmoid(b_gate) * b_up
    p_out = p_hidden + o_row * I + o_n[None, :]
    tl.store(p_out, b_hidden.to(p_hidden.dtype.element_ty), mask=mask)


@triton.jit
def experts_rows_kernel(
    rows: "Any", half_rows: "Any", weight: "Any", p_tiles: "Any", p_out: "Any",
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, IS_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Columns n to n + BN of the product of one tile's rows with its expert's weight."""
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    i_tile = tl.program_id(0) // NUM_N
    n = (tl.program_id(0) % NUM_N) * BN
    expert = tl.load(p_tiles + 3 * i_tile)
    first = tl.load(p_tiles + 3 * i_tile + 1)
    last = tl.load(p_tiles + 3 * i_tile + 2)
    if first >= last:
        return
    if BM >= 128 and last - first <= BM // 2:
        row_tile(
            half_rows, weight, p_out, expert, first, last, n,
            N, K, BM // 2, BN, BK, USE_TMA, IS_TRANSPOSED, PRECISION,
        )  # fmt: skip
    else:
        row_tile(
            rows, weight, p_out, expert, first, last, n,
            N, K, BM, BN, BK, USE_TMA, IS_TRANSPOSED, PRECISION,
        )  # fmt: skip


@triton.jit
def row_tile(
    rows: "Any", weight: "Any", p_out: "Any", expert: "Any", first: "Any", last: "Any", n: "Any",
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, IS_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """As the kernel, for the BM positions from `first` on, of which those below `last` count."""
    o_m = first + tl.arange(0, BM)
    m_m = o_m < last
    o_row = o_m.to(tl.int64)[:, None]
    b_out = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, K, BK):
        if USE_TMA:
            # Rows past `last` are another expert's; they are not stored.
            b_rows = rows.load([first, k])
        else:
            o_k = k + tl.arange(0, BK)
            m_rows = m_m[:, None] & (o_k < K)[None, :]
            b_rows = tl.load(rows + o_row * K + o_k[None, :], mask=m_rows, other=0.0)
        b_w = load_weight(weight, expert, n, k, N, K, N, BN, BK, USE_TMA, IS_TRANSPOSED)
        b_out = tl.dot(b_rows, b_w, b_out, input_precision=PRECISION)
    o_n = n + tl.arange(0, BN)
    p_row = p_out + o_row * N + o_n[None, :]
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_n < N)[None, :])


@triton.jit
def experts_combine_kernel(
    p_slots: "Any", p_inverse: "Any", p_weights: "Any", p_shared: "Any", p_gate: "Any",
    p_out: "Any",
    C: tl.constexpr, A: tl.constexpr, BC: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """Sum of one token's rows, BC columns of it."""
    i_t = tl.program_id(0)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_out = tl.zeros([BC], dtype=tl.float32)
    for a in tl.static_range(A):
        position = tl.load(p_inverse + i_t * A + a).to(tl.int64)
        b_row = tl.load(p_slots + position * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            b_row *= tl.load(p_weights + i_t * A + a).to(tl.float32)
        b_out += b_row
    o_out = i_t.to(tl.int64) * C + o_c
    if HAS_SHARED:
        gate = tl.sigmoid(tl.load(p_gate + i_t).to(tl.float32))
        b_out += gate * tl.load(p_shared + o_out, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_c)
