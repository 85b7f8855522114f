"""Run each GPU kernel once under NVIDIA's compute-sanitizer and list what it finds.

    python -m benchmarks.sanitize --tools memcheck racecheck

Takes one case of every test function of the Triton kernels: the small ones, which go through every
kernel with odd sizes and poisoned memory; `--real-sizes` adds those marked `gpu`. PyTorch's own
kernels are not looked at. Exits with 1 where an error was found, a test failed or none ran.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(.*)")
OUTCOME = re.compile(r"(\d+) passed")
RUNS_KERNELS = "triton_env"  # what tests of Triton kernels take their device from
FOUND = 99  # exit status of the sanitizer that tells its findings from a failed test


@dataclass(frozen=True)
class Finding:
    """One file's run under one tool."""

    tool: str
    file: str
    num_passed: int
    summary: str
    seconds: float
    is_clean: bool
    output: str


class OneOfEach:
    """A pytest plugin that keeps one case of every test function.

    Args:
        has_real_sizes: whether tests marked `gpu` are kept too.
    """

    def __init__(self, has_real_sizes: bool) -> None:
        self.has_real_sizes = has_real_sizes

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop the other cases."""
        first: dict[str, pytest.Item] = {}
        for item in items:
            if self.has_real_sizes or item.get_closest_marker("gpu") is None:
                first.setdefault(item.nodeid.partition("[")[0], item)
        items[:] = first.values()


def run_tests(file: str, has_real_sizes: bool) -> int:
    """One case of each test of a file, in this process."""
    arguments = ["-q", "-p", "no:cacheprovider", file]
    return int(pytest.main(arguments, plugins=[OneOfEach(has_real_sizes)]))


def examine(tool: str, file: Path, options: argparse.Namespace) -> Finding:
    """Run a file's tests under a tool."""
    own = [sys.executable, "-m", "benchmarks.sanitize", "--run", str(file)]
    command = [
        "compute-sanitizer",
        f"--tool={tool}",
        f"--error-exitcode={FOUND}",
        # Mangled names are C++: PyTorch's own kernels.
        "--kernel-name-exclude=kns=_ZN",
        *own,
        *(["--real-sizes"] if options.real_sizes else []),
    ]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=options.timeout,
            check=False,
        )
        output, status = done.stdout.decode(errors="replace"), done.returncode
    except subprocess.TimeoutExpired as expired:
        output, status = (expired.stdout or b"").decode(errors="replace"), -1
    seconds = time.perf_counter() - begin
    passed = OUTCOME.search(output)
    summaries = SUMMARY.findall(output)
    summary = summaries[-1].strip() if summaries else f"no summary, exit status {status}"
    if summaries and status not in (0, FOUND):
        summary += f"; the tests ended with status {status}"
    num_passed = int(passed.group(1)) if passed else 0
    is_clean = status == 0 and num_passed > 0
    return Finding(tool, file.name, num_passed, summary, seconds, is_clean, output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, examine, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck"])
    parser.add_argument("--files", nargs="*", help="parts of test files' names; all without")
    parser.add_argument("--real-sizes", action="store_true", help="tests marked gpu, too")
    parser.add_argument("--jobs", type=int, default=8, help="processes at once")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds of one process")
    parser.add_argument("--log", type=Path, help="where the whole output is written")
    parser.add_argument("--run", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        return run_tests(options.run, options.real_sizes)
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with CUDA's toolkit")
    tests = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    files = [file for file in tests if RUNS_KERNELS in file.read_text(encoding="utf-8")]
    wanted = options.files or [""]
    files = [file for file in files if any(part in file.name for part in wanted)]
    work = [(tool, file) for tool in options.tools for file in files]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(examine, tool, file, options) for tool, file in work]
        findings = [run.result() for run in runs]
    for each in findings:
        verdict = "clean" if each.is_clean else "NOT CLEAN"
        print(
            f"{each.tool:10} {each.file:42} {each.num_passed:3} passed {each.seconds:6.1f} s  "
            f"{verdict}: {each.summary}"
        )
    if options.log:
        parts = [f"=== {each.tool} {each.file}\n{each.output}" for each in findings]
        options.log.write_text("\n".join(parts), encoding="utf-8")
    return 0 if findings and all(each.is_clean for each in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
