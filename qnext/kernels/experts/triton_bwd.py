"""Gradients of the grouped products: of the rows, of the router's weights, and of both matrices."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qnext.kernels.experts.triton_config import ExpertsConfig, Tile, WeightTile
from qnext.kernels.experts.triton_products import (
    combine,
    describe,
    fits_descriptors,
    load_weight,
    multiply_rows,
    precision_of,
)
from qnext.kernels.experts.triton_sort import PairTable, max_tiles


class ExpertsGrads(NamedTuple):
    """Gradients of the op's inputs; None for those that nobody asked for."""

    x: torch.Tensor | None
    gate_up: torch.Tensor | None
    down: torch.Tensor | None
    top_weights: torch.Tensor | None


def experts_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    pre: torch.Tensor,
    table: PairTable,
    config: ExpertsConfig,
    needs: tuple[bool, bool, bool, bool],
    sums: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> ExpertsGrads:
    """All gradients of the op; sums run in fp32 and in a fixed order.

    Args:
        grad: gradient of the output. [T, C]
        gate_up, down: of any float dtype, which their gradients have too.
        pre: outputs of gate and up at sorted positions, from the forward pass. [T * A, 2I]
        needs: which of x, gate_up, down and top_weights want a gradient.
        sums: where to add the gradients of gate_up and down; those are then not returned.
    """
    grad = grad.contiguous()
    num_active = top_weights.shape[1]
    pre_grad, weighted, weight_parts = hidden_grad(
        grad, down.to(x.dtype), top_weights, pre, table, config.block_m, config.hidden_grad
    )
    x_grad = gate_up_grad = down_grad = top_grad = None
    if needs[0]:
        half_gate_up = gate_up.to(x.dtype)
        slots = multiply_rows(
            pre_grad, half_gate_up, table, config.block_m, config.input_grad, is_transposed=True
        )
        x_grad = combine(slots, table.inverse, num_active)
    if needs[1]:
        gate_up_grad = weight_grad(
            pre_grad, x, gate_up, table, num_active, config.weight_grad, gathers_left=False,
            total=sums[0],
        )  # fmt: skip
    if needs[2]:
        down_grad = weight_grad(
            grad, weighted, down, table, num_active, config.weight_grad, gathers_left=True,
            total=sums[1],
        )  # fmt: skip
    if needs[3]:
        top_grad = weight_parts.sum(1).view_as(top_weights).to(top_weights.dtype)
    return ExpertsGrads(x_grad, gate_up_grad, down_grad, top_grad)


def hidden_grad(
    grad: torch.Tensor, down: torch.Tensor, top_weights: torch.Tensor, pre: torch.Tensor,
    table: PairTable, block_m: int, tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradient of pre [T * A, 2I]; hidden rows times their weights [T * A, I]; parts, one per block
    of columns, of the gradient of each pair's weight [T * A, blocks], fp32.
    """
    num_pairs, width = table.order.shape[0], down.shape[2]
    size, num_blocks = grad.shape[1], triton.cdiv(width, tile.block_n)
    pre_grad = torch.empty_like(pre)
    weighted = grad.new_empty(num_pairs, width)
    parts = grad.new_empty(num_pairs, num_blocks, dtype=torch.float32)
    use_tma = fits_descriptors(grad.dtype, (width, tile.block_n), (size, tile.block_k))
    num_tiles = max_tiles(num_pairs, down.shape[0], block_m)
    experts_hidden_bwd_kernel[(num_tiles * num_blocks,)](
        grad, describe(down, tile.block_k, tile.block_n) if use_tma else down,
        table.order, table.tiles, top_weights, pre, pre_grad, weighted, parts,
        C=size, I=width, A=top_weights.shape[1],
        BM=block_m, BN=tile.block_n, BK=tile.block_k,
        USE_TMA=use_tma, HALVES=block_m * tile.block_n > 1024 * tile.num_warps,
        PRECISION=precision_of(grad),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return pre_grad, weighted, parts


def weight_grad(
    left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, table: PairTable,
    num_active: int, tile: WeightTile, gathers_left: bool, total: torch.Tensor | None = None,
) -> torch.Tensor | None:  # fmt: skip
    """Sum over each expert's pairs of left (outer) right, of the weight's shape and dtype.

    Args:
        gathers_left: left has a row per token and right one per sorted position; else the
            other way round.
        total: add to this one, rounding once, and return None.
    """
    num_experts, num_rows, num_columns = weight.shape
    out = torch.empty_like(weight) if total is None else total
    grid = (
        triton.cdiv(num_rows, tile.block_m) * triton.cdiv(num_columns, tile.block_n) * num_experts,
    )
    experts_weight_bwd_kernel[grid](
        left, right, table.order, table.starts, out,
        M=num_rows, N=num_columns, A=num_active,
        BM=tile.block_m, BN=tile.block_n, BK=tile.block_k,
        GATHERS_LEFT=gathers_left, ADDS=total is not None, PRECISION=precision_of(right),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out if total is None else None


@triton.jit
def experts_hidden_bwd_kernel(
    p_grad: "Any", weight: "Any", p_order: "Any", p_tiles: "Any", p_weights: "Any", p_pre: "Any",
    p_pre_grad: "Any", p_weighted: "Any", p_parts: "Any",
    C: tl.constexpr, I: tl.constexpr, A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """From the output's gradient to that of gate and up, columns n to n + BN of one tile.

    With h = silu(g) u, y += w down h and e = down^T dy:  dw = e . h,  du = w e silu(g),
    dg = w e u s (1 + g (1 - s)) where s = sigmoid(g).
    """
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    i_tile = tl.program_id(0) // NUM_N
    i_n = tl.program_id(0) % NUM_N
    expert = tl.load(p_tiles + 3 * i_tile)
    first = tl.load(p_tiles + 3 * i_tile + 1)
    last = tl.load(p_tiles + 3 * i_tile + 2)
    if first >= last:
        return
    if BM >= 128 and last - first <= BM // 2:
        hidden_grad_tile(
            p_grad, weight, p_order, p_weights, p_pre, p_pre_grad, p_weighted, p_parts,
            expert, first, last, i_n, C, I, A, BM // 2, BN, BK, USE_TMA, False, PRECISION,
        )  # fmt: skip
    else:
        hidden_grad_tile(
            p_grad, weight, p_order, p_weights, p_pre, p_pre_grad, p_weighted, p_parts,
            expert, first, last, i_n, C, I, A, BM, BN, BK, USE_TMA, HALVES, PRECISION,
        )  # fmt: skip


@triton.jit
def hidden_grad_tile(
    p_grad: "Any", weight: "Any", p_order: "Any", p_weights: "Any", p_pre: "Any",
    p_pre_grad: "Any", p_weighted: "Any", p_parts: "Any",
    expert: "Any", first: "Any", last: "Any", i_n: "Any",
    C: tl.constexpr, I: tl.constexpr, A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """As the kernel, for the BM positions from `first` on, of which those below `last` count."""
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    n = i_n * BN
    o_m = first + tl.arange(0, BM)
    m_m = o_m < last
    b_pair = tl.load(p_order + o_m, mask=m_m, other=0)
    p_rows = p_grad + (b_pair // A).to(tl.int64)[:, None] * C
    b_e = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, C, BK):
        o_k = k + tl.arange(0, BK)
        if C % BK == 0:
            b_y = tl.load(p_rows + o_k[None, :], mask=m_m[:, None], other=0.0)
        else:
            b_y = tl.load(p_rows + o_k[None, :], mask=m_m[:, None] & (o_k < C)[None, :], other=0.0)
        b_w = load_weight(weight, expert, n, k, I, C, I, BN, BK, USE_TMA, True)
        b_e = tl.dot(b_y, b_w, b_e, input_precision=PRECISION)
    b_w = tl.load(p_weights + b_pair, mask=m_m, other=0.0).to(tl.float32)[:, None]
    if HALVES:
        # Half the columns at a time: all at once need more registers than there are.
        b_left, b_right = b_e.reshape([BM, 2, BN // 2]).permute(0, 2, 1).split()
        b_part = swiglu_bwd(b_left, b_w, p_pre, p_pre_grad, p_weighted, o_m, m_m, n, I, BN // 2)
        b_part += swiglu_bwd(
            b_right, b_w, p_pre, p_pre_grad, p_weighted, o_m, m_m, n + BN // 2, I, BN // 2
        )
    else:
        b_part = swiglu_bwd(b_e, b_w, p_pre, p_pre_grad, p_weighted, o_m, m_m, n, I, BN)
    tl.store(p_parts + b_pair.to(tl.int64) * NUM_N + i_n, b_part, mask=m_m)


@triton.jit
def swiglu_bwd(
    b_e: "Any", b_w: "Any", p_pre: "Any", p_pre_grad: "Any", p_weighted: "Any",
    o_m: "Any", m_m: "Any", n: "Any", I: tl.constexpr, BN: tl.constexpr,
) -> "Any":  # fmt: skip
    """From e to the gradients of gate and up, w h, and this block's part of dw = e . h."""
    o_n = n + tl.arange(0, BN)
    mask = m_m[:, None] & (o_n < I)[None, :]
    o_row = o_m.to(tl.int64)[:, None]
    o_pre = o_row * (2 * I) + o_n[None, :]
    b_g = tl.load(p_pre + o_pre, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(p_pre + I + o_pre, mask=mask, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_g)
    b_silu = b_g * b_s
    b_part = tl.sum(tl.where(mask, b_e * b_silu * b_u, 0.0), 1)
    dtype = p_pre_grad.dtype.element_ty
    tl.store(p_weighted + o_row * I + o_n[None, :], (b_w * b_silu * b_u).to(dtype), mask=mask)
    b_e *= b_w
    tl.store(p_pre_grad + I + o_pre, (b_e * b_silu).to(dtype), mask=mask)
    b_e *= b_u * b_s * (1.0 + b_g * (1.0 - b_s))
    tl.store(p_pre_grad + o_pre, b_e.to(dtype), mask=mask)
    return b_part


@triton.jit
def experts_weight_bwd_kernel(
    p_left: "Any", p_right: "Any", p_order: "Any", p_starts: "Any", p_out: "Any",
    M: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GATHERS_LEFT: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One block of one expert's weight gradient; an expert without rows gets zeros, or is left."""
    NUM_M: tl.constexpr = (M + BM - 1) // BM
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    expert = tl.program_id(0) // (NUM_M * NUM_N)
    i_block = tl.program_id(0) % (NUM_M * NUM_N)
    o_m = i_block // NUM_N * BM + tl.arange(0, BM)
    o_n = i_block % NUM_N * BN + tl.arange(0, BN)
    start = tl.load(p_starts + expert)
    end = tl.load(p_starts + expert + 1)
    if ADDS:
        if start == end:
            return
    b_out = tl.zeros([BM, BN], dtype=tl.float32)
    for p in range(start, end, BK):
        o_p = p + tl.arange(0, BK)
        m_p = o_p < end
        o_token = (tl.load(p_order + o_p, mask=m_p, other=0) // A).to(tl.int64)
        o_row = o_p.to(tl.int64)
        o_left = o_token if GATHERS_LEFT else o_row
        o_right = o_row if GATHERS_LEFT else o_token
        m_left = m_p[:, None] & (o_m < M)[None, :]
        b_left = tl.load(p_left + o_left[:, None] * M + o_m[None, :], mask=m_left, other=0.0)
        m_right = m_p[:, None] & (o_n < N)[None, :]
        b_right = tl.load(p_right + o_right[:, None] * N + o_n[None, :], mask=m_right, other=0.0)
        b_out = tl.dot(b_left.T, b_right, b_out, input_precision=PRECISION)
    p_block = p_out + expert.to(tl.int64) * M * N + o_m[:, None] * N + o_n[None, :]
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    if ADDS:
        b_out += tl.load(p_block, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_block, b_out.to(p_out.dtype.element_ty), mask=mask)
