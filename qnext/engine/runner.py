"""Runs the model: prompt chunks, windows of rows, drafts. Owns the cache and the hidden rows.

The draft layer has a cache of its own: its row t holds (hidden_t, token_{t+1}), so it is one token
behind the main model's. Hidden rows wait here until drafts are wanted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qnext.cache.hybrid import HybridCache
from qnext.engine.captured_prefill import CapturedPrefill
from qnext.engine.captured_prefill import objection as captured_objection
from qnext.engine.first_pass import FirstPass
from qnext.engine.fused import FusedSteps
from qnext.engine.inputs import SequenceRows, build_batch, state_slot
from qnext.engine.request import Request
from qnext.engine.sampler import LogitsRow
from qnext.engine.scheduler import PromptPart
from qnext.engine.speculative import Drafts, choose_token
from qnext.kernels.decode_step.reference import NOT_NUMBERS, LaunchedRounds, RoundsOutput, best_ids
from qnext.model.batch import ForwardBatch
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.random_bits import Purpose

# Hidden rows that may wait for the draft layer, a sequence, before they are worked off.
MAX_PENDING_ROWS = 2048


class TensorRows:
    """Rows of raw logits on the model's device, brought over when needed. [T, W]

    Args:
        argmax: of each row, where the kernel has worked it out.
    """

    def __init__(self, logits: Tensor, argmax: Sequence[int] | None = None) -> None:
        self._logits = logits
        self._argmax = argmax
        self._host: Tensor | None = None

    def argmax(self, row_idx: int) -> int:
        """Lowest id of the largest logit; one transfer for all rows.

        Raises:
            ValueError: a logit is not a number.
        """
        if self._argmax is None:
            self._argmax = best_ids(self._logits)
        if self._argmax[row_idx] < 0:
            raise ValueError(NOT_NUMBERS)
        return self._argmax[row_idx]

    def row(self, row_idx: int) -> LogitsRow:
        """The row as an array; one transfer for all rows."""
        if self._host is None:
            self._host = self._logits.float().cpu()
        return self._host[row_idx].numpy()


@dataclass
class _PendingRows:
    """Hidden rows of one sequence that the draft layer has not seen, from position `start`."""

    start: int = 0
    parts: list[Tensor] = field(default_factory=list)  # [*, C] each
    num_rows: int = 0

    def add(self, hidden: Tensor) -> None:
        self.parts.append(hidden)
        self.num_rows += hidden.shape[0]

    def take(self, num_rows: int) -> Tensor:
        """Remove and return the first rows. [num_rows, C]"""
        joined = _joined(self.parts)
        self.start += num_rows
        self.num_rows -= num_rows
        self.parts = [joined[num_rows:]] if self.num_rows else []
        return joined[:num_rows]


class ModelRunner:
    """The model with its cache, driven by lists of requests.

    Args:
        cache: made for this model, with the scheduler's number of pages and slots.
        chunk_tokens: prompt rows of a pass at most.
        max_prefill_seqs: prompts of a pass at most.
        max_positions: tokens of the longest sequence, drafts included.
        keeps_hidden: whether drafts may be asked for.
    """

    def __init__(
        self,
        model: Qwen3Next,
        cache: HybridCache,
        *,
        chunk_tokens: int,
        max_prefill_seqs: int,
        max_positions: int,
        keeps_hidden: bool,
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = model.device
        # The whole-step kernels know the layers of Qwen3Next, not those of its stand-ins.
        has_fused = self.device.type in ("cpu", "cuda") and isinstance(model, Qwen3Next)
        self._fused = FusedSteps(model, cache, max_positions) if has_fused else None
        is_captured = has_fused and captured_objection(model) is None
        self._captured = CapturedPrefill(model, cache) if is_captured else None
        self.max_window = cache.state_pool.max_window
        self.chunk_tokens = chunk_tokens
        self.max_prefill_seqs = max_prefill_seqs
        self.keeps_hidden = keeps_hidden
        self._first_pass = FirstPass(cache, model.device)  # of those that are not captured
        self.deferred_seconds = 0.0  # time spent on hidden rows put off from earlier steps
        self._pending: dict[str, _PendingRows] = {}

    def read_weights(self) -> None:
        """Look at the model's weights anew, which may have changed since they were last used."""
        if self._fused is not None:
            self._fused.read_weights()
        if self._captured is not None:
            self._captured.read_weights()

    def start(self, requests: Sequence[Request]) -> None:
        """Clear the states of sequences that begin, or begin again."""
        if not requests:
            return
        slots = [state_slot(request) for request in requests]
        self.cache.reset_state(slots)
        for slot, request in zip(slots, requests, strict=True):
            if self._fused is not None:
                self._fused.start(slot)
            self._pending[request.request_id] = _PendingRows()

    def release(self, request: Request) -> None:
        """Forget a sequence."""
        self._pending.pop(request.request_id, None)

    @torch.inference_mode()
    def prefill(
        self, parts: Sequence[PromptPart], *, is_drafting: bool
    ) -> tuple[list[Request], TensorRows | None]:
        """Feed parts of prompts in one pass.

        Args:
            parts: each goes on where its sequence's cache ends.
            is_drafting: work off hidden rows now, so that few are held.

        Returns:
            Requests whose prompt ends here and whose answer has not begun; logits after the last
            token of each, None if there are none.
        """
        captured = self._captured if self._captured and self._captured.takes(parts) else None
        if captured is not None:
            hidden, logits = captured.run(parts[0].request)
        else:
            rows = [
                SequenceRows(p.request, p.request.prompt_array[p.start : p.end], p.start)
                for p in parts
            ]
            batch = self._batch(rows, is_window=False)
            if all(part.start == 0 for part in parts):
                forward = partial(self.model, batch, self.cache)
                self._first_pass.prepare(forward, [part.request for part in parts])
            hidden = self.model(batch, self.cache)  # [T, C]
        each = hidden.split([part.end - part.start for part in parts])
        begun, last_rows = [], []
        for part, own in zip(parts, each, strict=True):
            part.request.num_computed = part.end
            if not part.request.is_prefilling and not part.request.output_token_ids:
                begun.append(part.request)
                last_rows.append(own[-1:])
        if self.keeps_hidden:
            # A sequence's rows alone are kept: a slice would hold on to those of all the others,
            # and a captured pass writes the next prompt's to the same place.
            is_own = len(parts) == 1 and captured is None
            kept = each if is_own else [own.clone() for own in each]
            self._keep([part.request for part in parts], kept)
            if is_drafting:
                self._catch_up([p.request for p in parts if p.request.is_prefilling], leave=0)
        if captured is not None:
            return begun, TensorRows(logits) if begun else None
        return begun, self._logits(_joined(last_rows)) if begun else None

    @torch.inference_mode()
    def draft(self, requests: Sequence[Request], num_drafts: Sequence[int]) -> list[Drafts]:
        """Draft tokens that follow each sequence's last one.

        Args:
            requests: sequences whose known tokens, all but the last, are in the cache; one that is
                being replayed may lack more and then gets 0 drafts.
            num_drafts: for each; 0 only works off its hidden rows.
        """
        drafts = [Drafts() for _ in requests]
        rows, hidden = self._step_zero_rows(requests)
        draft_hidden, logits = self._draft_window(rows, hidden)  # a row for each sequence
        positions = [r.start + len(r.token_ids) - 1 for r in rows]
        wanted = [i for i, count in enumerate(num_drafts) if count > 0]
        row_of = {i: i for i in wanted}
        for depth in range(max(num_drafts)):
            for i in wanted:
                earlier = drafts[i].token_ids
                chosen = choose_token(requests[i], logits, row_of[i], Purpose.DRAFT, earlier)
                drafts[i].token_ids = [*earlier, chosen[0]]
                drafts[i].choices.append(chosen[1])
            wanted = [i for i in wanted if num_drafts[i] > depth + 1]
            if not wanted:
                break
            draft_hidden = draft_hidden[[row_of[i] for i in wanted]]  # [wanted, C]
            row_of = {i: row for row, i in enumerate(wanted)}
            rows = [
                SequenceRows(requests[i], drafts[i].token_ids[-1:], positions[i] + depth + 1)
                for i in wanted
            ]
            draft_hidden, logits = self._draft_window(rows, draft_hidden)
        return drafts

    @torch.inference_mode()
    def forward_windows(self, windows: Sequence[SequenceRows]) -> tuple[Tensor, TensorRows]:
        """Run one window of each sequence; states wait for `commit`.

        Returns:
            Hidden rows [T, C]; their logits.
        """
        if self._fused is not None:
            out = self._fused.window(windows)
            return out.hidden, TensorRows(out.logits, out.best)
        hidden = self.model(self._batch(windows, is_window=True), self.cache)
        return hidden, self._logits(hidden)

    @torch.inference_mode()
    def commit(
        self, windows: Sequence[SequenceRows], num_rows: Sequence[int], hidden: Tensor
    ) -> None:
        """Make the first rows of each window part of its sequence; the others never happened.

        Args:
            num_rows: rows to keep for each window, at least 1.
            hidden: what `forward_windows` returned.
        """
        slots = tuple(state_slot(window.request) for window in windows)
        (self._fused or self.cache).commit(slots, tuple(num_rows))
        first_row = 0
        for window, kept in zip(windows, num_rows, strict=True):
            window.request.num_computed += kept
            if self.keeps_hidden:
                self._keep([window.request], [hidden[first_row : first_row + kept]])
            first_row += len(window.token_ids)

    @torch.inference_mode()
    def launch_rounds(
        self,
        requests: Sequence[Request],
        num_drafts: int,
        max_rounds: int,
        end_token_ids: Sequence[int],
    ) -> LaunchedRounds | None:
        """Draft, verify and decide inside a kernel, round after round, if one can.

        On a GPU they are on their way when this returns, on a CPU they are over.

        Args:
            requests: sequences whose known tokens, all but the last, are in the cache.
            num_drafts: of each in a round, 0 for plain steps.
            max_rounds: rounds at most; the sequences have pages for all of them.
            end_token_ids: no round is taken after one that decided one of these.

        Returns:
            The rounds, to be read for `keep_rounds`; None if no kernel can.
        """
        if self._fused is None:
            return None
        windows = [SequenceRows(r, r.token_ids[-1:], r.num_computed) for r in requests]
        rows = self._fused.rounds_rows(windows, num_drafts)
        if rows is None:
            return None
        draft_rows = None
        if num_drafts:
            # A captured round has room for one window of rows.
            is_gpu = self.device.type == "cuda"
            draft_rows = self._step_zero_rows(requests, num_drafts + 1 if is_gpu else None)
        return self._fused.launch_rounds(
            rows,
            requests,
            draft_rows,
            num_drafts=num_drafts,
            max_rounds=max_rounds,
            end_token_ids=end_token_ids,
            wants_hidden=self.keeps_hidden,
        )

    @torch.inference_mode()
    def go_on(
        self, launched: LaunchedRounds, requests: Sequence[Request], max_rounds: int
    ) -> LaunchedRounds:
        """Launch further rounds of the same sequences behind some that nobody has read yet.

        Args:
            launched: rounds that `can_go_on`.
            max_rounds: as for `launch_rounds`, behind all tokens that `launched` may decide.
        """
        return launched.go_on([request.page_ids for request in requests], max_rounds)

    @torch.inference_mode()
    def keep_rounds(
        self, requests: Sequence[Request], out: RoundsOutput, num_drafts: int, *, is_last: bool
    ) -> None:
        """Note what rounds decided, once the requests have their tokens.

        Args:
            is_last: no call was launched behind this one, which has drafted from its states.
        """
        for decided in out.token_ids:
            for request, token_ids in zip(requests, decided, strict=True):
                request.num_computed += len(token_ids)
        if out.hidden is None or not self.keeps_hidden or (num_drafts and not is_last):
            return
        # An answer that ended on the way has fewer tokens, and no more drafts.
        parts = out.hidden.unbind(0 if num_drafts else 1)
        going = [n for n, request in enumerate(requests) if request.finish_reason is None]
        if num_drafts:
            counts = list(map(len, out.token_ids[-1]))
            for n in going:
                request = requests[n]
                self._pending[request.request_id].start = request.num_computed - counts[n]
            kept = [parts[n][: counts[n]] for n in going]
        else:
            kept = [parts[n] for n in going]
        self._keep([requests[n] for n in going], kept)

    @property
    def takes_penalties(self) -> bool:
        """Whether rounds that a kernel takes by itself may have penalties."""
        return self._fused is not None and self._fused.takes_penalties

    def captured_rounds(self) -> list[Any]:
        """`CapturedRounds` of this engine, for benchmarks; none on a CPU."""
        return [] if self._fused is None else self._fused.captured_rounds()

    def settle(self) -> None:
        """Take accepted rows into the cache's states now, which windows may put off."""
        if self._fused is not None:
            self._fused.settle()

    def _batch(self, rows: Sequence[SequenceRows], *, is_window: bool) -> ForwardBatch:
        return build_batch(rows, self.cache.page_size, self.device, is_window=is_window)

    def _logits(self, hidden: Tensor) -> TensorRows:
        # On a CPU each row alone, so that a row's logits do not depend on the batch.
        is_cpu = self.device.type == "cpu"
        return TensorRows(self.model.compute_logits(hidden, row_stable=is_cpu))

    def _draft_window(
        self, rows: Sequence[SequenceRows], hidden: Tensor
    ) -> tuple[Tensor, TensorRows]:
        """Run the draft layer on rows whose ids are the tokens after their positions.

        Returns:
            The state after each sequence's last row [N, C]; logits of those [N, W].
        """
        last_rows = [end - 1 for end in accumulate(len(r.token_ids) for r in rows)]
        if self._fused is not None:
            out = self._fused.mtp_step(rows, hidden)
            return out.hidden[last_rows], TensorRows(out.logits, out.best)
        batch = self._batch(rows, is_window=True)
        hidden = self.model.mtp_step(batch.token_ids, hidden, batch, self.cache)[last_rows]
        return hidden, self._logits(hidden)

    def _keep(self, requests: Sequence[Request], hidden: Sequence[Tensor]) -> None:
        """Hold on to new hidden rows of each sequence, [*, C], until drafts are wanted."""
        for request, rows in zip(requests, hidden, strict=True):
            self._pending[request.request_id].add(rows)
        # The token after the last row is not known yet.
        self._catch_up(self._behind(requests, MAX_PENDING_ROWS), leave=1)

    def _behind(self, requests: Sequence[Request], num_rows: int) -> list[Request]:
        """Those with more pending rows than this."""
        return [r for r in requests if self._pending[r.request_id].num_rows > num_rows]

    def _step_zero_rows(
        self, requests: Sequence[Request], most: int | None = None
    ) -> tuple[list[SequenceRows], Tensor]:
        """Draft-layer rows of the tokens decided since the last drafts.

        Args:
            most: rows of a sequence; None for as many as a window may have.
        """
        self._catch_up(self._behind(requests, most or self.max_window), leave=1)
        rows, parts = [], []
        for request in requests:
            pending = self._pending[request.request_id]
            start, count = pending.start, pending.num_rows
            parts.append(pending.take(count))
            rows.append(
                SequenceRows(request, request.token_ids[start + 1 : start + 1 + count], start)
            )
        return rows, torch.cat(parts)

    def _catch_up(self, requests: Sequence[Request], leave: int) -> None:
        """Feed pending rows to the draft layer, all but the last `leave` of each sequence.

        They go in the order of the sequences and in passes as large as those of prompts.
        """
        began = time.perf_counter()
        while requests := self._behind(requests, leave):
            room, rows, hidden = self.chunk_tokens, [], []
            for request in requests[: self.max_prefill_seqs]:
                pending = self._pending[request.request_id]
                start, count = pending.start, min(pending.num_rows - leave, room)
                if count:
                    token_ids = request.token_ids[start + 1 : start + 1 + count]
                    assert len(token_ids) == count, f"{len(token_ids)} known tokens of {count}"
                    rows.append(SequenceRows(request, token_ids, start))
                    hidden.append(pending.take(count))
                    room -= count
            batch = self._batch(rows, is_window=False)
            self.model.mtp_step(batch.token_ids, _joined(hidden), batch, self.cache)
        self.deferred_seconds += time.perf_counter() - began


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows one after the other, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
