"""Whole-step kernels for windows, where one exists for the model, its cache and the device."""

from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qnext.cache.hybrid import HybridCache
from qnext.engine.inputs import SequenceRows, build_batch, state_slot
from qnext.engine.request import Request
from qnext.engine.sampler import cuts_of
from qnext.kernels import dispatch
from qnext.kernels.decode_step.reference import (
    DecodeStep,
    LaunchedRounds,
    Penalties,
    Rounds,
    StepOutput,
    WindowRows,
)
from qnext.model.batch import ForwardBatch
from qnext.model.layer import DecoderLayer
from qnext.model.qwen3_next import Qwen3Next

_STEPS = "qnext.kernels.decode_step"
_KERNELS_CPU, _KERNELS_GPU = f"{_STEPS}.numba", f"{_STEPS}.triton_fwd"
_ROUNDS_CPU, _ROUNDS_GPU = f"{_STEPS}.rounds", f"{_STEPS}.cuda_rounds"


def penalties_of(requests: Sequence[Request]) -> list[Penalties | None]:
    """Penalties of each sequence, empty if there are none."""
    if not any(request.params.has_penalties for request in requests):
        return []
    return [
        Penalties(
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            request.prompt_token_ids,
            request.output_token_ids,
        )
        if (params := request.params).has_penalties
        else None
        for request in requests
    ]


class FusedSteps:
    """Runs windows through `dispatch.decode_step`: the trunk's, and the MTP layer's.

    Args:
        model: on a CPU or a GPU.
        cache: made for it.
        max_positions: tokens of the longest sequence.
    """

    def __init__(self, model: Qwen3Next, cache: HybridCache, max_positions: int) -> None:
        self.model = model
        self.cache = cache
        self._is_deferring = False  # the last window's kernel replays its rows later
        positions = torch.arange(max_positions, device=model.device)
        rotation = model.rotary_table(positions, model.dtype)
        count = model.config.num_hidden_layers
        self.trunk = self._step([f"layers.{idx}." for idx in range(count)], "", rotation)
        self.draft: DecodeStep | None = None
        if model.mtp is not None:
            self.draft = self._step(["mtp.layer."], "mtp.", rotation)

    def start(self, slot: int) -> None:
        """Prepare a state slot for a new sequence."""
        self._kernels.start_slot(self.trunk, slot)

    def read_weights(self) -> None:
        """Look at the model's weights anew: training may have changed or replaced them."""
        parameters = dict(self.model.named_parameters())
        for step in (self.trunk, self.draft):
            if step is not None and step.prepared is not None:
                step.parameters = parameters
                self._kernels.read_weights(step)

    def window(self, windows: Sequence[SequenceRows]) -> StepOutput:
        """Run windows through the trunk and its head; states wait for `commit`."""
        out: StepOutput = dispatch.decode_step(self.trunk, self._rows(windows, None))
        self._is_deferring = out.best is not None
        return out

    def rounds_rows(self, windows: Sequence[SequenceRows], num_drafts: int) -> WindowRows | None:
        """These rows, one a sequence, for `launch_rounds`; None if no kernel goes on from them."""
        if num_drafts >= self._kernels.MAX_WINDOW:
            return None
        rows = self._rows(windows, None)
        backend = dispatch.decode_step.backend_for(self.trunk, rows)
        return None if backend == "reference" else rows

    def launch_rounds(
        self,
        rows: WindowRows,
        requests: Sequence[Request],
        draft_rows: tuple[list[SequenceRows], Tensor] | None,
        *,
        num_drafts: int,
        max_rounds: int,
        end_token_ids: Sequence[int],
        wants_hidden: bool,
    ) -> LaunchedRounds:
        """Start rounds of drafts and verification, or of plain steps; to read them commits them.

        Args:
            rows: the last token of each sequence, from `rounds_rows`.
            requests: the sequences.
            draft_rows: rows that the draft layer has not seen and their states, as for `mtp_step`.
            num_drafts, max_rounds, end_token_ids, wants_hidden: as in `Rounds`.
        """
        rounds = Rounds(
            rows=rows,
            draft_rows=None if draft_rows is None else self._rows(*draft_rows),
            cuts=[cuts_of(request.params) for request in requests],
            seeds=[request.seed for request in requests],
            num_drafts=num_drafts,
            max_rounds=max_rounds,
            end_token_ids=end_token_ids,
            wants_hidden=wants_hidden,
            penalties=penalties_of(requests),
        )
        self._is_deferring = True
        launched: LaunchedRounds = self._rounds.launch_rounds(self.trunk, self.draft, rounds)
        return launched

    def mtp_step(self, rows: Sequence[SequenceRows], hidden: Tensor) -> StepOutput:
        """One step of the draft layer and the head on rows whose ids are the tokens after them.

        Args:
            hidden: as for `Qwen3Next.mtp_step`. [T, C]
        """
        assert self.draft is not None, "drafts of a model without an MTP head"
        out: StepOutput = dispatch.decode_step(self.draft, self._rows(rows, hidden))
        return out

    def commit(self, state_slots: tuple[int, ...], num_accepted: tuple[int, ...]) -> None:
        """As `HybridCache.commit`, by the kernel that ran the window."""
        if self._is_deferring:
            self._kernels.commit_window(self.trunk, state_slots, num_accepted)
        else:
            self.cache.commit(state_slots, num_accepted)

    @property
    def takes_penalties(self) -> bool:
        """Whether the device's rounds know penalties."""
        takes: bool = self._rounds.TAKES_PENALTIES
        return takes

    def captured_rounds(self) -> list[Any]:
        """Rounds that were captured so far, for benchmarks; none on a CPU."""
        prepared = self.trunk.prepared
        return list(getattr(prepared, "graphs", {}).values())

    def settle(self) -> None:
        """Take accepted rows into the states now, for others to read."""
        self._kernels.settle(self.trunk, self.cache.commit)

    @property
    def _kernels(self) -> Any:
        """The kernels' module, which is loaded when it is first needed."""
        is_gpu = self.model.device.type == "cuda"
        return import_module(_KERNELS_GPU if is_gpu else _KERNELS_CPU)

    @property
    def _rounds(self) -> Any:
        """The module of the kernels' rounds, likewise."""
        is_gpu = self.model.device.type == "cuda"
        return import_module(_ROUNDS_GPU if is_gpu else _ROUNDS_CPU)

    def _rows(self, windows: Sequence[SequenceRows], hidden: Tensor | None) -> WindowRows:
        def make_batch() -> ForwardBatch:
            device = self.model.device
            return build_batch(windows, self.cache.page_size, device, is_window=True)

        return WindowRows(
            token_ids=[token_id for rows in windows for token_id in rows.token_ids],
            query_lens=[len(rows.token_ids) for rows in windows],
            context_lens=[rows.start for rows in windows],
            state_slots=[state_slot(rows.request) for rows in windows],
            pages=[rows.request.page_ids for rows in windows],
            hidden=hidden,
            scores_last=hidden is not None,  # drafts go on from the newest row
            make_batch=make_batch,
        )

    def _step(self, names: list[str], prefix: str, rotation: tuple[Tensor, Tensor]) -> DecodeStep:
        model = self.model
        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        mixer_idx = []
        for name in names:
            layer = modules[name.rstrip(".")]
            assert isinstance(layer, DecoderLayer), f"a layer is a {type(layer).__name__}"
            mixer_idx.append(layer.mixer.layer_idx)

        def run(rows: WindowRows) -> StepOutput:
            self.settle()
            for slot in rows.state_slots:
                self._kernels.start_slot(self.trunk, slot)
            batch = rows.make_batch()
            if rows.hidden is None:
                hidden = model(batch, self.cache)
            else:
                hidden = model.mtp_step(batch.token_ids, rows.hidden, batch, self.cache)
            scored = hidden
            if rows.scores_last:
                scored = hidden[[end - 1 for end in accumulate(rows.query_lens)]]
            return StepOutput(hidden, model.compute_logits(scored, row_stable=True))

        return DecodeStep(
            config=model.config,
            parameters=parameters,
            layer_names=tuple(names),
            mixer_idx=tuple(mixer_idx),
            keys=self.cache.kv_pool.k,
            values=self.cache.kv_pool.v,
            page_size=self.cache.page_size,
            states=self.cache.state_pool.tensors(),
            rotation=rotation,
            prefix=prefix,
            head="embed_tokens" if model.lm_head is None else "lm_head",
            run_layers=run,
        )
