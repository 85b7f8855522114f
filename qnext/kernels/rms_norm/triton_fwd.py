"""Zero-centred RMSNorm on a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import row_tile, rows_objection
from qnext.kernels.graph_ops import graph_op
from qnext.kernels.rms_norm.triton_bwd import rms_norm_bwd

MAX_COLUMNS = 16384


def supports(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Say why this backend cannot run, or None."""
    if weight.shape[0] > MAX_COLUMNS:
        return f"a row of {weight.shape[0]} columns is over {MAX_COLUMNS}, which one program holds"
    return rows_objection(x, weight)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_reference`."""
    if torch.compiler.is_compiling():
        return rms_norm_fwd(x, weight, eps)  # the op has a gradient of its own
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: torch.Tensor = RMSNormFunction.apply(x, weight, eps)
        return out
    return rms_norm_fwd(x, weight, eps)


class RMSNormFunction(torch.autograd.Function):
    """Keeps x alone; the backward works the row's scale out again from what it reads anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        RMSNormFunction.keep(ctx, (x, weight, eps))
        return rms_norm_fwd(x, weight, eps)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, d_weight = rms_norm_bwd(d_out, x, weight, ctx.eps)
        return dx, d_weight, None


@graph_op("rms_norm", "x")
def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Launch the forward kernel. x: [..., C], its rows evenly spaced or copied to be so."""
    columns = x.shape[-1]
    rows = x.view(-1, columns) if x.is_contiguous() else x.reshape(-1, columns)
    num_rows = rows.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_rows, block_columns, warps = row_tile(columns)
    rms_norm_fwd_kernel[((num_rows + block_rows - 1) // block_rows,)](
        rows,
        weight,
        out,
        num_rows,
        rows.stride(0),
        eps,
        C=columns,
        BR=block_rows,
        BC=block_columns,
        num_warps=warps,
    )
    return out


torch.library.register_autograd(
    "qnext::rms_norm", RMSNormFunction.backward, setup_context=RMSNormFunction.keep
)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def rms_norm_fwd_kernel(
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_out: tl.tensor,
    num_rows: tl.tensor,
    stride_x: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """One program per tile of BR whole rows."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    mask = (o_r < num_rows)[:, None] & (o_c < C)[None, :]
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask, 0.0).to(tl.float32)
    b_weight = 1.0 + tl.load(p_weight + o_c, o_c < C, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)
    b_out = b_x * inverse[:, None] * b_weight[None, :]
    tl.store(p_out + o_r[:, None] * C + o_c[None, :], b_out, mask)
