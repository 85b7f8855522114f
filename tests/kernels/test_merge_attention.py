"""Attention over two sets of keys, put together from attention over each."""

import pytest
import torch

from qnext.kernels.merge_attention.reference import merge_attention_reference
from qnext.kernels.merge_attention.triton_fwd import merge_attention_triton
from tests.kernels.triton_env import DEVICE, HALF, error

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def attention(q, k, v):
    """Read-out [T, Hq, D] and logarithms of the denominators [Hq, T], in float64."""
    scores = torch.einsum("thd,lhd->htl", q, k)
    out = torch.einsum("htl,lhd->thd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("num_rows, num_heads, head_dim", [(1, 2, 16), (13, 3, 40), (70, 16, 64)])
def test_two_parts_are_the_whole(num_rows, num_heads, head_dim, dtype):
    q, k, v = (
        torch.randn(rows, num_heads, head_dim, dtype=torch.float64, device=DEVICE)
        for rows in (num_rows, 50, 50)
    )
    expected, _ = attention(q, k, v)
    parts = []
    for own in (slice(0, 37), slice(37, None)):
        out, sums = attention(q, k[own], v[own])
        parts += [out.to(dtype).contiguous(), sums.float()]
    for function in (merge_attention_reference, merge_attention_triton):
        assert error(function(*parts), expected) < LIMITS[dtype]


@pytest.mark.parametrize("function", [merge_attention_reference, merge_attention_triton])
def test_a_part_without_weight_adds_nothing(function):
    first, second = torch.randn(2, 5, 2, 16, device=DEVICE)
    low = torch.full((2, 5), -3e4, device=DEVICE)
    high = torch.full((2, 5), 3e4, device=DEVICE)
    assert torch.equal(function(first, high, second, low), first)
    assert torch.equal(function(first, low, second, high), second)
