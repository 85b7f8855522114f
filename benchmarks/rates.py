"""Rates, agreement, memory and start-up of contenders with one model; drafts are elsewhere."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.contenders import Cell, Contender, Machine, ModelFiles, Variant
from benchmarks.peers.process import PeerError, WorkerProcess
from benchmarks.prompts import decode_prompts, random_ids
from benchmarks.report import Measurement, Skipped

PILOT_TOKENS = 16  # decoded to choose a variant
PILOT_PROMPT = 2048  # tokens of a prompt, at most, to choose a variant
PARITY_PROMPT = 64
EQUAL_TOKENS = 8  # that float32 engines should write alike
START_PROMPT = 16
# Widths whose contenders take turns with one another.
TOGETHER = (("float32",), ("bfloat16",), ("int8", "q4"))
MEMORY_PROMPT = 2048
# Of the spread of the logits. Seen: 4e-5; bfloat16 activations alone move them by 1e-2 and more.
FLOAT32_TOLERANCE = 1e-3


@dataclass
class Results:
    """Everything found so far."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)  # versions and builds

    def skip(self, name: str, reason: object) -> None:
        """Note and say at once what is left out."""
        self.skipped.append(Skipped(name, str(reason)))
        print(f"not measured: {name}: {reason}", flush=True)


@dataclass(frozen=True)
class Work:
    """What is run: sizes common to all contenders."""

    files: ModelFiles
    machine: Machine
    repeats: int
    num_tokens: int  # decoded per sequence
    prompt_tokens: int  # before decoding

    def prompts(self, cell: Cell) -> list[list[int]]:
        """Token ids of a cell."""
        vocab_size = self.files.config.vocab_size
        if cell.kind == "prefill":
            return [random_ids(cell.size, vocab_size)]
        return decode_prompts(cell.size, self.prompt_tokens, vocab_size, self.files.encode)

    def max_tokens(self, cells: Sequence[Cell]) -> int:
        """Tokens of the longest sequence."""
        prefill = [cell.size for cell in cells if cell.kind == "prefill"]
        longest = max([*prefill, self.prompt_tokens + self.num_tokens, PARITY_PROMPT])
        return longest + 2


@dataclass
class Runner:
    """A contender with its process."""

    contender: Contender
    worker: WorkerProcess
    chosen: dict[Cell, Variant] = field(default_factory=dict)
    written: dict[Cell, list[list[int]]] = field(default_factory=dict)  # token ids, last run


def measure_model(
    work: Work, who: Sequence[Contender], cells: Sequence[Cell], results: Results, parity: bool
) -> None:
    """Compare logits, then let the contenders take turns at the cells.

    Equal widths are in memory together, and taking turns, since they are compared; all at once
    would not fit.
    """
    reference: list[float] | None = None
    for widths in TOGETHER:
        with ExitStack() as stack:
            group = [contender for contender in who if contender.width in widths]
            runners = list(_open_all(work, group, cells, results, stack))
            if parity:
                reference = measure_parity(work, runners, reference, results)
            results.measurements += measure_rates(work, runners, cells, results)


def _open_all(
    work: Work,
    who: Sequence[Contender],
    cells: Sequence[Cell],
    results: Results,
    stack: ExitStack,
) -> Iterator[Runner]:
    max_seqs = max([cell.size for cell in cells if cell.kind == "decode"], default=1)
    max_tokens = work.max_tokens(cells)
    for contender in who:
        try:
            worker = contender.start(
                work.files, work.machine, max_tokens=max_tokens, max_seqs=max_seqs
            )
        except PeerError as reason:
            results.skip(f"{work.files.name}, {contender.name}", reason)
            continue
        results.peers.update(worker.opened["info"])
        yield Runner(contender, stack.enter_context(worker))


def measure_parity(
    work: Work, runners: Sequence[Runner], reference: list[float] | None, results: Results
) -> list[float] | None:
    """Largest difference of the last logits from qnext's float32, over their spread.

    Args:
        reference: the logits to compare with, once they are known.

    Returns:
        The reference; None if there is none.

    Raises:
        ValueError: another engine's float32 differs by more than rounding: speed counts only on
            right answers.
    """
    prompt = random_ids(PARITY_PROMPT, work.files.config.vocab_size)
    for contender, worker in ((runner.contender, runner.worker) for runner in runners):
        name = f"{work.files.name} logits, {contender.name}"
        try:
            logits = worker.ask("logits", prompt=prompt)["logits"]
        except PeerError as reason:
            results.skip(name, reason)
            continue
        if contender == Contender("qnext", "float32"):
            reference = logits
            continue
        if reference is None:
            results.skip(name, "no logits of qnext float32 to compare with")
            continue
        expected = np.array(reference)
        distance = float(np.abs(np.array(logits) - expected).max() / expected.std())
        if contender.width == "float32" and distance > FLOAT32_TOLERANCE:
            raise ValueError(
                f"{name} differ from qnext's by {distance:.1e} of their spread; "
                f"want {FLOAT32_TOLERANCE:.0e} at most"
            )
        labels = contender.labels(work.files.name, "parity")
        note = "largest difference from qnext float32"
        results.measurements.append(Measurement(name, "std", (distance,), None, note, labels))
    return reference


def measure_rates(
    work: Work, runners: Sequence[Runner], cells: Sequence[Cell], results: Results
) -> list[Measurement]:
    """Tokens per second; the contenders take turns, so that a disturbance falls on all of them."""
    values: dict[tuple[Cell, Contender], list[float]] = {}
    turns = [(cell, runner) for cell in cells for runner in runners]
    for cell, runner in list(turns):
        try:
            runner.chosen[cell] = choose_variant(work, runner, cell)
        except PeerError as reason:
            results.skip(f"{work.files.name} {cell.name}, {runner.contender.name}", reason)
            turns.remove((cell, runner))
    check_beginnings(runners)
    for _ in range(work.repeats):
        for cell, runner in list(turns):
            try:
                rate = run_cell(work, runner, cell, runner.chosen[cell])
            except PeerError as reason:
                results.skip(f"{work.files.name} {cell.name}, {runner.contender.name}", reason)
                turns.remove((cell, runner))
                values.pop((cell, runner.contender), None)
                continue
            values.setdefault((cell, runner.contender), []).append(rate)
    chosen = {(cell, runner.contender): runner.chosen[cell] for cell, runner in turns}
    return with_baselines(
        [
            Measurement(
                f"{work.files.name} {cell.name}, {contender.name}",
                "tok/s",
                tuple(rates),
                note=", ".join(f"{k} {v}" for k, v in chosen[cell, contender].items()),
                labels=contender.labels(work.files.name, cell.name),
            )
            for (cell, contender), rates in values.items()
        ]
    )


def check_beginnings(runners: Sequence[Runner]) -> None:
    """Compare what float32 engines decoded: logits alone say nothing about decoding.

    Raises:
        ValueError: more than half of an engine's sequences soon part from qnext's. One may do so
            where two logits are nearly equal.
    """
    ours = next((r for r in runners if r.contender == Contender("qnext", "float32")), None)
    for runner in runners:
        if ours is None or runner.contender.width != "float32":
            continue
        for cell in runner.written.keys() & ours.written.keys():
            pairs = list(zip(runner.written[cell], ours.written[cell], strict=True))
            equal = sum(one[:EQUAL_TOKENS] == other[:EQUAL_TOKENS] for one, other in pairs)
            if 2 * equal < len(pairs):
                raise ValueError(
                    f"{cell.name}: {runner.contender.name} writes as qnext does in {equal} of "
                    f"{len(pairs)} sequences, {EQUAL_TOKENS} tokens; want half at least"
                )


def choose_variant(work: Work, runner: Runner, cell: Cell) -> Variant:
    """The fastest way to run a cell, tried on less work; this also warms up.

    Raises:
        PeerError: none of them runs.
    """
    is_prefill = cell.kind == "prefill"
    small = Cell("prefill", min(cell.size, PILOT_PROMPT)) if is_prefill else cell
    rates: list[tuple[float, Variant]] = []
    reason: PeerError | None = None
    for variant in runner.contender.variants(cell):
        try:
            run_cell(
                work, runner, Cell("prefill", START_PROMPT) if is_prefill else cell, variant, 2
            )
            rates.append((run_cell(work, runner, small, variant, PILOT_TOKENS), variant))
        except PeerError as error:
            reason = error
    if reason is not None and not rates:
        raise reason
    return max(rates, key=lambda pair: pair[0])[1]


def run_cell(
    work: Work, runner: Runner, cell: Cell, variant: Variant, num_tokens: int | None = None
) -> float:
    """Tokens per second of one run, decoding `num_tokens` or as many as is set for all."""
    prompts = work.prompts(cell)
    if cell.kind == "prefill":
        answer = runner.worker.ask("prefill", prompt=prompts[0], variant=dict(variant))
        return cell.size / float(answer["seconds"])
    count = num_tokens or work.num_tokens
    answer = runner.worker.ask("decode", prompts=prompts, num_tokens=count, variant=dict(variant))
    runner.written[cell] = answer["token_ids"]
    return cell.size * count / float(answer["seconds"])


def with_baselines(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Set ours against the best other engine at the same width, in the same cell."""
    completed = []
    for each in measurements:
        rivals = [
            other
            for other in measurements
            if other.labels["engine"] != "qnext"
            and all(other.labels[key] == each.labels[key] for key in ("model", "cell", "width"))
        ]
        if each.labels["engine"] == "qnext" and rivals:
            each = replace(each, baseline=max(rivals, key=lambda other: other.median).name)
        completed.append(each)
    return completed


def measure_memory(work: Work, who: Sequence[Contender], results: Results) -> None:
    """Most resident memory of a fresh process that reads a prompt and decodes a little."""
    longest = work.files.config.max_position_embeddings
    prefill, decode = Cell("prefill", min(MEMORY_PROMPT, longest // 2)), Cell("decode", 1)
    max_tokens = work.max_tokens([prefill])
    for contender in who:
        name = f"{work.files.name} peak memory, {contender.name}"
        try:
            with contender.start(
                work.files, work.machine, max_tokens=max_tokens, max_seqs=1
            ) as worker:
                runner = Runner(contender, worker)
                run_cell(work, runner, prefill, {})
                run_cell(work, runner, decode, {}, PILOT_TOKENS)
                peak = worker.ask("memory")["peak_bytes"] / 2**20
        except PeerError as reason:
            results.skip(name, reason)
            continue
        labels = contender.labels(work.files.name, "peak memory")
        results.measurements.append(Measurement(name, "MiB", (peak,), labels=labels))


def measure_start(work: Work, who: Sequence[Contender], results: Results) -> None:
    """Seconds from nothing to text, in fresh processes; ours also with no kernel compiled yet."""
    for contender in who:
        seconds: dict[str, list[float]] = {}
        try:
            for _ in range(work.repeats):
                with tempfile.TemporaryDirectory() as cache:
                    kinds = ("cold", "warm") if contender.engine == "qnext" else ("warm",)
                    for kind in kinds:
                        for what, value in _start_once(work, contender, cache).items():
                            name = what if what == "import" else f"{kind}, {what}"
                            seconds.setdefault(name, []).append(value)
        except PeerError as reason:
            results.skip(f"{work.files.name} start, {contender.name}", reason)
            continue
        for what, values in seconds.items():
            name = f"{work.files.name} start, {what}, {contender.name}"
            labels = contender.labels(work.files.name, f"start, {what}")
            results.measurements.append(Measurement(name, "s", tuple(values), None, "", labels))


def _start_once(work: Work, contender: Contender, kernel_cache: str) -> dict[str, float]:
    """Import; then, from there, opening the model until the first and the second token."""
    prompt = random_ids(START_PROMPT, work.files.config.vocab_size)
    with contender.start(
        work.files,
        work.machine,
        environment={"NUMBA_CACHE_DIR": kernel_cache},
        max_tokens=START_PROMPT + 4,
        max_seqs=1,
    ) as worker:
        written = worker.ask("decode", prompts=[prompt], num_tokens=1)
        opening = worker.opened["open_seconds"]
        second = opening + written["total_seconds"]
        return {
            "import": worker.opened["import_seconds"],
            "first token": second - written["seconds"],
            "second token": second,
        }
