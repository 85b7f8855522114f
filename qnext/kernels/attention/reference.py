"""Causal attention over packed sequences, plain PyTorch."""

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
) -> torch.Tensor:
    """Each token attends to itself and to earlier tokens of its own sequence.

    Args:
        q: queries. [T, Hq, D]
        k, v: keys and values; query head h reads head h // (Hq // Hkv). [T, Hkv, D]
        cu_seqlens: bounds of the sequences, 0 to T. [N + 1], int32
        max_seqlen: a bound on their lengths, known to the host.
        scale: factor of the scores.

    Returns:
        [T, Hq, D] in the dtype of q.

    Source: Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """
    num_tokens, num_heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    group = num_heads // k.shape[1]
    k = k.repeat_interleave(group, dim=1).to(wide)
    v = v.repeat_interleave(group, dim=1).to(wide)
    index = torch.arange(num_tokens, device=q.device)
    segment = torch.bucketize(index, cu_seqlens[1:].to(index.dtype), right=True)
    mask = (segment[:, None] == segment) & (index[:, None] >= index)
    scores = torch.einsum("thd,shd->hts", q.to(wide) * scale, k)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).to(q.dtype)
