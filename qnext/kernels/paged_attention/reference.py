"""Causal attention of new rows to cached keys, plain PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CachedRows:
    """Packed sequences whose last tokens ask and whose tokens are rows of a pool.

    Args:
        slots: pool rows of each sequence's tokens, oldest first, up to its last query; sequence
            after sequence. [sum of key_lens], int64
        key_lens: tokens of each sequence.
        query_lens: query rows of each sequence; they are its last tokens.
        key_bounds, query_bounds: running sums of the two from 0, on the device. [N + 1], int32
    """

    slots: torch.Tensor
    key_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    key_bounds: torch.Tensor
    query_bounds: torch.Tensor

    @staticmethod
    def of(slots: Sequence[torch.Tensor], query_lens: tuple[int, ...]) -> "CachedRows":
        """From the slots of each sequence. N tensors [L]"""
        key_lens = tuple(part.shape[0] for part in slots)
        bounds = [torch.tensor((0, *lens)).cumsum(0).int() for lens in (key_lens, query_lens)]
        device = slots[0].device
        places = (bound.to(device) for bound in bounds)
        return CachedRows(torch.cat(list(slots)), key_lens, query_lens, *places)

    def each(self) -> tuple[torch.Tensor, ...]:
        """Slots of each sequence. N views [L]"""
        return self.slots.split(self.key_lens)


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: CachedRows,
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The last rows of each sequence attend to its cached tokens, their own included.

    Args:
        q: queries, sequence after sequence. [T, Hq, D]
        k_cache, v_cache: one layer's pool; row s holds one token. [S, Hkv, D]
        rows: places of the keys, and the numbers of queries.
        scale: factor of the scores.
        row_stable: each query's result depends on its own sequence alone.
        product_dtype: what a fast kernel may round the factors of its products to, as the
            model's weights are; None: the dtype of q. Sums and softmax stay in fp32.
        fresh: keys and values of the query rows themselves, which are in the pool too; where no
            sequence has others, a kernel may read these. Two of [T, Hkv, D]

    Returns:
        [T, Hq, D] in the dtype of q. Rows past the last query are zero.

    Source: Efficient Memory Management for LLM Serving, https://arxiv.org/abs/2309.06180
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros_like(q)
    start = 0
    for slots, num_rows in zip(rows.each(), rows.query_lens, strict=True):
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
