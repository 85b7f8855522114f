"""A residual sum and the RMSNorm after it on a GPU, in one pass over the rows."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.add_rms_norm.triton_bwd import add_rms_norm_bwd
from qnext.kernels.gpu_rows import row_tile, rows_objection
from qnext.kernels.graph_ops import graph_op

MAX_COLUMNS = 16384


def supports(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> str | None:
    """Say why this backend cannot run, or None."""
    if weight.shape[0] > MAX_COLUMNS:
        return f"a row of {weight.shape[0]} columns is over {MAX_COLUMNS}, which one program holds"
    return rows_objection(x, residual, weight)


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm_reference`."""
    if torch.compiler.is_compiling():
        return add_rms_norm_fwd(x, residual, weight, eps)  # the op has a gradient of its own
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or weight.requires_grad
    ):
        normed, summed = AddRMSNormFunction.apply(x, residual, weight, eps)
        return normed, summed
    return add_rms_norm_fwd(x, residual, weight, eps)


class AddRMSNormFunction(torch.autograd.Function):
    """Keeps the sum, which lives on as the residual stream anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = add_rms_norm_fwd(x, residual, weight, eps)
        AddRMSNormFunction.keep(ctx, (x, residual, weight, eps), output)
        return output

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, _, weight, ctx.eps = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, d_normed: torch.Tensor | None, d_summed: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        summed, weight = ctx.saved_tensors
        if d_normed is None:
            d_weight, d_stream = None, d_summed
        else:
            d_stream, d_weight = add_rms_norm_bwd(d_normed, summed, weight, ctx.eps, d_summed)
        dx = None if d_stream is None else d_stream.to(ctx.dtype)
        return dx, d_stream, d_weight, None


@graph_op("add_rms_norm", "x", "residual")
def add_rms_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel. x, residual: [..., C], rows evenly spaced or copied to be so."""
    columns = x.shape[-1]
    rows, residual_rows = x.reshape(-1, columns), residual.reshape(-1, columns)
    num_rows = rows.shape[0]
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    block_rows, block_columns, warps = row_tile(columns)
    add_rms_norm_fwd_kernel[((num_rows + block_rows - 1) // block_rows,)](
        rows,
        residual_rows,
        weight,
        normed,
        summed,
        num_rows,
        rows.stride(0),
        residual_rows.stride(0),
        eps,
        C=columns,
        BR=block_rows,
        BC=block_columns,
        num_warps=warps,
    )
    return normed, summed


torch.library.register_autograd(
    "qnext::add_rms_norm", AddRMSNormFunction.backward, setup_context=AddRMSNormFunction.keep
)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def add_rms_norm_fwd_kernel(
    p_x: tl.tensor,
    p_residual: tl.tensor,
    p_weight: tl.tensor,
    p_normed: tl.tensor,
    p_summed: tl.tensor,
    num_rows: tl.tensor,
    stride_x: tl.tensor,
    stride_residual: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """One program per tile of BR whole rows."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    mask = (o_r < num_rows)[:, None] & (o_c < C)[None, :]
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask, 0.0)
    b_residual = tl.load(p_residual + o_r[:, None] * stride_residual + o_c[None, :], mask, 0.0)
    b_weight = 1.0 + tl.load(p_weight + o_c, o_c < C, 0.0).to(tl.float32)
    b_sum = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(p_summed.dtype.element_ty)
    out = o_r[:, None] * C + o_c[None, :]
    tl.store(p_summed + out, b_sum, mask)
    b_sum = b_sum.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(b_sum * b_sum, 1) / C + eps)
    tl.store(p_normed + out, b_sum * inverse[:, None] * b_weight[None, :], mask)
