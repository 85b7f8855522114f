"""Gated DeltaNet."""

import torch
import torch.nn.functional as F
from torch import nn

from qnext.cache.hybrid import HybridCache
from qnext.config.model import ModelConfig
from qnext.kernels import dispatch
from qnext.kernels.delta_inputs.reference import DeltaSizes
from qnext.model.batch import ForwardBatch
from qnext.model.linear import project
from qnext.model.norm import GatedRMSNorm

L2_EPS = 1e-6


class GatedDeltaNet(nn.Module):
    """Linear attention with a decaying, self-correcting state.

    One fused projection holds the rows [q | k | v | z | b | a], each flat by head; the
    checkpoint groups them by key head.

    Args:
        config: sizes.
        layer_idx: index among the DeltaNet layers.
    """

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_key_heads = config.linear_num_key_heads
        self.num_value_heads = config.linear_num_value_heads
        self.key_head_dim = config.linear_key_head_dim
        self.value_head_dim = config.linear_value_head_dim
        self.key_dim, self.value_dim = config.key_dim, config.value_dim
        heads = self.num_value_heads
        self.sizes = [config.conv_dim, self.value_dim, heads, heads]  # qkv, z, b, a
        self.in_proj = nn.Parameter(torch.empty(sum(self.sizes), config.hidden_size))
        self.conv1d = nn.Parameter(torch.empty(config.conv_dim, config.linear_conv_kernel_dim))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(self.value_head_dim, config.rms_norm_eps)
        self.out_proj = nn.Parameter(torch.empty(config.hidden_size, self.value_dim))

    def forward(
        self, x: torch.Tensor, batch: ForwardBatch, cache: HybridCache | None
    ) -> torch.Tensor:
        """Mix tokens. x: [T, C]; with a cache the states advance as the batch says."""
        fused = project(x, self.in_proj, batch)
        if cache is None:
            heads, z = self._packed(fused, batch)
        elif batch.is_window:
            heads, z = self._window(fused, batch, cache)
        else:
            heads, z = self._prefill(fused, batch, cache)
        gated = self.norm(heads, z).flatten(1)  # [T, Hv * V]
        return project(gated, self.out_proj, batch)

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Convolved channels [T, D] to q, k [T, Hk, K], normalised in fp32, and v [T, Hv, V]."""
        q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q = q.reshape(-1, self.num_key_heads, self.key_head_dim)
        k = k.reshape(-1, self.num_key_heads, self.key_head_dim)
        v = v.reshape(-1, self.num_value_heads, self.value_head_dim)
        q = dispatch.l2_norm(q, L2_EPS, self.key_head_dim**-0.5)
        return q, dispatch.l2_norm(k, L2_EPS), v

    def _gates(self, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """beta and the log decay g <= 0, both [T, Hv] in fp32 at least."""
        wide = torch.promote_types(a.dtype, torch.float32)
        rate = self.A_log.to(wide).exp()
        g = -rate * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        return torch.sigmoid(b.to(wide)), g

    def _inputs(
        self,
        fused: torch.Tensor,
        local_positions: torch.Tensor,
        history: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Projected rows [T, ...] to q, k, v, the log decay g, beta and z, by head.

        Args:
            local_positions, history: as for `causal_conv1d_reference`.
        """
        if fused.is_cuda:  # one pass over the rows
            inputs: tuple[torch.Tensor, ...] = dispatch.delta_inputs(
                fused,
                self.conv1d,
                self.A_log,
                self.dt_bias,
                local_positions,
                sizes=DeltaSizes(
                    self.num_key_heads,
                    self.num_value_heads,
                    self.key_head_dim,
                    self.value_head_dim,
                ),
                history=history,
            )
            return inputs
        mixed, z, b, a = fused.split(self.sizes, dim=-1)
        q, k, v = self._heads(dispatch.causal_conv1d(mixed, self.conv1d, local_positions, history))
        beta, g = self._gates(b, a)
        return q, k, v, g, beta, z.reshape(-1, self.num_value_heads, self.value_head_dim)

    def _packed(
        self, fused: torch.Tensor, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read-out and gate of packed sequences, both [T, Hv, V]; as for the two others."""
        q, k, v, g, beta, z = self._inputs(fused, batch.local_positions)
        heads, _ = dispatch.gated_delta_rule(
            q, k, v, g, beta, cu_seqlens=batch.cu_seqlens, row_tokens=batch.row_tokens
        )
        return heads, z

    def _prefill(
        self, fused: torch.Tensor, batch: ForwardBatch, cache: HybridCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.seq_lens is not None, "a batch with a cache has host lengths"
        pool, slots = cache.state_pool, batch.state_slots
        conv_state = pool.conv_state[self.layer_idx]
        histories = conv_state.index_select(0, slots)  # [N, D, width - 1]
        rows, steps = fused.split(batch.seq_lens), batch.local_positions.split(batch.seq_lens)
        parts = [self._inputs(*each) for each in zip(rows, steps, histories, strict=True)]
        conv_state.index_copy_(0, slots, self._last_inputs(fused, histories, batch))
        joined = parts[0] if len(parts) == 1 else [torch.cat(x) for x in zip(*parts, strict=True)]
        q, k, v, g, beta, z = joined
        heads, final = dispatch.gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            cu_seqlens=batch.cu_seqlens,
            initial_state=pool.recurrent_state[self.layer_idx, slots],
        )
        pool.recurrent_state[self.layer_idx, slots] = final
        if batch.tail_padding is not None:
            # No sequence writes them, and what lies there must not reach a router.
            tail = heads[-batch.tail_padding.shape[0] :]
            tail.masked_fill_(batch.tail_padding[:, None, None], 0.0)
        return heads, z

    def _last_inputs(
        self, fused: torch.Tensor, histories: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """Last inputs of each sequence's convolution. histories: those before. [N, D, width - 1]"""
        count = histories.shape[2]
        rows, is_own = batch.last_rows(count)
        own = fused[rows.clamp_min(0), : self.sizes[0]].to(histories.dtype)  # [N, width - 1, D]
        # Where a sequence's rows here are too few, the history's end stands before them.
        steps = rows - batch.cu_seqlens[:-1, None]
        old = histories.gather(2, (steps % count)[:, None].expand_as(histories))
        return torch.where(is_own[:, None], own.transpose(1, 2), old)

    def _window(
        self, fused: torch.Tensor, batch: ForwardBatch, cache: HybridCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.seq_lens is not None, "a batch with a cache has host lengths"
        mixed, z, b, a = fused.split(self.sizes, dim=-1)
        pool = cache.state_pool
        convolved = dispatch.causal_conv1d_window(
            mixed, self.conv1d, pool.conv_state[self.layer_idx], batch.state_slots, batch.seq_lens
        )
        q, k, v = self._heads(convolved)
        beta, g = self._gates(b, a)
        decay = g.exp()
        heads, changes = dispatch.gated_delta_window(
            q,
            k,
            v,
            decay,
            beta,
            states=pool.recurrent_state[self.layer_idx],
            state_slots=batch.state_slots,
            query_lens=batch.seq_lens,
        )
        rows = sum(batch.seq_lens)
        pool.record(
            self.layer_idx,
            *batch.window_rows,
            keys=k[:rows],
            changes=changes[:rows],
            decays=decay[:rows],
            inputs=mixed[:rows],
        )
        return heads, z.reshape(-1, self.num_value_heads, self.value_head_dim)
