"""Chunks of a prompt that go on from keys in the cache, on a GPU."""

import pytest
import torch

from qnext.kernels.paged_attention.reference import paged_attention_reference
from qnext.kernels.paged_attention.torch import paged_attention_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(16, 2, 256), (4, 4, 64)], ids=str)  # Hq, Hkv, D
def test_chunks_after_a_context_see_the_keys_up_to_their_own(sizes, dtype):
    num_heads, num_kv_heads, head_dim = sizes
    torch.manual_seed(0)
    contexts, lens = (0, 70, 513), (130, 1, 257)
    k, v = torch.randn(2, 4096, num_kv_heads, head_dim, device="cuda").to(dtype)
    q = torch.randn(sum(lens), num_heads, head_dim, device="cuda").to(dtype)
    slots = tuple(
        torch.randperm(4096, device="cuda")[: context + length]
        for context, length in zip(contexts, lens, strict=True)
    )
    expected = paged_attention_reference(
        q.double(), k.double(), v.double(), slots, lens, head_dim**-0.5
    )
    ours = paged_attention_torch(q, k, v, slots, lens, head_dim**-0.5)
    error = float((ours.double() - expected).norm() / expected.norm())
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}[dtype]
