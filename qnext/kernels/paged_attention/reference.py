"""Causal attention of new rows to cached keys, plain PyTorch."""

import torch


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    token_slots: tuple[torch.Tensor, ...],
    query_lens: tuple[int, ...],
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The last rows of each sequence attend to its cached tokens, their own included.

    Args:
        q: queries, sequence after sequence. [T, Hq, D]
        k_cache, v_cache: one layer's pool; row s holds one token. [S, Hkv, D]
        token_slots: for each sequence the pool rows of its tokens, oldest first, up to its
            last query. N tensors [L], int64
        query_lens: number of query rows of each sequence; they are its last tokens.
        scale: factor of the scores.
        row_stable: each query's result depends on its own sequence alone.
        product_dtype: what a fast kernel may round the factors of its products to, as the
            model's weights are; None: the dtype of q. Sums and softmax stay in fp32.

    Returns:
        [T, Hq, D] in the dtype of q. Rows past the sum of query_lens are zero.

    Source: Efficient Memory Management for LLM Serving, https://arxiv.org/abs/2309.06180
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros_like(q)
    start = 0
    for slots, num_rows in zip(token_slots, query_lens, strict=True):
        k = k_cache[slots].to(wide).repeat_interleave(group, dim=1)  # [L, Hq, D]
        v = v_cache[slots].to(wide).repeat_interleave(group, dim=1)
        for row_idx in range(num_rows):
            length = slots.shape[0] - num_rows + row_idx + 1
            query = q[start + row_idx].to(wide) * scale  # [Hq, D]
            scores = (query * k[:length]).sum(-1)  # [length, Hq]
            weights = scores.softmax(0)[..., None]
            out[start + row_idx] = (weights * v[:length]).sum(0).to(q.dtype)
        start += num_rows
    return out
