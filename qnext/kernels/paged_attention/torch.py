"""Causal attention of new rows to cached keys through SDPA."""

import torch
import torch.nn.functional as F


def supports(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    token_slots: tuple[torch.Tensor, ...],
    query_lens: tuple[int, ...],
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    return None


def paged_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    token_slots: tuple[torch.Tensor, ...],
    query_lens: tuple[int, ...],
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As `paged_attention_reference`: the keys are gathered once per sequence.

    row_stable gives each query a call of its own with exactly its keys, so the shape of the
    call, and with it the order of every sum, follows from the query's position alone.
    """
    out = torch.zeros_like(q)
    start = 0
    for slots, num_rows in zip(token_slots, query_lens, strict=True):
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
    if first > 0 and num_rows > 1 and _takes_flash(q):
        return _flash_block(q, k, v, scale)
    if first == 0 or num_rows == 1:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=num_rows > 1, scale=scale, enable_gqa=True
        )
    else:
        rows = torch.arange(num_rows, device=q.device)[:, None] + first
        mask = torch.arange(num_keys, device=q.device) <= rows
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


def _flash_block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Rows that end where the keys end. q: [1, Hq, rows, D]; k, v: [1, Hkv, L, D]

    FlashAttention aligns the causal mask with the last key and shares keys between query heads; the
    public function of torch aligns it with the first, and takes slower kernels with any other mask.
    """
    bounds = [torch.tensor([0, x.shape[2]], dtype=torch.int32, device=q.device) for x in (q, k)]
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *(x[0].transpose(0, 1) for x in (q, k, v)),
        *bounds,
        q.shape[2],
        k.shape[2],
        0.0,
        True,
        False,
        scale=scale,
    )[0]
    return out
