"""The `qnext` command: finds the subcommand, imports only its module, turns errors into one line.

Nothing here imports torch, so that help and mistakes in the arguments show at once.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from qnext import __version__

# In the order shown by --help; each lives in qnext/cli/<name>.py with add_parser and run.
COMMANDS = {
    "generate": "continue a prompt with a model, streamed",
    "chat": "talk with a model in the terminal",
    "inspect": "draw a model, count its parameters and memory, check a checkpoint's names",
    "data": "turn texts into deduplicated, tokenised, memory-mapped shards",
    "train": "pretrain or fine-tune a model from a TOML file",
    "eval": "measure a checkpoint: bits per byte of texts",
    "bench": "measure kernels, serving and training on one GPU",
    "doctor": "show versions, CPU and GPU features, and the backend chosen for each op",
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, which --help shows."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit with 2."""
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Parser whose subcommand `command` is complete; the others are named with their help only."""
    parser = OneLineParser(
        prog="qnext", description="Qwen3-Next from corpus to text.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"qnext {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error arose, for a bug report"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == command:
            import_module(f"qnext.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 2 a mistake in the arguments or the files they name, 130 Ctrl-C; a command may
    return others. An error that is not the user's keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in arguments if argument in COMMANDS), None)
    args = build_parser(command).parse_args(arguments)
    module = import_module(f"qnext.cli.{args.command}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where the terminal's encoding lacks a character, it is replaced; the answer goes on.
        sys.stdout.reconfigure(errors="replace")
    try:
        return int(module.run(args) or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`qnext ... | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if args.traceback:
            raise
        print(f"qnext {args.command}: error: {describe(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


def describe(error: Exception) -> str:
    """An error as a person reads it: an OSError names its file, a missing package its extra."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ModuleNotFoundError):
        extras = {"tensorboard": "train", "datasketch": "train", "pyarrow": "train"}
        package = (error.name or "").partition(".")[0]
        if package in extras:
            return f"{package} is not installed; pip install 'qnext[{extras[package]}]'"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
