"""Numbers with their spread, and where they came from."""

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    """

    name: str
    unit: str
    values: tuple[float, ...]
    baseline: str | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """Middle value, which one disturbed repeat does not move."""
        return statistics.median(self.values)


def environment(num_threads: int) -> dict[str, Any]:
    """Revision, command and machine of this run."""
    cpu = cpu_info()
    return {
        "revision": git_revision(REPO_ROOT),
        "command": shlex.join([Path(sys.executable).name, "-m", *_module_and_arguments()]),
        "cpu": cpu.name,
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


def print_report(measurements: Sequence[Measurement], where: dict[str, Any]) -> None:
    """Print a table with medians, spreads and ratios, then everything as one JSON line."""
    medians = {each.name: each.median for each in measurements}
    width = max(len(each.name) for each in measurements)
    print(f"{where['cpu']}, {where['num_threads']} threads, torch {where['torch']}")
    print(f"revision {where['revision'] or 'unknown'}: {where['command']}\n")
    for each in measurements:
        low, high = min(each.values), max(each.values)
        ratio = ""
        if each.baseline in medians:
            ratio = f"{each.median / medians[each.baseline]:5.2f}x"
        row = f"{each.name:<{width}}  {each.median:>10,.0f} {each.unit}"
        row += f"  [{low:,.0f} to {high:,.0f}]  {ratio}  {each.note}"
        print(row.rstrip())
    record = {**where, "measurements": [asdict(each) for each in measurements]}
    print("\n" + json.dumps(record))
