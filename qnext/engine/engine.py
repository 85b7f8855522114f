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


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine, all resolved."""

    max_num_seqs: int
    max_model_len: int  # tokens, prompt and answer together
    num_pages: int
    page_size: int
    prefill_chunk_tokens: int
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
            )
        )
        cache = HybridCache(
            model.config,
            has_mtp=options.max_drafts > 0,
            num_pages=options.num_pages,
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
            max_positions=options.max_model_len + options.max_drafts + 1,
            keeps_hidden=options.max_drafts > 0,
        )
        self.speculation: AutoSpeculation | FixedSpeculation
        if options.is_auto and options.max_drafts:
            self.speculation = AutoSpeculation(options.max_drafts)
        else:
            self.speculation = FixedSpeculation(options.max_drafts)
        self.metrics = EngineMetrics()
        self._step_seconds = 0.0  # of the last step

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
        """Run one prompt chunk, or one window of every running sequence.

        Returns:
            The requests that got tokens, some of them finished.
        """
        step = self.scheduler.schedule()
        if step is None:
            return []
        start = time.perf_counter()
        if isinstance(step, PrefillStep):
            changed = self._prefill(step)
            self.metrics.num_prefill_tokens += step.end - step.start
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
        request = step.request
        if step.start == 0:
            self.runner.start(request)
        is_drafting = self.speculation.is_drafting
        rows = self.runner.prefill(request, step.end, is_drafting=is_drafting)
        if rows is None:
            return []
        self._append(request, verify_window(request, Drafts(), rows, 0), rows, 0)
        return [request]

    def _decode(self, step: DecodeStep) -> list[Request]:
        requests = step.requests
        num_drafts = self.speculation.choose(len(requests))
        deferred_seconds = self.runner.deferred_seconds
        start = time.perf_counter()
        drafts = self._draft(requests, num_drafts)
        windows = [self._window(r, d) for r, d in zip(requests, drafts, strict=True)]
        max_steps, end_ids = self._steps_ahead(requests, num_drafts)
        hidden, rows, num_steps = self.runner.forward_windows(windows, max_steps, end_ids)
        if num_steps > 1:
            self._take_steps(requests, rows, num_steps)
            self.runner.commit(windows, [1] * len(windows), hidden, num_steps)
            seconds = (time.perf_counter() - start) / num_steps
            self.speculation.record(len(requests), 0, seconds, [(0, 0)] * len(requests))
            self._count_steps(0, seconds, num_steps)
            self.metrics.num_decode_steps += num_steps - 1  # `step` counts one
            return list(requests)
        first_row, kept_rows, changed = 0, [], []
        outcomes: list[tuple[int, int]] = []  # drafts of each sequence, and how many stood
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
        deferred_seconds = self.runner.deferred_seconds - deferred_seconds
        seconds = time.perf_counter() - start - deferred_seconds
        if len(outcomes) == len(requests):
            self.speculation.record(len(requests), num_drafts, seconds, outcomes, deferred_seconds)
        self._count_steps(num_drafts, seconds, 1)
        return changed

    def _steps_ahead(
        self, requests: tuple[Request, ...], num_drafts: int
    ) -> tuple[int, tuple[int, ...]]:
        """Steps that may be taken without a look at their tokens, and the tokens that end them."""
        if num_drafts or not self._step_seconds:
            return 1, ()
        steps = int(AHEAD_SECONDS / self._step_seconds)
        page_size = self.options.page_size
        end_ids: set[int] = set()
        for request in requests:
            params = request.params
            if not params.is_greedy or params.has_penalties or params.logprobs is not None:
                return 1, ()
            if request.is_replaying:
                return 1, ()
            # The last of these tokens is not forwarded, so it needs no place yet.
            room = len(request.page_ids) * page_size - request.num_tokens + 1
            steps = min(steps, request.num_remaining, room)
            end_ids |= request.end_token_ids
            end_ids.update(params.stop_token_ids or ())
        return max(1, steps), tuple(end_ids)

    def _take_steps(self, requests: tuple[Request, ...], rows: TensorRows, num_steps: int) -> None:
        """Append the best tokens of several steps; those after an answer's end are dropped."""
        for step in range(num_steps):
            for idx, request in enumerate(requests):
                if request.finish_reason is None:
                    token_id = rows.argmax(step * len(requests) + idx)
                    self._append(request, VerifiedWindow([token_id], 0), rows, 0)
                    self._count(request, 0, 0)

    def _count_steps(self, num_drafts: int, seconds: float, num_steps: int) -> None:
        """Note steps and how long one of them took."""
        self._step_seconds = seconds
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
        self, request: Request, verified: VerifiedWindow, rows: TensorRows, first_row: int
    ) -> None:
        now = time.monotonic()
        for depth, token_id in enumerate(verified.token_ids):
            if request.params.logprobs is not None:
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
