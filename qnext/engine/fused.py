"""Whole-step kernels for windows on a CPU, where one exists for the model and its cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.cache.hybrid import HybridCache
from qnext.kernels import dispatch
from qnext.kernels.decode_step.reference import DecodeStep, WindowRows
from qnext.model.batch import ForwardBatch
from qnext.model.layer import DecoderLayer
from qnext.model.qwen3_next import Qwen3Next, pad_window


class FusedSteps:
    """Runs windows through `dispatch.decode_step`: the trunk's, and the MTP layer's.

    Args:
        model: on a CPU.
        cache: made for it.
        max_positions: tokens of the longest sequence.
    """

    def __init__(self, model: Qwen3Next, cache: HybridCache, max_positions: int) -> None:
        self.model = model
        self.cache = cache
        rotation = model.rotary_table(torch.arange(max_positions), model.dtype)
        count = model.config.num_hidden_layers
        self.trunk = self._step([f"layers.{idx}." for idx in range(count)], "norm.weight", rotation)
        self.draft = None
        if model.mtp is not None:
            self.draft = self._step(["mtp.layer."], "mtp.norm.weight", rotation)

    def refresh(self) -> None:
        """Read the weights anew: training may have changed them since the last sequence began."""
        for step in (self.trunk, self.draft):
            if step is not None:
                step.prepared = None

    def window(self, batch: ForwardBatch) -> Tensor:
        """States after the trunk's final norm of a window's rows. [T, C]"""
        out: Tensor = dispatch.decode_step(
            self.trunk, _rows(self.model.embed(batch.token_ids), batch)
        )
        return out

    def mtp_step(self, next_token_ids: Tensor, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """As `Qwen3Next.mtp_step`. [T, C]"""
        head = self.model.mtp
        assert head is not None and self.draft is not None, "drafts of a model without an MTP head"
        x = head.combine(self.model.embed(next_token_ids), hidden, batch)
        out: Tensor = dispatch.decode_step(self.draft, _rows(x, batch))
        return out

    def commit(self, state_slots: tuple[int, ...], num_accepted: tuple[int, ...]) -> None:
        """As `HybridCache.commit`, by the kernel that ran the window."""
        if self.trunk.prepared is None:
            self.cache.commit(state_slots, num_accepted)
            return
        from qnext.kernels.decode_step.numba import commit_window

        commit_window(self.trunk, state_slots, num_accepted)

    def _step(
        self, names: list[str], final_norm: str, rotation: tuple[Tensor, Tensor]
    ) -> DecodeStep:
        model = self.model
        modules = dict(model.named_modules())
        layers = [modules[name.rstrip(".")] for name in names]
        norm = modules[final_norm.removesuffix(".weight")]
        mixer_idx = []
        for layer in layers:
            assert isinstance(layer, DecoderLayer), f"a layer is a {type(layer).__name__}"
            mixer_idx.append(layer.mixer.layer_idx)

        def run(rows: WindowRows) -> Tensor:
            batch = pad_window(rows.batch)
            extra = batch.token_ids.shape[0] - rows.x.shape[0]
            x = F.pad(rows.x, [0, 0, 0, extra])
            angles = model.rotary_table(batch.position_ids, model.dtype)
            for layer in layers:
                x, _ = layer(x, angles, batch, self.cache)
            states: Tensor = norm(x)
            return states[: rows.x.shape[0]]

        return DecodeStep(
            config=model.config,
            parameters=dict(model.named_parameters()),
            layer_names=tuple(names),
            mixer_idx=tuple(mixer_idx),
            keys=self.cache.kv_pool.k,
            values=self.cache.kv_pool.v,
            page_size=self.cache.page_size,
            states=self.cache.state_pool.tensors(),
            rotation=rotation,
            final_norm=final_norm,
            run_layers=run,
        )


def _rows(x: Tensor, batch: ForwardBatch) -> WindowRows:
    places = batch.cache_inputs
    assert places is not None, "a window has its places in the cache"
    assert batch.seq_lens is not None, "a window has host lengths"
    return WindowRows(
        x=x,
        query_lens=batch.seq_lens,
        context_lens=places.context_lens,
        state_slots=places.state_slots,
        page_table=places.page_table,
        batch=batch,
    )
