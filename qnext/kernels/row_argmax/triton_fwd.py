"""The likeliest token of each row: the best key of each part, then the best of those."""

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_decode import (
    key_id,
    order_key,
    overlap_options,
    rows_objection,
    wait_for_previous,
)

MAX_ROWS = 65535
# A part of a row: 152K tokens are 38 parts, one of whom no SM waits long for.
PART = 4096


@triton.jit(do_not_specialize=["N"])
def row_argmax_part_kernel(
    p_x: tl.tensor,
    p_part: tl.tensor,
    W: tl.tensor,
    N: tl.tensor,
    BW: tl.constexpr,
    WAITS: tl.constexpr,
) -> None:
    """The best key among BW elements of a row."""
    i_p, i_t = tl.program_id(0), tl.program_id(1)
    o_w = i_p * BW + tl.arange(0, BW)
    wait_for_previous(WAITS)
    b_x = tl.load(p_x + i_t.to(tl.int64) * W + o_w, mask=o_w < W, other=float("nan"))
    b_key = tl.where(o_w < W, order_key(b_x, o_w), -0x8000000000000000)
    tl.store(p_part + i_t * N + i_p, tl.max(b_key, 0))


@triton.jit(do_not_specialize=["N"])
def row_argmax_kernel(
    p_part: tl.tensor, p_id: tl.tensor, N: tl.tensor, BN: tl.constexpr, WAITS: tl.constexpr
) -> None:
    """The best of a row's keys."""
    i_t = tl.program_id(0)
    o_n = tl.arange(0, BN)
    wait_for_previous(WAITS)
    b_best = tl.full([BN], -0x8000000000000000, tl.int64)
    for i_n in range(0, N, BN):
        o_part = i_n + o_n
        b_key = tl.load(p_part + i_t * N + o_part, mask=o_part < N, other=-0x8000000000000000)
        b_best = tl.maximum(b_best, b_key)
    tl.store(p_id + i_t, key_id(tl.max(b_best, 0)).to(tl.int64))


def row_argmax_fwd(logits: torch.Tensor, *, use_pdl: bool = False) -> torch.Tensor:
    """Launch both kernels; see `row_argmax_reference` and `overlap_options`."""
    num_rows, width = logits.shape
    num_parts = triton.cdiv(width, PART)
    parts = torch.empty(num_rows, num_parts, dtype=torch.int64, device=logits.device)
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    options = overlap_options(use_pdl)
    row_argmax_part_kernel[(num_parts, num_rows)](
        logits, parts, width, num_parts, BW=PART, num_warps=4, **options
    )
    row_argmax_kernel[(num_rows,)](parts, ids, num_parts, BN=64, num_warps=1, **options)
    return ids


def supports(logits: torch.Tensor) -> str | None:
    """Why these kernels cannot run, or None."""
    if logits.dtype != torch.float32:
        return f"logits of {logits.dtype}, not fp32"
    return rows_objection(logits, MAX_ROWS)


def row_argmax_triton(logits: torch.Tensor) -> torch.Tensor:
    """See `row_argmax_reference`."""
    return row_argmax_fwd(logits)
