"""Backward of a gated linear unit's gate on a GPU."""

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import dense_rows, element_tile, sigmoid
from qnext.kernels.graph_ops import graph_op


@graph_op("silu_mul_backward", "gate_up")
def silu_mul_bwd(d_out: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Launch the backward kernel.

    Args:
        d_out: gradient of the output. [T, I]
        gate_up: as in the forward. [T, 2I]

    Returns:
        Gradient of gate_up. [T, 2I]
    """
    num_rows, columns = d_out.shape
    d_out = dense_rows(d_out)
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    grid, tile = element_tile(num_rows, columns)
    silu_mul_bwd_kernel[grid](
        d_out,
        gate_up,
        d_gate_up,
        num_rows,
        d_out.stride(0),
        gate_up.stride(0),
        I=columns,
        **tile,
    )
    return d_gate_up


@triton.jit(do_not_specialize=["num_rows"])
def silu_mul_bwd_kernel(
    p_dout: tl.tensor,
    p_gate_up: tl.tensor,
    p_dgate_up: tl.tensor,
    num_rows: tl.tensor,
    stride_dout: tl.tensor,
    stride_gate_up: tl.tensor,
    I: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """One program per tile of rows and columns."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (o_r < num_rows)[:, None] & (o_c < I)[None, :]
    o_gate = o_r[:, None] * stride_gate_up + o_c[None, :]
    b_gate = tl.load(p_gate_up + o_gate, mask, 0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + I + o_gate, mask, 0.0).to(tl.float32)
    o_out = o_r[:, None] * stride_dout + o_c[None, :]
    b_dout = tl.load(p_dout + o_out, mask, 0.0).to(tl.float32)
    b_sigmoid = sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    # silu' = sigmoid + silu (1 - sigmoid)
    b_dgate = b_dout * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    o_dgate = o_r[:, None] * (2 * I) + o_c[None, :]
    tl.store(p_dgate_up + o_dgate, b_dgate, mask)
    tl.store(p_dgate_up + I + o_dgate, b_dout * b_silu, mask)
