"""Backward of DeltaNet's output norm and its gate on a GPU."""

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import column_sums, dense_rows, num_processors, row_tile, sigmoid
from qnext.kernels.graph_ops import graph_op

_PROGRAMS_PER_PROCESSOR = 6


def head_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H, V] as [T, H, V], a view where the leading dimensions are evenly spaced."""
    if x.dim() == 3:
        return x
    return x.unsqueeze(-2) if x.dim() == 2 else x.reshape(-1, *x.shape[-2:])


@graph_op("gated_rms_norm_backward", "x", "z", "weight")
def gated_rms_norm_bwd(
    d_out: torch.Tensor, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward kernel and the sum of the weight's gradient over programs.

    Args:
        d_out: gradient of the gated rows. [..., V]
        x, z: read-out and gate, as in the forward. [..., V]
        weight: scale. [V]
        eps: as in the forward.

    Returns:
        Gradients of x, z and the weight, in their dtypes.
    """
    columns = x.shape[-1]
    x_rows, z_rows = head_rows(x), head_rows(z)
    heads = x_rows.shape[1]
    num_rows = x_rows.shape[0] * heads
    d_rows = dense_rows(d_out)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_z = torch.empty(z.shape, dtype=z.dtype, device=x.device)
    block_rows, block_columns, warps = row_tile(columns)
    num_programs = min(
        _PROGRAMS_PER_PROCESSOR * num_processors(x.device), triton.cdiv(num_rows, block_rows)
    )
    partials = torch.empty(num_programs, columns, dtype=torch.float32, device=x.device)
    gated_rms_norm_bwd_kernel[(num_programs,)](
        d_rows,
        x_rows,
        z_rows,
        weight,
        d_x,
        d_z,
        partials,
        num_rows,
        d_rows.stride(0),
        x_rows.stride(0),
        x_rows.stride(1),
        z_rows.stride(0),
        z_rows.stride(1),
        eps,
        H=heads,
        V=columns,
        BR=block_rows,
        BV=block_columns,
        num_warps=warps,
    )
    return d_x, d_z, column_sums(partials, weight.dtype)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def gated_rms_norm_bwd_kernel(
    p_dout: tl.tensor,
    p_x: tl.tensor,
    p_z: tl.tensor,
    p_weight: tl.tensor,
    p_dx: tl.tensor,
    p_dz: tl.tensor,
    p_partial: tl.tensor,
    num_rows: tl.tensor,
    stride_dout: tl.tensor,
    stride_xt: tl.tensor,
    stride_xh: tl.tensor,
    stride_zt: tl.tensor,
    stride_zh: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
) -> None:
    """Each program takes every P-th tile of rows and keeps its part of the weight's gradient.

    With n = x / rms(x) and e = d_out silu(z) w: dx = (e - n mean(e n)) / rms(x).
    """
    i_p, num_programs = tl.program_id(0), tl.num_programs(0)
    o_v = tl.arange(0, BV)
    b_weight = tl.load(p_weight + o_v, o_v < V, 0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros([BR, BV], tl.float32)
    for i_r in range(i_p, tl.cdiv(num_rows, BR), num_programs):
        o_r = tl.cast(i_r, tl.int64) * BR + tl.arange(0, BR)
        mask = (o_r < num_rows)[:, None] & (o_v < V)[None, :]
        o_t, o_h = o_r // H, o_r % H
        o_x, o_z = o_t * stride_xt + o_h * stride_xh, o_t * stride_zt + o_h * stride_zh
        b_x = tl.load(p_x + o_x[:, None] + o_v[None, :], mask, 0.0).to(tl.float32)
        b_z = tl.load(p_z + o_z[:, None] + o_v[None, :], mask, 0.0).to(tl.float32)
        o_d = (o_r * stride_dout)[:, None] + o_v[None, :]
        b_dout = tl.load(p_dout + o_d, mask, 0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)[:, None]
        b_normed = b_x * inverse
        b_sigmoid = sigmoid(b_z)
        b_silu = b_z * b_sigmoid
        out = o_r[:, None] * V + o_v[None, :]
        # silu' = sigmoid + silu (1 - sigmoid)
        b_slope = b_sigmoid + b_silu * (1.0 - b_sigmoid)
        tl.store(p_dz + out, b_dout * b_normed * b_weight * b_slope, mask)
        b_gated = b_dout * b_silu
        b_dweight += b_gated * b_normed
        b_scaled = b_gated * b_weight
        mean = (tl.sum(b_scaled * b_normed, 1) / V)[:, None]
        tl.store(p_dx + out, (b_scaled - b_normed * mean) * inverse, mask)
    tl.store(p_partial + i_p * V + o_v, tl.sum(b_dweight, 0), o_v < V)
