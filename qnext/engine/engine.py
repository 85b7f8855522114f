"""The loop that serves requests: schedule a step, run it, commit what it decided."""

import time
from dataclasses import dataclass

from qnext.cache.hybrid import HybridCache
from qnext.engine.inputs import SequenceRows
from qnext.engine.metrics import EngineMetrics
from qnext.engine.request import Request
from qnext.engine.runner import ModelRunner, TensorRows
from qnext.engine.sampler import raw_logprobs
from qnext.engine.scheduler import DecodeStep, PrefillStep, Scheduler, SchedulerLimits
from qnext.engine.speculative import (
    AutoSpeculation,
    Drafts,
    FixedSpeculation,
    VerifiedWindow,
    verify_window,
)
from qnext.model.qwen3_next import Qwen3Next

# How long a kernel may go on by itself. Text comes in pieces of this length, which nobody notices.
AHEAD_SECONDS = 0.004
AHEAD_SECONDS_GPU = 0.012  # the host's part of a call is as long as a step of a small batch there


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine, all resolved."""

    max_num_seqs: int
    max_model_len: int  # tokens, prompt and answer together
    num_pages: int
    page_size: int
    prefill_chunk_tokens: int
    max_prefill_seqs: int  # prompts read in one pass; with 1 a prompt's bits depend on it alone
    max_drafts: int  # 0 never drafts
    is_auto: bool  # the number of drafts is chosen while running, up to max_drafts


class Engine:
    """Serves requests with one model.

    Args:
        model: with an MTP head if options.max_drafts > 0.
        options: sizes.
    """

    def __init__(self, model: Qwen3Next, options: EngineOptions) -> None:
        assert model.has_mtp or not options.max_drafts, f"{options.max_drafts} drafts, no MTP head"
        self.options = options
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=options.max_num_seqs,
                num_pages=options.num_pages,
                page_size=options.page_size,
                prefill_chunk_tokens=options.prefill_chunk_tokens,
                max_drafts=options.max_drafts,
                max_prefill_seqs=options.max_prefill_seqs,
            )
        )
        cache = HybridCache(
            model.config,
            has_mtp=options.max_drafts > 0,
            num_pages=options.num_pages + 1,  # what fills up a pass is written to the last
            page_size=options.page_size,
            num_state_slots=options.max_num_seqs,
            max_window=options.max_drafts + 1,
            dtype=model.dtype,
            device=model.device,
        )
        self.runner = ModelRunner(
            model,
            cache,
            chunk_tokens=options.prefill_chunk_tokens,
            max_prefill_seqs=options.max_prefill_seqs,
            max_positions=options.max_model_len + options.max_drafts + 1,
            keeps_hidden=options.max_drafts > 0,
        )
        self.speculation: AutoSpeculation | FixedSpeculation
        if options.is_auto and options.max_drafts:
            self.speculation = AutoSpeculation(options.max_drafts)
        else:
            self.speculation = FixedSpeculation(options.max_drafts)
        self.metrics = EngineMetrics()
        self._step_seconds: dict[int, float] = {}  # of the last step, by its number of drafts

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Accept a request; it starts when a slot and pages are free.

        Raises:
            ValueError: the cache could not hold it even alone.
        """
        if not self.scheduler.has_work:
            self.runner.read_weights()
        self.scheduler.add(request)

    def abort(self, requests: list[Request]) -> None:
        """End unfinished requests now and free what they hold."""
        for request in requests:
            if request.finish_reason is None:
                request.finish("abort", time.monotonic())
            self.runner.release(request)
        self.scheduler.release(requests)

    def step(self) -> list[Request]:
        """Run some tokens of prompts, or one window of every running sequence.

        Returns:
            The requests that got tokens, some of them finished.
        """
        step = self.scheduler.schedule()
        if step is None:
            return []
        start = time.perf_counter()
        if isinstance(step, PrefillStep):
            changed = self._prefill(step)
            self.metrics.num_prefill_tokens += step.num_tokens
            self.metrics.prefill_seconds += time.perf_counter() - start
        else:
            changed = self._decode(step)
            self.metrics.num_decode_steps += 1
            self.metrics.decode_seconds += time.perf_counter() - start
        finished = [request for request in changed if request.finish_reason is not None]
        for request in finished:
            self.runner.release(request)
        self.scheduler.release(finished)
        self.metrics.num_preemptions = self.scheduler.num_preemptions
        return changed

    def _prefill(self, step: PrefillStep) -> list[Request]:
        self.runner.start([part.request for part in step.parts if part.start == 0])
        begun, rows = self.runner.prefill(step.parts, is_drafting=self.speculation.is_drafting)
        if rows is None:
            return []
        for row_idx, request in enumerate(begun):
            self._append(request, verify_window(request, Drafts(), rows, row_idx), rows, row_idx)
        return begun

    def _decode(self, step: DecodeStep) -> list[Request]:
        requests = step.requests
        num_drafts = self.speculation.choose(len(requests))
        deferred_seconds = self.runner.deferred_seconds
        start = time.perf_counter()
        max_rounds, end_ids = self._rounds_ahead(requests, num_drafts)
        if max_rounds:
            rounds = self.runner.take_rounds(requests, num_drafts, max_rounds, end_ids)
            if rounds is not None:
                outcomes = self._append_rounds(requests, rounds.token_ids, num_drafts)
                self.runner.keep_rounds(requests, rounds, num_drafts)
                num_rounds = len(rounds.token_ids)
                start += rounds.setup_seconds  # comes once, and says nothing of a step
                self._note_steps(start, deferred_seconds, num_drafts, outcomes, num_rounds)
                self.metrics.num_decode_steps += num_rounds - 1  # `step` counts one
                return list(requests)
        drafts = self._draft(requests, num_drafts)
        windows = [self._window(r, d) for r, d in zip(requests, drafts, strict=True)]
        hidden, rows = self.runner.forward_windows(windows)
        first_row, kept_rows, changed = 0, [], []
        outcomes = []
        for window, sequence_drafts in zip(windows, drafts, strict=True):
            request, num_rows = window.request, len(window.token_ids)
            if request.is_replaying:
                kept_rows.append(num_rows)
            else:
                verified = verify_window(request, sequence_drafts, rows, first_row)
                kept_rows.append(verified.num_accepted + 1)
                outcomes.append((len(sequence_drafts.token_ids), verified.num_accepted))
                self._append(request, verified, rows, first_row)
                self._count(request, *outcomes[-1])
                changed.append(request)
            first_row += num_rows
        self.runner.commit(windows, kept_rows, hidden)
        is_whole = len(outcomes) == len(requests)
        self._note_steps(start, deferred_seconds, num_drafts, outcomes if is_whole else None, 1)
        return changed

    def _rounds_ahead(
        self, requests: tuple[Request, ...], num_drafts: int
    ) -> tuple[int, tuple[int, ...]]:
        """Rounds that a kernel may decide by itself, 0 if none; tokens that end them."""
        seconds = self._step_seconds.get(num_drafts)
        is_timed = seconds is not None and not self.speculation.is_trying
        ahead = AHEAD_SECONDS_GPU if self.runner.device.type == "cuda" else AHEAD_SECONDS
        rounds = max(1, int(ahead / seconds)) if is_timed and seconds else 1
        window, page_size = num_drafts + 1, self.options.page_size
        end_ids: set[int] = set()
        for request in requests:
            params = request.params
            if params.has_penalties or params.logprobs is not None or request.is_replaying:
                return 0, ()
            # The last token decided is not forwarded, so it needs no place yet.
            room = len(request.page_ids) * page_size - request.num_tokens + 1
            rounds = min(rounds, request.num_remaining // window, room // window)
            end_ids |= request.end_token_ids
            end_ids.update(i for i in params.stop_token_ids or () if i < 2**31)
        return rounds, tuple(end_ids)

    def _append_rounds(
        self,
        requests: tuple[Request, ...],
        rounds: list[list[list[int]]],
        num_drafts: int,
    ) -> list[tuple[int, int]]:
        """Append tokens of several rounds; those after an answer's end are dropped.

        Returns:
            For each window its drafts and how many stood.
        """
        outcomes = []
        for decided in rounds:
            for request, token_ids in zip(requests, decided, strict=True):
                num_accepted = len(token_ids) - 1
                outcomes.append((num_drafts, num_accepted))
                if request.finish_reason is None:
                    self._append(request, VerifiedWindow(token_ids, num_accepted), None, 0)
                    self._count(request, num_drafts, num_accepted)
        return outcomes

    def _note_steps(
        self,
        start: float,
        deferred_before: float,
        num_drafts: int,
        outcomes: list[tuple[int, int]] | None,
        num_steps: int,
    ) -> None:
        """Learn from steps that began at `start`; outcomes: None if they were not typical."""
        deferred_seconds = self.runner.deferred_seconds - deferred_before
        seconds = (time.perf_counter() - start - deferred_seconds) / num_steps
        if outcomes is not None:
            num_seqs = len(outcomes) // num_steps
            self.speculation.record(num_seqs, num_drafts, seconds, outcomes, deferred_seconds)
        self._step_seconds[num_drafts] = seconds
        steps = self.metrics.num_steps_by_speculation
        steps[num_drafts] = steps.get(num_drafts, 0) + num_steps

    def _draft(self, requests: tuple[Request, ...], num_drafts: int) -> list[Drafts]:
        """Drafts of each sequence: none for one that is replayed or about to end."""
        drafts = {request: Drafts() for request in requests}
        if num_drafts == 0:
            return list(drafts.values())
        # A window yields one token more than its drafts, and no draft may go beyond the end.
        counts = {
            r: 0 if r.is_replaying else min(num_drafts, r.num_remaining - 1) for r in requests
        }
        active = [r for r in requests if counts[r] or r.is_replaying]
        if active:
            found = self.runner.draft(active, [counts[request] for request in active])
            drafts.update(zip(active, found, strict=True))
        return list(drafts.values())

    def _window(self, request: Request, drafts: Drafts) -> SequenceRows:
        """The next known token and its drafts, or known tokens of a preempted sequence."""
        start = request.num_computed
        if request.is_replaying:
            end = min(start + self.runner.max_window, request.num_tokens - 1)
            return SequenceRows(request, request.token_ids[start:end], start)
        return SequenceRows(request, [request.token_ids[-1], *drafts.token_ids], start)

    def _append(
        self, request: Request, verified: VerifiedWindow, rows: TensorRows | None, first_row: int
    ) -> None:
        """Append decided tokens. rows: their logits, where log-probabilities are asked for"""
        now = time.monotonic()
        for depth, token_id in enumerate(verified.token_ids):
            if request.params.logprobs is not None:
                assert rows is not None, "log-probabilities without logits"
                found = raw_logprobs(rows.row(first_row + depth), token_id, request.params.logprobs)
                request.logprobs.append(found)
                request.cumulative_logprob += found[token_id].logprob
            request.append_token(token_id, depth < verified.num_accepted, now)
            self.metrics.num_generated_tokens += 1
            if request.finish_reason is not None:
                return

    def _count(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        self.metrics.record_window(num_drafts, num_accepted)
        request.metrics.num_windows += 1
        request.metrics.num_draft_tokens += num_drafts
        request.metrics.num_accepted_tokens += num_accepted
