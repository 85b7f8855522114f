"""Parts of prompts that begin, or go on from keys in the cache, on a GPU."""

import pytest
import torch

from qnext.kernels.paged_attention.reference import CachedRows, paged_attention_reference
from qnext.kernels.paged_attention.torch import _takes_two_passes, paged_attention_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(16, 2, 256), (4, 4, 64)], ids=str)  # Hq, Hkv, D
@pytest.mark.parametrize(
    "contexts, lens",
    [((0, 70, 513), (130, 1, 257)), ((0, 0, 0, 0), (1, 300, 64, 7)), ((0,), (200,)), ((65,), (9,))],
    ids=["mixed", "several that begin", "one that begins", "one that goes on"],
)
def test_parts_of_prompts_see_the_keys_up_to_their_own(contexts, lens, sizes, dtype):
    num_heads, num_kv_heads, head_dim = sizes
    torch.manual_seed(0)
    k, v = torch.randn(2, 4096, num_kv_heads, head_dim, device="cuda").to(dtype)
    q = torch.randn(sum(lens), num_heads, head_dim, device="cuda").to(dtype)
    each = [
        torch.randperm(4096, device="cuda")[: context + length]
        for context, length in zip(contexts, lens, strict=True)
    ]
    rows = CachedRows.of(each, lens)
    own = torch.cat([slots[-length:] for slots, length in zip(each, lens, strict=True)])
    scale = head_dim**-0.5
    expected = paged_attention_reference(q.double(), k.double(), v.double(), rows, scale)
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}[dtype]
    for fresh in (None, (k[own], v[own])):
        ours = paged_attention_torch(q, k, v, rows, scale, fresh=fresh)
        assert float((ours.double() - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("context, length", [(1024, 1500), (3001, 1024), (5000, 2047)])
def test_a_long_part_of_one_prompt_goes_in_two_passes(context, length, dtype):
    torch.manual_seed(0)
    k, v = torch.randn(2, 8192, 2, 256, device="cuda").to(dtype)
    q = (3 * torch.randn(length, 16, 256, device="cuda")).to(dtype)
    slots = torch.randperm(8192, device="cuda")[: context + length]
    rows = CachedRows.of([slots], (length,))
    assert _takes_two_passes(q, rows) == (torch.cuda.get_device_capability() >= (9, 0))
    keys, values = (x[slots].double().repeat_interleave(8, dim=1).transpose(0, 1) for x in (k, v))
    places = torch.arange(context + length, device="cuda")
    mask = places <= places[context:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double().transpose(0, 1), keys, values, attn_mask=mask, scale=1 / 16
    ).transpose(0, 1)
    ours = paged_attention_torch(q, k, v, rows, 1 / 16)
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert float((ours.double() - expected).norm() / expected.norm()) < limit
