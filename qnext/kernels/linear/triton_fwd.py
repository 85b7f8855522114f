"""An e4m3 weight in scaled blocks times rows, on a GPU. Rows are not rounded: W8A16.

Up to `MAX_STREAM_ROWS` rows the time is that of reading the weight, so a kernel reads it as it is
and widens it in registers. For more rows the weight is written out once in the dtype of the rows,
which costs what three such weights take to read (25 us for 12,288 x 2,048 on an H100: 9 % of a
product of 4,096 rows, 1 % of one of 32,768), and PyTorch multiplies at its full speed. The copy is
of one matrix and lives as long as its product.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from qnext.kernels.fp8_blocks import (
    BLOCK,
    DTYPE,
    block_scale_of,
    device_objection,
    tail_of,
)
from qnext.kernels.gpu_decode import FLOAT_DTYPES, NUM_SMS, weight_objection, widened

MAX_STREAM_ROWS = 256
# What the loads in flight of a program may take of shared memory: two programs fit an SM.
STREAM_BYTES = 100_000


@dataclass(frozen=True)
class StreamTile:
    """How a product is cut: BO outputs of BT rows per program; a step is one block's columns."""

    BO: int
    BT: int
    num_warps: int
    num_stages: int


def stream_tile(num_rows: int, num_outputs: int, element_bytes: int) -> StreamTile:
    """Cut by shape: large tiles, as long as there is a program for every multiprocessor."""
    BO, BT = 64, max(16, min(128, triton.next_power_of_2(num_rows)))
    if element_bytes == 4:
        BO, BT = 32, min(BT, 32)
    while triton.cdiv(num_outputs, BO) * triton.cdiv(num_rows, BT) < NUM_SMS:
        if BT > 16:
            BT //= 2
        elif BO > 16:
            BO //= 2
        else:
            break
    step_bytes = BLOCK * (BO + BT * element_bytes)
    stages = max(2, min(6, STREAM_BYTES // step_bytes))
    return StreamTile(BO, BT, num_warps=4 if BO >= 64 else 2, num_stages=stages)


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if weight.dtype != DTYPE:
        return f"a weight is {DTYPE} here, not {weight.dtype}"
    if (objection := device_objection(x.device)) is not None:
        return objection
    if x.dtype not in FLOAT_DTYPES or x.dim() != 2:
        return f"rows are [T, C] in fp32, fp16 or bf16 here, not {x.dtype} {tuple(x.shape)}"
    if x.shape[1] % BLOCK:
        return f"rows are whole blocks of {BLOCK} here, not {x.shape[1]}"
    if torch.is_grad_enabled() and x.requires_grad:
        return "it has no gradient"
    if out_dtype not in (None, x.dtype, torch.float32):
        return f"the result is fp32 or as the rows, not {out_dtype}"
    return weight_objection("weight", weight, block_scale_of(weight), x.dtype)


def linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_stable: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As `linear_reference`, with sums in fp32. row_stable takes one cut for any number of rows.

    Where PyTorch multiplies, the weight times its scales is rounded to the dtype of the rows.
    """
    tile = StreamTile(64, 16, 4, 4) if row_stable else None
    return linear_fp8_fwd(x, weight, None, out_dtype=out_dtype, tile=tile)


def linear_fp8_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    out_dtype: torch.dtype | None = None,
    tile: StreamTile | None = None,
    is_streamed: bool | None = None,
) -> torch.Tensor:
    """x W^T + residual, with the weight's tail as last outputs.

    Args:
        x: rows. [T, C]
        weight: e4m3 with `block_scale`, and `tail` where it has one. [O, C]
        residual: contiguous, in the dtype of x; for weights without a tail. [T, O]
        out_dtype: None for the dtype of x.
        tile: another cut than the one chosen by shape; the weight is then streamed.
        is_streamed: read the weight as it is; None decides by the number of rows.

    Returns:
        [T, O + R], R the rows of the tail.
    """
    tail = tail_of(weight)
    assert residual is None or tail is None, "a residual and a tail"
    num_rows, out_dtype = x.shape[0], out_dtype or x.dtype
    if is_streamed is None:
        is_streamed = tile is not None or num_rows <= MAX_STREAM_ROWS
    if num_rows == 0:
        num_outputs = weight.shape[0] + (0 if tail is None else tail.shape[0])
        return torch.empty(0, num_outputs, dtype=out_dtype, device=x.device)
    if is_streamed:
        return _stream(x.contiguous(), weight, tail, residual, out_dtype, tile)
    wide = dequantize_fwd(weight, tail, x.dtype)
    if residual is not None and residual.dtype == x.dtype == out_dtype:
        return torch.addmm(residual, x, wide.t())
    if out_dtype != x.dtype and x.is_cuda:
        y = torch.mm(x, wide.t(), out_dtype=out_dtype)
    else:
        y = F.linear(x, wide).to(out_dtype)
    return y if residual is None else y.add_(residual)


def _stream(
    x: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: StreamTile | None,
) -> torch.Tensor:
    (num_rows, size), num_outputs = x.shape, weight.shape[0]
    width = num_outputs + (0 if tail is None else tail.shape[0])
    y = torch.empty(num_rows, width, dtype=out_dtype, device=x.device)
    tile = tile or stream_tile(num_rows, num_outputs, x.element_size())
    linear_stream_kernel[(triton.cdiv(num_outputs, tile.BO), triton.cdiv(num_rows, tile.BT))](
        x,
        weight,
        block_scale_of(weight),
        x if residual is None else residual,
        y,
        num_rows,
        num_outputs,
        width,
        C=size,
        BO=tile.BO,
        BT=tile.BT,
        BLOCK_SIZE=BLOCK,
        HAS_RESIDUAL=residual is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if tail is not None and tail.dtype == x.dtype == out_dtype:
        torch.mm(x, tail.t(), out=y[:, num_outputs:])
    elif tail is not None:
        y[:, num_outputs:] = F.linear(x, tail.to(x.dtype))
    return y


def dequantize_fwd(
    weight: torch.Tensor, tail: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The weight times its scales, and its tail, in another dtype. [O + R, C]"""
    num_outputs, size = weight.shape
    width = num_outputs + (0 if tail is None else tail.shape[0])
    wide = torch.empty(width, size, dtype=dtype, device=weight.device)
    dequantize_blocks_kernel[(triton.cdiv(num_outputs, BLOCK), size // BLOCK)](
        weight, block_scale_of(weight), wide, num_outputs, C=size, BLOCK_SIZE=BLOCK, num_warps=8
    )
    if tail is not None:
        wide[num_outputs:] = tail
    return wide


@triton.jit(do_not_specialize=["T", "O", "YS"])
def linear_stream_kernel(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_scale: tl.tensor,
    p_residual: tl.tensor,
    p_y: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,
    YS: tl.tensor,
    C: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BO outputs of BT rows, into rows of YS outputs.

    The weight is the left operand, which tensor cores take from the registers that widened it.
    """
    i_o, i_t = tl.program_id(0), tl.program_id(1)
    o_o, o_t = i_o * BO + tl.arange(0, BO), (i_t * BT + tl.arange(0, BT)).to(tl.int64)
    m_t = o_t < T
    m_y = (o_o < O)[:, None] & m_t[None, :]
    o_c = tl.arange(0, BLOCK_SIZE)
    p_row = p_w + tl.minimum(o_o, O - 1).to(tl.int64)[:, None] * C + o_c[None, :]
    p_token = p_x + o_t[:, None] * C + o_c[None, :]
    NUM_C: tl.constexpr = C // BLOCK_SIZE
    p_s = p_scale + (i_o * BO // BLOCK_SIZE) * NUM_C
    b_acc = tl.zeros([BO, BT], tl.float32)
    for i_c in range(NUM_C):
        b_w = tl.load(p_row + i_c * BLOCK_SIZE)
        b_x = tl.load(p_token + i_c * BLOCK_SIZE, mask=m_t[:, None], other=0.0)
        # The tile lies in one block, whose scale its sums take.
        b_dot = tl.dot(widened(b_w, b_x), tl.trans(b_x), input_precision=PRECISION)
        b_acc += b_dot * tl.load(p_s + i_c)
    o_y = o_t[None, :] * YS + o_o[:, None]
    if HAS_RESIDUAL:
        b_acc += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, b_acc.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["O"])
def dequantize_blocks_kernel(
    p_w: tl.tensor,
    p_scale: tl.tensor,
    p_wide: tl.tensor,
    O: tl.tensor,
    C: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """One block of weights times its scale."""
    i_o, i_c = tl.program_id(0), tl.program_id(1)
    o_o = i_o * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    o_w = o_o.to(tl.int64)[:, None] * C + i_c * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    m_o = (o_o < O)[:, None]
    scale = tl.load(p_scale + i_o * (C // BLOCK_SIZE) + i_c)
    b_w = tl.load(p_w + o_w, mask=m_o, other=0.0).to(tl.float32) * scale
    tl.store(p_wide + o_w, b_w.to(p_wide.dtype.element_ty), mask=m_o)
