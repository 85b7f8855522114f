"""Mixture of experts for a few rows: gathered products, one (token, expert) pair at a time.

Two tokens that chose one expert ask for the same weights at nearly the same time, since pairs are
neighbours in the grid, and the second finds them in L2. So no grouping by expert is needed while
pairs are few: 8 tokens have 80 of them, on 75 distinct experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.experts_rows.reference import NO_SCALES, ExpertScales
from qnext.kernels.fp8_blocks import BLOCK
from qnext.kernels.gpu_decode import (
    block_scales,
    overlap_options,
    rows_objection,
    times_scales,
    wait_for_previous,
    weight_objection,
)

MAX_ROWS = 16
MAX_ACTIVE = 32
# Elements of weight that a program asks for at once: 64 and 128 a thread, so that several
# programs fit an SM and together wait for several times what the memory's latency needs.
TILE_ELEMENTS = 16384


@dataclass(frozen=True)
class ExpertTile:
    """How an expert is cut.

    Attributes:
        BI: hidden channels per program of the first kernel.
        BC: columns of gate_up at once.
        up_warps: of the first kernel.
        BO: output channels per program of the second kernel.
        BD: columns of down at once.
        down_warps: of the second kernel.
    """

    BI: int
    BC: int
    up_warps: int
    BO: int
    BD: int
    down_warps: int


def expert_tile(C: int, I: int, A: int) -> ExpertTile:
    """Cut by shape: whole rows of gate_up where C is a power of two, all slots of down at once."""
    padded = triton.next_power_of_2(C)
    is_whole = padded == C and padded <= 4096
    BC = padded if is_whole else min(padded, 1024)
    # A loop over columns holds an fp32 sum per element of the tile, so its tiles are smaller.
    elements = TILE_ELEMENTS if is_whole else TILE_ELEMENTS // 2
    BI = min(16, elements // (2 * BC), triton.next_power_of_2(I))
    num_slots = triton.next_power_of_2(A)
    BD = min(512, triton.next_power_of_2(I), TILE_ELEMENTS // num_slots)
    BO = min(16, TILE_ELEMENTS // (num_slots * BD), padded)
    return ExpertTile(
        BI,
        BC,
        max(1, min(8, 2 * BI * BC // 2048)),
        BO,
        BD,
        max(1, min(4, num_slots * BO * BD // 4096)),
    )


@triton.jit
def experts_rows_up_kernel(
    p_x: tl.tensor,
    p_gate_up: tl.tensor,
    p_shared: tl.tensor,
    p_scale: tl.tensor,
    p_shared_scale: tl.tensor,
    p_ids: tl.tensor,
    p_hidden: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    IH: tl.constexpr,
    BI: tl.constexpr,
    BC: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BI channels of hidden[t, a] = silu(gate x_t) * up x_t; slot A is the shared expert."""
    i_pair, i_i = tl.program_id(0), tl.program_id(1)
    i_t, i_a = i_pair // SLOTS, i_pair % SLOTS
    is_shared = i_a == A
    if WAITS:
        # The shared expert is known before the router has chosen: its weights need not wait.
        if not is_shared:
            wait_for_previous(WAITS)
    e_id = tl.load(p_ids + i_t * A + i_a, mask=i_a < A, other=0).to(tl.int64)
    width = tl.where(is_shared, IS, I)
    p_w = tl.where(is_shared, p_shared, p_gate_up + e_id * (2 * I * C))
    o_i = i_i * BI + tl.arange(0, BI)
    o_c = tl.arange(0, BC)
    m_i = o_i < width
    p_gate = p_w + o_i[:, None] * C + o_c[None, :]
    p_up = p_gate + width * C
    m_w = m_i[:, None] & (o_c < C)[None, :]
    b_gate = tl.load(p_gate, mask=m_w, other=0.0)
    b_up = tl.load(p_up, mask=m_w, other=0.0)
    if HAS_SCALE:
        # I is a multiple of the block's size, so neither half straddles a block.
        SC: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
        p_s = tl.where(
            is_shared,
            p_shared_scale,
            p_scale + e_id * ((2 * I + BLOCK_SIZE - 1) // BLOCK_SIZE * SC),
        )
        # Past the width of the narrower kind of expert there are none.
        i_block = tl.minimum(i_i * BI, width - 1) // BLOCK_SIZE
        p_gate_s = p_s + i_block * SC
        p_up_s = p_gate_s + width // BLOCK_SIZE * SC
        b_gate_s = block_scales(p_gate_s, 0, C, BC, BLOCK_SIZE)
        b_up_s = block_scales(p_up_s, 0, C, BC, BLOCK_SIZE)
    wait_for_previous(WAITS)
    b_gate_sum = tl.zeros([BI, BC], tl.float32)
    b_up_sum = tl.zeros([BI, BC], tl.float32)
    for i_c in range(0, C, BC):
        m_c = i_c + o_c < C
        b_x = tl.load(p_x + i_t * C + i_c + o_c, mask=m_c, other=0.0).to(tl.float32)
        if HAS_SCALE:
            b_gate_sum += b_gate.to(tl.float32) * times_scales(b_x, b_gate_s)[None, :]
            b_up_sum += b_up.to(tl.float32) * times_scales(b_x, b_up_s)[None, :]
        else:
            b_gate_sum += b_gate.to(tl.float32) * b_x[None, :]
            b_up_sum += b_up.to(tl.float32) * b_x[None, :]
        if C > BC:
            m_w = m_i[:, None] & (i_c + BC + o_c < C)[None, :]
            b_gate = tl.load(p_gate + i_c + BC, mask=m_w, other=0.0)
            b_up = tl.load(p_up + i_c + BC, mask=m_w, other=0.0)
            if HAS_SCALE:
                b_gate_s = block_scales(p_gate_s, i_c + BC, C, BC, BLOCK_SIZE)
                b_up_s = block_scales(p_up_s, i_c + BC, C, BC, BLOCK_SIZE)
    b_g = tl.sum(b_gate_sum, 1)
    b_hidden = b_g / (1.0 + tl.exp(-b_g)) * tl.sum(b_up_sum, 1)
    tl.store(p_hidden + i_pair * IH + o_i, b_hidden.to(p_hidden.dtype.element_ty), mask=m_i)


@triton.jit
def experts_rows_down_kernel(
    p_hidden: tl.tensor,
    p_down: tl.tensor,
    p_shared: tl.tensor,
    p_scale: tl.tensor,
    p_shared_scale: tl.tensor,
    p_weights: tl.tensor,
    p_ids: tl.tensor,
    p_shared_logit: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    IH: tl.constexpr,
    BA: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO channels of one token, summed over its experts in the order of the slots.

    A row of down is cut in parts no longer than a block of scales: part r of BO * NB is part
    r % NB of channel r // NB.
    """
    i_t, i_o = tl.program_id(0), tl.program_id(1)
    NB: tl.constexpr = (BD + BLOCK_SIZE - 1) // BLOCK_SIZE
    BW: tl.constexpr = BD // NB
    o_a, o_o, o_r = tl.arange(0, BA), i_o * BO + tl.arange(0, BO), tl.arange(0, BO * NB)
    o_s = tl.arange(0, BS)
    m_a, m_o = o_a < A, o_o < C
    o_d = ((o_r % NB) * BW)[:, None] + tl.arange(0, BW)[None, :]
    o_channel = i_o * BO + o_r // NB
    m_r = (o_channel < C)[:, None]
    # The kernel before this one started it after the router had ended: ids need no wait. They
    # come from L2, past what this SM may have cached of an earlier step.
    b_id = tl.load(p_ids + i_t * A + o_a, mask=m_a, other=0, cache_modifier=".cg").to(tl.int64)
    p_row = (p_down + b_id * (C * I))[:, None, None] + (o_channel[:, None] * I + o_d)[None, :, :]
    b_w = tl.load(p_row, mask=m_a[:, None, None] & (m_r & (o_d < I))[None, :, :], other=0.0)
    p_s_row = p_shared + o_o[:, None] * IS + o_s[None, :]
    i_block = i_o * BO // BLOCK_SIZE
    if IS > 0:
        b_sw = tl.load(p_s_row, mask=m_o[:, None] & (o_s < IS)[None, :], other=0.0)
    if HAS_SCALE:
        SI: tl.constexpr = (I + BLOCK_SIZE - 1) // BLOCK_SIZE
        SO: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
        p_s = p_scale + ((b_id * SO + i_block) * SI)[:, None] + (o_r % NB)[None, :]
        b_s = tl.load(p_s, mask=m_a[:, None] & (o_r % NB * BW < I)[None, :], other=0.0)
        if IS > 0:
            p_shared_scale += i_block * ((IS + BLOCK_SIZE - 1) // BLOCK_SIZE)
            b_shared_s = block_scales(p_shared_scale, 0, IS, BS, BLOCK_SIZE)
    wait_for_previous(WAITS)
    # All that is small is asked for at once, before the sums.
    b_weight = tl.load(p_weights + i_t * A + o_a, mask=m_a, other=0.0)
    b_y = tl.load(p_residual + i_t * C + o_o, mask=m_o, other=0.0).to(tl.float32)
    p_h = p_hidden + i_t * SLOTS * IH
    if IS > 0:
        shared_gate = tl.sigmoid(tl.load(p_shared_logit + i_t))
        b_sh = tl.load(p_h + A * IH + o_s, mask=o_s < IS, other=0.0)
    p_h_row = p_h + (o_a * IH)[:, None, None] + o_d[None, :, :]
    b_sum = tl.zeros([BO * NB, BW], tl.float32)
    for i_d in range(0, I, BD):
        b_h = tl.load(
            p_h_row + i_d, mask=m_a[:, None, None] & (i_d + o_d < I)[None, :, :], other=0.0
        )
        b_factor = b_weight[:, None]
        if HAS_SCALE:
            b_factor = b_factor * b_s
        b_sum += tl.sum(b_w.to(tl.float32) * (b_h.to(tl.float32) * b_factor[:, :, None]), 0)
        if I > BD:
            m_d = m_r & (i_d + BD + o_d < I)
            b_w = tl.load(p_row + i_d + BD, mask=m_a[:, None, None] & m_d[None, :, :], other=0.0)
            if HAS_SCALE:
                p_s += NB
                m_s = (i_d + BD + o_r % NB * BW < I)[None, :]
                b_s = tl.load(p_s, mask=m_a[:, None] & m_s, other=0.0)
    b_y += tl.sum(tl.reshape(b_sum, [BO, BD]), 1)
    if IS > 0:
        b_shared = tl.zeros([BO, BS], tl.float32)
        for i_s in range(0, IS, BS):
            b_h = b_sh.to(tl.float32)
            if HAS_SCALE:
                b_h = times_scales(b_h, b_shared_s)
            b_shared += b_sw.to(tl.float32) * b_h[None, :]
            if IS > BS:
                m_next = i_s + BS + o_s < IS
                b_sh = tl.load(p_h + A * IH + i_s + BS + o_s, mask=m_next, other=0.0)
                b_sw = tl.load(p_s_row + i_s + BS, mask=m_o[:, None] & m_next[None, :], other=0.0)
                if HAS_SCALE:
                    b_shared_s = block_scales(p_shared_scale, i_s + BS, IS, BS, BLOCK_SIZE)
        b_y += tl.sum(b_shared, 1) * shared_gate
    tl.store(p_y + i_t * C + o_o, b_y.to(p_y.dtype.element_ty), mask=m_o)


def experts_rows_fwd(
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None,
    use_pdl: bool = False,
    tile: ExpertTile | None = None,
) -> torch.Tensor:
    """Launch both kernels; arguments as in `experts_rows_reference`.

    Args:
        use_pdl: see `overlap_options`.
        tile: another cut than the one chosen by shape.
    """
    (num_tokens, C), (A, I) = normed.shape, (top_ids.shape[1], down.shape[2])
    IS = 0 if shared_down is None else shared_down.shape[1]
    num_slots = A + (IS > 0)
    tile = tile or expert_tile(C, I, A)
    width = max(I, IS)
    hidden = torch.empty(num_tokens, num_slots, width, dtype=normed.dtype, device=normed.device)
    y = torch.empty_like(residual)
    routed_scales = (normed, normed) if scales is None else (scales.gate_up, scales.down)
    shared_scales = routed_scales
    if scales is not None and scales.shared_gate_up is not None and scales.shared_down is not None:
        shared_scales = (scales.shared_gate_up, scales.shared_down)
    common: dict[str, Any] = {
        "C": C,
        "I": I,
        "IS": IS,
        "A": A,
        "SLOTS": num_slots,
        "IH": width,
        "HAS_SCALE": scales is not None,
        "BLOCK_SIZE": BLOCK,
        "num_stages": 1,
        **overlap_options(use_pdl),
    }
    experts_rows_up_kernel[(num_tokens * num_slots, triton.cdiv(width, tile.BI))](
        normed,
        gate_up,
        gate_up if shared_gate_up is None else shared_gate_up,
        routed_scales[0],
        shared_scales[0],
        top_ids,
        hidden,
        BI=tile.BI,
        BC=tile.BC,
        num_warps=tile.up_warps,
        **common,
    )
    experts_rows_down_kernel[(num_tokens, triton.cdiv(C, tile.BO))](
        hidden,
        down,
        down if shared_down is None else shared_down,
        routed_scales[1],
        shared_scales[1],
        top_weights,
        top_ids,
        top_weights if shared_logit is None else shared_logit,
        residual,
        y,
        BA=triton.next_power_of_2(A),
        BO=tile.BO,
        BD=tile.BD,
        BS=min(512, triton.next_power_of_2(max(IS, 1))),
        num_warps=tile.down_warps,
        **common,
    )
    return y


def supports(
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None = None,
) -> str | None:
    """Why these kernels cannot run, or None."""
    if top_ids.shape[1] > MAX_ACTIVE:
        return f"{top_ids.shape[1]} experts per token, more than {MAX_ACTIVE}"
    given = (shared_gate_up is not None, shared_down is not None, shared_logit is not None)
    if len(set(given)) != 1:
        return "the shared expert needs gate_up, down and logit, or none of them"
    if not (residual.is_contiguous() and top_weights.is_contiguous() and top_ids.is_contiguous()):
        return "residual, weights or ids are not contiguous"
    scale = NO_SCALES if scales is None else scales
    weights = {
        "gate_up": (gate_up, scale[0]),
        "down": (down, scale[1]),
        "shared_gate_up": (shared_gate_up, scale[2]),
        "shared_down": (shared_down, scale[3]),
    }
    for name, (weight, weight_scale) in weights.items():
        if weight is None:
            continue
        reason = weight_objection(name, weight, weight_scale, normed.dtype)
        if reason is not None:
            return reason
        if scales is not None and "gate_up" in name and weight.shape[-2] % (2 * BLOCK):
            return f"{name} in e4m3 of width {weight.shape[-2] // 2}, not a multiple of {BLOCK}"
    return rows_objection(normed, MAX_ROWS)


def experts_rows_triton(
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor | None,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None = None,
) -> torch.Tensor:
    """See `experts_rows_reference`. Up to 16 rows; a row's bits depend on no other row.

    The hidden channels are rounded to the dtype of the rows once, between the two kernels.
    """
    return experts_rows_fwd(
        normed,
        gate_up,
        down,
        shared_gate_up,
        shared_down,
        top_weights=top_weights,
        top_ids=top_ids,
        shared_logit=shared_logit,
        residual=residual,
        scales=scales,
    )
