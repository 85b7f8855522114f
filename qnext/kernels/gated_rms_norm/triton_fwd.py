"""DeltaNet's output norm and its gate on a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.gated_rms_norm.triton_bwd import gated_rms_norm_bwd, head_rows
from qnext.kernels.gpu_rows import row_tile, rows_objection, sigmoid
from qnext.kernels.graph_ops import graph_op

MAX_COLUMNS = 4096


def supports(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Say why this backend cannot run, or None."""
    if weight.shape[0] > MAX_COLUMNS:
        return f"a row of {weight.shape[0]} columns is over {MAX_COLUMNS}, which one program holds"
    if x.shape != z.shape:
        return f"x {tuple(x.shape)} and z {tuple(z.shape)} have one shape here"
    return rows_objection(x, z, weight)


def gated_rms_norm_triton(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `gated_rms_norm_reference`."""
    if torch.compiler.is_compiling():
        return gated_rms_norm_fwd(x, z, weight, eps)  # the op has a gradient of its own
    if torch.is_grad_enabled() and (x.requires_grad or z.requires_grad or weight.requires_grad):
        out: torch.Tensor = GatedRMSNormFunction.apply(x, z, weight, eps)
        return out
    return gated_rms_norm_fwd(x, z, weight, eps)


class GatedRMSNormFunction(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        GatedRMSNormFunction.keep(ctx, (x, z, weight, eps))
        return gated_rms_norm_fwd(x, z, weight, eps)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        return *gated_rms_norm_bwd(d_out, x, z, weight, ctx.eps), None


@graph_op("gated_rms_norm", "x")
def gated_rms_norm_fwd(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Launch the forward kernel. x, z: [..., V]; slices of wider rows are read in place."""
    columns = x.shape[-1]
    x_rows, z_rows = head_rows(x), head_rows(z)
    num_rows, heads = x_rows.shape[0] * x_rows.shape[1], x_rows.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_rows, block_columns, warps = row_tile(columns)
    gated_rms_norm_fwd_kernel[((num_rows + block_rows - 1) // block_rows,)](
        x_rows,
        z_rows,
        weight,
        out,
        num_rows,
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
    return out


torch.library.register_autograd(
    "qnext::gated_rms_norm", GatedRMSNormFunction.backward, setup_context=GatedRMSNormFunction.keep
)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def gated_rms_norm_fwd_kernel(
    p_x: tl.tensor,
    p_z: tl.tensor,
    p_weight: tl.tensor,
    p_out: tl.tensor,
    num_rows: tl.tensor,
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
    """One program per tile of BR rows; row r is head r % H of token r // H."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    mask = (o_r < num_rows)[:, None] & (o_v < V)[None, :]
    o_t, o_h = o_r // H, o_r % H
    o_x, o_z = o_t * stride_xt + o_h * stride_xh, o_t * stride_zt + o_h * stride_zh
    b_x = tl.load(p_x + o_x[:, None] + o_v[None, :], mask, 0.0).to(tl.float32)
    b_z = tl.load(p_z + o_z[:, None] + o_v[None, :], mask, 0.0).to(tl.float32)
    b_weight = tl.load(p_weight + o_v, o_v < V, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)
    b_out = b_x * inverse[:, None] * b_weight[None, :] * (b_z * sigmoid(b_z))
    tl.store(p_out + o_r[:, None] * V + o_v[None, :], b_out, mask)
