"""Verification of drafted tokens without changing what is generated, and the choice of how many.

Greedy: a draft stands if it is the argmax. Sampled: see `kernels/decide_token/reference.py`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qnext.engine.request import Request
from qnext.engine.sampler import LogitsRow, cuts_of, draws_at, penalized_logits
from qnext.kernels import dispatch
from qnext.kernels.decide_token.reference import Choice
from qnext.kernels.decode_step.reference import NOT_NUMBERS
from qnext.runtime.random_bits import Purpose


class LogitsRows(Protocol):
    """Rows of raw logits, kept where they were computed until one is needed."""

    def argmax(self, row_idx: int) -> int:
        """Lowest id of the largest logit."""
        ...

    def row(self, row_idx: int) -> LogitsRow:
        """The row itself. [W], fp32"""
        ...


@dataclass
class Drafts:
    """Tokens drafted for one sequence, and how they were drawn."""

    token_ids: list[int] = field(default_factory=list)
    choices: list[Choice | None] = field(default_factory=list)  # None when greedy


@dataclass(frozen=True)
class VerifiedWindow:
    """Tokens decided by one window: the accepted drafts, then one of the main model's own."""

    token_ids: list[int]
    num_accepted: int


def choose_token(
    request: Request,
    rows: LogitsRows,
    row_idx: int,
    purpose: Purpose,
    window_ids: Sequence[int],
    draft: Choice | None = None,
) -> tuple[int, Choice | None]:
    """Decide one token from one row.

    Args:
        purpose: TARGET or DRAFT; names the random number.
        window_ids: drafts between the request's last token and the one decided here.
        draft: a sampled draft to test; the token is its own if it stands.

    Returns:
        The token; how it was drawn, None when greedy.

    Raises:
        ValueError: the logits are not numbers.
    """
    params = request.params
    if params.is_greedy and not params.has_penalties:
        return rows.argmax(row_idx), None
    logits = penalized_logits(
        rows.row(row_idx), params, request.prompt_id_set, request.output_counts, window_ids
    )
    cuts = cuts_of(params)
    if cuts is None:
        return int(logits.argmax()), None
    position = request.num_tokens + len(window_ids)
    draws = draws_at(request.seed, position, purpose)
    choice: Choice = dispatch.decide_token(logits, cuts, draws, draft)
    if choice.token_id < 0:
        raise ValueError(NOT_NUMBERS)
    return choice.token_id, choice


def verify_window(
    request: Request, drafts: Drafts, rows: LogitsRows, first_row_idx: int
) -> VerifiedWindow:
    """Accept drafts from the left until one fails; always decides one token more.

    Args:
        rows: logits of the main model; row first_row_idx + j follows the j-th draft.
    """
    decided: list[int] = []
    pairs = zip(drafts.token_ids, drafts.choices, strict=True)
    for depth, (draft_id, choice) in enumerate(pairs):
        row_idx = first_row_idx + depth
        token_id, _ = choose_token(request, rows, row_idx, Purpose.TARGET, decided, choice)
        decided.append(token_id)
        if token_id != draft_id:
            return VerifiedWindow(decided, depth)
    row_idx = first_row_idx + len(decided)
    token_id, _ = choose_token(request, rows, row_idx, Purpose.TARGET, decided)
    return VerifiedWindow([*decided, token_id], len(decided))


class FixedSpeculation:
    """Always the same number of drafts."""

    def __init__(self, num_drafts: int) -> None:
        self.max_drafts = num_drafts
        self.is_drafting = num_drafts > 0

    is_trying = False

    def choose(self, num_seqs: int) -> int:
        """Drafts for each sequence in the next step."""
        return self.max_drafts

    def record(
        self,
        num_seqs: int,
        num_drafts: int,
        seconds: float,
        accepted: Sequence[tuple[int, int]],
        deferred_seconds: float = 0.0,
    ) -> None:
        """Nothing to learn."""


class AutoSpeculation:
    """Picks the number of drafts with the most expected tokens per second, from what it measured.

    A step with k drafts yields 1 + a_1 + a_1 a_2 + ... tokens, where a_j is how often the j-th
    draft is accepted once those before it were, and takes a time that is measured for each k and
    each class of batch sizes. One count apart from the best is tried now and then, so seldom that
    the trials cost at most `PROBE_BUDGET` of the time.
    """

    PROBE_BUDGET = 0.005  # share of the time that trials may cost
    MIN_PROBE_INTERVAL = 48  # calls, of one or several rounds, between trials
    MAX_PROBE_INTERVAL = 1024
    PROBE_STEPS = 2  # steps of a trial
    SWITCH_GAIN = 1.02  # a new best must be better by this, or noise would switch to and fro
    FIRST_STEPS = (0, 0, 0, 2, 2)  # tried at the very start; the first is not timed, it warms up
    KEPT_TIMES = 9  # the median of the last times: other programs only ever add to a time
    MEMORY = 0.99  # how much of the acceptance counts stays after each window

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self._first_steps = deque(min(k, max_drafts) for k in self.FIRST_STEPS)
        self._is_warm = False
        self._best = 0
        self._probe: deque[int] = deque()
        self._probe_upward = True
        self._probe_deferred_seconds = 0.0
        self._steps_to_probe = self.MIN_PROBE_INTERVAL
        self._times: dict[int, dict[int, deque[float]]] = {}  # class -> k -> seconds
        self._num_tested = [0.0] * max_drafts
        self._num_accepted = [0.0] * max_drafts

    @property
    def is_drafting(self) -> bool:
        """Whether drafts are being made, so that the draft layer's cache should keep up."""
        return self._best > 0 or bool(self._first_steps)

    @property
    def is_trying(self) -> bool:
        """Whether the next step is a trial, to be timed by itself."""
        return bool(self._first_steps or self._probe)

    def choose(self, num_seqs: int) -> int:
        """Drafts for each sequence in the next step."""
        if self._first_steps:
            return self._first_steps[0]
        if self._probe:
            return self._probe[0]
        return self._best

    def record(
        self,
        num_seqs: int,
        num_drafts: int,
        seconds: float,
        accepted: Sequence[tuple[int, int]],
        deferred_seconds: float = 0.0,
    ) -> None:
        """Learn from a step.

        Args:
            num_drafts: what `choose` said.
            seconds: time of the step, without work put off from earlier steps.
            accepted: for each sequence its drafts and how many were accepted.
            deferred_seconds: time of the work put off, which is part of what a trial costs.
        """
        if num_drafts:
            for drafts, accepts in accepted:
                self._count(drafts, accepts)
        is_typical = all(drafts == num_drafts for drafts, _ in accepted)
        if is_typical and self._is_warm:
            times = self._times.setdefault(_size_class(num_seqs), {})
            times.setdefault(num_drafts, deque(maxlen=self.KEPT_TIMES)).append(seconds)
        self._is_warm = True
        self._probe_deferred_seconds += deferred_seconds
        self._advance(num_seqs, num_drafts)

    def rate(self, num_seqs: int, num_drafts: int) -> float | None:
        """Expected tokens per second and sequence; None before any time was measured."""
        seconds = self._seconds(_size_class(num_seqs), num_drafts)
        return None if seconds is None else self.expected_tokens(num_drafts) / seconds

    def expected_tokens(self, num_drafts: int) -> float:
        """Mean tokens that a window with this many drafts yields."""
        expected, reached, acceptance = 1.0, 1.0, 0.5
        for depth in range(num_drafts):
            tested = self._num_tested[depth]
            if tested >= 1.0:
                acceptance = self._num_accepted[depth] / tested
            else:
                acceptance *= 0.9  # never tested: a little worse than the depth before
            reached *= acceptance
            expected += reached
        return expected

    def _count(self, num_drafts: int, num_accepted: int) -> None:
        # A draft after a rejected one was not tested.
        for depth in range(min(num_drafts, num_accepted + 1)):
            is_accepted = depth < num_accepted
            self._num_tested[depth] = self._num_tested[depth] * self.MEMORY + 1
            self._num_accepted[depth] = self._num_accepted[depth] * self.MEMORY + is_accepted

    def _advance(self, num_seqs: int, num_drafts: int) -> None:
        if self._first_steps:
            self._first_steps.popleft()
            if not self._first_steps:
                self._choose_best(num_seqs)
            return
        if self._probe:
            # A call that was on its way when the trial began is not part of it.
            if num_drafts == self._probe[0]:
                self._probe.popleft()
                if not self._probe:
                    self._choose_best(num_seqs)
            return
        self._steps_to_probe -= 1
        if self._steps_to_probe <= 0:
            self._start_probe()

    def _start_probe(self) -> None:
        self._probe_deferred_seconds = 0.0
        upward = self._probe_upward if 0 < self._best < self.max_drafts else self._best == 0
        self._probe_upward = not upward
        self._probe.extend([self._best + (1 if upward else -1)] * self.PROBE_STEPS)

    def _choose_best(self, num_seqs: int) -> None:
        rates = [self.rate(num_seqs, k) or 0.0 for k in range(self.max_drafts + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] > rates[self._best] * self.SWITCH_GAIN:
            self._best = best
            self._steps_to_probe = self.MIN_PROBE_INTERVAL
            return
        neighbours = [k for k in (self._best - 1, self._best + 1) if 0 <= k <= self.max_drafts]
        slowest = min(rates[k] for k in neighbours)
        loss = self.PROBE_STEPS * max(0.0, 1.0 - slowest / max(rates[self._best], 1e-12))
        step_seconds = self._seconds(_size_class(num_seqs), self._best)
        loss += self._probe_deferred_seconds / step_seconds if step_seconds else 0.0
        interval = max(self.MIN_PROBE_INTERVAL, loss / self.PROBE_BUDGET)
        self._steps_to_probe = int(min(interval, self.MAX_PROBE_INTERVAL))

    def _seconds(self, size_class: int, num_drafts: int) -> float | None:
        """Measured or estimated time of a step in a class of batch sizes."""
        own = self._medians(size_class)
        if num_drafts in own:
            return own[num_drafts]
        others = [c for c in self._times if c != size_class]
        others.sort(key=lambda c: abs(c - size_class))
        for other in others:
            known = self._medians(other)
            shared = [k for k in own if k in known]
            if num_drafts in known and shared:
                nearest = min(shared, key=lambda k: abs(k - num_drafts))
                return known[num_drafts] * own[nearest] / known[nearest]
        return _on_line(own or (self._medians(others[0]) if others else {}), num_drafts)

    def _medians(self, size_class: int) -> dict[int, float]:
        times = self._times.get(size_class, {})
        return {k: float(np.median(values)) for k, values in times.items()}


def _size_class(num_seqs: int) -> int:
    """Batch sizes 1, 2, 3-4, 5-8, ... share their times."""
    return (num_seqs - 1).bit_length()


def _on_line(known: dict[int, float], num_drafts: int) -> float | None:
    """Time on the straight line through the two nearest measured counts of drafts."""
    if not known:
        return None
    nearest = sorted(known, key=lambda k: abs(k - num_drafts))[:2]
    if len(nearest) == 1 or num_drafts in known:
        return known[nearest[0]]
    first, second = nearest
    slope = (known[second] - known[first]) / (second - first)
    return max(known[first] + slope * (num_drafts - first), 0.25 * known[first])
