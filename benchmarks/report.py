"""Numbers with their spread, and where they came from."""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from qnext.runtime.device import gpu_infos
from qnext.runtime.env import cpu_info, git_revision, package_version

REPO_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measurement:
    """One quantity, measured several times.

    Args:
        name: what was measured ("decode, 8 sequences, k = 2").
        unit: of the values ("tok/s").
        values: one per repeat, in order.
        baseline: name of the measurement that this one is shown as a multiple of.
        note: what a reader must know beside the number ("accepted 63 %").
        labels: the parts of the name, for programs that group ("model", "cell", "engine").
    """

    name: str
    unit: str
    values: tuple[float, ...]
    baseline: str | None = None
    note: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Middle value, which one disturbed repeat does not move."""
        return statistics.median(self.values)


@dataclass(frozen=True)
class Skipped:
    """What was asked for and not measured, and why."""

    name: str
    reason: str


def environment(num_threads: int) -> dict[str, Any]:
    """Revision, command and machine of this run."""
    cpu = cpu_info()
    return {
        "revision": git_revision(REPO_ROOT),
        "command": shlex.join([Path(sys.executable).name, "-m", *_module_and_arguments()]),
        "cpu": cpu.name,
        "cpu_features": list(cpu.features),
        "num_cores": cpu.num_cores,
        "num_threads": num_threads,
        "gpus": [gpu.name for gpu in gpu_infos()],
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
    }


def _module_and_arguments() -> list[str]:
    path = Path(sys.argv[0]).resolve()
    is_ours = path.is_relative_to(REPO_ROOT)
    module = ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts) if is_ours else path.name
    return [module, *sys.argv[1:]]


def print_report(
    measurements: Sequence[Measurement],
    where: Mapping[str, Any],
    skipped: Sequence[Skipped] = (),
) -> dict[str, Any]:
    """Print a table with medians, spreads and ratios, then everything as one JSON line.

    Returns:
        What the JSON line holds.
    """
    medians = {each.name: each.median for each in measurements}
    width = max((len(each.name) for each in measurements), default=0)
    print(f"{where['cpu']}, {where['num_threads']} threads, torch {where['torch']}")
    print(f"revision {where['revision'] or 'unknown'}: {where['command']}\n")
    for each in measurements:
        spread = f"[{readable(min(each.values))} to {readable(max(each.values))}]"
        ratio = ""
        if each.baseline is not None and medians.get(each.baseline):
            ratio = f"{each.median / medians[each.baseline]:5.2f}x of {each.baseline}"
        row = f"{each.name:<{width}}  {readable(each.median):>10} {each.unit}"
        print("  ".join(part for part in (row, spread, ratio, each.note) if part))
    for one in skipped:
        print(f"not measured: {one.name}: {one.reason}")
    record = {
        **where,
        "measurements": [asdict(each) for each in measurements],
        "skipped": [asdict(one) for one in skipped],
    }
    print("\n" + json.dumps(record))
    return record


def readable(value: float) -> str:
    """Three digits at least, none after the point where they would say nothing."""
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return (
        f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    )
