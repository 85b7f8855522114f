"""What Multi-Token Prediction brings and costs on this machine, with trained weights.

Acceptance at a depth is the share of windows in which that draft and all before it stood, so that
a step with k drafts yields 1 + the sum of them; it pays if that is more than its time over the time
of a plain step. The break-even acceptance is the chance of each draft, given those before it, at
which both are equal: 1 + a + ... + a^k.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.peers.process import PeerError, WorkerProcess
from benchmarks.rates import Results, Work
from benchmarks.report import Measurement
from qnext.eval.loss import read_texts

TEMPERATURES = (0.0, 0.7)
PROMPT_TOKENS = 64
WARM_PROMPTS = 2
SEED = 2025

Answer = dict[str, Any]


def measure_drafts(
    work: Work, width: str, counts: Sequence[str], texts: Path, num_prompts: int, results: Results
) -> None:
    """Write after prompts of prose with each number of drafts, greedy and sampled."""
    name = f"{work.files.name} drafts"
    contender = Contender("qnext", width)
    try:
        prompts = prose_prompts(work, texts, num_prompts)
        with ExitStack() as stack:
            workers = {
                count: stack.enter_context(_start(work, contender, count)) for count in counts
            }
            for temperature in TEMPERATURES:
                answers = _take_turns(work, workers, prompts, temperature)
                labels = contender.labels(work.files.name, "drafts")
                results.measurements += summarise(name, temperature, answers, labels)
    except (PeerError, ValueError) as reason:
        results.skip(name, reason)


def prose_prompts(work: Work, texts: Path, count: int) -> list[list[int]]:
    """Tokens from the middle of each text: titles and tables of contents stand at the start.

    Raises:
        ValueError: no such file, or a model without a tokenizer.
    """
    encode = work.files.encode
    if encode is None:
        raise ValueError(f"{work.files.name} has no tokenizer for prompts of prose")
    middles = [
        text[len(text) // 2 :].partition(" ")[2] for text in islice(read_texts(texts), count)
    ]
    return [encode(text[: 16 * PROMPT_TOKENS])[:PROMPT_TOKENS] for text in middles]


def _start(work: Work, contender: Contender, count: str) -> WorkerProcess:
    return contender.start(
        work.files,
        work.machine,
        max_tokens=PROMPT_TOKENS + work.num_tokens + 2,
        max_seqs=1,
        drafts=count if count == "auto" else int(count),
    )


def _take_turns(
    work: Work,
    workers: dict[str, WorkerProcess],
    prompts: Sequence[Sequence[int]],
    temperature: float,
) -> dict[str, list[Answer]]:
    """Answers of each number of drafts, one a round.

    Raises:
        ValueError: greedy text differs between two numbers of drafts.
    """
    answers: dict[str, list[Answer]] = {count: [] for count in workers}
    options = {"num_tokens": work.num_tokens, "temperature": temperature, "seed": SEED}
    for worker in workers.values():
        worker.ask("drafts", prompts=prompts[:WARM_PROMPTS], **options)
    for _ in range(work.repeats):
        for count, worker in workers.items():
            answers[count].append(worker.ask("drafts", prompts=prompts, **options))
    if temperature == 0:
        check_equal_text({count: found[0]["token_ids"] for count, found in answers.items()})
    return answers


def check_equal_text(written: dict[str, list[list[int]]]) -> None:
    """Speed counts only on right answers: every number of drafts must give the same tokens.

    Raises:
        ValueError: two differ, with their names.
    """
    first = next(iter(written))
    for count, tokens in written.items():
        if tokens != written[first]:
            raise ValueError(f"greedy tokens with k = {count} differ from those with k = {first}")


def summarise(
    name: str, temperature: float, answers: dict[str, list[Answer]], labels: dict[str, str]
) -> list[Measurement]:
    """Rates, acceptance and costs; costs are multiples of a step without drafts, same round."""
    way = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    plain = [answer["seconds"] / answer["num_steps"] for answer in answers.get("0", ())]
    measurements = []

    def add(what: str, unit: str, values: Sequence[float], note: str = "", base: str = "") -> None:
        full = f"{name}, {way}, {what}"
        baseline = f"{name}, {way}, {base}" if base else None
        measurements.append(Measurement(full, unit, tuple(values), baseline, note, labels))

    for count, found in answers.items():
        base = "k = 0" if count != "0" and plain else ""
        add(f"k = {count}", "tok/s", [_rate(answer) for answer in found], _note(found[0]), base)
        for depth in range(len(found[0]["drafted"]) if count != "auto" else 0):
            shares = [100 * a["accepted"][depth] / a["drafted"][depth] for a in found]
            add(f"k = {count}, accepted at depth {depth + 1}", "%", shares)
    for count, found in answers.items():
        if count in ("0", "auto") or not plain:
            continue
        num_drafts = int(count)
        pairs = list(zip(found, plain, strict=True))
        steps = [a["seconds"] / a["num_steps"] / t for a, t in pairs]
        # Kernel times against a plain step's kernel, whatever goes on around them.
        kernels = [a["window_seconds"] for a in answers["0"]]
        drafts = [a["draft_seconds"] / t for a, t in zip(found, kernels, strict=True)]
        windows = [a["window_seconds"] / t for a, t in zip(found, kernels, strict=True)]
        add(f"k = {count}, one step", "plain steps", steps)
        add(f"k = {count}, one draft", "plain steps", drafts)
        add(f"k = {count}, window of {num_drafts + 1} rows", "plain steps", windows)
        even = [100 * break_even(cost, num_drafts) for cost in steps]
        add(f"k = {count}, break-even acceptance", "%", even)
    return measurements


def _rate(answer: Answer) -> float:
    return _num_written(answer) / float(answer["seconds"])


def _num_written(answer: Answer) -> int:
    """Tokens after the first one of each answer, which the prompt's own pass wrote."""
    return sum(len(ids) - 1 for ids in answer["token_ids"])


def _note(answer: Answer) -> str:
    """Tokens of a step; for a varying number of drafts, how often each was chosen."""
    parts = [f"{_num_written(answer) / answer['num_steps']:.2f} tokens a step"]
    if len(answer["steps_by_drafts"]) > 1:
        counted = sorted(answer["steps_by_drafts"].items())
        parts.append("steps " + ", ".join(f"k={k}: {n}" for k, n in counted))
    return "; ".join(parts)


def break_even(cost: float, num_drafts: int) -> float:
    """Acceptance a with 1 + a + ... + a^k = cost; above 1 if no acceptance can pay for it.

    Args:
        cost: time of a step with drafts, in steps without.
        num_drafts: k.
    """
    low, high = 0.0, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        if sum(middle**power for power in range(num_drafts + 1)) < cost:
            low = middle
        else:
            high = middle
    return statistics.fmean((low, high))
