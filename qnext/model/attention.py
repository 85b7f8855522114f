"""Gated Attention."""

import torch
from torch import nn

from qnext.cache.hybrid import HybridCache
from qnext.config.model import ModelConfig
from qnext.kernels import dispatch
from qnext.kernels.attention_inputs.reference import AttentionSizes
from qnext.model.batch import ForwardBatch
from qnext.model.linear import project
from qnext.model.norm import RMSNorm

Rotation = tuple[torch.Tensor, torch.Tensor]


class GatedAttention(nn.Module):
    """Grouped-query attention whose output passes a sigmoid gate computed beside the query.

    One fused projection holds the rows [query | gate | key | value], each flat by head; the
    checkpoint's q_proj interleaves query and gate head by head.

    Args:
        config: sizes.
        layer_idx: index among the attention layers; the MTP layer comes last.
    """

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        query_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        self.sizes = [query_size, query_size, kv_size, kv_size]
        self.qkv_proj = nn.Parameter(torch.empty(sum(self.sizes), config.hidden_size))
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Parameter(torch.empty(config.hidden_size, query_size))

    def project(
        self, x: torch.Tensor, rotation: Rotation, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows to rotated heads: q [T, Hq, D], k and v [T, Hkv, D], gate [T, Hq * D]."""
        fused = project(x, self.qkv_proj, batch)
        if fused.is_cuda:  # one pass over the rows
            sizes = AttentionSizes(self.num_heads, self.num_kv_heads, self.head_dim)
            q, k, v, gate = dispatch.attention_inputs(
                fused,
                self.q_norm.weight,
                self.k_norm.weight,
                *rotation,
                eps=self.q_norm.eps,
                sizes=sizes,
            )
            return q, k, v, gate
        q, gate, k, v = fused.split(self.sizes, dim=-1)
        q = self.q_norm(q.reshape(-1, self.num_heads, self.head_dim))
        k = self.k_norm(k.reshape(-1, self.num_kv_heads, self.head_dim))
        v = v.reshape(-1, self.num_kv_heads, self.head_dim)
        return dispatch.rotary(q, *rotation), dispatch.rotary(k, *rotation), v, gate

    def finish(self, heads: torch.Tensor, gate: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Gate the read-out and project it. heads: [T, Hq, D]; gate: [T, Hq * D]"""
        if heads.is_cuda:
            return project(dispatch.sigmoid_gate(heads, gate), self.o_proj, batch)
        wide = torch.promote_types(heads.dtype, torch.float32)
        gated = heads.flatten(1).to(wide) * torch.sigmoid(gate.to(wide))
        return project(gated.to(heads.dtype), self.o_proj, batch)

    def _product_dtype(self) -> torch.dtype:
        """To which attention's factors may be rounded: as precise as the weights at least."""
        stored = self.qkv_proj.dtype
        return torch.bfloat16 if stored.itemsize == 1 else stored

    def forward(
        self, x: torch.Tensor, rotation: Rotation, batch: ForwardBatch, cache: HybridCache | None
    ) -> torch.Tensor:
        """Mix tokens. x: [T, C]; with a cache the new keys and values are written to it."""
        q, k, v, gate = self.project(x, rotation, batch)
        if cache is None:
            heads = dispatch.attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, self.scale)
        else:
            assert batch.cache_inputs is not None, "a batch with a cache names its places"
            slots = batch.cache_inputs.slot_mapping
            fresh = k[: slots.shape[0]], v[: slots.shape[0]]
            pool = cache.kv_pool
            pool.write(self.layer_idx, *fresh, slots)
            heads = dispatch.paged_attention(
                q,
                pool.k[self.layer_idx],
                pool.v[self.layer_idx],
                batch.cached_rows(cache.page_size),
                self.scale,
                row_stable=batch.row_stable,
                product_dtype=self._product_dtype(),
                fresh=fresh,
            )
        return self.finish(heads, gate, batch)
