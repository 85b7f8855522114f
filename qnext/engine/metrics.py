"""Counts and times of requests and of the engine as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class RequestMetrics:
    """What one request cost. Times are seconds of a monotonic clock; None until they happen."""

    arrival_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_windows: int = 0  # forwards of the main model past the prompt
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0

    def record_tokens(self, count: int, now: float) -> None:
        """Count generated tokens, at least one."""
        self.num_generated_tokens += count
        if self.first_token_time is None:
            self.first_token_time = now

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        if self.arrival_time is None or self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time

    def tokens_per_second(self, now: float) -> float | None:
        """Tokens after the first over the time since it; None before there are two."""
        if self.first_token_time is None or self.num_generated_tokens < 2:
            return None
        end = now if self.finished_time is None else self.finished_time
        return (self.num_generated_tokens - 1) / max(end - self.first_token_time, 1e-9)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that were accepted; None when nothing was drafted."""
        if self.num_draft_tokens == 0:
            return None
        return self.num_accepted_tokens / self.num_draft_tokens


@dataclass
class EngineMetrics:
    """Totals since the engine started."""

    num_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    num_decode_steps: int = 0
    num_preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_drafted_by_depth: list[int] = field(default_factory=list)
    num_accepted_by_depth: list[int] = field(default_factory=list)
    num_steps_by_speculation: dict[int, int] = field(default_factory=dict)

    def record_windows(self, num_drafts: int, num_accepted: Sequence[int]) -> None:
        """Count verified windows. A draft is only tested when those before it were accepted.

        Args:
            num_drafts: of each window.
            num_accepted: drafts that stood, window by window.
        """
        while len(self.num_drafted_by_depth) < num_drafts:
            self.num_drafted_by_depth.append(0)
            self.num_accepted_by_depth.append(0)
        for depth in range(num_drafts):
            self.num_drafted_by_depth[depth] += len(num_accepted)
            self.num_accepted_by_depth[depth] += sum(count > depth for count in num_accepted)

    @property
    def num_draft_tokens(self) -> int:
        """Tokens drafted and verified."""
        return sum(self.num_drafted_by_depth)

    @property
    def num_accepted_tokens(self) -> int:
        """Drafted tokens that became output."""
        return sum(self.num_accepted_by_depth)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of drafted tokens that were accepted; None when nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None
