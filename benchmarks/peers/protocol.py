"""What every worker speaks: a JSON job on stdin opens the model, each further line asks one thing.

Only the standard library is imported here, since each worker runs in its engine's environment. A
rate means the same for all: prefill is the time of a prompt and its first token; decode is the time
from when all sequences have their first token to the end.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

Answer = dict[str, Any]
Variant = Mapping[str, Any]


class Unsupported(Exception):
    """This engine cannot do this; the text says why. The peer is skipped, with the reason."""


class Peer(Protocol):
    """A model opened by one engine. Token ids in and out; all choices of tokens are greedy."""

    info: Answer
    """Versions and build, for the report."""

    def prefill(self, prompt: list[int], variant: Variant) -> float:
        """Seconds until the first token after the prompt."""
        ...

    def decode(
        self, prompts: list[list[int]], num_tokens: int, variant: Variant
    ) -> tuple[float, float, list[list[int]]]:
        """Write a first token and `num_tokens` more after each prompt, all sequences together.

        Returns:
            Seconds in all; those after the last of the first tokens; the tokens of each sequence.
        """
        ...

    def logits(self, prompt: list[int]) -> list[float]:
        """Logits after the last token of the prompt, as exact as the engine can. [W]"""
        ...


def serve(open_peer: Callable[[Answer], Peer], extras: Mapping[str, Any] | None = None) -> None:
    """Answer lines until stdin ends.

    Args:
        open_peer: imports the engine and opens the model of a job; sets `import_seconds` in it.
        extras: commands of this engine alone, by name: functions of (peer, command).
    """
    answers = _claim_stdout()
    job = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    try:
        peer = open_peer(job)
    except Unsupported as reason:
        _send(answers, {"unsupported": str(reason)})
        return
    seconds = time.perf_counter() - start
    import_seconds = job.get("import_seconds", 0.0)
    opened = {"import_seconds": import_seconds, "open_seconds": seconds - import_seconds}
    _send(answers, {**opened, "info": peer.info})
    for line in sys.stdin:
        try:
            answer = _answer(peer, json.loads(line), extras or {})
        except Unsupported as reason:
            answer = {"unsupported": str(reason)}
        _send(answers, answer)


def timed_import(job: Answer, load: Callable[[], Any]) -> Any:
    """Run an import of the engine and note its time in the job.

    Raises:
        Unsupported: the engine is not installed here.
    """
    start = time.perf_counter()
    try:
        module = load()
    except ImportError as error:
        raise Unsupported(f"{Path(sys.executable)} cannot import it: {error}") from error
    job["import_seconds"] = time.perf_counter() - start
    return module


def peak_memory_bytes() -> int:
    """Most memory that this process ever had resident, its program and libraries included."""
    try:
        # Not ru_maxrss first: Linux carries that over from the process that started this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _answer(peer: Peer, command: Answer, extras: Mapping[str, Any]) -> Answer:
    variant = command.get("variant", {})
    match command["do"]:
        case "prefill":
            return {"seconds": peer.prefill(command["prompt"], variant)}
        case "decode":
            found = peer.decode(command["prompts"], command["num_tokens"], variant)
            return dict(zip(("total_seconds", "seconds", "token_ids"), found, strict=True))
        case "logits":
            return {"logits": peer.logits(command["prompt"])}
        case "memory":
            return {"peak_bytes": peak_memory_bytes()}
        case name:
            answer: Answer = extras[name](peer, command)
            return answer


def _claim_stdout() -> TextIO:
    """Keep stdout for answers; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _send(answers: TextIO, answer: Answer) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
