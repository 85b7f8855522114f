"""The loop that serves requests: schedule a step, run it, commit what it decided."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

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
from qnext.kernels.decode_step.reference import MAX_ROUNDS, LaunchedRounds
from qnext.model.qwen3_next import Qwen3Next

# How long a kernel may go on by itself. Text comes in pieces of this length, which nobody notices.
AHEAD_SECONDS = 0.004
AHEAD_SECONDS_GPU = 0.008  # longer than the host's part of a call, which runs at the same time


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


@dataclass
class Flight:
    """A call of several rounds that was launched and whose tokens the requests lack.

    While one is in the air, the slots and pages of its requests are given to no others.
    """

    launched: LaunchedRounds
    requests: tuple[Request, ...]
    num_drafts: int
    start: float  # of its time on the device
    deferred_seconds: float  # the runner's at that time


class Engine:
    """Serves requests with one model.

    On a GPU a call is launched before the one ahead of it is read, as long as the same sequences
    go on: the device works while the host appends tokens.

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
        # Events, captures and Triton's launches go to the current device, whatever tensors say.
        is_gpu = model.device.type == "cuda"
        self._on_device: AbstractContextManager[Any] = (
            torch.cuda.device(model.device) if is_gpu else nullcontext()
        )
        self._step_seconds: dict[int, float] = {}  # of the last step, by its number of drafts
        self._flights: list[Flight] = []  # at most two, in the order of their launch

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
            self._drop_flights()
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
        with self._on_device:
            return self._step()

    def _step(self) -> list[Request]:
        if self._flights and all(r.finish_reason for r in self._flights[0].requests):
            self._drop_flights()
        # Nothing is scheduled over a flight: it may hold what its requests have given back.
        step = None if self._flights else self.scheduler.schedule()
        if step is None and not self._flights:
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

    def _decode(self, step: DecodeStep | None) -> list[Request]:
        """Land the flight in the air, or start one; windows of one step where no kernel can."""
        if step is not None:
            num_drafts = self.speculation.choose(len(step.requests))
            flight = self._take_off(step.requests, num_drafts)
            if flight is None:
                return self._run_windows(step.requests, num_drafts)
            self._flights.append(flight)
        return self._land()

    def _run_windows(self, requests: tuple[Request, ...], num_drafts: int) -> list[Request]:
        """One window of each sequence, decided in Python."""
        deferred_seconds = self.runner.deferred_seconds
        start = time.perf_counter()
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
                self._count(request, outcomes[-1][0], [verified.num_accepted])
                changed.append(request)
            first_row += num_rows
        self.runner.commit(windows, kept_rows, hidden)
        is_whole = len(outcomes) == len(requests)
        deferred_seconds = self.runner.deferred_seconds - deferred_seconds
        seconds = time.perf_counter() - start - deferred_seconds
        known = outcomes if is_whole else None
        self._note_steps(1, seconds, deferred_seconds, num_drafts, len(requests), known)
        return changed

    def _take_off(self, requests: tuple[Request, ...], num_drafts: int) -> Flight | None:
        """Launch rounds of sequences that stand still; None if no kernel can."""
        start, deferred_seconds = time.perf_counter(), self.runner.deferred_seconds
        max_rounds, end_ids = self._rounds_ahead(requests, num_drafts)
        if not max_rounds:
            return None
        launched = self.runner.launch_rounds(requests, num_drafts, max_rounds, end_ids)
        if launched is None:
            return None
        return Flight(launched, requests, num_drafts, start, deferred_seconds)

    def _follow(self, flight: Flight) -> Flight | None:
        """Launch the call behind a flight in the air, if the same sequences go on."""
        requests, num_drafts, speculation = flight.requests, flight.num_drafts, self.speculation
        if not flight.launched.can_go_on or tuple(self.scheduler.running) != requests:
            return None
        # A trial is timed by itself, and a newcomer shall not wait for one call more.
        if speculation.is_trying or self.scheduler.can_admit:
            return None
        if speculation.choose(len(requests)) != num_drafts:
            return None
        num_in_air = flight.launched.num_rounds * (num_drafts + 1)
        max_rounds, _ = self._rounds_ahead(requests, num_drafts, num_in_air)
        if not max_rounds:
            return None
        launched = self.runner.go_on(flight.launched, requests, max_rounds)
        return Flight(launched, requests, num_drafts, 0.0, 0.0)

    def _land(self) -> list[Request]:
        """Launch what follows a flight, then wait for it; returns the requests that got tokens."""
        flight = self._flights[0]
        # There are two where somebody broke off the wait for the first.
        if len(self._flights) == 1 and (later := self._follow(flight)):
            self._flights.append(later)
        try:
            rounds = flight.launched.read()
        except ValueError:
            self._drop_flights()
            raise
        del self._flights[0]
        landed, deferred_seconds = time.perf_counter(), self.runner.deferred_seconds
        changed = [r for r in flight.requests if r.finish_reason is None]
        outcomes = self._append_rounds(flight.requests, rounds.token_ids, flight.num_drafts)
        seconds = rounds.device_seconds
        deferred_seconds -= flight.deferred_seconds
        if seconds is None:
            # A setup comes once, and says nothing of a step.
            seconds = landed - flight.start - rounds.setup_seconds - deferred_seconds
        num_rounds, num_seqs = len(rounds.token_ids), len(flight.requests)
        self._note_steps(
            num_rounds,
            seconds / num_rounds,
            deferred_seconds,
            flight.num_drafts,
            num_seqs,
            outcomes,
        )
        for later in self._flights:
            later.start, later.deferred_seconds = landed, self.runner.deferred_seconds
        is_last = not self._flights
        self.runner.keep_rounds(flight.requests, rounds, flight.num_drafts, is_last=is_last)
        self.metrics.num_decode_steps += num_rounds - 1  # `step` counts one
        return changed

    def _drop_flights(self) -> None:
        """Wait for flights that nobody will read, and let go of them."""
        for flight in self._flights:
            flight.launched.drop()
        self._flights.clear()

    def _rounds_ahead(
        self, requests: tuple[Request, ...], num_drafts: int, num_in_air: int = 0
    ) -> tuple[int, tuple[int, ...]]:
        """Rounds that a kernel may decide by itself, 0 if none; tokens that end them.

        Args:
            num_in_air: tokens that each request may get before them.
        """
        seconds = self._step_seconds.get(num_drafts)
        is_timed = seconds is not None and not self.speculation.is_trying
        ahead = AHEAD_SECONDS_GPU if self.runner.device.type == "cuda" else AHEAD_SECONDS
        rounds = min(max(1, int(ahead / seconds)), MAX_ROUNDS) if is_timed and seconds else 1
        window, page_size = num_drafts + 1, self.options.page_size
        end_ids: set[int] = set()
        for request in requests:
            params = request.params
            if params.logprobs is not None or request.is_replaying:
                return 0, ()
            if params.has_penalties and not self.runner.takes_penalties:
                return 0, ()
            rounds = min(rounds, (request.num_remaining - num_in_air) // window)
            end_ids |= request.ending_ids
        if rounds <= 0:
            return 0, ()
        for request in requests:
            # The last token decided is not forwarded, so it needs no place yet.
            known = request.num_tokens + num_in_air - 1
            if known + rounds * window > len(request.page_ids) * page_size:
                self.scheduler.grow_ahead(request, known + rounds * window)
                rounds = min(rounds, (len(request.page_ids) * page_size - known) // window)
        return max(0, rounds), tuple(i for i in end_ids if i < 2**31)

    def _append_rounds(
        self, requests: tuple[Request, ...], rounds: list[list[list[int]]], num_drafts: int
    ) -> list[tuple[int, int]]:
        """Append tokens of several rounds; those after an answer's end are dropped.

        Returns:
            Drafts of each window up to an answer's end, and how many stood.
        """
        now = time.monotonic()
        outcomes = []
        for request, *windows in zip(requests, *rounds, strict=True):
            if request.finish_reason is not None:
                continue
            num_before = request.num_tokens
            num_windows = request.append_windows(windows, now)
            self.metrics.num_generated_tokens += request.num_tokens - num_before
            accepted = [len(window) - 1 for window in windows[:num_windows]]
            self._count(request, num_drafts, accepted)
            outcomes += [(num_drafts, count) for count in accepted]
        return outcomes

    def _note_steps(
        self,
        num_steps: int,
        seconds: float,
        deferred_seconds: float,
        num_drafts: int,
        num_seqs: int,
        outcomes: list[tuple[int, int]] | None,
    ) -> None:
        """Learn from steps of `seconds` each; outcomes: None if they were not typical."""
        if outcomes is not None:
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

    def _count(self, request: Request, num_drafts: int, num_accepted: list[int]) -> None:
        """Count windows of a request. num_accepted: drafts of each that stood"""
        self.metrics.record_windows(num_drafts, num_accepted)
        request.metrics.num_windows += len(num_accepted)
        request.metrics.num_draft_tokens += num_drafts * len(num_accepted)
        request.metrics.num_accepted_tokens += sum(num_accepted)
