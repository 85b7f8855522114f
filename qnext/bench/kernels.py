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
TESTS_FOLDER = Path("tests") / "kernels"
# Measurements, modules of OPS_FOLDER, and the tests whose pass makes their numbers count.
TESTS = {
    "adamw": ("adamw",),
    "attention": ("ops",),
    "elementwise": (
        "triton_elementwise",
        "triton_delta_inputs",
        "merge_attention",
        "router_stats",
    ),
    "experts": ("triton_experts",),
    "gated_delta_rule": ("triton_gated_delta_rule",),
    "gated_delta_step": ("triton_gated_delta_step",),
    "linear_cross_entropy": ("triton_linear_cross_entropy",),
    "paged_attention": ("triton_paged_attention",),
    "rows": ("triton_rows", "triton_router", "triton_linear_fp8"),
    "sample_rows": ("triton_sample_rows",),
}


def checkout_root() -> Path | None:
    """Folder of the checkout that this package belongs to; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    is_checkout = (root / "pyproject.toml").is_file() and (root / OPS_FOLDER).is_dir()
    return root if is_checkout else None


def run_kernels(
    table: Table, ops: Sequence[str], seconds: float, *, runs_tests: bool = True
) -> None:
    """Run each op's tests and, where they pass, `python -m benchmarks.ops.X`, as processes.

    Args:
        table: receives their records.
        ops: names of measurements; empty means all.
        seconds: for all of them; one that outlasts its share is ended, its lines stay.
        runs_tests: False measures untested.

    Raises:
        ValueError: the checkout has no measurement of this name.
    """
    table.title("kernels: each op beside the limit of the machine, in a process of its own")
    root = checkout_root()
    if root is None:
        table.skip("kernels", f"{OPS_FOLDER} is in a checkout, not in the installed package")
        return
    for name in ops:
        if name not in TESTS:
            raise ValueError(f"--ops {name}: there are {', '.join(TESTS)}")
    wanted = list(ops) or list(TESTS)
    budget = Budget(seconds, len(wanted))
    records: dict[str, Any] = table.facts.setdefault("ops", {})
    for name in wanted:
        print(f"\n{name}", flush=True)
        begin, share = time.monotonic(), budget.next_seconds()
        problem = run_tests(root, TESTS[name], share) if runs_tests else None
        record = None
        if problem is None:
            record, problem = run_op(root, name, share - (time.monotonic() - begin))
        if problem is not None:
            table.skip(name, problem)
        if record is not None:
            records[name] = record


def run_tests(root: Path, names: Sequence[str], seconds: float) -> str | None:
    """Run test files until one test fails; says what is wrong, or None."""
    files = [str(TESTS_FOLDER / f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    lines, problem = _run(root, command, seconds, is_shown=False)
    last = lines[-1].strip() if lines else "no output"
    print(f"tests: {last}", flush=True)
    return None if problem is None else f"its tests: {problem}; {last}"


def run_op(root: Path, name: str, seconds: float) -> tuple[Any, str | None]:
    """Run one measurement and pass its lines on.

    Returns:
        What its JSON line holds, or None; why it did not come to its end, or None.
    """
    command = [sys.executable, "-u", "-m", f"benchmarks.ops.{name}"]
    lines, problem = _run(root, command, seconds, is_shown=True)
    record = _last_json(lines)
    if problem is None and record is None:
        problem = "it printed no JSON line"
    return record, problem


def _run(
    root: Path, command: Sequence[str], seconds: float, *, is_shown: bool
) -> tuple[list[str], str | None]:
    """Run a command.

    Returns:
        Its lines, which are passed on as they come if is_shown, JSON excepted; why it did not come
        to its end, or None.
    """
    if seconds <= 0:
        return [], "the time given by --seconds is spent"
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
            if is_shown and not line.startswith("{"):
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    if code == 0:
        return lines, None
    if time.monotonic() - start >= seconds:
        return lines, f"ended after its share of --seconds, {seconds:.0f} s"
    return lines, f"exit code {code}"


def _last_json(lines: Sequence[str]) -> Any:
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None
