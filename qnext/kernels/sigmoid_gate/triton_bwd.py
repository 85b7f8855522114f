"""Backward of attention's output gate on a GPU."""

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import dense_rows, element_tile, sigmoid
from qnext.kernels.graph_ops import graph_op


@graph_op("sigmoid_gate_backward", "heads", "gate")
def sigmoid_gate_bwd(
    d_out: torch.Tensor, heads: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernel.

    Args:
        d_out: gradient of the gated rows. [T, Hq * D]
        heads, gate: as in the forward.

    Returns:
        Gradients of heads and gate in their shapes and dtypes, contiguous.
    """
    num_rows, columns = gate.shape
    rows = heads.flatten(1)
    d_out = dense_rows(d_out)
    d_heads = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid, tile = element_tile(num_rows, columns)
    sigmoid_gate_bwd_kernel[grid](
        d_out,
        rows,
        gate,
        d_heads,
        d_gate,
        num_rows,
        d_out.stride(0),
        rows.stride(0),
        gate.stride(0),
        N=columns,
        **tile,
    )
    return d_heads, d_gate


@triton.jit(do_not_specialize=["num_rows"])
def sigmoid_gate_bwd_kernel(
    p_dout: tl.tensor,
    p_heads: tl.tensor,
    p_gate: tl.tensor,
    p_dheads: tl.tensor,
    p_dgate: tl.tensor,
    num_rows: tl.tensor,
    stride_dout: tl.tensor,
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
    o_dout = o_r[:, None] * stride_dout + o_c[None, :]
    b_dout = tl.load(p_dout + o_dout, mask, 0.0).to(tl.float32)
    b_sigmoid = sigmoid(b_gate)
    b_dheads = b_dout * b_sigmoid
    out = o_r[:, None] * N + o_c[None, :]
    tl.store(p_dheads + out, b_dheads, mask)
    tl.store(p_dgate + out, b_dheads * b_heads * (1.0 - b_sigmoid), mask)
