"""Speed of serving: start-up, prefill, decode, and what a step with drafts costs.

Everything goes through `LLM.generate` with prompts of random token ids, new ones each time.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qnext.bench.anchors import NEXT_12L, STATED_ACCEPTANCE, Anchor
from qnext.bench.budget import Budget, repeated
from qnext.bench.cells import Cell
from qnext.bench.models import bench_config, free_memory, random_model
from qnext.bench.options import SERVE_CELLS, SMALL_SERVE_CELLS, BenchOptions
from qnext.bench.report import Row, Table, readable
from qnext.bench.rounds import RoundSeconds, round_seconds
from qnext.config.model import ModelConfig
from qnext.engine.llm import LLM
from qnext.engine.request import SamplingParams
from qnext.engine.sizing import PAGE_SIZE
from qnext.model.accounting import count_parameters, kv_bytes_per_token
from qnext.model.quantized import quantize_head
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.device import synchronize

ANCHORED_LAYERS = 12
STEP_CONTEXT, SMALL_STEP_CONTEXT = 1024, 24
# Decoding before a measurement, so that every kernel of it has run.
WARM_UP_TOKENS = 8
# Steps that a cost of a step is the mean of.
NUM_STEPS, NUM_SMALL_STEPS = 64, 8
PEER_CELLS = ("prefill-4096", "prefill-32768", "decode-1x1024", "decode-32x1024")
SPENT = "the time given by --seconds is spent"


@dataclass
class Server:
    """An engine, and prompts for it that were never seen before."""

    llm: LLM
    prompts: random.Random

    def seconds(self, num_seqs: int, context: int, num_tokens: int) -> float:
        """Wall time of answering prompts with exactly num_tokens greedy tokens each."""
        vocab_size, device = self.llm.model.config.vocab_size, self.llm.model.device
        prompts = [
            {"prompt_token_ids": self.prompts.choices(range(vocab_size), k=context)}
            for _ in range(num_seqs)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        synchronize(device)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params)
        synchronize(device)
        seconds = time.perf_counter() - start
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        assert counts == {num_tokens}, f"{counts} tokens, asked for {num_tokens}"
        return seconds

    def prefill_rate(self, context: int) -> float:
        """Prompt tokens over the time of prompt and first token."""
        return context / self.seconds(1, context, 1)

    def decode_rate(self, num_seqs: int, context: int, num_tokens: int) -> float:
        """B n / (t(n + 1) - t(1)); not above 0 where noise exceeds the decoding itself."""
        first = self.seconds(num_seqs, context, 1)
        whole = self.seconds(num_seqs, context, num_tokens + 1)
        return num_seqs * num_tokens / (whole - first) if whole > first else 0.0

    def step_seconds(self, num_seqs: int, context: int, num_steps: int) -> float:
        """Mean time of a decode step, drafts included; the first ones are left out.

        A first step may work off hidden rows of the prompt, which no later one has to.
        """
        metrics = self.llm.engine.metrics

        def spent(num_tokens: int) -> tuple[int, float]:
            steps, seconds = metrics.num_decode_steps, metrics.decode_seconds
            self.seconds(num_seqs, context, num_tokens)
            return metrics.num_decode_steps - steps, metrics.decode_seconds - seconds

        few_steps, few = spent(WARM_UP_TOKENS)
        many_steps, many = spent(WARM_UP_TOKENS + num_steps)
        if many_steps <= few_steps:
            return 0.0
        return (many - few) / (many_steps - few_steps)


def start_server(
    model: Qwen3Next, cells: Sequence[Cell], num_tokens: int, num_drafts: int, options: BenchOptions
) -> Server:
    """An engine whose cache is as large as its largest cell needs."""
    longest = max(cell.context for cell in cells) + num_tokens + 1
    # A page more for each sequence, into which it grows.
    pages = [cell.num_seqs * (2 + (cell.context + num_tokens) // PAGE_SIZE) for cell in cells]
    token_bytes = kv_bytes_per_token(
        model.config, has_mtp=num_drafts > 0, dtype_bytes=model.dtype.itemsize
    )
    sizes: dict[str, Any] = (
        {} if options.chunk_tokens is None else {"prefill_chunk_tokens": options.chunk_tokens}
    )
    llm = LLM.from_model(
        model,
        max_model_len=longest,
        max_num_seqs=max(cell.num_seqs for cell in cells),
        num_speculative_tokens=num_drafts,
        kv_cache_memory_bytes=(max(pages) + 2) * PAGE_SIZE * token_bytes,
        **sizes,
    )
    return Server(llm, random.Random(0))


@contextmanager
def compiled_kernels(is_cold: bool) -> Iterator[str]:
    """Inside, kernels are compiled into an empty folder if is_cold; says what the folder holds."""
    name = "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    if not is_cold:
        folder = Path(before) if before else Path.home() / ".triton" / "cache"
        count = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
        yield f"{count} entries in the folder of compiled kernels"
        return
    with tempfile.TemporaryDirectory() as empty:
        os.environ[name] = empty
        try:
            yield "no compiled kernels on disk"
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


class ServeRun:
    """The serving part of one run.

    Args:
        table: receives the rows.
        config: of the model.
        device: where it runs.
        options: of the run.
        budget: of the cells that will be measured.
    """

    def __init__(
        self,
        table: Table,
        config: ModelConfig,
        device: torch.device,
        options: BenchOptions,
        budget: Budget,
    ) -> None:
        self.table, self.config, self.device = table, config, device
        self.options, self.budget = options, budget
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.num_tokens = options.decode_tokens or (16 if options.is_small else 128)

    def measure(self, plain: Sequence[Cell], steps: Sequence[Cell]) -> None:
        """All cells of our engine; its memory is free again afterwards."""
        begin = time.perf_counter()
        has_mtp = bool(steps)
        model = random_model(
            self.config,
            has_mtp=has_mtp,
            dtype=self.dtype,
            device=self.device,
            is_fp8=self.options.dtype != "bfloat16",
        )
        if self.options.dtype == "fp8-head":
            quantize_head(model)
        model.requires_grad_(False).eval()
        synchronize(self.device)
        seconds = time.perf_counter() - begin
        self.table.fact("draw_seconds", seconds, f"weights drawn in {seconds:.1f} s")
        self.table.header()
        if plain:
            self._measure_plain(model, plain)
            free_memory(self.device)
        if steps:
            self._measure_steps(model, steps)

    def _measure_plain(self, model: Qwen3Next, cells: Sequence[Cell]) -> None:
        with compiled_kernels(self.options.is_cold) as note:
            begin = time.perf_counter()
            longest = max(self.num_tokens, WARM_UP_TOKENS)
            server = start_server(model, cells, longest, 0, self.options)
            seconds = time.perf_counter() - begin
            for cell in cells:
                share = self.budget.next_seconds()
                if cell.kind == "start":
                    # The prompt of the first request is made outside of its time.
                    seconds += server.seconds(1, cell.context, 1)
                    row = Row("start", "s", (seconds,), anchor=self._anchor("start"), note=note)
                    self.table.add(row)
                elif cell.kind == "prefill":
                    warm_up = partial(server.seconds, 1, cell.context, 1)
                    run = partial(server.prefill_rate, cell.context)
                    self._rate(cell, warm_up, run, share)
                else:
                    work = (cell.num_seqs, cell.context)
                    warm_up = partial(server.seconds, *work, WARM_UP_TOKENS)
                    run = partial(server.decode_rate, *work, self.num_tokens)
                    self._rate(cell, warm_up, run, share)

    def _rate(
        self, cell: Cell, warm_up: Callable[[], float], run: Callable[[], float], share: float
    ) -> None:
        """Add a row of tokens per second, unless time or memory is short."""
        values = self._values(cell.name, warm_up, run, share)
        if values:
            self.table.add(Row(cell.name, "tok/s", values, anchor=self._anchor(cell.name)))

    def _values(
        self, name: str, warm_up: Callable[[], float], run: Callable[[], float], share: float
    ) -> tuple[float, ...]:
        """Values above 0 of several rounds; none, with a line that says why, if there are none."""
        if share <= 0:
            self.table.skip(name, SPENT)
            return ()
        try:
            begin = time.monotonic()
            for _ in range(2):  # the first compiles, and a length that comes again is captured
                warm_up()
            left = share - (time.monotonic() - begin)
            values = tuple(v for v in repeated(run, self.options.repeats, left) if v > 0)
        except torch.OutOfMemoryError as problem:
            self.table.skip(name, str(problem).splitlines()[0])
            return ()
        if not values:
            self.table.skip(name, "decoding took less time than prefill's varied")
        return values

    def _measure_steps(self, model: Qwen3Next, cells: Sequence[Cell]) -> None:
        """Seconds of a plain step, and steps with drafts as multiples of it."""
        num_steps = NUM_SMALL_STEPS if self.options.is_small else NUM_STEPS
        plain: dict[str, float] = {}
        plain_rounds: dict[str, float] = {}
        for num_drafts in range(self.options.max_drafts + 1):
            longest = WARM_UP_TOKENS + num_steps
            server = start_server(model, cells, longest, num_drafts, self.options)
            for cell in cells:
                drafts = f", {num_drafts} draft{'s' if num_drafts > 1 else ''}"
                name = cell.name + (drafts if num_drafts else "")
                work = (cell.num_seqs, cell.context)
                values = self._values(
                    name,
                    partial(server.seconds, *work, WARM_UP_TOKENS),
                    partial(server.step_seconds, *work, num_steps),
                    self.budget.next_seconds(),
                )
                seconds = round_seconds(server.llm, cell.num_seqs, num_drafts) if values else None
                if seconds is not None and num_drafts == 0:
                    plain_rounds[cell.name] = seconds.whole
                if values and num_drafts == 0:
                    row = Row(name, "ms", tuple(1e3 * value for value in values))
                    plain[cell.name] = row.median / 1e3
                    self.table.add(row)
                elif values and cell.name in plain:
                    row = step_row(name, cell, num_drafts, values, plain[cell.name])
                    if seconds is not None and cell.name in plain_rounds:
                        row = with_parts(row, seconds, plain_rounds[cell.name])
                    accepted = server.llm.engine.metrics.acceptance_rate or 0.0
                    self.table.add(replace(row, details={**row.details, "accepted": accepted}))
            del server
            free_memory(self.device)

    def _anchor(self, name: str) -> Anchor:
        options = self.options
        is_same = not options.is_small and options.layers == ANCHORED_LAYERS
        is_same = is_same and options.dtype == "bfloat16"
        return NEXT_12L.get(name, Anchor()) if is_same else Anchor()


def step_row(
    name: str, cell: Cell, num_drafts: int, seconds: Sequence[float], plain_seconds: float
) -> Row:
    """A step with drafts as a multiple of a plain one, and the speed at the stated acceptance."""
    row = Row(name, "plain", tuple(value / plain_seconds for value in seconds))
    num_tokens = sum(STATED_ACCEPTANCE**depth for depth in range(num_drafts + 1))
    step_seconds = row.median * plain_seconds
    rate = cell.num_seqs * num_tokens / step_seconds
    note = (
        f"{1e3 * step_seconds:.2f} ms; with {STATED_ACCEPTANCE:.0%} of the drafts accepted, which "
        f"is assumed: {num_tokens:.2f} tokens a step, {readable(rate)} tok/s"
    )
    details = {"num_drafts": num_drafts, "step_ms": 1e3 * step_seconds, "assumed_tok_s": rate}
    return replace(row, note=note, details=details)


def with_parts(row: Row, seconds: RoundSeconds, plain_seconds: float) -> Row:
    """The row with its device times of drafts and verification, in plain steps' own."""
    verification = seconds.verification / plain_seconds
    drafts = seconds.drafts / plain_seconds
    note = f"{row.note}; on the device verification {verification:.2f} plain, drafts {drafts:.2f}"
    details = {**row.details, "verification": verification, "drafts": drafts}
    return replace(row, note=note, details=details)


def run_serve(table: Table, options: BenchOptions, device: torch.device, seconds: float) -> None:
    """Measure every cell, and those of the peer after our model is gone from memory."""
    config = bench_config(options.layers, is_small=options.is_small)
    context = SMALL_STEP_CONTEXT if options.is_small else STEP_CONTEXT
    names = options.cells or (SMALL_SERVE_CELLS if options.is_small else SERVE_CELLS)
    cells = [Cell.parse(name, context) for name in names]
    # A start is one only while nothing has run.
    plain = sorted((c for c in cells if c.kind != "steps"), key=lambda c: c.kind != "start")
    steps = [cell for cell in cells if cell.kind == "steps"]
    takes_all = bool(options.cells) or options.is_small
    rates = [cell for cell in plain if cell.kind in ("prefill", "decode")]
    peer_cells = [c for c in rates if options.peer and (takes_all or c.name in PEER_CELLS)]
    num_pieces = len(plain) + len(steps) * (1 + options.max_drafts) + len(peer_cells)
    counts = count_parameters(config, has_mtp=False)
    table.title(
        f"serve: {config.num_hidden_layers} layers, {counts.total:,} random parameters without the "
        f"MTP head, {options.dtype}"
    )
    table.facts |= {
        "num_layers": config.num_hidden_layers,
        "num_parameters": counts.total,
        "dtype": options.dtype,
    }
    run = ServeRun(table, config, device, options, Budget(seconds, num_pieces))
    run.measure(plain, steps)
    free_memory(device)
    if peer_cells:
        from qnext.bench.transformers_peer import measure_serving

        measure_serving(table, config, device, peer_cells, options.repeats, run.budget)
