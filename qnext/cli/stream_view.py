"""Text as it is generated: plain in a pipe, with a status line below it in a terminal."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from qnext.engine.metrics import RequestMetrics
from qnext.engine.text import TextSegment

if TYPE_CHECKING:
    from rich.console import Console

ACCEPTED_STYLE = "green"
STATUS_STYLE = "dim"


class StreamView(Protocol):
    """Shows one answer; a context manager, so that the terminal is left in order."""

    def write(self, segments: Iterable[TextSegment], metrics: RequestMetrics) -> None:
        """Show new text, and what it cost so far."""
        ...

    def __enter__(self) -> "StreamView": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_view(show_accepted: bool) -> StreamView:
    """The view that fits standard output."""
    if not sys.stdout.isatty():
        return PlainView()
    from rich.console import Console

    return LiveView(Console(highlight=False), show_accepted)


def status_text(metrics: RequestMetrics) -> str:
    """Tokens, speed and drafts in one line."""
    parts = [f"{metrics.num_generated_tokens} tokens"]
    speed = metrics.tokens_per_second(time.monotonic())
    if speed is not None:
        parts.append(f"{speed:.1f} tokens/s")
    if metrics.acceptance_rate is not None:
        counts = f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens}"
        parts.append(f"drafts accepted {counts} ({metrics.acceptance_rate:.0%})")
        decoded = metrics.num_generated_tokens - 1
        parts.append(f"{decoded / max(metrics.num_windows, 1):.2f} tokens a step")
    return " · ".join(parts)


class PlainView:
    """Nothing but the text."""

    def write(self, segments: Iterable[TextSegment], metrics: RequestMetrics) -> None:
        """Show new text."""
        sys.stdout.write("".join(segment.text for segment in segments))
        sys.stdout.flush()

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            sys.stdout.write("\n")
            sys.stdout.flush()


class LiveView:
    """Finished lines are printed for good; the growing one and the status are redrawn below.

    Args:
        show_accepted: tint text whose tokens were accepted drafts.
    """

    def __init__(self, console: "Console", show_accepted: bool) -> None:
        from rich.live import Live
        from rich.text import Text

        self._console = console
        self._show_accepted = show_accepted
        self._line = Text()
        self._live = Live(console=console, auto_refresh=False)

    def write(self, segments: Iterable[TextSegment], metrics: RequestMetrics) -> None:
        """Show new text, and what it cost so far."""
        from rich.console import Group
        from rich.text import Text

        for segment in segments:
            style = ACCEPTED_STYLE if self._show_accepted and segment.is_accepted_draft else ""
            first, *others = segment.text.split("\n")
            self._line.append(first, style)
            for other in others:
                self._console.print(self._line)
                self._line = Text(other, style)
        # A line longer than the terminal is broken here: only its last row may still change.
        *full_rows, self._line = self._line.wrap(self._console, self._console.width) or [Text()]
        for row in full_rows:
            self._console.print(row)
        status = Text(status_text(metrics), STATUS_STYLE)
        self._live.update(Group(self._line, status), refresh=True)

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()
