"""Attention's output gate on a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import element_tile, rows_objection, sigmoid
from qnext.kernels.graph_ops import graph_op
from qnext.kernels.sigmoid_gate.triton_bwd import sigmoid_gate_bwd


def supports(heads: torch.Tensor, gate: torch.Tensor) -> str | None:
    """Say why this backend cannot run, or None."""
    return rows_objection(heads, gate)


def sigmoid_gate_triton(heads: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As `sigmoid_gate_reference`."""
    if torch.compiler.is_compiling():
        return sigmoid_gate_fwd(heads, gate)  # the op has a gradient of its own
    if torch.is_grad_enabled() and (heads.requires_grad or gate.requires_grad):
        out: torch.Tensor = SigmoidGateFunction.apply(heads, gate)
        return out
    return sigmoid_gate_fwd(heads, gate)


class SigmoidGateFunction(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        SigmoidGateFunction.keep(ctx, (heads, gate))
        return sigmoid_gate_fwd(heads, gate)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: Any = None) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sigmoid_gate_bwd(d_out, *ctx.saved_tensors)


@graph_op("sigmoid_gate", shapes=lambda heads, gate: heads.new_empty(gate.shape))
def sigmoid_gate_fwd(heads: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Launch the forward kernel. heads: [T, Hq, D]; gate: [T, Hq * D], read in place"""
    num_rows, columns = gate.shape
    rows = heads.view(num_rows, columns) if heads.is_contiguous() else heads.flatten(1)
    out = torch.empty(num_rows, columns, dtype=heads.dtype, device=heads.device)
    grid, tile = element_tile(num_rows, columns)
    sigmoid_gate_fwd_kernel[grid](
        rows, gate, out, num_rows, rows.stride(0), gate.stride(0), N=columns, **tile
    )
    return out


torch.library.register_autograd(
    "qnext::sigmoid_gate", SigmoidGateFunction.backward, setup_context=SigmoidGateFunction.keep
)


@triton.jit(do_not_specialize=["num_rows"])
def sigmoid_gate_fwd_kernel(
    p_heads: tl.tensor,
    p_gate: tl.tensor,
    p_out: tl.tensor,
    num_rows: tl.tensor,
    stride_heads: tl.tensor,
    stride_gate: tl.tensor,
    N: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """One program per tile of rows and columns."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (o_r < num_rows)[:, None] & (o_c < N)[None, :]
    o_heads = o_r[:, None] * stride_heads + o_c[None, :]
    b_heads = tl.load(p_heads + o_heads, mask, 0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_r[:, None] * stride_gate + o_c[None, :], mask, 0.0).to(tl.float32)
    tl.store(p_out + o_r[:, None] * N + o_c[None, :], b_heads * sigmoid(b_gate), mask)
