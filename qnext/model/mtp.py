"""Multi-Token Prediction: one extra layer that drafts the tokens after the next."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from qnext.cache.hybrid import HybridCache
from qnext.config.model import ModelConfig
from qnext.kernels import dispatch
from qnext.model.attention import GatedAttention, Rotation
from qnext.model.batch import ForwardBatch
from qnext.model.layer import DecoderLayer
from qnext.model.linear import project
from qnext.model.moe import RouterStats
from qnext.model.norm import RMSNorm
from qnext.model.rope import RotaryTable


class MTPHead(nn.Module):
    """h' = norm(layer(fc([norm_e(embedding of the next token); norm_h(h)])))

    The layer is a Gated Attention layer with keys of its own; embedding and output head are the
    main model's. Step j of a draft from token t stands at position t + j: it attends to the
    step-0 keys of tokens up to t, and to the keys of its own earlier steps.

    Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.2
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(size, eps)
        self.pre_fc_norm_hidden = RMSNorm(size, eps)
        self.fc = nn.Parameter(torch.empty(size, 2 * size))
        self.layer = DecoderLayer(
            config,
            is_attention=True,
            is_moe=config.num_experts > 0,
            mixer_idx=config.num_attention_layers,
        )
        self.norm = RMSNorm(size, eps)

    def combine(
        self, embedded: torch.Tensor, hidden: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """Join the next token's embedding [T, C] and the state [T, C], embedding first."""
        joined = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        return project(torch.cat(joined, dim=-1), self.fc, batch)

    def forward(
        self,
        embedded: torch.Tensor,
        hidden: torch.Tensor,
        rotation: Rotation,
        batch: ForwardBatch,
        cache: HybridCache | None,
        router_stats: list[RouterStats] | None = None,
    ) -> torch.Tensor:
        """One step on rows whose keys are those of the step-0 kind, or on cached drafts.

        Args:
            embedded: embeddings of the next tokens. [T, C]
            hidden: the trunk's state after its final norm, or the previous step's. [T, C]
            rotation: cos and sin at the rows' positions.
            batch, cache, router_stats: as for the trunk.

        Returns:
            State after the head's norm, which predicts and feeds the next step. [T, C]
        """
        x = self.combine(embedded, hidden, batch)
        x, stats = self.layer(x, rotation, batch, cache)
        if router_stats is not None and stats is not None:
            router_stats.append(stats)
        out: torch.Tensor = self.norm(x)
        return out


def unrolled_steps(
    head: MTPHead,
    embed: Callable[[torch.Tensor], torch.Tensor],
    table: RotaryTable,
    hidden: torch.Tensor,
    batch: ForwardBatch,
    num_steps: int,
    router_stats: list[RouterStats] | None = None,
) -> list[torch.Tensor]:
    """Teacher-forced steps 0 to num_steps - 1 for every token, with the keys that drafting has.

    Args:
        head: the MTP head.
        embed: embedding of token ids, shared with the trunk. [T] to [T, C]
        table: of rotary angles.
        hidden: trunk states after the final norm. [T, C]
        batch: the packed tokens the states belong to.
        num_steps: how many steps, k >= 1.
        router_stats: receives one record per step, if the layer is a mixture.

    Returns:
        k states [T, C]; row t of step j predicts token t + 2 + j, and means something only where
        token t + 1 + j is in the same sequence.
    """
    token_ids = batch.token_ids
    states: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    visible = None
    for step in range(num_steps):
        following = token_ids.roll(-step - 1)
        # Past a document's end a row reads its own token: what comes after has no part in it.
        is_within = batch.position_ids.roll(-step - 1) == batch.position_ids + step + 1
        following = torch.where(is_within, following, token_ids)
        embedded = embed(following).to(hidden.dtype)
        rotation = table(batch.position_ids + step, hidden.dtype)
        if step == 0 and num_steps == 1:
            return [head(embedded, hidden, rotation, batch, None, router_stats)]
        layer = head.layer
        mixer = layer.mixer
        assert isinstance(mixer, GatedAttention), "the MTP layer is an attention layer"
        x = head.combine(embedded, states[-1] if states else hidden, batch)
        q, k, v, gate = mixer.project(layer.input_layernorm(x), rotation, batch)
        keys.append(k)
        values.append(v)
        if step == 0:
            heads = dispatch.attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, mixer.scale)
        else:
            visible = _same_sequence(batch) if visible is None else visible
            heads = _draft_attention(q, keys, values, visible, mixer.scale)
        x = x + mixer.finish(heads, gate, batch)
        out, stats = layer.mlp(layer.post_attention_layernorm(x), batch)
        if router_stats is not None and stats is not None:
            router_stats.append(stats)
        states.append(head.norm(x + out))
    return states


def _same_sequence(batch: ForwardBatch) -> torch.Tensor:
    """Which step-0 keys each token sees. [rows, L, L], bool, L tokens in a row"""
    length = batch.row_tokens or batch.token_ids.shape[0]
    index = torch.arange(batch.token_ids.shape[0], device=batch.token_ids.device)
    segment = torch.bucketize(index, batch.cu_seqlens[1:].to(index.dtype), right=True)
    segment = segment.view(-1, length)
    causal = torch.ones(length, length, dtype=torch.bool, device=index.device).tril()
    return causal & (segment[:, :, None] == segment[:, None, :])


def _draft_attention(
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    visible: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend to the step-0 keys of committed tokens and to one's own later steps.

    Args:
        q: queries of step j >= 1. [T, Hq, D]
        keys, values: of steps 0 to j, row t belonging to the draft from token t. j + 1 of
            [T, Hkv, D]
        visible: which step-0 keys each token sees. [rows, L, L]
        scale: factor of the scores.

    Returns:
        [T, Hq, D]
    """
    rows, length, _ = visible.shape
    own = torch.eye(length, dtype=torch.bool, device=q.device).expand(rows, length, length)
    mask = torch.cat([visible] + [own] * (len(keys) - 1), dim=-1)[:, None]  # [rows, 1, L, (j+1)L]

    def rows_of(x: torch.Tensor) -> torch.Tensor:  # [T, H, D] -> [rows, H, L, D]
        return x.view(rows, length, *x.shape[1:]).transpose(1, 2)

    k = torch.cat([rows_of(part) for part in keys], dim=2)
    v = torch.cat([rows_of(part) for part in values], dim=2)
    out = F.scaled_dot_product_attention(
        rows_of(q), k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(q.shape)
