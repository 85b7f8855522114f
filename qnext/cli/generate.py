"""`qnext generate`: continue a prompt, streamed."""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from qnext.cli.generation_options import add_generation_options, open_model, sampling_changes
from qnext.cli.stream_view import open_view

if TYPE_CHECKING:
    from qnext.engine.request import RequestOutput


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a model, streamed",
        description="Continue a prompt with a model. In a terminal the text comes with a status "
        "line; in a pipe it comes alone.",
    )
    parser.add_argument("prompt", help="text to continue; - reads it from standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_generation_options(parser, max_tokens=256)


def run(args: argparse.Namespace) -> int:
    """Generate and print; 0 unless interrupted."""
    changes = sampling_changes(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty; want at least one character")
    llm = open_model(args)
    params = llm.get_default_sampling_params(**changes)
    if args.json:
        (output,) = llm.generate(prompt, params)
        print(json.dumps(_as_json(output), ensure_ascii=False))
        return 0
    with open_view(args.show_accepted) as view:
        for chunk in llm.stream(prompt, params):
            view.write(chunk.segments, chunk.output.metrics)
    return 0


def _as_json(output: "RequestOutput") -> dict[str, Any]:
    completion, metrics = output.outputs[0], output.metrics
    return {
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": metrics.num_prompt_tokens,
        "num_generated_tokens": metrics.num_generated_tokens,
        "time_to_first_token_s": metrics.time_to_first_token,
        "tokens_per_second": metrics.tokens_per_second(time.monotonic()),
        "num_windows": metrics.num_windows,
        "num_draft_tokens": metrics.num_draft_tokens,
        "num_accepted_tokens": metrics.num_accepted_tokens,
    }
