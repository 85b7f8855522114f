"""`qnext inspect`: sizes, memory and drawing of a model; its names against a list. No torch."""

import argparse
import json
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "inspect",
        help="draw a model, count its parameters and memory, check a checkpoint's names",
        description="Draw a model, count its parameters and memory, check a checkpoint's names. "
        "Of weights only the headers are read.",
    )
    parser.add_argument(
        "model", metavar="PATH|PRESET", help="a checkpoint's folder, a preset, or a hub id"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of the sequence whose memory is shown; default: the model's limit",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="NAMES",
        help="compare with a list of names and shapes (.tsv or .tsv.zst)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0, or 1 where weights, config.json or the list disagree."""
    from qnext.inspect.names import compare_shapes, read_names
    from qnext.inspect.summary import summarise

    expected = None if args.check is None else read_names(args.check)
    summary = summarise(args.model, args.context)
    check = None if expected is None else compare_shapes(expected, summary.shapes)
    if args.html is not None:
        from qnext.inspect.html import render_page

        args.html.write_text(render_page(summary), encoding="utf-8")
    if args.json:
        report = summary.as_dict()
        if check is not None:
            report["check"] = {
                "num_tensors": check.num_expected,
                "num_parameters": check.num_parameters,
                "differences": list(check.lines()),
            }
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        from qnext.inspect.stack import headline, render

        console = Console(highlight=False)
        console.print(headline(summary), soft_wrap=True)
        if check is None:
            console.print(render(summary))
        else:
            agreement = "differ from" if check else "agree with"
            console.print(
                f"{len(summary.shapes):,} names and shapes {agreement} {args.check.name}: "
                f"{check.num_expected:,} tensors, {check.num_parameters:,} parameters",
                style="red" if check else "green",
                soft_wrap=True,
            )
            for line in check.lines():
                console.print("  " + line, markup=False, soft_wrap=True)
        if args.html is not None:
            console.print(f"wrote {args.html}", markup=False, soft_wrap=True)
    return 1 if check or summary.comparison else 0
