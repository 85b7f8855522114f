"""Causal attention of new rows to cached keys through SDPA."""

import torch
import torch.nn.functional as F

from qnext.kernels.paged_attention.reference import CachedRows

# Queries of a part of a prompt, and keys before it, from which two passes of cuDNN's kernels are
# faster than one of FlashAttention's.
MANY_ROWS = 1024


def supports(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: CachedRows,
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    return None


def paged_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: CachedRows,
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `paged_attention_reference`: one call for all sequences where FlashAttention takes them.

    Elsewhere the keys are gathered once per sequence. row_stable gives each query a call of its own
    with exactly its keys, so the shape of the call, and with it the order of every sum, follows
    from the query's position alone.
    """
    if not row_stable and _takes_flash(q):
        return _packed(q, (k_cache, v_cache), rows, scale, fresh)
    out = torch.zeros_like(q)
    start = 0
    for slots, num_rows in zip(rows.each(), rows.query_lens, strict=True):
        end = start + num_rows
        k = k_cache[slots].transpose(0, 1)[None]  # [1, Hkv, L, D]
        v = v_cache[slots].transpose(0, 1)[None]
        queries = q[start:end].transpose(0, 1)[None]  # [1, Hq, rows, D]
        first = slots.shape[0] - num_rows
        if row_stable:
            for row_idx in range(num_rows):
                keys = first + row_idx + 1
                query = queries[:, :, row_idx : row_idx + 1].clone()
                part = F.scaled_dot_product_attention(
                    query, k[:, :, :keys], v[:, :, :keys], scale=scale, enable_gqa=True
                )
                out[start + row_idx] = part[0, :, 0]
        else:
            out[start:end] = _block(queries, k, v, first, scale)
        start = end
    return out


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, scale: float
) -> torch.Tensor:
    num_rows, num_keys = q.shape[2], k.shape[2]
    if first == 0 or num_rows == 1:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=num_rows > 1, scale=scale, enable_gqa=True
        )
    else:
        positions = torch.arange(num_rows, device=q.device)[:, None] + first
        mask = torch.arange(num_keys, device=q.device) <= positions
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _takes_flash(q: torch.Tensor) -> bool:
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_fit = q.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return (
        is_fit
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _packed(
    q: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    rows: CachedRows,
    scale: float,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """All sequences at once, by a number of launches that does not depend on theirs."""
    num_rows = sum(rows.query_lens)
    is_first = rows.key_lens == rows.query_lens
    if is_first and fresh is not None:
        k, v = fresh
    else:
        k, v = (pool[rows.slots] for pool in pools)  # [sum of key_lens, Hkv, D]
    if is_first and len(rows.key_lens) == 1:
        # The public function has a faster kernel for this case than FlashAttention.
        query, key, value = (x.transpose(0, 1)[None] for x in (q[:num_rows], k, v))
        heads = _block(query, key, value, 0, scale)
    elif len(rows.key_lens) == 1 and _takes_two_passes(q, rows):
        heads = _in_two_passes(q[:num_rows], k, v, rows.key_lens[0] - num_rows, scale)
    else:
        heads = _flash(q[:num_rows], k, v, rows, scale)
    extra = q.shape[0] - num_rows
    return F.pad(heads, [0, 0, 0, 0, 0, extra]) if extra else heads


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: CachedRows, scale: float
) -> torch.Tensor:
    """Queries that end where their sequence's keys end. [T, Hq, D]

    FlashAttention aligns the causal mask with the last key and shares keys between query heads; the
    public function of torch aligns it with the first, and takes slower kernels with any other mask.
    """
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *(q, k, v),
        *(rows.query_bounds, rows.key_bounds),
        *(max(rows.query_lens), max(rows.key_lens)),
        0.0,
        True,
        False,
        scale=scale,
    )[0]
    return out


def _takes_two_passes(q: torch.Tensor, rows: CachedRows) -> bool:
    num_rows = rows.query_lens[0]
    return (
        min(num_rows, rows.key_lens[0] - num_rows) >= MANY_ROWS
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
    )


def _in_two_passes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, scale: float
) -> torch.Tensor:
    """Queries at the end of one sequence: all keys before them, then their own. [T, Hq, D]

    cuDNN's kernels are the fastest for prompts, but their causal mask begins at the first key. The
    keys before the queries need no mask.
    """
    from qnext.kernels import dispatch  # which imports this module

    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    parts = []
    for keys, is_causal in ((slice(0, first), False), (slice(first, None), True)):
        out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(query, key[:, :, keys], value[:, :, keys]),
            None,
            True,  # the denominators too
            0.0,
            is_causal,
            scale=scale,
        )
        parts += [out[0].transpose(0, 1).contiguous(), sums.view(q.shape[1], q.shape[0])]
    heads: torch.Tensor = dispatch.merge_attention(*parts)
    return heads
