"""Mixture of experts for one or two rows: each (token, expert) pair reads its expert by itself."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.experts_rows.reference import ExpertScales
from qnext.kernels.fp8_blocks import BLOCK
from qnext.kernels.gpu_decode import (
    block_scales,
    overlap_options,
    prefetch_bytes,
    times_scales,
    wait_for_previous,
)

# Elements of gate_up that a program asks for at once, and bytes per thread: three programs of
# bf16 fit an SM, which then waits for 96 KB, several times what the memory's latency needs.
UP_ELEMENTS, UP_BYTES = 16384, 128
# The same of down, of which slots without an expert are never asked for: 44 KB of 11 experts.
DOWN_ELEMENTS, DOWN_BYTES = 32768, 256


@dataclass(frozen=True)
class GatherTile:
    """How an expert is cut where pairs read it by themselves.

    Attributes:
        BI: hidden channels per program of the first kernel.
        BC: columns of gate_up at once.
        up_warps: of the first kernel.
        BO: output channels per program of the second kernel.
        BD: columns of down at once.
        down_warps: of the second kernel.
        prefetched: last ranks whose down the first kernel brings into L2. DRAM would be idle
            between the two kernels for some 2.5 us, in which it reads the down of four experts.
    """

    BI: int
    BC: int
    up_warps: int
    BO: int
    BD: int
    down_warps: int
    prefetched: int = 4


def gather_tile(C: int, width: int, num_slots: int, element_bytes: int) -> GatherTile:
    """Cut by shape: whole rows of gate_up where C is a power of two, all slots of down at once."""
    padded = triton.next_power_of_2(C)
    is_whole = padded == C and padded <= 4096
    BC = padded if is_whole else min(padded, 1024)
    # A loop over columns holds an fp32 sum per element of the tile, so its tiles are smaller.
    elements = UP_ELEMENTS if is_whole else UP_ELEMENTS // 2
    up_bytes = UP_BYTES if is_whole else min(UP_BYTES, UP_BYTES * element_bytes // 2)
    BI = max(1, min(16, elements // (2 * BC), triton.next_power_of_2(width)))
    # Two warps at least: an SM holds 32 programs, and of one warp each they would fill half of it.
    slots = triton.next_power_of_2(num_slots)
    elements = DOWN_ELEMENTS if element_bytes < 4 else DOWN_ELEMENTS // 4
    BD = min(1024, triton.next_power_of_2(width), elements // slots)
    BO = min(16, elements // (slots * BD), padded)
    return GatherTile(
        BI,
        BC,
        max(2, min(8, 2 * BI * BC * element_bytes // (32 * up_bytes))),
        BO,
        BD,
        max(2, min(8, slots * BO * BD * element_bytes // (32 * DOWN_BYTES))),
    )


@triton.jit(do_not_specialize=["T"])
def experts_rows_up_kernel(
    p_x: tl.tensor,
    p_gate_up: tl.tensor,
    p_shared: tl.tensor,
    p_scale: tl.tensor,
    p_shared_scale: tl.tensor,
    p_down: tl.tensor,
    p_ids: tl.tensor,
    p_hidden: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    IH: tl.constexpr,
    BI: tl.constexpr,
    BC: tl.constexpr,
    SHARE: tl.constexpr,
    PREFETCHED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BI channels of hidden[t, a] = silu(gate x_t) * up x_t; slot A is the shared expert.

    Programs of one expert are neighbours, and those of the shared expert come first: it is known
    before the router has chosen, so that its weights need not wait.
    """
    i_i, i_slot = tl.program_id(0), tl.program_id(1)
    num_shared = T * (SLOTS - A)
    is_shared = i_slot < num_shared
    i_pair = tl.maximum(i_slot - num_shared, 0)
    if WAITS:
        if not is_shared:
            wait_for_previous(WAITS)
    e_id = tl.load(p_ids + i_pair, mask=i_slot >= num_shared, other=0).to(tl.int64)
    i_t = tl.where(is_shared, i_slot, i_pair // A)
    i_a = tl.where(is_shared, A, i_pair % A)
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
    if WAITS and PREFETCHED > 0:
        # Not of the shared expert, which is first: it would be out of L2 again when it is needed.
        if (i_a >= A - PREFETCHED) & (i_a < A):
            BYTES: tl.constexpr = p_down.dtype.element_ty.primitive_bitwidth // 8
            prefetch_bytes(p_down + e_id * (C * I) + i_i * SHARE, SHARE * BYTES)
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
    p_out = p_hidden + (i_t * SLOTS + i_a) * IH + o_i
    tl.store(p_out, b_hidden.to(p_hidden.dtype.element_ty), mask=m_i)


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
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO channels of one token, summed over its experts, of which slot A is the shared one.

    A row of down is cut in parts no longer than a block of scales: part r of BO * NB is part
    r % NB of channel r // NB.
    """
    i_o, i_t = tl.program_id(0), tl.program_id(1)
    NB: tl.constexpr = (BD + BLOCK_SIZE - 1) // BLOCK_SIZE
    BW: tl.constexpr = BD // NB
    o_a, o_o, o_r = tl.arange(0, BA), i_o * BO + tl.arange(0, BO), tl.arange(0, BO * NB)
    is_routed, m_a, m_o = o_a < A, o_a < SLOTS, o_o < C
    o_d = ((o_r % NB) * BW)[:, None] + tl.arange(0, BW)[None, :]
    o_channel = i_o * BO + o_r // NB
    b_width = tl.where(is_routed, I, IS)
    m_r = m_a[:, None] & (o_channel < C)[None, :]
    # Every program reads the same ids: through L1, since all of them past L1 queue at one slice
    # of L2. So not before the wait, when L1 may hold those of an earlier step.
    wait_for_previous(WAITS)
    b_id = tl.load(p_ids + i_t * A + o_a, mask=is_routed, other=0).to(tl.int64)
    p_expert = tl.where(is_routed, p_down + b_id * (C * I), p_shared)
    o_w = o_channel[None, :, None] * b_width[:, None, None] + o_d[None, :, :]
    p_w = p_expert[:, None, None] + o_w
    p_h = p_hidden + i_t * SLOTS * IH + (o_a * IH)[:, None, None] + o_d[None, :, :]
    b_sum = tl.zeros([BO * NB, BW], tl.float32)
    b_weight = tl.load(p_weights + i_t * A + o_a, mask=is_routed, other=0.0)
    if IS > 0:
        b_weight = tl.where(is_routed, b_weight, tl.sigmoid(tl.load(p_shared_logit + i_t)))
    if HAS_SCALE:
        i_block = i_o * BO // BLOCK_SIZE
        SO: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
        SI: tl.constexpr = (I + BLOCK_SIZE - 1) // BLOCK_SIZE
        SIS: tl.constexpr = (IS + BLOCK_SIZE - 1) // BLOCK_SIZE
        p_routed_s = p_scale + (b_id * SO + i_block) * SI
        p_s = tl.where(is_routed, p_routed_s, p_shared_scale + i_block * SIS)
    for i_d in range(0, IH, BD):
        m_d = i_d + o_d[None, :, :] < b_width[:, None, None]
        b_w = tl.load(p_w + i_d, mask=m_r[:, :, None] & m_d, other=0.0)
        b_factor = b_weight[:, None]
        if HAS_SCALE:
            o_s = i_d // BLOCK_SIZE + o_r % NB
            m_s = m_a[:, None] & ((o_s * BLOCK_SIZE)[None, :] < b_width[:, None])
            b_factor *= tl.load(p_s[:, None] + o_s[None, :], mask=m_s, other=0.0)
        # Keeps the compiler from spreading the loads above among the sums to save registers.
        tl.debug_barrier()
        b_h = tl.load(p_h + i_d, mask=m_a[:, None, None] & m_d, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_w.to(tl.float32) * (b_h * b_factor[:, :, None]), 0)
    b_y = tl.sum(tl.reshape(tl.sum(b_sum, 1), [BO, NB]), 1)
    b_y += tl.load(p_residual + i_t * C + o_o, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_y + i_t * C + o_o, b_y.to(p_y.dtype.element_ty), mask=m_o)


def common_options(
    down: torch.Tensor, shared_down: torch.Tensor | None, num_active: int, use_pdl: bool
) -> dict[str, Any]:
    """Sizes that all kernels of the op take, and how they are launched."""
    _, C, I = down.shape
    IS = 0 if shared_down is None else shared_down.shape[1]
    return {
        "C": C,
        "I": I,
        "IS": IS,
        "A": num_active,
        "SLOTS": num_active + (IS > 0),
        "IH": max(I, IS),
        "BLOCK_SIZE": BLOCK,
        **overlap_options(use_pdl),
    }


def gather_up(
    normed: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    top_ids: torch.Tensor,
    scales: ExpertScales | None,
    tile: GatherTile,
    *,
    use_pdl: bool,
) -> torch.Tensor:
    """Hidden channels of each slot, the shared expert's last. [T, A + 1, I]

    Args:
        weights: gate_up, down, shared_gate_up, shared_down.
    """
    gate_up, down, shared_gate_up, shared_down = weights
    num_tokens, num_active = top_ids.shape
    options = common_options(down, shared_down, num_active, use_pdl)
    slots, width = options["SLOTS"], options["IH"]
    hidden = torch.empty(num_tokens, slots, width, dtype=normed.dtype, device=normed.device)
    num_blocks = triton.cdiv(width, tile.BI)
    # Of the next kernel's weights each program asks for a stretch that begins at 16 bytes.
    share = options["C"] * options["I"] // num_blocks
    is_aligned = share * down.element_size() % 16 == 0 and share * num_blocks == down[0].numel()
    experts_rows_up_kernel[(num_blocks, num_tokens * slots)](
        normed,
        gate_up,
        gate_up if shared_gate_up is None else shared_gate_up,
        normed if scales is None else scales.gate_up,
        normed if scales is None or scales.shared_gate_up is None else scales.shared_gate_up,
        down,
        top_ids,
        hidden,
        num_tokens,
        **options,
        BI=tile.BI,
        BC=tile.BC,
        SHARE=share,
        PREFETCHED=tile.prefetched if is_aligned else 0,
        HAS_SCALE=scales is not None,
        num_warps=tile.up_warps,
        num_stages=1,
    )
    return hidden


def gather_down(
    hidden: torch.Tensor,
    down: torch.Tensor,
    shared_down: torch.Tensor | None,
    *,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    scales: ExpertScales | None,
    tile: GatherTile,
    use_pdl: bool,
) -> torch.Tensor:
    """Weighted sum of all slots' down products, and the residual. [T, C]"""
    num_tokens, num_active = top_ids.shape
    options = common_options(down, shared_down, num_active, use_pdl)
    y = torch.empty_like(residual)
    experts_rows_down_kernel[(triton.cdiv(options["C"], tile.BO), num_tokens)](
        hidden,
        down,
        down if shared_down is None else shared_down,
        hidden if scales is None else scales.down,
        hidden if scales is None or scales.shared_down is None else scales.shared_down,
        top_weights,
        top_ids,
        top_weights if shared_logit is None else shared_logit,
        residual,
        y,
        **options,
        BA=triton.next_power_of_2(options["SLOTS"]),
        BO=tile.BO,
        BD=tile.BD,
        HAS_SCALE=scales is not None,
        num_warps=tile.down_warps,
        num_stages=1,
    )
    return y
