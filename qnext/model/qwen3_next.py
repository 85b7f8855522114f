"""Qwen3-Next: the hybrid of DeltaNet and attention, with its Multi-Token Prediction head."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from qnext.cache.hybrid import HybridCache
from qnext.config.model import ModelConfig
from qnext.kernels import dispatch
from qnext.kernels.int8_rows import scale_of
from qnext.model.batch import ForwardBatch
from qnext.model.layer import DecoderLayer
from qnext.model.moe import RouterStats
from qnext.model.mtp import MTPHead, unrolled_steps
from qnext.model.norm import RMSNorm
from qnext.model.quantized import apply_with_scales, refuse_quantised
from qnext.model.rope import RotaryTable

# Windows run with a whole number of vectors per tensor: an exponential that falls into the
# scalar tail of a vector loop is rounded differently, and which one does would depend on company.
# The loops take two vectors of fp32 at a time: 32 numbers of 512 bits, 16 of 256.
ROW_PAD = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16


class Qwen3Next(nn.Module):
    """One model for training, prefill, decode and verification.

    Args:
        config: sizes and layer pattern.
        has_mtp: with the Multi-Token Prediction head.
        dtype: of all parameters but A_log and dt_bias, which are fp32 at least: rounding A_log
            compounds along the sequence.
        device: where; "meta" allocates nothing. Weights are left undefined: load them, or call
            `init_weights`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        has_mtp: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.has_mtp = has_mtp
        self.compute_dtype: torch.dtype | None = None
        # Set by loading: how each checkpoint tensor was stored, and where from.
        self.stored_dtypes: dict[str, torch.dtype] = {}
        self.source_folder: Path | None = None
        self.rotary_table = RotaryTable(config)
        with torch.device(device):
            self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self.layers = nn.ModuleList(self._layer(idx) for idx in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head: nn.Parameter | None = None
            if not config.tie_word_embeddings:
                self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self.mtp = MTPHead(config) if has_mtp else None
        wide = torch.promote_types(dtype, torch.float32)
        for name, parameter in self.named_parameters():
            is_decay = name.endswith((".A_log", ".dt_bias"))
            parameter.data = parameter.data.to(wide if is_decay else dtype)

    def _layer(self, layer_idx: int) -> DecoderLayer:
        config = self.config
        is_attention = config.is_attention_layer(layer_idx)
        same = [config.is_attention_layer(idx) == is_attention for idx in range(layer_idx)]
        return DecoderLayer(
            config,
            is_attention=is_attention,
            is_moe=config.is_moe_layer(layer_idx),
            mixer_idx=sum(same),
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; refused for 8-bit matrices, whose scales it has no place for."""
        refuse_quantised(self, "take the state of")
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and `float` go through: scales move along with their matrices."""
        apply_with_scales(self, fn, partial(super()._apply, fn, recurse))
        return self

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: `compute_dtype` where it is set, else that of the embedding."""
        stored = self.embed_tokens.dtype
        return self.compute_dtype or (torch.float32 if stored == torch.int8 else stored)

    def matrix_names(self) -> list[str]:
        """Names of the matrices that take most of the memory and may be held in int8.

        Routers and gates stay as they are: they are small, and a choice of experts is sensitive.
        """
        small = ("conv1d", "gate", "shared_expert_gate")
        return [
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() >= 2 and name.rpartition(".")[2] not in small
        ]

    @property
    def head_weight(self) -> torch.Tensor:
        """The output head, which may be the embedding. [W, C]"""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings in the activations' dtype. token_ids: [T]. Returns [T, C]"""
        embedded = F.embedding(token_ids, self.embed_tokens).to(self.dtype)
        if self.embed_tokens.dtype == torch.int8:
            embedded = embedded * F.embedding(token_ids, scale_of(self.embed_tokens))
        return embedded

    def forward(
        self,
        batch: ForwardBatch,
        cache: HybridCache | None = None,
        *,
        router_stats: list[RouterStats] | None = None,
    ) -> torch.Tensor:
        """Run the trunk.

        Args:
            batch: packed tokens; with a cache it names their places in it.
            cache: memory of running sequences; None in training and scoring.
            router_stats: receives one record per mixture layer (without a cache).

        Returns:
            States after the final norm. [T, C]
        """
        num_tokens = batch.token_ids.shape[0]
        batch = pad_window(batch)
        rotation = self.rotary_table(batch.position_ids, self.dtype)
        x = self.embed(batch.token_ids)
        for layer in self.layers:
            x, stats = layer(x, rotation, batch, cache)
            if router_stats is not None and stats is not None:
                router_stats.append(stats)
        return self.norm(x)[:num_tokens]

    def compute_logits(self, hidden: torch.Tensor, *, row_stable: bool = False) -> torch.Tensor:
        """Output head. hidden: [T, C]; row_stable: each row alone, as decoding on a CPU needs.

        Returns:
            [T, W], fp32 at least.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits: torch.Tensor = dispatch.linear(
            hidden, self.head_weight, row_stable=row_stable, out_dtype=wide
        )
        return logits

    def mtp_step(
        self,
        next_token_ids: torch.Tensor,
        hidden: torch.Tensor,
        batch: ForwardBatch,
        cache: HybridCache,
    ) -> torch.Tensor:
        """One cached MTP step for some rows; their keys go to the cache's MTP layer.

        Args:
            next_token_ids: the token after each row's. [T]
            hidden: trunk states of the rows, or the previous step's states. [T, C]
            batch: positions and places of the rows; a draft's step j stands j further on.
            cache: holds the MTP layer's keys.

        Returns:
            States that predict the token after the next. [T, C]

        Raises:
            ValueError: the model has no MTP head.
        """
        head = self._mtp_head()
        num_tokens = hidden.shape[0]
        padded = pad_window(replace(batch, token_ids=next_token_ids))
        extra = padded.token_ids.shape[0] - num_tokens
        hidden = F.pad(hidden, [0, 0, 0, extra]) if extra else hidden
        rotation = self.rotary_table(padded.position_ids, self.dtype)
        embedded = self.embed(padded.token_ids)
        out: torch.Tensor = head(embedded, hidden, rotation, padded, cache)
        return out[:num_tokens]

    def mtp_hidden(
        self,
        hidden: torch.Tensor,
        batch: ForwardBatch,
        num_steps: int = 1,
        *,
        router_stats: list[RouterStats] | None = None,
    ) -> list[torch.Tensor]:
        """Teacher-forced MTP steps without a cache, as training and scoring need them.

        Args:
            hidden: trunk states of the batch. [T, C]
            batch: packed tokens, no cache.
            num_steps: k >= 1.
            router_stats: receives one record per step, if the head's layer is a mixture.

        Returns:
            k states [T, C]; row t of step j predicts token t + 2 + j, where that row's sequence
            reaches token t + 1 + j.

        Raises:
            ValueError: the model has no MTP head, or num_steps < 1.
        """
        head = self._mtp_head()
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps = {num_steps!r}: must be an integer, at least 1")
        table = self.rotary_table
        return unrolled_steps(head, self.embed, table, hidden, batch, num_steps, router_stats)

    @torch.no_grad()
    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Next-token logits of one sequence.

        Args:
            token_ids: [T], int64; T >= 1

        Returns:
            [T, W], fp32.

        Raises:
            ValueError: no vector of token ids, or an id outside the vocabulary.
        """
        batch = self._scored_sequence(token_ids)
        return self.compute_logits(self(batch))

    @torch.no_grad()
    def mtp_logits(self, token_ids: torch.Tensor, k: int = 1) -> torch.Tensor:
        """Draft logits of one sequence, teacher-forced.

        Args:
            token_ids: [T], int64
            k: steps.

        Returns:
            [T, k, W], fp32; [t, j] predicts token t + 2 + j from tokens up to t + 1 + j, and is
            NaN where the sequence ends before token t + 1 + j.

        Raises:
            ValueError: the model has no MTP head, k < 1, or as for `logits`.
        """
        batch = self._scored_sequence(token_ids)
        states = self.mtp_hidden(self(batch), batch, k)
        logits = torch.stack([self.compute_logits(state) for state in states], dim=1)
        for step in range(k):
            logits[max(0, token_ids.shape[0] - 1 - step) :, step] = torch.nan
        return logits

    @staticmethod
    def from_pretrained(
        path_or_hub_id: str | Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        *,
        strict: bool = True,
    ) -> "Qwen3Next":
        """Open a checkpoint; see `qnext.model.checkpoint.load_model`."""
        from qnext.model.checkpoint import load_model

        return load_model(path_or_hub_id, dtype=dtype, device=device, strict=strict)

    def save_pretrained(
        self,
        path: str | Path,
        max_shard_size: int | str = "5GB",
        layout: str = "per_expert",
    ) -> None:
        """Write a checkpoint; see `qnext.model.checkpoint.save_model`."""
        from qnext.model.checkpoint import save_model

        save_model(self, path, max_shard_size=max_shard_size, layout=layout)

    def _scored_sequence(self, token_ids: torch.Tensor) -> ForwardBatch:
        """A batch of one sequence, its ids checked; training and serving check theirs earlier."""
        if not isinstance(token_ids, torch.Tensor):
            raise ValueError(
                f"token_ids is a {type(token_ids).__name__}; must be a tensor of int64"
            )
        batch = ForwardBatch.packed(token_ids.to(self.device))
        if token_ids.numel() == 0:
            raise ValueError("token_ids is empty; must hold at least one token")
        for bound in (int(batch.token_ids.min()), int(batch.token_ids.max())):
            if not 0 <= bound < self.config.vocab_size:
                raise ValueError(
                    f"token_ids holds {bound}; ids go from 0 to {self.config.vocab_size - 1}"
                )
        return batch

    def _mtp_head(self) -> MTPHead:
        if self.mtp is None:
            raise ValueError("this model has no MTP head: its checkpoint holds no mtp.* tensor")
        return self.mtp


def pad_window(batch: ForwardBatch) -> ForwardBatch:
    """Fill up a window on a CPU to a multiple of ROW_PAD rows; the extra rows touch nothing."""
    extra = -batch.token_ids.shape[0] % ROW_PAD
    if not batch.row_stable or extra == 0:
        return batch
    return replace(
        batch,
        token_ids=F.pad(batch.token_ids, [0, extra]),
        position_ids=F.pad(batch.position_ids, [0, extra]),
    )
