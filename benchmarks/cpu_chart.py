"""Draw the rates of a CPU benchmark as bars, engine beside engine at equal width of weights.

    python -m benchmarks.cpu_chart cpu.json docs/figures/cpu.svg

The file is what `python -m benchmarks.cpu --json` wrote. Bars of one panel share a scale; the thin
line on a bar spans all repeats.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contenders import ENGINE_NAMES, ENGINES
from benchmarks.report import REPO_ROOT, readable

sys.path.insert(0, str(REPO_ROOT / "docs" / "figures"))  # which is no package

import svg as s

# Widths that more than one engine has.
WIDTHS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8, Q8_0"}
STYLES = {"qnext": s.DELTA, "transformers": s.ATTENTION, "llama_cpp": s.EXPERTS}
PAGE_WIDTH, MARGIN = 1180, 40
NAMES_WIDTH = 120  # column of the widths' names
TOP = 104
BAR, BAR_STEP, GROUP_GAP = 13, 16, 10
BLOCK_HEAD, BLOCK_GAP = 46, 26
VALUE_WIDTH = 58  # room for the number after the longest bar

Record = Mapping[str, Any]
Rates = dict[tuple[str, str, str, str], list[float]]  # model, cell, width, engine


def read_rates(record: Record) -> Rates:
    """Tokens per second of each repeat, in the order of the record."""
    keys = ("model", "cell", "width", "engine")
    return {
        (labels["model"], labels["cell"], labels["width"], labels["engine"]): each["values"]
        for each in record["measurements"]
        if (labels := each["labels"]).keys() >= set(keys)
        and labels["cell"].startswith(("prefill ", "decode "))
        and labels["width"] in WIDTHS
    }


def draw(record: Record) -> s.Drawing:
    """One block for each model, one panel in it for each cell.

    Raises:
        ValueError: the record has no rates.
    """
    rates = read_rates(record)
    if not rates:
        raise ValueError("the record has no rates of prefill or decode to draw")
    models = list(dict.fromkeys(key[0] for key in rates))
    heights = [BLOCK_HEAD + _rows_height(rates, model) for model in models]
    height = TOP + sum(heights) + BLOCK_GAP * len(models)
    drawing = s.Drawing(PAGE_WIDTH, height, "Tokens per second on a CPU")
    _head(drawing, record)
    top = TOP
    for model, block_height in zip(models, heights, strict=True):
        _block(drawing, rates, model, top)
        top += block_height + BLOCK_GAP
    return drawing


def _head(drawing: s.Drawing, record: Record) -> None:
    drawing.text(MARGIN, 46, "Tokens per second on a CPU", size=22, weight=700)
    peers = record.get("peers", {})
    versions = [f"{name} {peers[name]}" for name in ("transformers", "llama.cpp") if name in peers]
    where = f"{record['cpu']}, {record['num_threads']} threads"
    drawing.text(MARGIN, 70, "; ".join([where, *versions]), size=13, fill=s.SOFT)
    x = PAGE_WIDTH - MARGIN
    for engine in reversed(ENGINES):
        name = ENGINE_NAMES[engine]
        drawing.text(x, 46, name, size=13, anchor="end", fill=STYLES[engine][2], weight=600)
        x -= 8 * len(name) + 18
        drawing.rect(x, 35, 13, 13, fill=STYLES[engine][0], stroke=STYLES[engine][1], radius=3)
        x -= 18


def _groups(rates: Rates, model: str) -> dict[str, list[str]]:
    """Engines of each width that the model was measured at."""
    found = {(width, engine) for m, _, width, engine in rates if m == model}
    groups = {width: [engine for engine in ENGINES if (width, engine) in found] for width in WIDTHS}
    return {width: engines for width, engines in groups.items() if engines}


def _rows_height(rates: Rates, model: str) -> int:
    groups = _groups(rates, model)
    return sum(len(engines) * BAR_STEP + GROUP_GAP for engines in groups.values())


def _block(drawing: s.Drawing, rates: Rates, model: str, top: float) -> None:
    """A card with the model's name, the widths down its side, and a panel for each cell."""
    cells = list(dict.fromkeys(cell for m, cell, _, _ in rates if m == model))
    groups = _groups(rates, model)
    height = BLOCK_HEAD + _rows_height(rates, model)
    drawing.rect(MARGIN - 14, top - 4, PAGE_WIDTH - 2 * MARGIN + 28, height + 8, radius=10)
    drawing.text(MARGIN, top + 22, model, size=15, weight=700)
    y = top + BLOCK_HEAD
    for width, engines in groups.items():
        middle = y + len(engines) * BAR_STEP / 2 + 3
        drawing.text(MARGIN, middle, WIDTHS[width], size=12, fill=s.SOFT)
        y += len(engines) * BAR_STEP + GROUP_GAP
    panel = (PAGE_WIDTH - 2 * MARGIN - NAMES_WIDTH) / len(cells)
    for idx, cell in enumerate(cells):
        left = MARGIN + NAMES_WIDTH + idx * panel
        drawing.text(left, top + 22, cell, size=13, weight=600)
        _panel(drawing, rates, (model, cell), groups, (left, top + BLOCK_HEAD, panel - 12))


def _panel(
    drawing: s.Drawing,
    rates: Rates,
    where: tuple[str, str],
    groups: Mapping[str, Sequence[str]],
    place: tuple[float, float, float],
) -> None:
    left, y, width = place
    largest = max(max(values) for key, values in rates.items() if key[:2] == where)
    scale = (width - VALUE_WIDTH) / largest
    for weights, engines in groups.items():
        for engine in engines:
            values = rates.get((*where, weights, engine))
            if values is not None:
                fill, stroke, ink = STYLES[engine]
                length = max(scale * median(values), 1)
                drawing.rect(left, y, round(length, 1), BAR, fill=fill, stroke=stroke, radius=2)
                low, high = (left + scale * edge(values) for edge in (min, max))
                middle = y + BAR / 2
                drawing.path(f"M{low:.1f} {middle:g}H{high:.1f}", stroke=stroke, width=1.5)
                end = round(max(left + length, high) + 5, 1)
                weight = 700 if engine == "qnext" else 400
                number = readable(median(values))
                drawing.text(end, y + BAR - 2.5, number, size=11, fill=ink, weight=weight)
            y += BAR_STEP
        y += GROUP_GAP


def main(argv: Sequence[str] | None = None) -> None:
    """Read the record and write the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_chart", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("record", type=Path, help="what benchmarks.cpu --json wrote")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    args = parser.parse_args(argv)
    record = json.loads(args.record.read_text(encoding="utf-8").splitlines()[-1])
    args.picture.write_text(draw(record).render(), encoding="utf-8")


if __name__ == "__main__":
    main()
