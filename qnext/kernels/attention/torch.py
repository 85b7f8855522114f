"""Causal attention over packed sequences through PyTorch's fused kernels."""

from typing import cast

import torch
import torch.nn.functional as F

# Tokens from which a lone sequence takes the public function. On Hopper that is cuDNN's kernel, the
# fastest, which costs the host some time for each length that is new.
MANY_TOKENS = 4096


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> str | None:
    """Say why this backend cannot run, or None."""
    return None


def attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """As `attention_reference`: one varlen call on a GPU, one SDPA call per sequence elsewhere.

    A lone sequence takes SDPA on a GPU too, where it is long or in fp32: that there is only one is
    known without a look at the bounds, which lie on the device.
    """
    takes_varlen = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
    if cu_seqlens.shape[0] == 2 and (not takes_varlen or q.shape[0] >= MANY_TOKENS):
        return _one(q, k, v, scale)
    if takes_varlen:
        return _varlen(q, k, v, cu_seqlens, max_seqlen, scale)
    bounds = cu_seqlens.tolist()
    outputs = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end == start:
            continue
        outputs.append(_one(q[start:end], k[start:end], v[start:end], scale))
    return torch.cat(outputs)


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, L, D]
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    # Older releases have no grouped heads here; two or four copies of few heads cost little.
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *bounds, scale=scale, window_size=(-1, 0))
    return cast(torch.Tensor, out)  # a pair only when auxiliary outputs are asked for
