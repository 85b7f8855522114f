"""Rounds of drafts, verification and decisions as one CUDA graph that is replayed.

The host reads the log once for several rounds, which are one call. A call may be launched behind
one that still runs: its inputs are where the last round left them, and only pages come from the
host. The order of the stream keeps the two apart on the device, so that only what the host itself
reads and writes is there twice.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from qnext.kernels.decode_step.captured_round import CapturedRounds
from qnext.kernels.decode_step.reference import (
    MAX_ROUNDS,
    NOT_NUMBERS,
    DecodeStep,
    LaunchedRounds,
    Rounds,
    RoundsOutput,
)
from qnext.kernels.decode_step.triton_fwd import (
    Prepared,
    SlotState,
    enter,
    land,
    prepare,
)
from qnext.kernels.sample_rows.fields import TokenCounts
from qnext.kernels.sample_rows.triton_penalties import clear_counts_triton, count_tokens_triton

# Numbers of sequences that graphs are captured for; others are filled up with padding, and those
# above the last to a multiple of it.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
TAKES_PENALTIES = True
MAX_GRAPHS = 24  # kept; each has buffers of its own


class DeviceTimes:
    """Where a call begins on the current stream, and where it ends once `end` is recorded."""

    def __init__(self) -> None:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.begin.record()

    @property
    def seconds(self) -> float:
        """From begin to end, both of which the device has passed."""
        return self.begin.elapsed_time(self.end) / 1e3


class GraphRounds(LaunchedRounds):
    """Rounds that a GPU takes by itself, queued on the current stream.

    What they decided is in host memory once `read` has waited for it; the states of the slots are
    known to the host from then on.

    Args:
        trunk: the model's layers and head.
        captured: the round; its buffers hold the inputs, or will once `before` is over.
        rounds: what was asked for.
        before: the call that these follow, if there is one.
        setup_seconds: spent on capturing the round.
    """

    def __init__(
        self,
        trunk: DecodeStep,
        captured: CapturedRounds,
        rounds: Rounds,
        *,
        before: "GraphRounds | None" = None,
        setup_seconds: float = 0.0,
    ) -> None:
        super().__init__(None)
        self.trunk, self.captured, self.rounds = trunk, captured, rounds
        self._num_rounds = min(rounds.max_rounds, MAX_ROUNDS)
        self._before = before
        self._half: int = 0 if before is None else 1 - before._half
        self._num_pages = list(map(len, rounds.rows.pages))
        self._setup_seconds = setup_seconds
        is_gpu = captured.buffers.log.device.type == "cuda"
        self._times = DeviceTimes() if is_gpu else None
        captured.replay(self.num_rounds)
        log = captured.host_log[self._half, : self.num_rounds]
        log.copy_(captured.buffers.log[: self.num_rounds], non_blocking=True)
        # A copy of its own: the call behind this one writes where it was.
        self._hidden = captured.hidden(self.num_rounds) if rounds.wants_hidden else None
        if self._times is not None:
            self._times.end.record()
        trunk.prepared.launched = self

    @property
    def num_rounds(self) -> int:
        """Rounds of this call."""
        return self._num_rounds

    @property
    def can_go_on(self) -> bool:
        """Whether the device is still where these rounds leave it."""
        return self.trunk.prepared.launched is self

    def go_on(self, pages: Sequence[Sequence[int]], max_rounds: int) -> "GraphRounds":
        """As `LaunchedRounds.go_on`; the call before these has been read."""
        if not self.can_go_on:
            raise RuntimeError("others have written where these rounds left off")
        is_first = self._before is None or self._before._output is not None
        assert is_first, "two calls are on their way, the host has room for no third"
        width = self.captured.sent.pages.shape[1]
        grown = [
            (n * width + i, own[i])
            for n, (own, known) in enumerate(zip(pages, self._num_pages, strict=True))
            for i in range(known, len(own))
        ]
        self.captured.grown.send(1 - self._half, grown)
        rows = replace(self.rounds.rows, pages=pages)
        rounds = replace(self.rounds, rows=rows, draft_rows=None, max_rounds=max_rounds)
        return GraphRounds(self.trunk, self.captured, rounds, before=self)

    def read(self) -> RoundsOutput:
        """As `LaunchedRounds.read`; calls are read in the order of their launch."""
        if self._output is None:
            try:
                if self._before is not None:
                    self._before.read()
                    self._before = None
                self.wait()
                self._output = self._commit()
            except ValueError:
                self.trunk.prepared.launched = None  # nothing goes on from what is no text
                raise
        return self._output

    def wait(self) -> None:
        """Until the device has taken the rounds."""
        if self._times is not None:
            self._times.end.synchronize()

    def drop(self) -> None:
        """As `LaunchedRounds.drop`."""
        self.wait()
        if self.can_go_on:
            self.trunk.prepared.launched = None

    def _commit(self) -> RoundsOutput:
        slots = self.rounds.rows.state_slots
        num_seqs = len(slots)
        log = self.captured.host_log[self._half, : self.num_rounds, :num_seqs].tolist()
        counts = [[own[0] for own in row] for row in log]
        if min(map(min, counts)) < 0:
            raise ValueError(NOT_NUMBERS)
        tokens = [[own[1 : 1 + own[0]] for own in row] for row in log]
        known = self.trunk.prepared.slots
        for slot, *own in zip(slots, *counts, strict=True):
            state: SlotState = known[slot]
            assert state.num_tokens is not None, f"slot {slot} was not entered"
            state.num_tokens += sum(own)
            state.num_pending = own[-1] - 1
            if state.num_counted is not None:
                state.num_counted += sum(own)
        hidden = self._hidden
        if hidden is not None:
            hidden = hidden[:num_seqs] if self.rounds.num_drafts else hidden[:, :num_seqs]
        seconds = None if self._times is None else self._times.seconds
        return RoundsOutput(tokens, hidden, self._setup_seconds, seconds)


def launch_rounds(trunk: DecodeStep, draft: DecodeStep | None, rounds: Rounds) -> GraphRounds:
    """Queue rounds on the current stream; those launched before are read first.

    Args:
        trunk: the model's layers and head.
        draft: its MTP layer, where num_drafts > 0.

    Raises:
        ValueError: logits of the rounds before are not numbers.
    """
    prepared: Prepared = trunk.prepared or prepare(trunk)
    land(prepared)
    enter(trunk, rounds.rows)
    began = time.perf_counter()
    captured = _captured(trunk, draft, rounds)
    setup_seconds = time.perf_counter() - began
    pending = [prepared.slots[slot].num_pending for slot in rounds.rows.state_slots]
    captured.sent.send(rounds, captured.window, pending)
    if rounds.penalties:
        _count_seen(prepared, rounds)
    if rounds.draft_rows is not None:
        _send_draft_rows(captured, rounds)
    return GraphRounds(trunk, captured, rounds, setup_seconds=setup_seconds)


def decode_rounds(trunk: DecodeStep, draft: DecodeStep | None, rounds: Rounds) -> RoundsOutput:
    """As `rounds.decode_rounds`; rounds after the end of a text are taken and their tokens dropped.

    Raises:
        ValueError: logits are not numbers.
    """
    return launch_rounds(trunk, draft, rounds).read()


def _captured(trunk: DecodeStep, draft: DecodeStep | None, rounds: Rounds) -> CapturedRounds:
    """The round of this shape, captured when it is first needed."""
    prepared: Prepared = trunk.prepared
    count = len(rounds.cuts)
    num_seqs = next((n for n in SIZES if n >= count), -(-count // SIZES[-1]) * SIZES[-1])
    has_filters = any(
        cuts is not None and (cuts.top_k > 0 or cuts.top_p < 1 or cuts.min_p > 0)
        for cuts in rounds.cuts
    )
    has_penalties = any(penalty is not None for penalty in rounds.penalties)
    key = (num_seqs, rounds.num_drafts, has_filters, has_penalties)
    if key not in prepared.graphs:
        if has_penalties and prepared.counts is None:
            vocab_size = trunk.parameters[trunk.head].shape[0]
            num_slots = trunk.states[0].shape[1]
            prepared.counts = TokenCounts.allocate(num_slots, vocab_size, trunk.keys.device)
        draft_tensors = None
        if rounds.num_drafts:
            assert draft is not None, "drafts without a draft layer"
            draft_tensors = (draft.prepared or prepare(draft)).tensors
        positions = prepared.tensors.rotation[0].shape[0]
        captured = CapturedRounds(
            prepared.tensors,
            draft_tensors,
            key[:2],
            has_filters=has_filters,
            max_pages=-(-positions // trunk.page_size),
            counts=prepared.counts if has_penalties else None,
        )
        captured.capture(prepared)
        prepared.graphs[key] = captured
        if len(prepared.graphs) > MAX_GRAPHS:
            del prepared.graphs[next(iter(prepared.graphs))]  # the one that was captured first
    found: CapturedRounds = prepared.graphs[key]
    return found


def _count_seen(prepared: Prepared, rounds: Rounds) -> None:
    """Count what sequences with penalties have seen, where that is not known already."""
    counts = prepared.counts
    assert counts is not None, "penalties without counts"
    for slot, penalty in zip(rounds.rows.state_slots, rounds.penalties, strict=True):
        if penalty is None or prepared.slots[slot].num_counted == len(penalty.output_ids):
            continue
        device = counts.num_ids.device
        slots = torch.tensor([slot], dtype=torch.int32, device=device)
        clear_counts_triton(counts, slots)
        for ids, is_prompt in ((penalty.prompt_ids, True), (penalty.output_ids, False)):
            tokens = torch.tensor([list(ids)], dtype=torch.int64).to(device)
            count_tokens_triton(tokens, counts, slots, is_prompt=is_prompt)
        prepared.slots[slot].num_counted = len(penalty.output_ids)


def _send_draft_rows(captured: CapturedRounds, rounds: Rounds) -> None:
    """Write the rows that the draft layer has not seen, at most a window of each sequence."""
    b, rows, window = captured.buffers, rounds.draft_rows, captured.window
    assert rows is not None and rows.hidden is not None, "a draft without states"
    num_seqs, device = len(rows.query_lens), b.lens.device
    own = [n * window + i for n, length in enumerate(rows.query_lens) for i in range(length)]
    ids = torch.zeros(captured.num_seqs * window, dtype=torch.int64)
    ids[own] = torch.tensor(rows.token_ids)
    b.draft_ids.copy_(ids.view(captured.num_seqs, window).to(device))
    b.draft_states[torch.tensor(own, device=device)] = rows.hidden
    lists = torch.zeros(2, captured.num_seqs, dtype=torch.int32)
    lists[:, :num_seqs] = torch.tensor([rows.query_lens, rows.context_lens])
    b.draft_lens.copy_(lists[0].to(device))
    b.draft_contexts.copy_(lists[1].to(device))
    ends = torch.zeros(captured.num_seqs, dtype=torch.int64)
    ends[:num_seqs] = torch.arange(num_seqs) * window + lists[0, :num_seqs] - 1
    b.draft_ends.copy_(ends.to(device))
