"""Backward of zero-centred RMSNorm on a GPU."""

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import column_sums, dense_rows, num_processors, row_tile
from qnext.kernels.graph_ops import graph_op

_TILE_ELEMENTS = 4096
_PROGRAMS_PER_PROCESSOR = 2


@graph_op("rms_norm_backward", "x", "weight")
def rms_norm_bwd(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    d_x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernel and the sum of the weight's gradient over programs.

    Args:
        d_out: gradient of the normalised rows. [..., C]
        x: rows that were normalised. [..., C]
        weight: zero-centred scale. [C]
        eps: as in the forward.
        d_x: gradient that x has from elsewhere; it is added. [..., C]

    Returns:
        Gradients of x and of the weight, in their dtypes.
    """
    columns = x.shape[-1]
    rows, d_rows = dense_rows(x), dense_rows(d_out)
    num_rows = rows.shape[0]
    extra = rows if d_x is None else dense_rows(d_x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_rows, block_columns, warps = row_tile(columns, _TILE_ELEMENTS)
    num_programs = min(
        _PROGRAMS_PER_PROCESSOR * num_processors(x.device), triton.cdiv(num_rows, block_rows)
    )
    partials = torch.empty(num_programs, columns, dtype=torch.float32, device=x.device)
    rms_norm_bwd_kernel[(num_programs,)](
        d_rows,
        rows,
        weight,
        extra,
        out,
        partials,
        num_rows,
        d_rows.stride(0),
        rows.stride(0),
        extra.stride(0),
        eps,
        C=columns,
        BR=block_rows,
        BC=block_columns,
        HAS_EXTRA=d_x is not None,
        num_warps=warps,
    )
    return out, column_sums(partials, weight.dtype)


@triton.jit
def _load_rows(
    p_rows: tl.tensor,
    stride: tl.tensor,
    o_r: tl.tensor,
    o_c: tl.tensor,
    num_rows: tl.tensor,
    C: tl.constexpr,
) -> tl.tensor:
    mask = (o_r < num_rows)[:, None] & (o_c < C)[None, :]
    return tl.load(p_rows + o_r[:, None] * stride + o_c[None, :], mask, 0.0)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def rms_norm_bwd_kernel(
    p_dout: tl.tensor,
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_extra: tl.tensor,
    p_dx: tl.tensor,
    p_partial: tl.tensor,
    num_rows: tl.tensor,
    stride_dout: tl.tensor,
    stride_x: tl.tensor,
    stride_extra: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
) -> None:
    """Each program takes every P-th tile of rows and keeps its part of the weight's gradient.

    With n = x / rms(x) and e = d_out (1 + w): dx = (e - n mean(e n)) / rms(x).
    """
    i_p, num_programs = tl.program_id(0), tl.num_programs(0)
    o_c = tl.arange(0, BC)
    b_weight = 1.0 + tl.load(p_weight + o_c, o_c < C, 0.0).to(tl.float32)
    b_dweight = tl.zeros([BR, BC], tl.float32)
    num_tiles = tl.cdiv(num_rows, BR)
    o_r = i_p.to(tl.int64) * BR + tl.arange(0, BR)
    b_x = _load_rows(p_x, stride_x, o_r, o_c, num_rows, C)
    b_dout = _load_rows(p_dout, stride_dout, o_r, o_c, num_rows, C)
    for _ in range(i_p, num_tiles, num_programs):
        # The next tile is asked for before this one is worked on, to keep the memory busy.
        o_next = o_r + num_programs * BR
        b_next_x = _load_rows(p_x, stride_x, o_next, o_c, num_rows, C)
        b_next_dout = _load_rows(p_dout, stride_dout, o_next, o_c, num_rows, C)
        if HAS_EXTRA:
            b_extra = _load_rows(p_extra, stride_extra, o_r, o_c, num_rows, C)
        b_x = b_x.to(tl.float32)
        b_dout = b_dout.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)[:, None]
        b_normed = b_x * inverse
        b_dweight += b_dout * b_normed
        b_scaled = b_dout * b_weight[None, :]
        mean = (tl.sum(b_scaled * b_normed, 1) / C)[:, None]
        b_dx = (b_scaled - b_normed * mean) * inverse
        if HAS_EXTRA:
            b_dx += b_extra.to(tl.float32)
        mask = (o_r < num_rows)[:, None] & (o_c < C)[None, :]
        tl.store(p_dx + o_r[:, None] * C + o_c[None, :], b_dx, mask)
        b_x, b_dout, o_r = b_next_x, b_next_dout, o_next
    tl.store(p_partial + i_p * C + o_c, tl.sum(b_dweight, 0), o_c < C)
