"""`qnext chat`: talk with a model in the terminal, or answer the lines of a pipe."""

import argparse
import sys
from typing import TYPE_CHECKING

from qnext.cli.generation_options import add_generation_options, open_model, sampling_changes
from qnext.cli.stream_view import open_view

if TYPE_CHECKING:
    from qnext.engine.llm import LLM
    from qnext.engine.request import SamplingParams

HELP = "Commands: /new starts over, /exit leaves. Ctrl-C stops an answer; at the prompt it leaves."


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model. In a terminal answers come with a status line; from a "
        "pipe each line is a message, and the answers come alone. " + HELP,
    )
    parser.add_argument("--system", metavar="TEXT", help="system message that opens each talk")
    add_generation_options(parser, max_tokens=1024)


def run(args: argparse.Namespace) -> int:
    """Answer until the input ends; 0 then, 130 after Ctrl-C."""
    changes = sampling_changes(args)
    llm = open_model(args)
    params = llm.get_default_sampling_params(**changes)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        print(HELP)
    messages = _opening(args.system)
    while True:
        text = _read_message(is_terminal)
        if text is None or text == "/exit":
            return 0
        if text == "/new":
            messages = _opening(args.system)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                answer = _answer(llm, messages, params, args.show_accepted, is_terminal)
            except ValueError as error:
                if not is_terminal:
                    raise
                messages.pop()
                print(f"error: {error}; /new starts over", file=sys.stderr)
            else:
                messages.append({"role": "assistant", "content": answer})


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _read_message(is_terminal: bool) -> str | None:
    """The next message, None at the end of the input."""
    if is_terminal:
        try:
            return input("\n> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    llm: "LLM",
    messages: list[dict[str, str]],
    params: "SamplingParams",
    show_accepted: bool,
    is_terminal: bool,
) -> str:
    """Stream an answer; in a terminal Ctrl-C keeps what there is of it."""
    text = ""
    try:
        with open_view(show_accepted) as view:
            for chunk in llm.stream(llm.render_chat(messages), params):
                text = chunk.output.outputs[0].text
                view.write(chunk.segments, chunk.output.metrics)
    except KeyboardInterrupt:
        if not is_terminal:
            raise
    return text
