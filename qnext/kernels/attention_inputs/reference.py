"""From the rows of an attention layer's fused projection to attention's inputs."""

from dataclasses import dataclass

import torch

from qnext.kernels.rms_norm.reference import rms_norm_reference
from qnext.kernels.rotary.reference import rotary_reference


@dataclass(frozen=True)
class AttentionSizes:
    """Heads in one row [query | gate | key | value] of the fused projection, each flat by head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def columns(self) -> list[int]:
        """Widths of query, gate, key, value."""
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return [query_size, query_size, kv_size, kv_size]


def attention_inputs_reference(
    fused: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    sizes: AttentionSizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise each head of query and key, then rotate its first R dimensions.

        q = rotary(q * rsqrt(mean(q^2) + eps) * (1 + q_weight)), and k alike

    The op takes the fused rows whole, and hands gate and value on, so that its backward writes
    the one gradient that the projection needs.

    Args:
        fused: rows [query | gate | key | value]. [T, 2 Hq D + 2 Hkv D]
        q_weight, k_weight: zero-centred scales of a head. [D]
        cos, sin: of the angles, one per pair and token. [T, R / 2], fp32 or wider
        eps: added to the mean square, before the root.
        sizes: heads of a row.

    Returns:
        q [T, Hq, D], k and v [T, Hkv, D], gate [T, Hq * D] in the dtype of fused; q and k are
        rounded once, after the rotation, and v and gate are views of fused.
    """
    wide = torch.promote_types(fused.dtype, torch.float32)
    q, gate, k, v = fused.split(sizes.columns, dim=-1)
    kv_shape = (sizes.num_kv_heads, sizes.head_dim)
    q = q.unflatten(-1, (sizes.num_heads, sizes.head_dim)).to(wide)
    k = k.unflatten(-1, kv_shape).to(wide)
    q = rotary_reference(rms_norm_reference(q, q_weight, eps), cos, sin).to(fused.dtype)
    k = rotary_reference(rms_norm_reference(k, k_weight, eps), cos, sin).to(fused.dtype)
    return q, k, v.unflatten(-1, kv_shape), gate
