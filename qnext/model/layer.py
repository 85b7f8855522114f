"""One decoder layer: a mixer, then experts, each behind a norm and a residual."""

import torch
from torch import nn

from qnext.cache.hybrid import HybridCache
from qnext.config.model import ModelConfig
from qnext.kernels import dispatch
from qnext.model.attention import GatedAttention, Rotation
from qnext.model.batch import ForwardBatch
from qnext.model.gated_delta_net import GatedDeltaNet
from qnext.model.moe import DenseMLP, MixtureOfExperts, RouterStats
from qnext.model.norm import RMSNorm


class DecoderLayer(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)).

    Args:
        config: sizes.
        is_attention: Gated Attention rather than Gated DeltaNet.
        is_moe: a mixture of experts rather than a dense MLP.
        mixer_idx: index among the layers of the same mixer, which is the cache's index.
    """

    def __init__(
        self, config: ModelConfig, *, is_attention: bool, is_moe: bool, mixer_idx: int
    ) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.is_attention = is_attention
        self.input_layernorm = RMSNorm(config.hidden_size, eps)
        self.mixer: GatedAttention | GatedDeltaNet
        if is_attention:
            self.mixer = GatedAttention(config, mixer_idx)
        else:
            self.mixer = GatedDeltaNet(config, mixer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps)
        self.mlp: MixtureOfExperts | DenseMLP
        if is_moe:
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = DenseMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: torch.Tensor, rotation: Rotation, batch: ForwardBatch, cache: HybridCache | None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """Run the layer. x: [T, C]; rotation: cos and sin [T, R / 2] of the tokens' positions."""
        normed = self.input_layernorm(x)
        if isinstance(self.mixer, GatedAttention):
            mixed = self.mixer(normed, rotation, batch, cache)
        else:
            mixed = self.mixer(normed, batch, cache)
        norm = self.post_attention_layernorm
        if x.is_cuda:  # one pass over the rows
            normed, x = dispatch.add_rms_norm(mixed, x, norm.weight, norm.eps)
        else:
            x = x + mixed
            normed = norm(x)
        out, stats = self.mlp(normed, batch)
        return x + out, stats
