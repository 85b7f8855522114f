"""Draw loss curves from the logs of training runs.

    python docs/figures/curves.py nano=out/nano/log.jsonl nano-dense=out/nano-dense/log.jsonl

The first run gives nano-loss.svg: its losses, and bits per byte of the validation texts. All runs
together give nano-vs-dense.svg: bits per byte against training FLOPs and against wall time, stages
before the instructions only. The stored pictures are drawn from
qnext/assets/nano/training_log.jsonl and docs/figures/data/nano_dense_log.jsonl.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import svg as s  # noqa: E402  (beside this file, which is no package)

DOMAIN = "en_val"
COLOURS = (s.DELTA[1], s.ATTENTION[1], s.EXPERTS[1], s.MTP[1])
Point = tuple[float, float]


@dataclass
class Run:
    """What one log tells, as points (tokens, value)."""

    name: str
    loss: list[Point] = field(default_factory=list)
    mtp_loss: list[Point] = field(default_factory=list)
    bits_per_byte: list[Point] = field(default_factory=list)
    agreement: list[Point] = field(default_factory=list)
    stages: list[tuple[str, float, float]] = field(default_factory=list)  # name, from, to tokens
    flops: list[Point] = field(default_factory=list)  # FLOPs spent, by tokens
    seconds: list[Point] = field(default_factory=list)
    rates: list[Point] = field(default_factory=list)  # learning rate, by tokens

    def is_falling(self, tokens: float) -> bool:
        """Whether the learning rate had left its peak by then."""
        peak = max(rate for _, rate in self.rates)
        first = next(seen for seen, rate in self.rates if rate == peak)
        return any(first < seen <= tokens and rate < peak for seen, rate in self.rates)


def read_run(name: str, path: Path) -> Run:
    """Read a `log.jsonl`."""
    run = Run(name)
    tokens, flops, step_tokens = 0.0, 0.0, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            seen = float(record["tokens"])
            flops += (seen - tokens) * record["flops_per_second"] / record["tokens_per_second"]
            stage = record["stage"]
            if not run.stages or run.stages[-1][0] != stage:
                run.stages.append((stage, tokens, seen))
            run.stages[-1] = (stage, run.stages[-1][1], seen)
            tokens = seen
            step_tokens[record["step"]] = tokens
            for points, key in ((run.loss, "loss"), (run.mtp_loss, "mtp_loss")):
                if isinstance(record[key], float) and record[key] > 0:
                    points.append((tokens, record[key]))
            run.flops.append((tokens, flops))
            run.seconds.append((tokens, float(record["seconds"])))
            run.rates.append((tokens, float(record["lr"])))
        elif record["kind"] == "eval" and DOMAIN in record:
            run.bits_per_byte.append((tokens, record[DOMAIN]["bits_per_byte"]))
            if "mtp_agreement" in record[DOMAIN]:
                run.agreement.append((tokens, record[DOMAIN]["mtp_agreement"]))
    return run


def smoothed(points: list[Point], share: float = 0.01) -> list[Point]:
    """Running mean over about this share of the points, at most 300 of them."""
    width = max(1, int(len(points) * share))
    means = []
    for end in range(width, len(points) + 1, max(1, len(points) // 300)):
        part = points[end - width : end]
        means.append((part[-1][0], sum(value for _, value in part) / width))
    return means


@dataclass(frozen=True)
class Axes:
    """A plot area; maps data to pixels."""

    drawing: s.Drawing
    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def at(self, x: float, y: float) -> Point:
        """Pixel of a point, kept inside the area."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = min(max((x - x0) / (x1 - x0), 0), 1)
        up = min(max((y - y0) / (y1 - y0), 0), 1)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def frame(self, title: str, x_label: str, x_unit: float) -> None:
        """Card, grid, ticks and labels; ticks along x are shown in x_unit."""
        drawing = self.drawing
        drawing.rect(self.left - 62, self.top - 48, self.width + 92, self.height + 104, radius=10)
        drawing.text(self.left - 44, self.top - 22, title, size=15, weight=700)
        marks = ticks(*self.y_range)
        digits = max(len(f"{value:g}".partition(".")[2]) for value in marks)
        for value in marks:
            _, y = self.at(self.x_range[0], value)
            drawing.path(f"M{self.left:g} {y:.1f}h{self.width:g}", stroke=s.EDGE, width=1)
            drawing.text(
                self.left - 8, y + 4, f"{value:.{digits}f}", size=11, fill=s.SOFT, anchor="end"
            )
        for value in ticks(*(edge / x_unit for edge in self.x_range)):
            x, _ = self.at(value * x_unit, self.y_range[0])
            y = self.top + self.height + 18
            drawing.text(x, y, f"{value:g}", size=11, fill=s.SOFT, anchor="middle")
        middle = self.left + self.width / 2
        bottom = self.top + self.height + 40
        drawing.text(middle, bottom, x_label, size=12, fill=s.SOFT, anchor="middle")

    def curve(
        self, points: list[Point], colour: str, label: str, row: int, rings: tuple[int, ...] = ()
    ) -> None:
        """One line and its entry in the legend; the points of `rings` are drawn hollow."""
        pixels = [self.at(*point) for point in points]
        commands = " ".join(
            f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(pixels)
        )
        self.drawing.path(commands, stroke=colour, width=2)
        if len(points) <= 30:
            for i, (x, y) in enumerate(pixels):
                fill = s.CARD if i in rings else colour
                self.drawing.circle(round(x, 1), round(y, 1), 3.5, fill=fill, stroke=colour)
        x, y = self.left + self.width - 8, self.top + 20 + 20 * row
        self.drawing.text(x, y, label, size=12, fill=colour, anchor="end", weight=600)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def bounds(values: list[float]) -> tuple[float, float]:
    """A range a little wider than the values; of many, without the outliers of the first steps."""
    ordered = sorted(values)
    share = 0.98 if len(ordered) > 100 else 1.0
    low, high = ordered[0], ordered[int(share * (len(ordered) - 1))]
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def draw_losses(run: Run) -> s.Drawing:
    """Training losses with their stages, and the validation texts."""
    drawing = s.Drawing(1180, 470, f"Losses of the {run.name} run")
    drawing.text(40, 46, f"How {run.name} was trained", size=22, weight=700)
    loss, mtp_loss = smoothed(run.loss), smoothed(run.mtp_loss)
    x_range = (0.0, run.loss[-1][0])
    values = [value for _, value in loss + mtp_loss]
    left = Axes(drawing, 102, 126, 480, 250, x_range, bounds(values))
    left.frame("training loss, nats per token", "tokens seen, millions", 1e6)
    _mark_stages(left, run)
    left.curve(mtp_loss, s.MTP[1], "second token ahead (MTP)", 1)
    left.curve(loss, s.DELTA[1], "next token", 0)
    measured = [value for _, value in run.bits_per_byte]
    right = Axes(drawing, 690, 126, 420, 250, x_range, bounds(measured))
    right.frame(f"{DOMAIN}, bits per byte", "tokens seen, millions", 1e6)
    _mark_stages(right, run)
    right.curve(run.bits_per_byte, s.EXPERTS[1], f"last: {measured[-1]:.3f}", 0)
    return drawing


def _mark_stages(axes: Axes, run: Run) -> None:
    for index, (name, start, _) in enumerate(run.stages):
        x, _ = axes.at(start, axes.y_range[0])
        if index:
            axes.drawing.path(
                f"M{x:.1f} {axes.top:g}v{axes.height:g}", stroke=s.LINE, width=1, dash="3 4"
            )
        # The last stages are short and close to one another: their names stand one below another,
        # above the curves; the first one's stands below them.
        y = axes.top + (40 + 14 * index if index else axes.height - 10)
        side = "end" if x > axes.left + 0.8 * axes.width else "start"
        shift = -5 if side == "end" else 5
        axes.drawing.text(x + shift, y, name, size=11, fill=s.SOFT, anchor=side)


def draw_comparison(runs: list[Run]) -> s.Drawing:
    """Bits per byte of all runs against FLOPs and against wall time."""
    drawing = s.Drawing(1180, 470, "Bits per byte against training compute")
    names = " and ".join(run.name for run in runs)
    drawing.text(40, 46, f"{names}: the same tokens, the same code", size=22, weight=700)
    drawing.text(1110, 46, "hollow: the learning rate falls", size=13, fill=s.SOFT, anchor="end")
    for left, width, title, label, spent_of, unit in (
        (102, 480, "against compute", "training FLOPs, 1e15", lambda run: run.flops, 1e15),
        (690, 420, "against time", "wall time, minutes", lambda run: run.seconds, 60.0),
    ):
        curves = [_by_cost(run, spent_of(run)) for run in runs]
        cost = max(points[-1][0] for points in curves)
        values = [value for points in curves for _, value in points]
        axes = Axes(drawing, left, 126, width, 250, (0.0, cost), bounds(values))
        axes.frame(f"{DOMAIN}, bits per byte, {title}", label, unit)
        for row, (run, points) in enumerate(zip(runs, curves, strict=True)):
            seen = [tokens for tokens, _ in run.bits_per_byte[: len(points)]]
            rings = tuple(i for i, tokens in enumerate(seen) if run.is_falling(tokens))
            label = f"{run.name}: best {min(value for _, value in points):.3f}"
            axes.curve(points, COLOURS[row], label, row, rings)
    return drawing


def _by_cost(run: Run, spent: list[Point]) -> list[Point]:
    """Bits per byte by what had been spent when they were measured."""
    cost_at = dict(spent)
    last = max((end for name, _, end in run.stages if name != "instructions"), default=math.inf)
    return [(cost_at[t], value) for t, value in run.bits_per_byte if t in cost_at and t <= last]


def main() -> None:
    """Read the logs named on the command line and write the pictures."""
    runs = [read_run(name, Path(path)) for name, path in (a.split("=", 1) for a in sys.argv[1:])]
    if not runs:
        raise SystemExit(__doc__)
    (FOLDER / "nano-loss.svg").write_text(draw_losses(runs[0]).render(), encoding="utf-8")
    if len(runs) > 1:
        drawing = draw_comparison(runs)
        (FOLDER / "nano-vs-dense.svg").write_text(drawing.render(), encoding="utf-8")


if __name__ == "__main__":
    main()
