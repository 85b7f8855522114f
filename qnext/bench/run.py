"""One run of `qnext bench`: its parts in order, and where the numbers came from."""

import json
import shlex
import sys
from typing import Any

import torch

from qnext.bench.anchors import CARD, SOURCE
from qnext.bench.budget import Budget
from qnext.bench.kernels import checkout_root, run_kernels
from qnext.bench.models import free_memory
from qnext.bench.options import PARTS, BenchOptions
from qnext.bench.report import Table
from qnext.bench.serve import run_serve
from qnext.bench.train import run_train
from qnext.io.json_file import write_json
from qnext.runtime.device import resolve_device
from qnext.runtime.env import cpu_info, git_revision, package_version


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, revision and command."""
    root = checkout_root()
    is_gpu = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if is_gpu else cpu_info().name,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "revision": git_revision(root) if root is not None else None,
        "command": shlex.join(["qnext", *sys.argv[1:]]),
    }


def run_bench(options: BenchOptions) -> int:
    """Measure the parts that were asked for; print tables, and last one line of JSON.

    The line comes also when a part fails or Ctrl-C ends the run, with what was measured until then.

    Returns:
        0 when something was measured, else 1.

    Raises:
        ValueError: no GPU and not options.is_small, or a cell that does not exist.
    """
    device = resolve_device(options.device)
    if device.type != "cuda" and not options.is_small:
        raise ValueError("there is no CUDA device; --small measures tiny sizes on a CPU")
    where = environment(device)
    print(f"{where['card']}, torch {where['torch']}, triton {where['triton']}")
    print(f"revision {where['revision'] or 'unknown'}: {where['command']}")
    print(f"limits, aims and vLLM's figures are those of one {CARD}")
    parts = [part for part in PARTS if part in (options.parts or PARTS)]
    budget = Budget(options.seconds, len(parts))
    tables = {part: Table() for part in parts}
    try:
        for part in parts:
            try:
                measure_part(part, tables[part], options, device, budget.next_seconds())
            except torch.OutOfMemoryError as error:
                tables[part].skip(part, str(error).splitlines()[0])
            free_memory(device)
    finally:
        if any(table.rows or table.skipped or table.facts for table in tables.values()):
            records = {part: table.record() for part, table in tables.items()}
            record = {**where, "anchors": SOURCE, "parts": records}
            print("\n" + json.dumps(record), flush=True)
            if options.json_path is not None:
                write_json(options.json_path, record)
    return 0 if any(table.rows or table.facts.get("ops") for table in tables.values()) else 1


def measure_part(
    part: str, table: Table, options: BenchOptions, device: torch.device, seconds: float
) -> None:
    """Fill the table of one part."""
    if part == "serve":
        run_serve(table, options, device, seconds)
    elif part == "train":
        run_train(table, options, device, seconds)
    elif device.type == "cuda":
        run_kernels(table, options.ops, seconds, runs_tests=not options.is_untested)
    else:
        table.title("kernels")
        table.skip("kernels", "there is no CUDA device")
