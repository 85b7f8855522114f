"""The gate of a gated linear unit on a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import element_tile, rows_objection, sigmoid
from qnext.kernels.graph_ops import graph_op
from qnext.kernels.silu_mul.triton_bwd import silu_mul_bwd


def supports(gate_up: torch.Tensor) -> str | None:
    """Say why this backend cannot run, or None."""
    if gate_up.dim() != 2:
        return f"gate_up has two dimensions here, not {gate_up.dim()}"
    return rows_objection(gate_up)


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """As `silu_mul_reference`."""
    if torch.compiler.is_compiling():
        return silu_mul_fwd(gate_up)  # the op has a gradient of its own
    if torch.is_grad_enabled() and gate_up.requires_grad:
        out: torch.Tensor = SiluMulFunction.apply(gate_up)
        return out
    return silu_mul_fwd(gate_up)


class SiluMulFunction(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        SiluMulFunction.keep(ctx, (gate_up,))
        return silu_mul_fwd(gate_up)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: Any = None) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> torch.Tensor:
        return silu_mul_bwd(d_out, *ctx.saved_tensors)


def _shapes(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@graph_op("silu_mul", shapes=_shapes)
def silu_mul_fwd(gate_up: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel. gate_up: [T, 2I]"""
    num_rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, columns, dtype=gate_up.dtype, device=gate_up.device)
    grid, tile = element_tile(num_rows, columns)
    silu_mul_fwd_kernel[grid](gate_up, out, num_rows, gate_up.stride(0), I=columns, **tile)
    return out


torch.library.register_autograd(
    "qnext::silu_mul", SiluMulFunction.backward, setup_context=SiluMulFunction.keep
)


@triton.jit(do_not_specialize=["num_rows"])
def silu_mul_fwd_kernel(
    p_gate_up: tl.tensor,
    p_out: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    I: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """One program per tile of rows and columns."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (o_r < num_rows)[:, None] & (o_c < I)[None, :]
    o_gate = o_r[:, None] * stride + o_c[None, :]
    b_gate = tl.load(p_gate_up + o_gate, mask, 0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + I + o_gate, mask, 0.0).to(tl.float32)
    b_out = b_gate * sigmoid(b_gate) * b_up
    tl.store(p_out + o_r[:, None] * I + o_c[None, :], b_out, mask)
