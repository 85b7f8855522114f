"""Rows that show as soon as they are measured, and the record of all of them."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qnext.bench.anchors import Anchor

OURS = "qnext"
NAME_WIDTH, WHO_WIDTH = 30, 12


@dataclass(frozen=True)
class Row:
    """One quantity, measured several times.

    Args:
        name: what was measured ("decode-8x1024").
        unit: of the values; of "tok/s" more is better, of anything else less.
        values: one per round, in order.
        who: the engine.
        anchor: what it is held against.
        note: what a reader must know beside the number.
        details: further numbers, for programs.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    who: str = OURS
    anchor: Anchor = field(default_factory=Anchor)
    note: str = ""
    details: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Middle value, which one disturbed round does not move."""
        return statistics.median(self.values)

    @property
    def meets_aim(self) -> bool | None:
        """Whether the median is as good as the aim; None without one."""
        if self.anchor.aim is None:
            return None
        is_rate = self.unit == "tok/s"
        return self.median >= self.anchor.aim if is_rate else self.median <= self.anchor.aim

    def record(self) -> dict[str, Any]:
        """As plain values; absent figures are left out."""
        anchor = {key: value for key, value in vars(self.anchor).items() if value is not None}
        return {
            "name": self.name,
            "who": self.who,
            "unit": self.unit,
            "median": self.median,
            "spread": [min(self.values), max(self.values)],
            "values": list(self.values),
            **anchor,
            **({"note": self.note} if self.note else {}),
            **self.details,
        }


class Table:
    """Rows of one part of the run, each printed when it is added."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[tuple[str, str]] = []
        self.facts: dict[str, Any] = {}

    def title(self, text: str) -> None:
        """Print what the part is about."""
        print(f"\n{text}", flush=True)

    def header(self) -> None:
        """Print the names of the columns."""
        columns = f"{'median':>10} {'unit':<6} {'lowest to highest':<22}"
        against = f"{'limit':>9} {'of it':>6} {'aim':>9}      {'vLLM':>9} {'ratio':>6}"
        print(f"{'':<{NAME_WIDTH}}{'':<{WHO_WIDTH}}{columns}{against}", flush=True)

    def fact(self, name: str, value: Any, text: str) -> None:
        """Record something about the whole part, and print it."""
        self.facts[name] = value
        print(text, flush=True)

    def add(self, row: Row) -> None:
        """Print a row and keep it."""
        self.rows.append(row)
        anchor = row.anchor
        spread = f"{readable(min(row.values))} to {readable(max(row.values))}"
        share = f"{row.median / anchor.limit:.0%}" if anchor.limit else ""
        verdict = {True: "met", False: "no", None: ""}[row.meets_aim]
        cells = (
            f"{row.name:<{NAME_WIDTH}}{row.who:<{WHO_WIDTH}}"
            f"{readable(row.median):>10} {row.unit:<6} {spread:<22}"
            f"{_optional(anchor.limit):>9} {share:>6} {_optional(anchor.aim):>9} {verdict:<4}"
            f"{_optional(anchor.vllm):>9} {_times(row.median, anchor.vllm, row.unit):>6}"
        )
        note = f"  {row.note}" if row.note else ""
        print((cells + note).rstrip(), flush=True)

    def skip(self, name: str, reason: str) -> None:
        """Say what was asked for and not measured, and why."""
        self.skipped.append((name, reason))
        print(f"{name:<{NAME_WIDTH}}not measured: {reason}", flush=True)

    def ours(self, name: str) -> Row | None:
        """Our own row of this name."""
        return next((row for row in self.rows if row.name == name and row.who == OURS), None)

    def ratio_note(self, name: str, value: float, unit: str) -> str:
        """How our row compares with a peer's value, in words; empty without a row of ours."""
        mine = self.ours(name)
        times = _times(mine.median, value, unit) if mine is not None else ""
        return f"qnext is {times}" if times else ""

    def record(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            **self.facts,
            "rows": [row.record() for row in self.rows],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }


def _optional(value: float | None) -> str:
    return "" if value is None else readable(value)


def _times(value: float, other: float | None, unit: str) -> str:
    """How many times better than other, more of a rate or less of a time."""
    if not other or not value:
        return ""
    return f"{value / other if unit == 'tok/s' else other / value:.2f}x"


def readable(value: float) -> str:
    """Three digits at least, none after the point where they would say nothing."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return (
        f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    )
