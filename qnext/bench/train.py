"""Speed of training: tokens per second, share of the device's peak and peak memory of a step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from qnext.bench.anchors import TRAIN_SHARE_AIM, Anchor
from qnext.bench.budget import Budget, repeated
from qnext.bench.models import bench_config, free_memory, random_model
from qnext.bench.optimizer import BenchOptimizer
from qnext.bench.options import SMALL_TRAIN_CELLS, TRAIN_CELLS, BenchOptions
from qnext.bench.report import OURS, Row, Table
from qnext.config.model import ModelConfig
from qnext.config.train import LossConfig, RuntimeConfig
from qnext.data.loader import PackedBatch
from qnext.model.accounting import count_parameters, training_flops_per_token
from qnext.runtime.device import peak_memory_bytes, synchronize
from qnext.train.batches import micro_batch
from qnext.train.monitor import peak_flops
from qnext.train.optim import TrainOptimizer
from qnext.train.step import MicroBatch, TrainStep

WARM_UP_STEPS, STEPS_PER_ROUND = 2, 3
# What --checkpointing computes again in the backward pass, from fast to small.
CHECKPOINTING = {"off": "nothing", "cheap": "norms and gates", "on": "layers"}
RUNTIME_MODES: dict[str, Literal["off", "cheap", "layers"]] = {
    "off": "off",
    "cheap": "cheap",
    "on": "layers",
}
SPENT = "the time given by --seconds is spent"


@dataclass(frozen=True)
class TrainCell:
    """One size of a step: tokens of a micro-batch, and of each of its documents."""

    num_tokens: int
    context: int

    @classmethod
    def parse(cls, text: str) -> "TrainCell":
        """The cell that "32768" (one document) or "32768x4096" (eight of 4096) names.

        Raises:
            ValueError: any other text, or documents that do not fill the step.
        """
        parts = text.split("x")
        numbers = [int(part) if part.isdecimal() else 0 for part in parts]
        if len(numbers) > 2 or not all(numbers) or numbers[0] % numbers[-1]:
            raise ValueError(
                f"--train-cells {text}: want TOKENS or TOKENSxCONTEXT, whole documents of CONTEXT"
            )
        return cls(numbers[0], numbers[-1])

    @property
    def name(self) -> str:
        """As the table calls it."""
        count = self.num_tokens // self.context
        return f"train {count} x {self.context:,}"


@dataclass(frozen=True)
class Contender:
    """A model that can be trained on a cell.

    Attributes:
        who: the engine.
        optimizer: of its parameters.
        prepare: makes one step of a cell, given a mode of CHECKPOINTING.
    """

    who: str
    optimizer: BenchOptimizer
    prepare: Callable[[TrainCell, str], Callable[[], object]]


class TrainRun:
    """The training part of one run.

    Args:
        table: receives the rows.
        config: of the model, which has no MTP head.
        device: where it runs.
        options: of the run.
    """

    def __init__(
        self, table: Table, config: ModelConfig, device: torch.device, options: BenchOptions
    ) -> None:
        self.table, self.config, self.device, self.options = table, config, device, options
        self.moments = options.moments
        self.peak = peak_flops(device)

    def measure(self, contender: Contender, cells: Sequence[TrainCell], budget: Budget) -> None:
        """Add a row for each cell."""
        wanted = self.options.checkpointing
        modes = tuple(CHECKPOINTING) if wanted == "auto" else (wanted,)
        for cell in cells:
            seconds = budget.next_seconds()
            if seconds <= 0:
                self.table.skip(f"{cell.name}, {contender.who}", SPENT)
                continue
            for mode in modes:
                problem = self._measure_cell(contender, cell, mode, seconds)
                if problem is None:
                    break
            else:
                self.table.skip(f"{cell.name}, {contender.who}", str(problem))

    def _measure_cell(
        self, contender: Contender, cell: TrainCell, mode: str, seconds: float
    ) -> str | None:
        """Add the row; returns why memory was too short, if it was."""
        problem = None
        try:
            self._add_row(contender, cell, mode, seconds)
        except torch.OutOfMemoryError as error:
            problem = str(error).splitlines()[0]
        # Only here, where the error holds no frames any more, can the memory go.
        contender.optimizer.clear()
        contender.optimizer.watch.discard()
        free_memory(self.device)
        return problem

    def _add_row(self, contender: Contender, cell: TrainCell, mode: str, seconds: float) -> None:
        begin = time.monotonic()
        step = contender.prepare(cell, mode)
        watch = contender.optimizer.watch
        for _ in range(WARM_UP_STEPS):
            step()
        synchronize(self.device)
        watch.take_seconds()

        def round_seconds() -> float:
            start = time.perf_counter()
            for _ in range(STEPS_PER_ROUND):
                step()
            synchronize(self.device)
            return (time.perf_counter() - start) / STEPS_PER_ROUND

        left = seconds - (time.monotonic() - begin)
        times = repeated(round_seconds, self.options.repeats, left)
        updates = watch.take_seconds()
        row = self._row(contender.who, cell, mode, times, sum(updates) / len(updates))
        self.table.add(row)

    def _row(
        self,
        who: str,
        cell: TrainCell,
        mode: str,
        step_seconds: Sequence[float],
        update_seconds: float,
    ) -> Row:
        num_tokens = cell.num_tokens * self.options.accumulate
        rates = tuple(num_tokens / seconds for seconds in step_seconds)
        row = Row(cell.name, "tok/s", rates, who=who)
        flops = training_flops_per_token(self.config, cell.context)
        details: dict[str, float | str] = {
            "flops_per_token": flops,
            "step_ms": 1e3 * num_tokens / row.median,
            "update_ms": 1e3 * update_seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "checkpointing": mode,
            "accumulate": self.options.accumulate,
        }
        notes = []
        anchor = Anchor()
        if self.peak is not None:
            limit = self.peak / flops
            anchor = Anchor(limit=limit, aim=TRAIN_SHARE_AIM * limit if who == OURS else None)
            details["share_of_peak"] = row.median / limit
            passes = num_tokens / (num_tokens / row.median - update_seconds) / limit
            details["share_of_peak_without_update"] = passes
            notes.append(f"{row.median / limit:.1%} of peak, {passes:.1%} without the update")
        notes.append(f"{details['step_ms']:.1f} ms a step, {details['update_ms']:.1f} the update")
        notes.append(f"peak {peak_memory_bytes(self.device) / 2**30:.1f} GiB")
        if mode != "off":
            notes.append(f"{CHECKPOINTING[mode]} recomputed")
        if who != OURS:
            notes.append(self.table.ratio_note(cell.name, row.median, "tok/s"))
        note = "; ".join(part for part in notes if part)
        return Row(cell.name, "tok/s", rates, who, anchor, note, details)


def packed_tokens(cell: TrainCell, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Random ids of one micro-batch, on the host. [T], int64"""
    return torch.randint(vocab_size, (cell.num_tokens,), generator=generator)


def make_micro_batch(cell: TrainCell, ids: Tensor, device: torch.device) -> MicroBatch:
    """Documents of `context` tokens behind one another, as the loader would pack them."""
    mask = torch.ones(cell.num_tokens, dtype=torch.uint8)
    mask[:: cell.context] = 0
    bounds = torch.arange(0, cell.num_tokens + 1, cell.context, dtype=torch.int32)
    return micro_batch(PackedBatch(ids, mask, bounds, cell.context, 0, ()), 0).to(device)


def our_contender(run: TrainRun) -> Contender:
    """The model under `TrainStep`, as `qnext train` runs it, with the narrow optimiser."""
    options, device = run.options, run.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = random_model(run.config, has_mtp=False, dtype=dtype, device=device).train()
    optimizer = BenchOptimizer(model.parameters(), run.moments)
    vocab_size = run.config.vocab_size

    def prepare(cell: TrainCell, mode: str) -> Callable[[], object]:
        runtime = RuntimeConfig(
            dtype="float32" if device.type == "cpu" else "bfloat16",
            compile=options.compile,
            activation_checkpointing=RUNTIME_MODES[mode],
        )
        # TrainStep calls nothing of its optimiser but `step`.
        trained = cast(TrainOptimizer, optimizer)
        step = TrainStep(model, trained, LossConfig(mtp_weight=0.0), runtime)
        generator = torch.Generator().manual_seed(0)
        batches = [
            make_micro_batch(cell, packed_tokens(cell, vocab_size, generator), device)
            for _ in range(options.accumulate)
        ]
        return partial(step.run, batches)

    return Contender(OURS, optimizer, prepare)


def peer_contender(run: TrainRun) -> Contender:
    """transformers' model and loss with the same optimiser, without a loss of balance.

    Its layers are recomputed whole in any mode but "off".

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from qnext.bench.transformers_peer import (
        NAME,
        describe_peer,
        random_peer,
        set_experts,
        training_pass,
    )

    model: Any = random_peer(run.config, run.device).train()
    describe_peer(run.table, model)
    set_experts(model, "grouped_mm")
    optimizer = BenchOptimizer(model.parameters(), run.moments)

    def prepare(cell: TrainCell, mode: str) -> Callable[[], object]:
        # Newer versions call it activation checkpointing.
        is_new = hasattr(model, "activation_checkpointing_enable")
        switch = f"{'activation' if is_new else 'gradient'}_checkpointing_"
        getattr(model, switch + ("disable" if mode == "off" else "enable"))()
        generator = torch.Generator().manual_seed(0)
        passes = [
            training_pass(
                model,
                packed_tokens(cell, run.config.vocab_size, generator)
                .view(-1, cell.context)
                .to(run.device),
            )
            for _ in range(run.options.accumulate)
        ]

        def step() -> object:
            losses = [one() for one in passes]
            return optimizer.step(torch.stack(losses).sum())

        return step

    return Contender(NAME, optimizer, prepare)


def run_train(table: Table, options: BenchOptions, device: torch.device, seconds: float) -> None:
    """Measure every cell, and those of the peer after our model is gone from memory."""
    config = bench_config(options.train_layers, is_small=options.is_small)
    names = options.train_cells or (SMALL_TRAIN_CELLS if options.is_small else TRAIN_CELLS)
    cells = [TrainCell.parse(name) for name in names]
    counts = count_parameters(config, has_mtp=False)
    table.title(
        f"train: {config.num_hidden_layers} layers, {counts.total:,} parameters, {counts.active:,} "
        "active, no MTP"
    )
    run = TrainRun(table, config, device, options)
    table.facts |= {
        "num_layers": config.num_hidden_layers,
        "num_parameters": counts.total,
        "num_active_parameters": counts.active,
        "peak_flops": run.peak,
    }
    table.fact("moments", run.moments, f"AdamW with {run.moments} moments; limit: the peak")
    table.header()
    budget = Budget(seconds, len(cells) * (2 if options.peer else 1))
    run.measure(our_contender(run), cells, budget)
    free_memory(device)
    if options.peer:
        try:
            peer = peer_contender(run)
        except (torch.OutOfMemoryError, ModuleNotFoundError) as problem:
            table.skip(options.peer, str(problem).splitlines()[0])
            return
        run.measure(peer, cells, budget)
        del peer
        free_memory(device)
