"""Mixture of experts for up to 16 rows: each distinct expert is read once, for all of them.

A token chooses an expert at most once, so 16 rows hold an expert's tokens without any sorting. The
program of a pair (token, expert) does the work if no earlier token chose the same expert, with all
rows as one side of its dots, and writes what belongs to tokens that did choose it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qnext.kernels.experts_rows.reference import ExpertScales
from qnext.kernels.experts_rows.triton_config import RowsTile, Weights, common_options
from qnext.kernels.gpu_decode import overlap_options, wait_for_previous, widened

# Rows of a dot, for any number of tokens: so a row's bits depend on no other.
TILE_ROWS = 16
# Channels per program of the sum over slots.
SUM_CHANNELS = 128


@triton.jit
def rows_of_expert(
    p_ids: tl.tensor,
    i_pair: tl.tensor,
    T: tl.tensor,
    A: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
) -> "tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]":
    """A pair's expert, whether this pair is the first with it, who chose it, and as which rank."""
    o_t, o_a = tl.arange(0, BT), tl.arange(0, BA)
    o_pair = o_t[:, None] * A + o_a[None, :]
    m_pair = (o_t < T)[:, None] & (o_a < A)[None, :]
    e_id = tl.load(p_ids + i_pair)
    b_is = (tl.load(p_ids + o_pair, mask=m_pair, other=-1) == e_id) & m_pair
    b_rank = tl.max(tl.where(b_is, o_a[None, :], -1), 1)
    is_first = tl.min(tl.min(tl.where(b_is, o_pair, BT * A), 1), 0) == i_pair
    return e_id, is_first, b_rank >= 0, tl.maximum(b_rank, 0)


@triton.jit
def load_rows(
    weight: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    k: tl.tensor,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    USE_TMA: tl.constexpr,
) -> tl.tensor:
    """Columns k to k + BK of BN rows; past num_rows of them the last is read again."""
    if USE_TMA:
        return weight.load([first, k])
    else:
        o_k = k + tl.arange(0, BK)
        o_n = first.to(tl.int64) + tl.minimum(tl.arange(0, BN), num_rows - 1)
        p_w = weight + o_n[:, None] * K + o_k[None, :]
        if K % BK == 0:
            return tl.load(p_w)
        else:
            return tl.load(p_w, mask=(o_k < K)[None, :], other=0.0)


@triton.jit
def up_rows(
    p_x: tl.tensor,
    weight: tl.tensor,
    p_scale: tl.tensor,
    p_hidden: tl.tensor,
    e_id: tl.tensor,
    i_n: tl.tensor,
    b_slot: tl.tensor,
    m_t: tl.tensor,
    C: tl.constexpr,
    W: tl.constexpr,
    IH: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BN hidden channels of one expert of width W, for the tokens in m_t at their slots."""
    o_t = tl.arange(0, BT)
    n = i_n * BN
    first = e_id * (2 * W) + n
    if HAS_SCALE:
        SC: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
        p_gate_s = p_scale + (e_id * (2 * W // BLOCK_SIZE) + n // BLOCK_SIZE) * SC
        p_up_s = p_gate_s + W // BLOCK_SIZE * SC
    b_gate = tl.zeros([BN, BT], tl.float32)
    b_up = tl.zeros([BN, BT], tl.float32)
    for k in range(0, C, BK):
        o_k = k + tl.arange(0, BK)
        p_row = p_x + o_t[:, None] * C + o_k[None, :]
        if C % BK == 0:
            b_x = tl.trans(tl.load(p_row, mask=m_t[:, None], other=0.0))
        else:
            b_x = tl.trans(tl.load(p_row, mask=m_t[:, None] & (o_k < C)[None, :], other=0.0))
        b_g = load_rows(weight, first, W - n, k, C, BN, BK, USE_TMA)
        b_u = load_rows(weight, first + W, W - n, k, C, BN, BK, USE_TMA)
        if HAS_SCALE:
            # A step is one block of columns, whose scale its sums take.
            gate_s = tl.load(p_gate_s + k // BLOCK_SIZE)
            up_s = tl.load(p_up_s + k // BLOCK_SIZE)
            b_gate += tl.dot(widened(b_g, b_x), b_x, input_precision=PRECISION) * gate_s
            b_up += tl.dot(widened(b_u, b_x), b_x, input_precision=PRECISION) * up_s
        else:
            b_gate = tl.dot(b_g, b_x, b_gate, input_precision=PRECISION)
            b_up = tl.dot(b_u, b_x, b_up, input_precision=PRECISION)
    b_hidden = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    o_n = n + tl.arange(0, BN)
    p_out = p_hidden + (b_slot * IH)[None, :] + o_n[:, None]
    tl.store(p_out, b_hidden.to(p_hidden.dtype.element_ty), mask=(o_n < W)[:, None] & m_t[None, :])


@triton.jit(do_not_specialize=["T"])
def experts_rows_up_tile_kernel(
    p_x: tl.tensor,
    gate_up: tl.tensor,
    shared: tl.tensor,
    p_scale: tl.tensor,
    p_shared_scale: tl.tensor,
    p_ids: tl.tensor,
    p_hidden: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    IH: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BN channels of one expert's hidden[t, a] = silu(gate x_t) * up x_t; slot A is the shared one.

    Programs of the shared expert come first, then those of each pair, neighbours of each other.
    """
    NUM_SHARED: tl.constexpr = (IS + BN - 1) // BN
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    i_p = tl.program_id(0)
    o_t = tl.arange(0, BT)
    wait_for_previous(WAITS)
    if i_p < NUM_SHARED:
        if IS > 0:
            up_rows(
                p_x, shared, p_shared_scale, p_hidden, 0, i_p, o_t * SLOTS + A, o_t < T,
                C, IS, IH, BT, BN, BK, USE_TMA, HAS_SCALE, BLOCK_SIZE, PRECISION,
            )  # fmt: skip
    else:
        i_r = i_p - NUM_SHARED
        e_id, is_first, m_t, b_rank = rows_of_expert(p_ids, i_r // NUM_N, T, A, BT, BA)
        if is_first:
            up_rows(
                p_x, gate_up, p_scale, p_hidden, e_id, i_r % NUM_N, o_t * SLOTS + b_rank, m_t,
                C, I, IH, BT, BN, BK, USE_TMA, HAS_SCALE, BLOCK_SIZE, PRECISION,
            )  # fmt: skip


@triton.jit
def down_rows(
    p_hidden: tl.tensor,
    weight: tl.tensor,
    p_scale: tl.tensor,
    p_slots: tl.tensor,
    e_id: tl.tensor,
    i_o: tl.tensor,
    b_slot: tl.tensor,
    m_t: tl.tensor,
    C: tl.constexpr,
    W: tl.constexpr,
    IH: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BO channels of one expert of width W, for the tokens in m_t at their slots."""
    n = i_o * BO
    if HAS_SCALE:
        SO: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
        SI: tl.constexpr = (W + BLOCK_SIZE - 1) // BLOCK_SIZE
        p_s = p_scale + (e_id * SO + n // BLOCK_SIZE) * SI
    b_out = tl.zeros([BO, BT], tl.float32)
    for k in range(0, W, BD):
        o_k = k + tl.arange(0, BD)
        p_row = p_hidden + b_slot[:, None] * IH + o_k[None, :]
        if W % BD == 0:
            b_h = tl.trans(tl.load(p_row, mask=m_t[:, None], other=0.0))
        else:
            b_h = tl.trans(tl.load(p_row, mask=m_t[:, None] & (o_k < W)[None, :], other=0.0))
        b_w = load_rows(weight, e_id * C + n, C - n, k, W, BO, BD, USE_TMA)
        if HAS_SCALE:
            scale = tl.load(p_s + k // BLOCK_SIZE)
            b_out += tl.dot(widened(b_w, b_h), b_h, input_precision=PRECISION) * scale
        else:
            b_out = tl.dot(b_w, b_h, b_out, input_precision=PRECISION)
    o_n = n + tl.arange(0, BO)
    p_out = p_slots + (b_slot * C)[None, :] + o_n[:, None]
    tl.store(p_out, b_out, mask=(o_n < C)[:, None] & m_t[None, :])


@triton.jit(do_not_specialize=["T"])
def experts_rows_down_tile_kernel(
    p_hidden: tl.tensor,
    down: tl.tensor,
    shared: tl.tensor,
    p_scale: tl.tensor,
    p_shared_scale: tl.tensor,
    p_ids: tl.tensor,
    p_slots: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    I: tl.constexpr,
    IS: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    IH: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    USE_TMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO channels of the down product of each slot of one expert, in fp32."""
    NUM_O: tl.constexpr = (C + BO - 1) // BO
    NUM_SHARED: tl.constexpr = NUM_O * (SLOTS - A)
    i_p = tl.program_id(0)
    o_t = tl.arange(0, BT)
    wait_for_previous(WAITS)
    if i_p < NUM_SHARED:
        if IS > 0:
            b_slot = o_t * SLOTS + A
            down_rows(
                p_hidden, shared, p_shared_scale, p_slots, 0, i_p, b_slot, o_t < T,
                C, IS, IH, BT, BO, BD, USE_TMA, HAS_SCALE, BLOCK_SIZE, PRECISION,
            )  # fmt: skip
    else:
        i_r = i_p - NUM_SHARED
        e_id, is_first, m_t, b_rank = rows_of_expert(p_ids, i_r // NUM_O, T, A, BT, BA)
        if is_first:
            b_slot = o_t * SLOTS + b_rank
            down_rows(
                p_hidden, down, p_scale, p_slots, e_id, i_r % NUM_O, b_slot, m_t,
                C, I, IH, BT, BO, BD, USE_TMA, HAS_SCALE, BLOCK_SIZE, PRECISION,
            )  # fmt: skip


@triton.jit
def experts_rows_sum_kernel(
    p_slots: tl.tensor,
    p_weights: tl.tensor,
    p_shared_logit: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    C: tl.constexpr,
    A: tl.constexpr,
    SLOTS: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BC channels of y_t: residual, and slots times their weights; slot A's is sigmoid(logit)."""
    i_t = tl.program_id(1)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_a = tl.arange(0, BA)
    m_c, m_a = o_c < C, o_a < SLOTS
    wait_for_previous(WAITS)
    b_weight = tl.load(p_weights + i_t * A + o_a, mask=o_a < A, other=0.0)
    if SLOTS > A:
        b_weight = tl.where(o_a < A, b_weight, tl.sigmoid(tl.load(p_shared_logit + i_t)))
    p_slot = p_slots + ((i_t * SLOTS + o_a) * C)[:, None] + o_c[None, :]
    b_slots = tl.load(p_slot, mask=m_a[:, None] & m_c[None, :], other=0.0)
    b_y = tl.load(p_residual + i_t * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y += tl.sum(b_slots * b_weight[:, None], 0)
    tl.store(p_y + i_t * C + o_c, b_y.to(p_y.dtype.element_ty), mask=m_c)


def _blocks(
    weight: torch.Tensor, shared: torch.Tensor | None, sizes: tuple[int, ...], BN: int, BK: int
) -> tuple[Any, Any, bool]:
    """Both weights as the kernels take them, and whether the copy engine loads their blocks.

    Args:
        sizes: rows that belong together, which a block of BN must divide.
    """
    other = weight if shared is None else shared
    use_tma = weight.dtype != torch.float32 and all(size % BN == 0 for size in sizes)
    use_tma = use_tma and weight.shape[-1] % BK == 0 and other.shape[-1] % BK == 0
    if not use_tma:
        return weight, other, False
    block = [BN, BK]
    first, second = (
        TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), block)
        for matrix in (weight, other)
    )
    return first, second, True


def _tile_options(
    normed: torch.Tensor, options: dict[str, Any], scales: ExpertScales | None
) -> dict[str, Any]:
    return {
        **options,
        "BT": TILE_ROWS,
        "BA": triton.next_power_of_2(options["A"]),
        "HAS_SCALE": scales is not None,
        "PRECISION": "ieee" if normed.dtype == torch.float32 else "tf32",
    }


def tile_up(
    normed: torch.Tensor,
    weights: Weights,
    top_ids: torch.Tensor,
    scales: ExpertScales | None,
    tile: RowsTile,
    *,
    use_pdl: bool,
) -> torch.Tensor:
    """Hidden channels of each slot, the shared expert's last. [T, A + 1, I]"""
    gate_up, down, shared_gate_up, shared_down = weights
    num_tokens, num_active = top_ids.shape
    options = common_options(down, shared_down, num_active, use_pdl)
    I, IS, slots, width = (options[name] for name in ("I", "IS", "SLOTS", "IH"))
    hidden = torch.empty(num_tokens, slots, width, dtype=normed.dtype, device=normed.device)
    routed, shared, use_tma = _blocks(gate_up, shared_gate_up, (I, IS), tile.BN, tile.BK)
    num_programs = num_tokens * num_active * triton.cdiv(I, tile.BN) + triton.cdiv(IS, tile.BN)
    experts_rows_up_tile_kernel[(num_programs,)](
        normed,
        routed,
        shared,
        normed if scales is None else scales.gate_up,
        normed if scales is None or scales.shared_gate_up is None else scales.shared_gate_up,
        top_ids,
        hidden,
        num_tokens,
        **_tile_options(normed, options, scales),
        BN=tile.BN,
        BK=tile.BK,
        USE_TMA=use_tma,
        num_warps=tile.up_warps,
        num_stages=tile.up_stages,
    )
    return hidden


def tile_down(
    hidden: torch.Tensor,
    down: torch.Tensor,
    shared_down: torch.Tensor | None,
    top_ids: torch.Tensor,
    scales: ExpertScales | None,
    tile: RowsTile,
    *,
    use_pdl: bool,
) -> torch.Tensor:
    """Down products of each slot. [T, A + 1, C], fp32"""
    num_tokens, num_active = top_ids.shape
    options = common_options(down, shared_down, num_active, use_pdl)
    C, slots = options["C"], options["SLOTS"]
    products = torch.empty(num_tokens, slots, C, dtype=torch.float32, device=hidden.device)
    routed, shared, use_tma = _blocks(down, shared_down, (C,), tile.BO, tile.BD)
    num_programs = (num_tokens * num_active + slots - num_active) * triton.cdiv(C, tile.BO)
    experts_rows_down_tile_kernel[(num_programs,)](
        hidden,
        routed,
        shared,
        hidden if scales is None else scales.down,
        hidden if scales is None or scales.shared_down is None else scales.shared_down,
        top_ids,
        products,
        num_tokens,
        **_tile_options(hidden, options, scales),
        BO=tile.BO,
        BD=tile.BD,
        USE_TMA=use_tma,
        num_warps=tile.down_warps,
        num_stages=tile.down_stages,
    )
    return products


def sum_slots(
    products: torch.Tensor,
    top_weights: torch.Tensor,
    shared_logit: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    use_pdl: bool,
) -> torch.Tensor:
    """Residual plus the weighted slots, in their order. [T, C]"""
    num_tokens, slots, C = products.shape
    y = torch.empty_like(residual)
    experts_rows_sum_kernel[(triton.cdiv(C, SUM_CHANNELS), num_tokens)](
        products,
        top_weights,
        top_weights if shared_logit is None else shared_logit,
        residual,
        y,
        C=C,
        A=top_weights.shape[1],
        SLOTS=slots,
        BA=triton.next_power_of_2(slots),
        BC=SUM_CHANNELS,
        num_warps=4,
        num_stages=1,
        **overlap_options(use_pdl),
    )
    return y
