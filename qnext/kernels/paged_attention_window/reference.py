"""Gated Attention between its projections over paged keys, plain PyTorch: see the README."""

from dataclasses import dataclass

import torch

from qnext.kernels.paged_attention.reference import CachedRows, paged_attention_reference
from qnext.kernels.rms_norm.reference import rms_norm_reference
from qnext.kernels.rotary.reference import rotary_reference


@dataclass(frozen=True)
class HeadWeights:
    """What turns projected heads into queries and keys.

    Attributes:
        q_norm, k_norm: zero-centred scales of the heads' norms. [D]
        eps: of the norms.
        cos, sin: of the rotary angles, one row per position. [P, R/2], fp32 or wider
    """

    q_norm: torch.Tensor
    k_norm: torch.Tensor
    eps: float
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Window:
    """Where the rows of N sequences belong; all lengths are on the device.

    Attributes:
        page_table: pages of each sequence, oldest first; token p has slot
            page_table[n, p // page_size] * page_size + p % page_size. [N, max_pages], int32
        context_lens: tokens before the window, which is the position of its row 0. [N], int32
        query_lens: rows of the window, at most Q; 0 is a padding sequence. [N], int32
        page_size: tokens of a page, a power of two.
    """

    page_table: torch.Tensor
    context_lens: torch.Tensor
    query_lens: torch.Tensor
    page_size: int


def paged_attention_window_reference(
    fused: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    weights: HeadWeights,
    window: Window,
    *,
    scale: float,
    keys_per_split: int | None = None,
    use_pdl: bool = False,
) -> torch.Tensor:
    """Norm, rotary, cache write, causal attention and output gate for up to Q new rows a sequence.

    Args:
        fused: projected rows [query | gate | key | value], each flat by head; row n * Q + i is
            row i of sequence n. [N * Q, 2 * Hq * D + 2 * Hkv * D]
        k_cache, v_cache: one layer's pool; the window's keys and values are written here.
            [S, Hkv, D]
        weights: norms and rotary angles.
        window: pages and lengths.
        scale: factor of the scores.
        keys_per_split: None divides the keys as the batch allows; a number gives every split this
            many, so that a row's result does not depend on the batch.
        use_pdl: start under the tail of the kernel before, where the GPU can.

    Returns:
        Gated heads [N * Q, Hq * D] in the dtype of fused; rows past a window's end are zero.

    Source: Gated Attention, https://arxiv.org/abs/2505.06708; Flash-Decoding,
        https://crfm.stanford.edu/2023/10/12/flashdecoding.html
    """
    hkv, d = k_cache.shape[1:]
    query_size = fused.shape[1] // 2 - hkv * d
    max_window = fused.shape[0] // window.query_lens.shape[0]
    wide = torch.promote_types(fused.dtype, torch.float32)
    out = fused.new_zeros(fused.shape[0], query_size)
    lengths = zip(window.context_lens.tolist(), window.query_lens.tolist(), strict=True)
    for n, (context, count) in enumerate(lengths):
        if count == 0:
            continue
        own = slice(n * max_window, n * max_window + count)
        parts = fused[own].split([query_size, query_size, hkv * d, hkv * d], dim=1)
        q, gate, k, v = (part.reshape(count, -1, d) for part in parts)
        places = torch.arange(context + count, device=fused.device)
        pages = window.page_table[n, places // window.page_size].long()
        slots = pages * window.page_size + places % window.page_size
        angles = weights.cos[context : context + count], weights.sin[context : context + count]
        q = rotary_reference(rms_norm_reference(q, weights.q_norm, weights.eps), *angles)
        k = rotary_reference(rms_norm_reference(k, weights.k_norm, weights.eps), *angles)
        k_cache[slots[context:]] = k.to(k_cache.dtype)
        v_cache[slots[context:]] = v.to(v_cache.dtype)
        rows = CachedRows.of((slots,), (count,))
        heads = paged_attention_reference(q, k_cache, v_cache, rows, scale)
        gated = heads.to(wide) * torch.sigmoid(gate.to(wide))
        out[own] = gated.to(fused.dtype).flatten(1)
    return out
