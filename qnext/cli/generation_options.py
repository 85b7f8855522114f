"""Options that `generate` and `chat` share: the model, the sampling, and early refusals."""

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext.config.model import DTYPES
from qnext.engine.request import SamplingParams, check_drafts
from qnext.io.hub import resolve_checkpoint

if TYPE_CHECKING:
    from qnext.engine.llm import LLM

# Options that go to SamplingParams under their own name; None leaves the model's default.
_SAMPLING_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "stop",
    "seed",
    "ignore_eos",
)


def add_generation_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add the options of model and sampling.

    Args:
        max_tokens: default length of an answer.
    """
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", default="nano", help="nano, a checkpoint folder, or a hub id (default: nano)")
    add(
        "--dtype",
        type=_dtype,
        default="auto",
        help="float32, bfloat16, float16, int8 (CPU), fp8 (GPU) or auto (default)",
    )
    add("--device", type=_device, default="auto", help="cpu, cuda, cuda:N or auto (default)")
    add(
        "--num-threads",
        type=_at_least(1),
        metavar="N",
        help="CPU threads (default: torch's choice)",
    )
    add(
        "--max-model-len",
        type=_at_least(2),
        metavar="N",
        help="tokens of prompt and answer together",
    )
    add(
        "--num-speculative-tokens",
        type=_drafts,
        default="auto",
        metavar="K",
        help="tokens drafted per step, 0 for none; auto (default) picks the fastest",
    )
    sampling = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    add = sampling.add_argument
    add("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default: {max_tokens}")
    add("--temperature", type=float, metavar="T", help="0 always takes the most probable token")
    add("--top-p", type=float, metavar="P", help="smallest set that reaches this probability")
    add("--top-k", type=int, metavar="K", help="most probable K tokens; 0 for all")
    add("--min-p", type=float, metavar="P", help="at least this share of the largest probability")
    add("--presence-penalty", type=float, metavar="X", help="against any token used before")
    add("--frequency-penalty", type=float, metavar="X", help="the same, times how often")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: against repetition")
    add("--seed", type=int, help="repeats sampled text, with a fixed --num-speculative-tokens")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add("--ignore-eos", action="store_const", const=True, help="go on past the end token")
    parser.add_argument(
        "--show-accepted", action="store_true", help="tint tokens that were accepted drafts"
    )


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling parameters given on the command line.

    Raises:
        ValueError: one is out of range; found without loading anything.
    """
    given = {name: getattr(args, name) for name in _SAMPLING_NAMES}
    changes = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**changes)
    return changes


def open_model(args: argparse.Namespace) -> "LLM":
    """Load the model; a folder that is not there is named before torch is imported."""
    folder: Path = resolve_checkpoint(args.model)
    from qnext.engine.llm import LLM
    from qnext.runtime.log import setup_logging

    # What the engine chose is shown; which kernel ran each op is `qnext doctor`'s to tell.
    setup_logging(logging.WARNING)
    logging.getLogger("qnext.engine").setLevel(logging.INFO)
    return LLM(
        folder,
        dtype=args.dtype,
        device=args.device,
        num_threads=args.num_threads,
        max_model_len=args.max_model_len,
        max_num_seqs=1,
        num_speculative_tokens=args.num_speculative_tokens,
    )


def _dtype(text: str) -> str:
    """Read --dtype."""
    if text.removeprefix("torch.") not in ("auto", "int8", "fp8", *DTYPES):
        allowed = ", ".join(("auto", "int8", "fp8", *DTYPES))
        raise argparse.ArgumentTypeError(f"dtype is {text!r}; want {allowed}")
    return text


def _device(text: str) -> str:
    """Read --device; whether the machine has it is found when the model is loaded."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"device is {text!r}; want auto, cpu, cuda or cuda:N")
    return text


def _at_least(low: int) -> Callable[[str], int]:
    """Reader of an integer that is no smaller."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is too small; want at least {low}")
        return value

    return integer


def _drafts(text: str) -> int | str:
    """Read --num-speculative-tokens."""
    value: int | str = int(text) if text.lstrip("-").isdigit() else text
    try:
        check_drafts(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value
