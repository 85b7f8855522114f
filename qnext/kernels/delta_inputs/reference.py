"""From the rows of a DeltaNet layer's fused projection to the delta rule's inputs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qnext.kernels.causal_conv1d.reference import causal_conv1d_reference
from qnext.kernels.l2_norm.reference import l2_norm_reference

L2_EPS = 1e-6


@dataclass(frozen=True)
class DeltaSizes:
    """Heads in one row [q | k | v | z | b | a] of the fused projection, each flat by head."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int

    @property
    def key_dim(self) -> int:
        """Columns of all keys, Hk * K."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Columns of all values, Hv * V."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Columns that are convolved, [q | k | v]."""
        return 2 * self.key_dim + self.value_dim

    @property
    def columns(self) -> list[int]:
        """Widths of q, k, v, z, b, a."""
        heads = self.num_value_heads
        return [self.key_dim, self.key_dim, self.value_dim, self.value_dim, heads, heads]


def delta_inputs_reference(
    fused: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    local_positions: torch.Tensor,
    *,
    sizes: DeltaSizes,
    history: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Convolve q, k, v; give q and k unit length; work out decay and write strength.

        [q | k | v] = silu(conv(fused[:D])),  q = q / |q| * K^-1/2,  k = k / |k|
        g = -exp(A_log) * softplus(a + dt_bias),  beta = sigmoid(b)

    The op takes the fused rows whole, and hands z on, so that its backward writes the one
    gradient that the projection needs: gradients of slices would be joined in a pass of their own.

    Args:
        fused: rows [q | k | v | z | b | a]. [T, 2 Hk K + 2 Hv V + 2 Hv]
        conv_weight: taps of q, k and v, oldest input first. [D, width], D = 2 Hk K + Hv V
        A_log: log of each head's decay rate. [Hv]
        dt_bias: added to a. [Hv]
        local_positions: index of each token since its sequence's start in fused, from 0. [T]
        sizes: heads of a row.
        history: inputs of the convolution before the first token, oldest first, when fused is
            one sequence that goes on; it gets no gradient. [D, width - 1]

    Returns:
        q, k [T, Hk, K] and v [T, Hv, V] in the dtype of fused, rounded once, at the end;
        g, beta [T, Hv] in fp32 (float64 for float64 rows); z [T, Hv, V], a view of fused.

    Source: Gated Delta Networks, https://arxiv.org/abs/2412.06464
    """
    wide = torch.promote_types(fused.dtype, torch.float32)
    *_, z, b, a = fused.split(sizes.columns, dim=-1)
    past = None if history is None else history.detach()
    mixed = causal_conv1d_reference(
        fused[:, : sizes.conv_dim].to(wide), conv_weight, local_positions, past
    )
    q, k, v = mixed.split(sizes.columns[:3], dim=-1)
    key_shape = (-1, sizes.num_key_heads, sizes.key_head_dim)
    value_shape = (-1, sizes.num_value_heads, sizes.value_head_dim)
    q = l2_norm_reference(q.reshape(key_shape), L2_EPS, sizes.key_head_dim**-0.5)
    k = l2_norm_reference(k.reshape(key_shape), L2_EPS)
    g = -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))
    heads = (part.to(fused.dtype) for part in (q, k, v.reshape(value_shape)))
    return *heads, g, torch.sigmoid(b.to(wide)), z.unflatten(-1, value_shape[1:])
