"""Norm and choice of experts: logits on many SMs, then the choice by one program per token."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_decode import (
    key_id,
    key_value,
    order_bits,
    order_key,
    order_value,
    overlap_options,
    row_inverse_rms,
    rows_objection,
    wait_for_previous,
    weight_objection,
)
from qnext.kernels.row_linear.triton_fwd import MAX_ROWS as MAX_GEMV_ROWS
from qnext.kernels.row_linear.triton_fwd import row_linear_fwd

MAX_ROWS = 128
MAX_EXPERTS = 1024
MAX_ACTIVE = 32
# Gate rows and warps per program. For few tokens a warp of its own for each row: no sum then waits
# for other warps, and 512 of them are one for each scheduler. For more tokens 128 programs each.
FEW_TOKENS = 2
FEW_TOKENS_CUT = (1, 1)
MANY_TOKENS_CUT = (4, 4)


@triton.jit
def choose_experts(
    p_logits: tl.tensor,
    p_weights: tl.tensor,
    p_ids: tl.tensor,
    E: tl.constexpr,
    A: tl.constexpr,
    IS_NORMED: tl.constexpr,
    BE: tl.constexpr,
    BA: tl.constexpr,
    ONE_WARP: tl.constexpr,
) -> None:
    """Softmax and the A best of one token's logits, by A rounds of taking the largest.

    One warp finds the largest 32 bits, then the lowest id that has them, an instruction each for
    its 32 lanes. Several warps would meet twice per round; they find both at once, in 64 bits.
    """
    o_e, o_a = tl.arange(0, BE), tl.arange(0, BA)
    # From L2, where other programs of the same launch may just have put them.
    b_e = tl.load(p_logits + o_e, mask=o_e < E, other=-float("inf"), cache_modifier=".cg")
    b_id = tl.zeros([BA], tl.int32)
    if ONE_WARP:
        LEAST: tl.constexpr = -0x80000000
        b_order = tl.where(o_e < E, order_bits(b_e), LEAST)
        b_best = tl.full([BA], LEAST, tl.int32)
        for i_a in range(A):
            best = tl.max(b_order, 0)
            best_id = tl.min(tl.where(b_order == best, o_e, BE), 0)
            b_best = tl.where(o_a == i_a, best, b_best)
            b_id = tl.where(o_a == i_a, best_id, b_id)
            b_order = tl.where(o_e == best_id, LEAST, b_order)
        b_top = tl.where(o_a < A, order_value(b_best), -float("inf"))
    else:
        b_key = tl.where(o_e < E, order_key(b_e, o_e), -0x8000000000000000)
        b_top = tl.full([BA], -float("inf"), tl.float32)
        for i_a in range(A):
            best_key = tl.max(b_key, 0)
            b_top = tl.where(o_a == i_a, key_value(best_key), b_top)
            b_id = tl.where(o_a == i_a, key_id(best_key), b_id)
            b_key = tl.where(b_key == best_key, -0x8000000000000000, b_key)
    largest = tl.max(b_top, 0)
    b_p = tl.exp(b_top - largest)
    if IS_NORMED:
        b_p = b_p / tl.sum(b_p, 0)
    else:
        b_p = b_p / tl.sum(tl.exp(b_e - largest), 0)
    tl.store(p_weights + o_a, b_p, mask=o_a < A)
    tl.store(p_ids + o_a, b_id, mask=o_a < A)


@triton.jit
def norm_router_logits_kernel(
    p_x: tl.tensor,
    p_norm: tl.tensor,
    p_gate: tl.tensor,
    p_shared: tl.tensor,
    p_normed: tl.tensor,
    p_logits: tl.tensor,
    p_shared_logit: tl.tensor,
    p_weights: tl.tensor,
    p_ids: tl.tensor,
    p_counter: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    IS_NORMED: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BC: tl.constexpr,
    BG: tl.constexpr,
    BE: tl.constexpr,
    BA: tl.constexpr,
    ONE_WARP: tl.constexpr,
    CHOOSES: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BG logits of one token. The first program also writes the norm and the shared gate's logit.

    With CHOOSES, the token's last program to arrive chooses, and sets its counter back to zero.
    """
    i_t, i_e = tl.program_id(0), tl.program_id(1)
    o_e = i_e * BG + tl.arange(0, BG)
    o_c = tl.arange(0, BC)
    is_first = i_e == 0
    p_row = p_gate + o_e[:, None] * C + o_c[None, :]
    b_w = tl.load(p_row, mask=(o_e < E)[:, None] & (o_c < C)[None, :], other=0.0)
    b_n = tl.load(p_norm + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    if HAS_SHARED:
        b_g = tl.load(p_shared + o_c, mask=(o_c < C) & is_first, other=0.0)
    wait_for_previous(WAITS)
    p_x += i_t * C
    inverse = row_inverse_rms(p_x, eps, C, BC)
    b_sum = tl.zeros([BG, BC], tl.float32)
    b_shared = tl.zeros([BC], tl.float32)
    for i_c in range(0, C, BC):
        m_c = i_c + o_c < C
        b_x = tl.load(p_x + i_c + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = (b_x * inverse * (1.0 + b_n)).to(p_x.dtype.element_ty)
        tl.store(p_normed + i_t * C + i_c + o_c, b_x, mask=m_c & is_first)
        b_x = b_x.to(tl.float32)
        b_sum += b_w.to(tl.float32) * b_x[None, :]
        if HAS_SHARED:
            b_shared += b_g.to(tl.float32) * b_x
        if C > BC:
            o_next = i_c + BC + o_c
            m_next = o_next < C
            b_w = tl.load(p_row + i_c + BC, mask=(o_e < E)[:, None] & m_next[None, :], other=0.0)
            b_n = tl.load(p_norm + o_next, mask=m_next, other=0.0).to(tl.float32)
            if HAS_SHARED:
                b_g = tl.load(p_shared + o_next, mask=m_next & is_first, other=0.0)
    tl.store(p_logits + i_t * E + o_e, tl.sum(b_sum, 1), mask=o_e < E)
    if HAS_SHARED:
        if is_first:
            tl.store(p_shared_logit + i_t, tl.sum(b_shared, 0))
    if CHOOSES:
        # All threads' logits are written before the one that counts says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(p_counter + i_t, 1, sem="acq_rel", scope="gpu")
        if arrived == tl.num_programs(1) - 1:
            choose_experts(
                p_logits + i_t * E, p_weights + i_t * A, p_ids + i_t * A, E, A, IS_NORMED, BE, BA,
                ONE_WARP,
            )  # fmt: skip
            tl.store(p_counter + i_t, 0)


@triton.jit
def norm_router_choose_kernel(
    p_x: tl.tensor,
    p_norm: tl.tensor,
    p_shared: tl.tensor,
    p_normed: tl.tensor,
    p_logits: tl.tensor,
    p_shared_logit: tl.tensor,
    p_weights: tl.tensor,
    p_ids: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    IS_NORMED: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    NORMS: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
    BA: tl.constexpr,
    ONE_WARP: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """The choice for one token whose logits are there; with NORMS also its norm and shared gate."""
    i_t = tl.program_id(0)
    wait_for_previous(WAITS)
    if NORMS:
        p_x += i_t * C
        o_c = tl.arange(0, BC)
        inverse = row_inverse_rms(p_x, eps, C, BC)
        b_shared = tl.zeros([BC], tl.float32)
        for i_c in range(0, C, BC):
            m_c = i_c + o_c < C
            b_x = tl.load(p_x + i_c + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_n = tl.load(p_norm + i_c + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_x = (b_x * inverse * (1.0 + b_n)).to(p_x.dtype.element_ty)
            tl.store(p_normed + i_t * C + i_c + o_c, b_x, mask=m_c)
            if HAS_SHARED:
                b_g = tl.load(p_shared + i_c + o_c, mask=m_c, other=0.0).to(tl.float32)
                b_shared += b_g * b_x.to(tl.float32)
        if HAS_SHARED:
            tl.store(p_shared_logit + i_t, tl.sum(b_shared, 0))
    choose_experts(
        p_logits + i_t * E, p_weights + i_t * A, p_ids + i_t * A, E, A, IS_NORMED, BE, BA, ONE_WARP
    )


def norm_router_fwd(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor,
    shared_gate: torch.Tensor | None,
    *,
    top_k: int,
    norm_topk_prob: bool,
    counters: torch.Tensor | None = None,
    use_pdl: bool = False,
    cut: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch one kernel or two; arguments as in `norm_router_reference`.

    Args:
        counters: zeros, left as zeros; one launch does all with them. Calls that may run at the
            same time need their own. Used for up to 16 rows. [>= T], int32
        use_pdl: see `overlap_options`.
        cut: other gate rows and warps per program than those chosen by shape.
    """
    num_rows, num_columns = x.shape
    num_experts = gate.shape[0]
    normed = torch.empty_like(x)
    logits = torch.empty(num_rows, num_experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(num_rows, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(num_rows, top_k, dtype=torch.int32, device=x.device)
    shared_logit = None
    if shared_gate is not None:
        shared_logit = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    shared = normed if shared_gate is None else shared_gate
    is_gemv = num_rows <= MAX_GEMV_ROWS
    chooses = is_gemv and counters is not None
    if not is_gemv:
        how: dict[str, Any] = {"eps": eps, "out_dtype": torch.float32, "use_pdl": use_pdl}
        logits = row_linear_fwd(x, gate, norm_weight, None, None, **how)
    outputs = (normed, logits, logits if shared_logit is None else shared_logit, weights, ids)
    options: dict[str, Any] = {
        "C": num_columns,
        "E": num_experts,
        "A": top_k,
        "IS_NORMED": norm_topk_prob,
        "HAS_SHARED": shared_gate is not None,
        "BC": _column_block(num_columns),
        "BE": triton.next_power_of_2(num_experts),
        "BA": triton.next_power_of_2(top_k),
        "num_stages": 1,
        **overlap_options(use_pdl),
    }
    if is_gemv:
        gate_rows, warps = cut or choose_cut(num_rows, num_columns)
        # Programs of one part of the gate are neighbours: one reads it from memory for all tokens.
        norm_router_logits_kernel[(num_rows, triton.cdiv(num_experts, gate_rows))](
            x,
            norm_weight,
            gate,
            shared,
            *outputs,
            ids if counters is None else counters,
            eps,
            BG=gate_rows,
            CHOOSES=chooses,
            ONE_WARP=warps == 1,
            num_warps=warps,
            **options,
        )
    if not chooses:
        warps = 1 if is_gemv else 4
        norm_router_choose_kernel[(num_rows,)](
            x,
            norm_weight,
            shared,
            *outputs,
            eps,
            NORMS=not is_gemv,
            ONE_WARP=warps == 1,
            num_warps=warps,
            **options,
        )
    return normed, weights, ids, shared_logit


def choose_cut(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Gate rows and warps per program; longer rows than 2048 outgrow the registers of a warp."""
    return FEW_TOKENS_CUT if num_rows <= FEW_TOKENS and num_columns <= 2048 else MANY_TOKENS_CUT


def _column_block(num_columns: int) -> int:
    """Whole rows where their length is a power of two up to 4096."""
    padded = triton.next_power_of_2(num_columns)
    return padded if padded == num_columns and padded <= 4096 else min(padded, 1024)


def supports(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor,
    shared_gate: torch.Tensor | None,
    *,
    top_k: int,
    norm_topk_prob: bool,
) -> str | None:
    """Why these kernels cannot run, or None."""
    if gate.shape[0] > MAX_EXPERTS:
        return f"{gate.shape[0]} experts, more than {MAX_EXPERTS}"
    if not 1 <= top_k <= min(MAX_ACTIVE, gate.shape[0]):
        return f"{top_k} of {gate.shape[0]} experts per token, not 1 to {MAX_ACTIVE}"
    if shared_gate is not None:
        reason = weight_objection("shared_gate", shared_gate, None, x.dtype)
        if reason is not None:
            return reason
    return rows_objection(x, MAX_ROWS) or weight_objection("gate", gate, None, x.dtype)


def norm_router_triton(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor,
    shared_gate: torch.Tensor | None,
    *,
    top_k: int,
    norm_topk_prob: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `norm_router_reference`. Up to 128 rows.

    A row's bits depend on no other row, but those of its logits on how many rows there are: 1 to 2,
    3 to 16, or more.
    """
    return norm_router_fwd(
        x,
        norm_weight,
        eps,
        gate,
        shared_gate,
        top_k=top_k,
        norm_topk_prob=norm_topk_prob,
    )
