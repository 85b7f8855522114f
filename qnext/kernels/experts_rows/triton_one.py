"""Mixture of e4m3 experts for a single row, by FMA and in two launches.

There is nothing to share between rows, so a program asks for all its weights at once, as the
product of one row does, and the sum over slots is part of the second product. In two bytes the
tiles of several rows are at least as fast.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qnext.kernels.experts_rows.reference import ExpertScales
from qnext.kernels.experts_rows.triton_config import Weights, common_options
from qnext.kernels.gpu_decode import (
    TILE_ELEMENTS,
    block_scales,
    fma_block,
    fma_warps,
    hold_loads,
    times_scales,
    wait_for_previous,
)


@dataclass(frozen=True)
class OneTile:
    """How the experts of one row are cut.

    Attributes:
        BN: hidden channels per program of the first kernel, gate and up of each.
        up_warps: of the first kernel.
        BO: output channels per program of the second kernel, of all slots.
        down_warps: of the second kernel.
    """

    BN: int
    BO: int
    up_warps: int
    down_warps: int


def one_tile(weights: Weights, num_active: int) -> OneTile | None:
    """Cut by shape, or None where tiles of dots are taken: sizes long or no powers of two."""
    _, down, _, shared_down = weights
    _, C, I = down.shape
    IS = I if shared_down is None else shared_down.shape[1]
    slots, width = triton.next_power_of_2(num_active), max(I, IS)
    is_even = all(triton.next_power_of_2(size) == size for size in (C, I, IS))
    if not is_even or max(2 * C, slots * width) > TILE_ELEMENTS:
        return None
    BN = max(1, min(16, TILE_ELEMENTS // (2 * C)))
    BO = fma_block(C, slots * width)
    return OneTile(BN, BO, fma_warps(2 * BN * C), fma_warps(BO * slots * width))


@triton.jit
def one_up(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_scale: tl.tensor,
    p_hidden: tl.tensor,
    i_n: tl.tensor,
    C: tl.constexpr,
    W: tl.constexpr,
    SC: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BN hidden channels of one expert of width W, with SC blocks of columns."""
    o_n, o_c = i_n * BN + tl.arange(0, BN), tl.arange(0, C)
    m_n = o_n < W
    p_gate = p_w + o_n[:, None] * C + o_c[None, :]
    b_gate = tl.load(p_gate, mask=m_n[:, None], other=0.0)
    b_up = tl.load(p_gate + W * C, mask=m_n[:, None], other=0.0)
    # BN divides a block, so that all rows of a tile have the same scales.
    p_s = p_scale + i_n * BN // BLOCK_SIZE * SC
    gate_s = block_scales(p_s, 0, C, C, BLOCK_SIZE)
    up_s = block_scales(p_s + W // BLOCK_SIZE * SC, 0, C, C, BLOCK_SIZE)
    hold_loads(WAITS)
    b_x = tl.load(p_x + o_c).to(tl.float32)
    b_g = tl.sum(b_gate.to(tl.float32) * times_scales(b_x, gate_s)[None, :], 1)
    b_u = tl.sum(b_up.to(tl.float32) * times_scales(b_x, up_s)[None, :], 1)
    b_hidden = b_g / (1.0 + tl.exp(-b_g)) * b_u
    tl.store(p_hidden + o_n, b_hidden.to(p_hidden.dtype.element_ty), mask=m_n)


@triton.jit
def experts_one_up_kernel(
    p_x: tl.tensor,
    gate_up: tl.tensor,
    shared: tl.tensor,
    p_scale: tl.tensor,
    p_shared_scale: tl.tensor,
    p_ids: tl.tensor,
    p_hidden: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    IH: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BN channels of one slot's hidden = silu(gate x) * up x; slot A is the shared expert's."""
    NUM_SHARED: tl.constexpr = (IS + BN - 1) // BN
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    SC: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
    i_p = tl.program_id(0)
    wait_for_previous(WAITS)
    if i_p < NUM_SHARED:
        if IS > 0:
            one_up(
                p_x, shared, p_shared_scale, p_hidden + A * IH, i_p,
                C, IS, SC, BN, BLOCK_SIZE, WAITS,
            )  # fmt: skip
    else:
        i_r = i_p - NUM_SHARED
        i_a = i_r // NUM_N
        e_id = tl.load(p_ids + i_a).to(tl.int64)
        p_expert, p_s = gate_up + e_id * (2 * I * C), p_scale + e_id * (2 * I // BLOCK_SIZE * SC)
        one_up(
            p_x, p_expert, p_s, p_hidden + i_a * IH, i_r % NUM_N,
            C, I, SC, BN, BLOCK_SIZE, WAITS,
        )  # fmt: skip


@triton.jit
def one_down(
    b_w: tl.tensor,
    b_h: tl.tensor,
    b_s: tl.tensor,
    R: tl.constexpr,
    W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Sums of R rows of weights times hidden channels, each block with its scale."""
    b_product = b_w.to(tl.float32) * b_h.to(tl.float32)
    b_blocks = tl.sum(tl.reshape(b_product, [R, W // BLOCK_SIZE, BLOCK_SIZE]), 2)
    return tl.sum(b_blocks * b_s, 1)


@triton.jit
def experts_one_down_kernel(
    p_hidden: tl.tensor,
    down: tl.tensor,
    shared: tl.tensor,
    p_scale: tl.tensor,
    p_shared_scale: tl.tensor,
    p_ids: tl.tensor,
    p_weights: tl.tensor,
    p_shared_logit: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    IH: tl.constexpr,
    BA: tl.constexpr,
    BO: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO channels of y: the residual and the weighted products of all slots.

    The choice is not of the kernel before this one, which had waited for it: it and the weights
    are asked for while that kernel ends. Past L1, where a choice of before may still lie.
    """
    i_o = tl.program_id(0)
    o_r = tl.arange(0, BA * BO)
    o_a, o_n = o_r // BO, i_o * BO + o_r % BO
    o_i = tl.arange(0, I)
    m_r = (o_a < A) & (o_n < C)
    e_id = tl.load(p_ids + o_a, mask=o_a < A, other=0, cache_modifier=".cg").to(tl.int64)
    b_w = tl.load(down + (e_id * C + o_n)[:, None] * I + o_i[None, :], mask=m_r[:, None], other=0.0)
    SO: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
    SI: tl.constexpr = I // BLOCK_SIZE
    p_s = p_scale + (e_id * SO + o_n // BLOCK_SIZE)[:, None] * SI + tl.arange(0, SI)[None, :]
    b_s = tl.load(p_s, mask=m_r[:, None], other=0.0)
    o_o = i_o * BO + tl.arange(0, BO)
    m_o = o_o < C
    if IS > 0:
        o_is = tl.arange(0, IS)
        b_ws = tl.load(shared + o_o[:, None] * IS + o_is[None, :], mask=m_o[:, None], other=0.0)
        SS: tl.constexpr = IS // BLOCK_SIZE
        p_ss = p_shared_scale + (o_o // BLOCK_SIZE)[:, None] * SS + tl.arange(0, SS)[None, :]
        b_ss = tl.load(p_ss, mask=m_o[:, None], other=0.0)
    wait_for_previous(WAITS)
    b_h = tl.load(p_hidden + o_a[:, None] * IH + o_i[None, :], mask=m_r[:, None], other=0.0)
    b_weight = tl.load(p_weights + o_a, mask=o_a < A, other=0.0)
    b_y = tl.load(p_residual + o_o, mask=m_o, other=0.0).to(tl.float32)
    b_sums = one_down(b_w, b_h, b_s, BA * BO, I, BLOCK_SIZE) * b_weight
    b_y += tl.sum(tl.reshape(b_sums, [BA, BO]), 0)
    if IS > 0:
        b_hs = tl.load(p_hidden + A * IH + o_is)
        b_shared = one_down(b_ws, b_hs[None, :], b_ss, BO, IS, BLOCK_SIZE)
        b_y += b_shared * tl.sigmoid(tl.load(p_shared_logit).to(tl.float32))
    tl.store(p_y + o_o, b_y.to(p_y.dtype.element_ty), mask=m_o)


def experts_one_fwd(
    normed: torch.Tensor,
    weights: Weights,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales,
    tile: OneTile,
    *,
    use_pdl: bool,
) -> torch.Tensor:
    """Launch both kernels for one row; arguments as in `experts_rows_reference`. [1, C]"""
    gate_up, down, shared_gate_up, shared_down = weights
    num_active = top_ids.shape[1]
    options = common_options(down, shared_down, num_active, use_pdl)
    C, I, IS, width = (options[name] for name in ("C", "I", "IS", "IH"))
    hidden = torch.empty(options.pop("SLOTS"), width, dtype=normed.dtype, device=normed.device)
    y = torch.empty_like(residual)

    def given(own: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
        return other if own is None else own  # which is not read then

    num_programs = num_active * triton.cdiv(I, tile.BN) + triton.cdiv(IS, tile.BN)
    experts_one_up_kernel[(num_programs,)](
        normed,
        gate_up,
        given(shared_gate_up, gate_up),
        scales.gate_up,
        given(scales.shared_gate_up, scales.gate_up),
        top_ids,
        hidden,
        **options,
        BN=tile.BN,
        num_warps=tile.up_warps,
        num_stages=1,
    )
    experts_one_down_kernel[(triton.cdiv(C, tile.BO),)](
        hidden,
        down,
        given(shared_down, down),
        scales.down,
        given(scales.shared_down, scales.down),
        top_ids,
        top_weights,
        given(shared_logit, top_weights),
        residual,
        y,
        **options,
        BA=triton.next_power_of_2(num_active),
        BO=tile.BO,
        num_warps=tile.down_warps,
        num_stages=1,
    )
    return y
