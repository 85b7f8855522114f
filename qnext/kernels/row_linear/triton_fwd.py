"""Product of a few rows with a weight, which is read once: one row by FMA, up to 16 by dots.

The norm of one row is fused: each program has the row at hand. Of several rows it is a launch of
its own, since each program would read and scale all of them, which took longer than its weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.fp8_blocks import BLOCK, held_scale, tail_of
from qnext.kernels.gpu_decode import (
    NUM_SMS,
    THREAD_ELEMENTS,
    TILE_ELEMENTS,
    block_scales,
    fma_block,
    fma_warps,
    overlap_options,
    row_inverse_rms,
    rows_objection,
    times_scales,
    wait_for_previous,
    weight_objection,
    widened,
)

MAX_ROWS = 16
# Rows of one dot: the narrowest that tensor cores take as this operand without padding.
DOT_ROWS = 16
# From so many e4m3 outputs on dots are faster for one row too: 82 us, not 90, for an H200's head.
DOT_OUTPUTS = 32768


@dataclass(frozen=True)
class RowTile:
    """How a weight is cut: BO of its rows per program, BC columns at once."""

    BO: int
    BC: int
    num_warps: int
    num_stages: int = 1


def gemv_tile(num_outputs: int, num_columns: int, element_bytes: int) -> RowTile:
    """Cut for one row: whole weight rows where their length is a power of two."""
    padded = triton.next_power_of_2(num_columns)
    # A loop over columns holds an fp32 sum per element of the tile, so its tiles are smaller.
    is_whole = padded == num_columns and padded <= 4096
    BC = padded if is_whole else min(padded, 1024)
    is_wide = is_whole and element_bytes < 4
    elements, per_thread = TILE_ELEMENTS, THREAD_ELEMENTS
    if not is_wide:
        elements, per_thread = elements // 4, per_thread // 2
    BO = fma_block(num_outputs, BC, elements)
    return RowTile(BO, BC, num_warps=fma_warps(BO * BC, per_thread))


def dot_tile(num_outputs: int, num_columns: int, element_bytes: int) -> RowTile:
    """Cut for several rows: few outputs are cut narrow, for more programs, with longer steps."""
    if element_bytes == 4:
        return RowTile(16, 32, num_warps=4, num_stages=2)
    is_large = num_outputs >= 64 * NUM_SMS
    if element_bytes == 1:
        # Each warp converts the whole of a narrow tile, so there are two.
        tile = RowTile(32, 2 * BLOCK, 2, 3) if is_large else RowTile(16, 4 * BLOCK, 2, 3)
        # Scales are applied between dots, so a step is whole blocks.
        return tile if num_columns % tile.BC == 0 else RowTile(16, BLOCK, 2, 8)
    tile = RowTile(64, 128, 4, 3) if is_large else RowTile(16, 512, 2, 3)
    BC = max(16, min(tile.BC, triton.next_power_of_2(num_columns)))
    return RowTile(tile.BO, BC, tile.num_warps, tile.num_stages if BC == tile.BC else 5)


@triton.jit
def row_norm_kernel(
    p_x: tl.tensor,
    p_norm: tl.tensor,
    p_normed: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BC: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """The norm of one row, rounded to its dtype."""
    i_t = tl.program_id(0)
    o_c = tl.arange(0, BC)
    b_n = tl.load(p_norm + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    wait_for_previous(WAITS)
    inverse = row_inverse_rms(p_x + i_t * C, eps, C, BC)
    b_x = tl.load(p_x + i_t * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_x = b_x * inverse * (1.0 + b_n)
    tl.store(p_normed + i_t * C + o_c, b_x.to(p_normed.dtype.element_ty), mask=o_c < C)


@triton.jit
def gemv_rows(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_scale: tl.tensor,
    p_norm: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    i_o: tl.tensor,
    O: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO outputs of the only row, from one weight of O rows."""
    o_o = i_o * BO + tl.arange(0, BO)
    o_c = tl.arange(0, BC)
    m_o = o_o < O
    p_row = p_w + o_o.to(tl.int64)[:, None] * C + o_c[None, :]
    SC: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
    # The launcher makes BO divide a block, so that all rows of a tile have the same scales.
    p_s = p_scale + (i_o * BO // BLOCK_SIZE) * SC
    b_w = tl.load(p_row, mask=m_o[:, None] & (o_c < C)[None, :], other=0.0)
    if HAS_NORM:
        b_n = tl.load(p_norm + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    if HAS_SCALE:
        b_s = block_scales(p_s, 0, C, BC, BLOCK_SIZE)
    wait_for_previous(WAITS)
    b_y = tl.zeros([BO], tl.float32)
    if HAS_RESIDUAL:
        b_y += tl.load(p_residual + o_o, mask=m_o, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = row_inverse_rms(p_x, eps, C, BC)
    b_sum = tl.zeros([BO, BC], tl.float32)
    for i_c in range(0, C, BC):
        b_x = tl.load(p_x + i_c + o_c, mask=i_c + o_c < C, other=0.0).to(tl.float32)
        if HAS_NORM:
            b_x = (b_x * inverse * (1.0 + b_n)).to(p_x.dtype.element_ty).to(tl.float32)
        if HAS_SCALE:
            b_x = times_scales(b_x, b_s)
        b_sum += b_w.to(tl.float32) * b_x[None, :]
        if C > BC:
            o_next = i_c + BC + o_c
            b_w = tl.load(p_row + i_c + BC, mask=m_o[:, None] & (o_next < C)[None, :], other=0.0)
            if HAS_NORM:
                b_n = tl.load(p_norm + o_next, mask=o_next < C, other=0.0).to(tl.float32)
            if HAS_SCALE:
                b_s = block_scales(p_s, i_c + BC, C, BC, BLOCK_SIZE)
    b_y += tl.sum(b_sum, 1)
    tl.store(p_y + o_o, b_y.to(p_y.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=["O", "R"])
def row_linear_gemv_kernel(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_scale: tl.tensor,
    p_tail: tl.tensor,
    p_norm: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    O: tl.tensor,
    R: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO outputs of the only row; the first programs take the R rows of the tail, if there is one.

    A tail is twice as wide as its weight: BR of its rows are as many bytes, in as many registers.
    """
    i_o = tl.program_id(0)
    if HAS_TAIL:
        num_tail = (R + BR - 1) // BR
        if i_o < num_tail:
            gemv_rows(
                p_x, p_tail, p_scale, p_norm, p_residual, p_y + O, i_o, R, eps,
                C, BR, BC, HAS_NORM, False, False, BLOCK_SIZE, WAITS,
            )  # fmt: skip
            return
        i_o -= num_tail
    gemv_rows(
        p_x, p_w, p_scale, p_norm, p_residual, p_y, i_o, O, eps,
        C, BO, BC, HAS_NORM, HAS_RESIDUAL, HAS_SCALE, BLOCK_SIZE, WAITS,
    )  # fmt: skip


@triton.jit
def prefetch_rows(p_row: tl.tensor, N: tl.constexpr) -> None:
    """Ask for the first N lines of 128 bytes from each address; returns at once."""
    p_line = p_row.to(tl.int64)[:, None] + tl.arange(0, N)[None, :] * 128
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [p_line], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def dot_rows(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_scale: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    i_o: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,
    YS: tl.tensor,
    C: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BC: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO outputs of BT rows; the weight, of O rows, is at left, where the wide side is."""
    i_t = tl.program_id(1)
    o_o = i_o * BO + tl.arange(0, BO)
    # A step of e4m3 may hold several blocks of columns, each with its scale.
    BK: tl.constexpr = BLOCK_SIZE if HAS_SCALE and BC > BLOCK_SIZE else BC
    # Rows past the end are masked, not read again: a line that all programs ask for many times over
    # took longer to come than their weights.
    o_t = i_t * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BK)
    m_o, m_t = o_o < O, o_t < T
    p_row = p_w + tl.minimum(o_o, O - 1).to(tl.int64)[:, None] * C
    p_token = p_x + o_t.to(tl.int64)[:, None] * C + o_c[None, :]
    SC: tl.constexpr = (C + BLOCK_SIZE - 1) // BLOCK_SIZE
    p_s = p_scale + (i_o * BO // BLOCK_SIZE) * SC
    if WAITS:
        prefetch_rows(p_w + tl.minimum(o_o, O - 1).to(tl.int64) * C, PREFETCH)
    wait_for_previous(WAITS)
    o_y = o_t.to(tl.int64)[None, :] * YS + o_o[:, None]
    m_y = m_o[:, None] & m_t[None, :]
    b_acc = tl.zeros([BO, BT], tl.float32)
    if HAS_RESIDUAL:
        b_acc += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    for i_step in range(0, C, BC):
        for i_part in tl.static_range(0, BC, BK):
            i_c = i_step + i_part
            if C % BC == 0:
                b_w = tl.load(p_row + i_c + o_c[None, :])
                b_x = tl.load(p_token + i_c, mask=m_t[:, None], other=0.0)
            else:
                m_c = (i_c + o_c < C)[None, :]
                b_w = tl.load(p_row + i_c + o_c[None, :], mask=m_c, other=0.0)
                b_x = tl.load(p_token + i_c, mask=m_t[:, None] & m_c, other=0.0)
            if HAS_SCALE:
                b_dot = tl.dot(widened(b_w, b_x), tl.trans(b_x), input_precision=PRECISION)
                # Blocks past the last column, in a step that is not full, have no scale.
                is_there = C % BC == 0 or i_c < C
                b_acc += b_dot * tl.load(p_s + i_c // BLOCK_SIZE, mask=is_there, other=0.0)
            else:
                b_acc = tl.dot(b_w, tl.trans(b_x), b_acc, input_precision=PRECISION)
    tl.store(p_y + o_y, b_acc.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["T", "O", "R", "YS"])
def row_linear_dot_kernel(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_scale: tl.tensor,
    p_tail: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,
    R: tl.tensor,
    YS: tl.tensor,
    C: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """BO outputs of BT rows, into rows of YS; the tail first, as in `row_linear_gemv_kernel`."""
    i_o = tl.program_id(0)
    if HAS_TAIL:
        num_tail = (R + BR - 1) // BR
        if i_o < num_tail:
            dot_rows(
                p_x, p_tail, p_scale, p_residual, p_y + O, i_o, T, R, YS,
                C, BT, BR, BLOCK_SIZE, False, False, BLOCK_SIZE, PRECISION, PREFETCH, WAITS,
            )  # fmt: skip
            return
        i_o -= num_tail
    dot_rows(
        p_x, p_w, p_scale, p_residual, p_y, i_o, T, O, YS,
        C, BT, BO, BC, HAS_RESIDUAL, HAS_SCALE, BLOCK_SIZE, PRECISION, PREFETCH, WAITS,
    )  # fmt: skip


def row_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    eps: float,
    out_dtype: torch.dtype,
    use_dot: bool | None = None,
    use_pdl: bool = False,
    tile: RowTile | None = None,
    tail: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernels for the number of rows; arguments as in `row_linear_reference`.

    Args:
        use_dot: several rows in one dot; None for more than one row, and for long e4m3 weights.
            With True a row's bits are the same alone and in any company.
        use_pdl: see `overlap_options`.
        tile: another cut than the one chosen by shape.
        tail: rows in the dtype of x behind those of an e4m3 weight; without residual. [R, C]

    Returns:
        [T, O + R]
    """
    assert tail is None or (residual is None and tail.dtype == x.dtype), "a tail of other rows"
    num_rows, num_columns = x.shape
    num_outputs = weight.shape[0]
    if use_dot is None:
        use_dot = num_rows > 1 or (scale is not None and num_outputs >= DOT_OUTPUTS)
    if use_dot and norm_weight is not None:
        x, norm_weight = norm_rows(x, norm_weight, eps, use_pdl=use_pdl), None
    num_tail = 0 if tail is None else tail.shape[0]
    y = torch.empty(num_rows, num_outputs + num_tail, dtype=out_dtype, device=x.device)
    choose = dot_tile if use_dot else gemv_tile
    tile = tile or choose(num_outputs, num_columns, weight.element_size())
    tail_block = max(16 if use_dot else 1, tile.BO // 2)
    num_blocks = triton.cdiv(num_outputs, tile.BO) + triton.cdiv(num_tail, tail_block)
    common: dict[str, Any] = {
        "C": num_columns,
        "BO": tile.BO,
        "BR": tail_block,
        "BC": tile.BC,
        "HAS_RESIDUAL": residual is not None,
        "HAS_SCALE": scale is not None,
        "HAS_TAIL": tail is not None,
        "BLOCK_SIZE": BLOCK,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **overlap_options(use_pdl),
    }
    inputs = (x, weight, x if scale is None else scale, x if tail is None else tail)
    other = x if residual is None else residual
    sizes = (num_outputs, num_tail)
    if not use_dot:
        norm = x if norm_weight is None else norm_weight
        row_linear_gemv_kernel[(num_blocks,)](
            *inputs, norm, other, y, *sizes, eps, HAS_NORM=norm_weight is not None, **common
        )
        return y
    row_linear_dot_kernel[(num_blocks, triton.cdiv(num_rows, DOT_ROWS))](
        *inputs,
        other,
        y,
        num_rows,
        *sizes,
        y.stride(0),
        BT=DOT_ROWS,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        PREFETCH=8 if num_columns * weight.element_size() >= 1024 else 1,
        **common,
    )
    return y


def norm_rows(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, *, use_pdl: bool
) -> torch.Tensor:
    """The norm of each row, as an op of its own computes it. [T, C]"""
    num_rows, num_columns = x.shape
    normed = torch.empty_like(x)
    BC = triton.next_power_of_2(num_columns)
    row_norm_kernel[(num_rows,)](
        x,
        norm_weight,
        normed,
        eps,
        C=num_columns,
        BC=BC,
        num_warps=max(1, min(16, BC // 256)),
        **overlap_options(use_pdl),
    )
    return normed


def rows_with_tail_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    eps: float,
    use_pdl: bool = False,
) -> torch.Tensor:
    """norm(x) W^T of up to 16 rows, where an e4m3 weight's tail gives the last outputs. [T, O + R]

    Args:
        weight: in the dtype of x, or e4m3 with its `block_scale` and, where it has one, its `tail`.
    """
    return row_linear_fwd(
        x,
        weight,
        norm_weight,
        None,
        held_scale(weight),
        eps=eps,
        out_dtype=x.dtype,
        use_pdl=use_pdl,
        tail=tail_of(weight),
    )


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Why these kernels cannot run, or None."""
    if residual is not None and not residual.is_contiguous():
        return f"a residual of strides {residual.stride()}"
    return rows_objection(x, MAX_ROWS) or weight_objection("weight", weight, scale, x.dtype)


def row_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `row_linear_reference`. Up to 16 rows, each with the same bits in any company of 2 to 16.

    A row alone is summed in another order, by `row_linear_gemv_kernel` (not by long e4m3 weights).
    """
    return row_linear_fwd(
        x, weight, norm_weight, residual, scale, eps=eps, out_dtype=out_dtype or x.dtype
    )
