"""`qnext eval`: bits per byte of texts, and how often MTP drafts agree with the model."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from qnext.io.hub import resolve_checkpoint


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a checkpoint: bits per byte of texts",
        description=(
            "Measure a model on texts. Bits per byte: each document starts from an empty state, "
            "the model reads up to --context tokens of it, and the bits of tokens 2 to n are "
            "divided by the UTF-8 bytes of these tokens; sums run over all documents of a file. "
            "With --windows first (the default), n is the number of tokens among the document's "
            "first --context ones, and what follows is not scored. With --windows all, the whole "
            "document is scored in consecutive pieces of --context tokens that share one token, "
            "so that every token but the document's first is scored once."
        ),
    )
    parser.add_argument("path", metavar="PATH", help="model folder or hub id")
    parser.add_argument(
        "--bpb",
        nargs="+",
        required=True,
        metavar="FILE",
        help="jsonl (key text), jsonl.zst, parquet or text files; one line of results each",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens per piece (2048)")
    parser.add_argument(
        "--windows",
        choices=("first", "all"),
        default="first",
        help="score the start of each document, or all of it (first)",
    )
    parser.add_argument(
        "--mtp",
        action="store_true",
        help="also the share of positions where the first draft, teacher-forced, is the token "
        "that the model itself finds most probable there",
    )
    parser.add_argument("--max-documents", type=int, help="read no more of each file")
    parser.add_argument("--batch-tokens", type=int, help="tokens of one forward pass")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="float32, bfloat16, int8, fp8 or auto = as stored (float32)",
    )
    parser.add_argument("--tokenizer", help="tokenizer folder; the model's own if not given")
    parser.add_argument("--json", action="store_true", help="one JSON object per file")


def run(args: argparse.Namespace) -> int:
    """Print one result per file."""
    for path in args.bpb:
        if not Path(path).is_file():
            raise ValueError(f"--bpb {path}: no such file")
    if args.context < 2:
        raise ValueError(f"--context {args.context}: must be at least 2")

    folder = resolve_checkpoint(args.path)
    from qnext.eval.loss import read_texts, score_texts
    from qnext.model.qwen3_next import Qwen3Next
    from qnext.runtime.device import resolve_device
    from qnext.tokenizer import load

    texts_of = {path: read_texts(path, args.max_documents) for path in args.bpb}
    device = resolve_device(args.device)
    model = Qwen3Next.from_pretrained(folder, dtype=args.dtype, device=device)
    tokenizer = load(args.tokenizer or folder)
    for path, texts in texts_of.items():
        then = time.perf_counter()
        report = score_texts(
            model,
            tokenizer,
            texts,
            context=args.context,
            windows=args.windows,
            max_batch_tokens=args.batch_tokens,
            with_mtp=args.mtp,
        )
        result: dict[str, Any] = {
            "file": path,
            "bits_per_byte": report.bits_per_byte,
            "documents": report.num_documents,
            "tokens": report.num_tokens,
            "bytes": report.num_bytes,
            "context": args.context,
            "windows": args.windows,
            "seconds": time.perf_counter() - then,
        }
        if report.mtp_agreement is not None:
            result["mtp_agreement"] = report.mtp_agreement
            result["mtp_positions"] = report.num_drafts
        print(json.dumps(result) if args.json else _line(result))
    return 0


def _line(result: dict[str, Any]) -> str:
    text = (
        f"{result['file']}: {result['bits_per_byte']:.4f} bits per byte, "
        f"{result['tokens']:,} tokens of {result['documents']:,} documents "
        f"({result['bytes']:,} bytes, context {result['context']:,}, {result['windows']})"
    )
    if "mtp_agreement" in result:
        text += f", first draft agrees at {result['mtp_agreement']:.2%}"
    return text
