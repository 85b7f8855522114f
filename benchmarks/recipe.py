"""Speed of a training run on several sets of kernels: tokens per second over some minutes of each.

    python -m benchmarks.recipe configs/nano/train.toml --minutes 5 \
        --contenders fastest:eager fastest:compile torch:compile --set data.shards=/tmp/shards

A contender is a backend, "fastest" for what dispatch chooses by itself, and whether layers are
compiled. Each runs the file's own recipe in a process of its own, without evaluation, samples and
checkpoints, into a folder that is deleted afterwards; compilation counts as part of its minutes but
not of its speed, which is the median over the log's points after the first ones.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.report import Measurement, Skipped, environment, print_report
from qnext.cli.main import main as qnext_main
from qnext.cli.train import STOPPED
from qnext.kernels.dispatch import BACKENDS, use_backend

FASTEST, MODES = "fastest", ("eager", "compile")
WARM_UP_POINTS = 2  # of the log: compilation, and the first reading of the shards
NEVER = 10**9


def settings(mode: str, minutes: float, changes: Sequence[str], output: Path) -> list[str]:
    """Options of `qnext train` for one contender; `changes` come last, so they win."""
    fixed = {
        "output": json.dumps(str(output)),
        "max_minutes": str(minutes),
        "runtime.compile": "true" if mode == "compile" else "false",
        "data.validation": "{}",
        "log.eval_every_steps": "0",
        "log.sample_every_steps": "0",
        "log.checkpoint_every_steps": str(NEVER),
        "log.tensorboard": "false",
    }
    options = [f"{key}={value}" for key, value in fixed.items()]
    return _as_options([*options, *changes])


def _as_options(changes: Sequence[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def train(file: str, backend: str, options: Sequence[str]) -> int:
    """Run `qnext train` on one backend, in this process."""
    with nullcontext() if backend == FASTEST else use_backend(backend):
        return qnext_main(["train", file, "--quiet", *options])


def rates_of(log: Path) -> tuple[float, ...]:
    """Tokens per second of the log's points, in order, without the first ones."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = [record for record in records if record["kind"] == "train"]
    return tuple(float(point["tokens_per_second"]) for point in points)[WARM_UP_POINTS:]


def measure(args: argparse.Namespace, contender: str) -> Measurement | Skipped:
    """One contender in a process of its own."""
    backend, mode = contender.split(":")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        options = settings(mode, args.minutes, args.set, output)
        command = [sys.executable, "-m", "benchmarks.recipe", args.file, "--child", backend]
        done = subprocess.run([*command, *options], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode not in (0, STOPPED):
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return Skipped(contender, last)
        rates = rates_of(output / "log.jsonl")
    if not rates:
        return Skipped(contender, f"{args.minutes} minutes were over before the log's third point")
    return Measurement(contender, "tok/s", rates, note=f"{len(rates)} points of the log")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="speed of a training run on sets of kernels")
    add = parser.add_argument
    add("file", metavar="CONFIG.toml")
    add("--minutes", type=float, default=5.0, help="of each contender")
    add("--contenders", nargs="+", default=["fastest:eager", "fastest:compile", "torch:compile"])
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as of qnext train")
    add("--child", metavar="BACKEND", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes}; want more than 0")
    for contender in args.contenders:
        backend, _, mode = contender.partition(":")
        if backend not in (FASTEST, *BACKENDS) or mode not in MODES:
            known = ", ".join((FASTEST, *BACKENDS))
            parser.error(f"{contender!r}: want one of {known}, a colon, and {' or '.join(MODES)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every contender, then print all of them."""
    args = parse(arguments)
    if args.child:
        return train(args.file, args.child, _as_options(args.set))
    results = [measure(args, contender) for contender in args.contenders]
    found = [result for result in results if isinstance(result, Measurement)]
    skipped = [result for result in results if isinstance(result, Skipped)]
    print_report(found, environment(torch.get_num_threads()), skipped)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
