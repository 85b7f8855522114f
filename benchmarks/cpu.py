"""Speed, memory and start-up on a CPU, beside transformers and llama.cpp with the same weights.

    python -m benchmarks.cpu --models nano bench-nano --repeats 5 --json cpu.json
    python -m benchmarks.cpu --models nano --engines qnext --cells decode-1 drafts

A cell is prefill-N (a prompt of N tokens and its first token), decode-N (N sequences, after their
first tokens), memory, start or drafts. nano is the shipped model; another preset gets random
weights. Every engine runs in a process of its own and they take turns. What cannot be measured is
listed with its reason. llama.cpp comes from llama-cpp-python, built for this machine:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.contenders import (
    ENGINES,
    SHIPPED,
    WIDTHS,
    Cell,
    Machine,
    ModelFiles,
    contenders,
)
from benchmarks.drafts import measure_drafts
from benchmarks.rates import Results, Work, measure_memory, measure_model, measure_start
from benchmarks.report import environment, print_report
from qnext.runtime.env import num_usable_cores

MODELS = (SHIPPED, "bench-nano", "bench-small")
SECTIONS = ("memory", "start", "drafts")
CELLS = ("prefill-512", "prefill-2048", "prefill-8192", "decode-1", "decode-8", *SECTIONS)
START_WIDTH = "bfloat16"
START_REPEATS = 3
TEXTS = Path("pretrain") / "en_val.jsonl.zst"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: an unknown cell.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=(__doc__ or "").partition("\n\n")[0]
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help="nano, presets or checkpoint folders")
    add(
        "--cells", nargs="+", default=list(CELLS), help="prefill-N, decode-N, memory, start, drafts"
    )
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="who is measured")
    add("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="of the weights")
    add("--threads", type=int, default=min(2, num_usable_cores()), help="CPU threads of each")
    add("--repeats", type=int, default=5, help="rounds; the median is reported")
    add("--tokens", type=int, default=128, help="tokens decoded per sequence")
    add("--prompt-tokens", type=int, default=32, help="tokens before decoding")
    add("--drafts", nargs="+", default=["0", "1", "2", "auto"], help="drafts per step")
    add("--draft-width", choices=WIDTHS[:3], default="bfloat16", help="of the weights, with drafts")
    add("--draft-prompts", type=int, default=20, help="texts to go on from")
    add("--draft-texts", type=Path, help=f"jsonl.zst of prose; default $QNEXT_DATA/{TEXTS}")
    add("--llama-python", metavar="PATH", help="interpreter that has llama_cpp, if not this one")
    add("--work-dir", type=Path, help="where models are exported to and kept; default temporary")
    add("--no-parity", action="store_true", help="don't compare logits first")
    add("--json", type=Path, metavar="FILE", help="write the last line there too")
    args = parser.parse_args(argv)
    for text in args.cells:
        if text not in SECTIONS and Cell.parse(text) is None:
            parser.error(f"--cells {text}: want prefill-N, decode-N, {', '.join(SECTIONS)}")
    if min(args.repeats, args.tokens, args.threads, args.prompt_tokens) < 1:
        parser.error("--repeats, --tokens, --prompt-tokens and --threads are 1 at least")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parse_arguments(argv)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.models:
            measure(args, name, folder, results)
    where = {**environment(args.threads), "peers": results.peers}
    for name, version in results.peers.items():
        print(f"{name}: {version}")
    record = print_report(results.measurements, where, results.skipped)
    if args.json is not None:
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace, name: str, folder: Path, results: Results) -> None:
    """All cells of one model."""
    pythons = {"llama_cpp": args.llama_python} if args.llama_python else {}
    machine = Machine(args.threads, pythons)
    files = ModelFiles(name, folder, machine)
    work = Work(files, machine, args.repeats, args.tokens, args.prompt_tokens)
    cells = [cell for cell in map(Cell.parse, args.cells) if cell is not None]
    who = contenders(args.engines, args.widths)
    if cells:
        measure_model(work, who, cells, results, parity=not args.no_parity)
    if "memory" in args.cells:
        measure_memory(work, who, results)
    if "start" in args.cells:
        quick = replace(work, repeats=min(args.repeats, START_REPEATS))
        measure_start(quick, contenders(args.engines, [START_WIDTH]), results)
    if "drafts" in args.cells and files.encode is not None:
        texts = args.draft_texts or draft_texts()
        if texts is None:
            reason = "QNEXT_DATA is not set and --draft-texts not given"
            results.skip(f"{files.name} drafts", reason)
        else:
            width, count = args.draft_width, args.draft_prompts
            measure_drafts(work, width, args.drafts, texts, count, results)


def draft_texts() -> Path | None:
    """Validation texts in the shared data, if their place is known."""
    data = os.environ.get("QNEXT_DATA")
    return Path(data) / TEXTS if data else None


if __name__ == "__main__":
    main()
