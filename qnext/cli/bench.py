"""`qnext bench`: speed of kernels, serving and training on one GPU."""

import argparse
from pathlib import Path

from qnext.bench.options import (
    PARTS,
    SERVE_CELLS,
    SERVE_DTYPES,
    TRAIN_CELLS,
    BenchOptions,
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    defaults = BenchOptions()
    parser = subparsers.add_parser(
        "bench",
        help="measure kernels, serving and training on one GPU",
        description=(
            "Measure kernels, serving and training on one GPU, with random weights of the 80B-A3B "
            "sizes and fewer layers. Rows are printed as they are measured, beside the limit of "
            "the machine and other engines; the last line is JSON. docs/benchmarks.md says what "
            "each number means."
        ),
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none is named")
    add("--seconds", type=float, default=defaults.seconds, help="for the whole run (540)")
    add("--repeats", type=int, default=defaults.repeats, help="rounds of a cell, in time (3)")
    add("--small", action="store_true", help="a tiny model and tiny sizes, also on a CPU")
    add("--device", default=defaults.device, help="auto, cpu, cuda or cuda:N (auto)")
    add("--json", type=Path, metavar="FILE", help="write the JSON there too")
    add("--peer", choices=("transformers",), help="measure it too, after ours has left the memory")
    kernels = parser.add_argument_group("kernels").add_argument
    kernels("--ops", nargs="+", default=[], metavar="OP", help="modules of benchmarks/ops")
    kernels("--untested", action="store_true", help="do not run their tests first")
    serve = parser.add_argument_group("serve").add_argument
    serve(
        "--cells",
        nargs="+",
        default=[],
        metavar="CELL",
        help=f"start, prefill-TOKENS, decode-SEQUENCESxTOKENS, steps-SEQUENCES; default "
        f"{' '.join(SERVE_CELLS)}",
    )
    serve("--layers", type=int, default=defaults.layers, help="of the model (12)")
    serve("--dtype", choices=SERVE_DTYPES, default=defaults.dtype, help="of its weights (bfloat16)")
    serve("--tokens", type=int, help="decoded for each sequence of a decode cell (128)")
    serve("--max-drafts", type=int, default=defaults.max_drafts, help="of a steps cell (4)")
    serve("--chunk-tokens", type=int, help="rows in which prompts are fed; else the engine's own")
    serve("--cold", action="store_true", help="start with an empty folder of compiled kernels")
    train = parser.add_argument_group("train").add_argument
    train(
        "--train-cells",
        nargs="+",
        default=[],
        metavar="CELL",
        help=f"TOKENS or TOKENSxCONTEXT, of one pass; default {' '.join(TRAIN_CELLS)}",
    )
    train("--train-layers", type=int, default=defaults.train_layers, help="of the model (4)")
    train(
        "--moments",
        choices=("8bit", "bf16"),
        default=defaults.moments,
        help="of AdamW (8bit)",
    )
    train(
        "--checkpointing",
        choices=("auto", "off", "cheap", "on"),
        default=defaults.checkpointing,
        help="recompute nothing, norms and gates, or layers in the backward pass; auto: the first "
        "for which memory is enough",
    )
    train("--accumulate", type=int, default=defaults.accumulate, help="passes per update (1)")
    train("--compile", action="store_true", help="compile the layers with torch.compile")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when something was measured, else 1."""
    options = BenchOptions(
        parts=tuple(args.parts),
        seconds=args.seconds,
        repeats=args.repeats,
        is_small=args.small,
        device=args.device,
        json_path=args.json,
        peer=args.peer,
        ops=tuple(args.ops),
        is_untested=args.untested,
        cells=tuple(args.cells),
        layers=args.layers,
        dtype=args.dtype,
        decode_tokens=args.tokens,
        max_drafts=args.max_drafts,
        chunk_tokens=args.chunk_tokens,
        is_cold=args.cold,
        train_cells=tuple(args.train_cells),
        train_layers=args.train_layers,
        moments=args.moments,
        checkpointing=args.checkpointing,
        accumulate=args.accumulate,
        compile=args.compile,
    )
    from qnext.bench.run import run_bench

    return run_bench(options)
