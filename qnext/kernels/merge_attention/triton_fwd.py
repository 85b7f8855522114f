"""Attention over two sets of keys from attention over each, on a GPU in one pass."""

import torch
import triton
import triton.language as tl

from qnext.kernels.gpu_rows import power_of_two, rows_objection, sigmoid

_TILE_ELEMENTS = 4096


def supports(
    first: torch.Tensor,
    first_sums: torch.Tensor,
    second: torch.Tensor,
    second_sums: torch.Tensor,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if not (first.is_contiguous() and second.is_contiguous()):
        return "read-outs are contiguous here"
    if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
        return "it has no gradient, and gradients are on"
    return rows_objection(first, second, first_sums, second_sums)


def merge_attention_triton(
    first: torch.Tensor,
    first_sums: torch.Tensor,
    second: torch.Tensor,
    second_sums: torch.Tensor,
) -> torch.Tensor:
    """As `merge_attention_reference`."""
    num_rows, num_heads, head_dim = first.shape
    out = torch.empty_like(first)
    columns = power_of_two(head_dim)
    rows = max(1, _TILE_ELEMENTS // columns)
    merge_attention_kernel[(triton.cdiv(num_rows * num_heads, rows),)](
        *(first, first_sums, second, second_sums, out),
        *(num_rows, first_sums.stride(0), second_sums.stride(0)),
        H=num_heads,
        D=head_dim,
        BR=rows,
        BD=columns,
        num_warps=8,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def merge_attention_kernel(
    p_first: tl.tensor,
    p_first_sums: tl.tensor,
    p_second: tl.tensor,
    p_second_sums: tl.tensor,
    p_out: tl.tensor,
    num_rows: tl.tensor,
    stride_first: tl.tensor,
    stride_second: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """One program per BR pairs of a query and a head."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_r = o_r < num_rows.to(tl.int64) * H
    o_h, o_t = o_r % H, o_r // H
    b_first = tl.load(p_first_sums + o_h * stride_first + o_t, m_r, 0.0).to(tl.float32)
    b_second = tl.load(p_second_sums + o_h * stride_second + o_t, m_r, 0.0).to(tl.float32)
    b_share = sigmoid(b_second - b_first)[:, None]
    o_x = o_r[:, None] * D + o_d[None, :]
    mask = m_r[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_first + o_x, mask, 0.0).to(tl.float32)
    b_y = tl.load(p_second + o_x, mask, 0.0).to(tl.float32)
    tl.store(p_out + o_x, b_x * (1.0 - b_share) + b_y * b_share, mask)
