"""Runs the measurements of single kernels, which live beside the package in a checkout."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnext.bench.budget import Budget
from qnext.bench.report import Table

OPS_FOLDER = Path("benchmarks") / "ops"
# These write tables of tiles instead of measuring what there is.
TUNERS = "tune_"
# What a measurement has, and the modules that several of them share have not.
RUNS = 'if __name__ == "__main__":'


def checkout_root() -> Path | None:
    """Folder of the checkout that this package belongs to; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    is_checkout = (root / "pyproject.toml").is_file() and (root / OPS_FOLDER).is_dir()
    return root if is_checkout else None


def op_names(root: Path) -> list[str]:
    """Measurements that the checkout has: the modules that run by themselves, without tuners."""
    modules = [path for path in (root / OPS_FOLDER).glob("*.py") if RUNS in path.read_text("utf-8")]
    return sorted(path.stem for path in modules if not path.stem.startswith(TUNERS))


def run_kernels(table: Table, ops: Sequence[str], seconds: float) -> None:
    """Run `python -m benchmarks.ops.X` for each op, in a process of its own.

    Args:
        table: receives their records.
        ops: names of measurements; empty means all.
        seconds: for all of them; one that outlasts its share is ended, its lines stay.

    Raises:
        ValueError: the checkout has no measurement of this name.
    """
    table.title("kernels: each op beside the limit of the machine, in a process of its own")
    root = checkout_root()
    if root is None:
        table.skip("kernels", f"{OPS_FOLDER} is in a checkout, not in the installed package")
        return
    known = op_names(root)
    for name in ops:
        if name not in known:
            raise ValueError(f"--ops {name}: there are {', '.join(known)}")
    wanted = list(ops) or known
    budget = Budget(seconds, len(wanted))
    records: dict[str, Any] = table.facts.setdefault("ops", {})
    for name in wanted:
        print(f"\n{name}", flush=True)
        record, problem = run_op(root, name, budget.next_seconds())
        if problem is not None:
            table.skip(name, problem)
        if record is not None:
            records[name] = record


def run_op(root: Path, name: str, seconds: float) -> tuple[Any, str | None]:
    """Run one measurement and pass its lines on.

    Returns:
        What its JSON line holds, or None; why it did not come to its end, or None.
    """
    if seconds <= 0:
        return None, "the time given by --seconds is spent"
    command = [sys.executable, "-u", "-m", f"benchmarks.ops.{name}"]
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None, "stdout is a pipe"
        for line in process.stdout:
            lines.append(line)
            if not line.startswith("{"):
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    record = _last_json(lines)
    if code == 0:
        return record, None if record is not None else "it printed no JSON line"
    if time.monotonic() - start >= seconds:
        return record, f"ended after its share of --seconds, {seconds:.0f} s"
    return record, f"exit code {code}"


def _last_json(lines: Sequence[str]) -> Any:
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None
