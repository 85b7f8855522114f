"""What a caller asks for and gets back, in vLLM's shapes, and the engine's own record of it."""

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnext.engine.metrics import RequestMetrics
from qnext.engine.text import OutputText

# Below this the largest logit has all the mass in float64, and 1/temperature would overflow.
GREEDY_TEMPERATURE = 1e-5
MAX_SEED = 2**64 - 1
MAX_DRAFTS = 16  # of a window


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are chosen, and when it ends.

    Order of work: repetition, frequency and presence penalty; temperature; min_p; top_k; top_p.

    Raises:
        ValueError: a value outside its range, by name, value and limit.
    """

    temperature: float = 1.0  # 0 takes the largest logit, the lowest id among equals
    top_p: float = 1.0  # smallest set of tokens whose probability reaches this
    top_k: int = 0  # largest this many; 0 or -1 for all
    min_p: float = 0.0  # at least this share of the largest probability
    presence_penalty: float = 0.0  # taken off the logit of each token in the answer so far
    frequency_penalty: float = 0.0  # the same, times how often it is there
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or answer
    max_tokens: int | None = 16  # None: until max_model_len
    stop: str | Sequence[str] | None = None  # the answer ends before the first of these
    stop_token_ids: Sequence[int] | None = None  # end ids beside the model's own
    seed: int | None = None  # same seed, same num_speculative_tokens, same text
    logprobs: int | None = None  # this many largest, and the chosen token's own
    ignore_eos: bool = False  # go on past the model's end ids

    def __post_init__(self) -> None:
        stop = self.stop
        strings = (stop,) if isinstance(stop, str) else _as_tuple("stop", stop)
        object.__setattr__(self, "stop", strings)
        end_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", end_ids)
        _require_real("temperature", self.temperature, 0.0, math.inf)
        _require_real("top_p", self.top_p, 0.0, 1.0, low_is_open=True)
        require_integer("top_k", self.top_k, -1)
        _require_real("min_p", self.min_p, 0.0, 1.0)
        _require_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, True)
        if self.max_tokens is not None:
            require_integer("max_tokens", self.max_tokens, 1)
        if self.seed is not None:
            require_integer("seed", self.seed, 0, MAX_SEED)
            object.__setattr__(self, "seed", int(self.seed))
        if self.logprobs is not None:
            require_integer("logprobs", self.logprobs, 0)
        for text in strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop holds {text!r}; want strings of at least one character")
        for token_id in end_ids:
            require_integer("stop_token_ids", token_id, 0)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}; want True or False")

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken, without a random number."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


def _as_tuple(name: str, values: object) -> tuple[Any, ...]:
    if values is None:
        return ()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; want a list")
    return tuple(values)


def _require_real(
    name: str, value: object, low: float, high: float, low_is_open: bool = False
) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and low <= value <= high:  # type: ignore[arg-type,operator]
        if not (low_is_open and value == low):
            return
    bracket = "(" if low_is_open else "["
    raise ValueError(f"{name} is {value!r}; want a number in {bracket}{low:g}, {high:g}]")


def require_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse anything but an integer in range.

    Raises:
        ValueError: by name, value and limit.
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if is_integer and low <= value and (high is None or value <= high):  # type: ignore[operator]
        return
    limit = f"at least {low}" if high is None else f"{low} to {high}"
    raise ValueError(f"{name} is {value!r}; want an integer, {limit}")


def check_drafts(num_speculative_tokens: int | str) -> None:
    """Refuse a number of drafts that no model could serve.

    Raises:
        ValueError: neither "auto" nor an integer in range.
    """
    is_count = isinstance(num_speculative_tokens, int) and not isinstance(
        num_speculative_tokens, bool
    )
    if num_speculative_tokens == "auto":
        return
    if not is_count or not 0 <= int(num_speculative_tokens) <= MAX_DRAFTS:
        raise ValueError(
            f"num_speculative_tokens is {num_speculative_tokens!r}; "
            f'want "auto" or an integer, 0 to {MAX_DRAFTS}'
        )


@dataclass(frozen=True)
class Logprob:
    """Natural log of a token's probability under the raw distribution, and its place in it."""

    logprob: float
    rank: int | None = None  # 1 is the most probable token
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer. `token_ids` keeps the token that ended it; `text` does not."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None  # "stop", "length" or "abort"; None while it grows
    stop_reason: int | str | None = None  # the stop string or id; None for the model's end token

    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and its answers, complete or so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = "waiting"  # no state slot: new, or preempted
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence on its way through the engine; the scheduler and `Engine.step` change it.

    Positions count from the first prompt token. The cache holds the tokens before `num_computed`;
    a running sequence past its prompt normally has exactly one token that is not in it yet.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_total_tokens: int  # prompt and answer together
    output_text: OutputText
    prompt: str | None = None
    end_token_ids: frozenset[int] = frozenset()  # the model's own; empty with ignore_eos
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    state_slot: int | None = None
    page_ids: list[int] = field(default_factory=list)
    draft_token_ids: list[int] = field(default_factory=list)
    draft_probs: list[Any] = field(default_factory=list)  # one [W] array a draft; None if greedy
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    known_array: InitVar[NDArray[np.int64] | None] = None  # of prompt_token_ids, if there is one

    def __post_init__(self, known_array: NDArray[np.int64] | None) -> None:
        if known_array is None:
            known_array = np.array(self.prompt_token_ids, np.int64)
        self.prompt_array = known_array  # of which chunks are slices. [num_prompt_tokens]
        self.token_ids = list(self.prompt_token_ids)  # prompt and answer
        self.output_counts: dict[int, int] = {}  # kept up where there are penalties
        self.metrics.num_prompt_tokens = len(self.prompt_token_ids)

    @cached_property
    def prompt_id_set(self) -> frozenset[int]:
        """The tokens of the prompt, each once."""
        return frozenset(self.prompt_token_ids)

    @cached_property
    def ending_ids(self) -> frozenset[int]:
        """Tokens that end the answer: the model's own and those of the parameters."""
        return self.end_token_ids.union(self.params.stop_token_ids or ())

    @cached_property
    def is_plain(self) -> bool:
        """Whether logits alone decide its tokens, and nobody asks for the logits."""
        return not self.params.has_penalties and self.params.logprobs is None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.max_total_tokens - len(self.token_ids)

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are still missing from the cache."""
        return self.num_computed < self.num_prompt_tokens

    @property
    def is_replaying(self) -> bool:
        """Whether known answer tokens are missing from the cache: it was preempted."""
        return not self.is_prefilling and self.num_computed < self.num_tokens - 1

    def append_token(self, token_id: int, is_accepted_draft: bool, now: float) -> None:
        """Add a decided token and finish the request if it ends here.

        Args:
            is_accepted_draft: the token was drafted and accepted, not sampled by the main head.
            now: seconds, of the clock that the metrics use.
        """
        assert self.finish_reason is None, f"{self.request_id} ended with {self.finish_reason!r}"
        self.output_token_ids.append(token_id)
        self.token_ids.append(token_id)
        if self.params.has_penalties:
            self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1
        self.metrics.record_tokens(1, now)
        if token_id in self.end_token_ids:
            self.finish_reason = "stop"
        elif token_id in (self.params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token_id
        else:
            stop = self.output_text.append(token_id, is_accepted_draft)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
        if self.finish_reason is None and self.num_remaining == 0:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self.finish(self.finish_reason, now)

    def append_windows(self, windows: Sequence[list[int]], now: float) -> int:
        """Add the tokens that windows decided, up to the end of the answer.

        Args:
            windows: in each the drafts that stood and one token more.
            now: as for `append_token`.

        Returns:
            How many windows began before the end.
        """
        assert self.finish_reason is None, f"{self.request_id} ended with {self.finish_reason!r}"
        tokens = [token_id for window in windows for token_id in window]
        is_amid = len(tokens) < self.num_remaining and self.ending_ids.isdisjoint(tokens)
        if is_amid and self.is_plain and not self.params.stop:
            self.output_token_ids += tokens
            self.token_ids += tokens
            self.metrics.record_tokens(len(tokens), now)
            self.output_text.extend(windows)
            return len(windows)
        for idx, window in enumerate(windows):
            for depth, token_id in enumerate(window):
                self.append_token(token_id, depth < len(window) - 1, now)
                if self.finish_reason is not None:
                    return idx + 1
        return len(windows)

    def finish(self, reason: str, now: float) -> None:
        """Mark the request as ended; its memory is given back by the scheduler."""
        self.finish_reason = reason
        self.status = RequestStatus.FINISHED
        self.metrics.finished_time = now
        self.output_text.finish()

    def output(self) -> RequestOutput:
        """Everything generated so far, as a record of its own that later tokens don't change."""
        wants_logprobs = self.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=self.output_text.text,
            token_ids=list(self.output_token_ids),
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            outputs=[completion],
            finished=self.finish_reason is not None,
            metrics=self.metrics,
        )
