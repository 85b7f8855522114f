"""A training run: stages one after another, with log, evaluation and checkpoints in between."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from qnext.config.toml import to_table
from qnext.config.train import StageConfig, TrainConfig
from qnext.data.loader import PackedLoader
from qnext.data.shards import open_shards
from qnext.data.sources import expand_path
from qnext.eval.loss import read_texts, score_texts
from qnext.model.accounting import training_flops_per_token
from qnext.runtime.device import resolve_device, set_num_threads
from qnext.runtime.log import get_logger
from qnext.runtime.seed import derive_seed, seed_everything
from qnext.tokenizer.tokenizer import load_tokenizer
from qnext.train.batches import StepInput, StepInputs
from qnext.train.build import (
    build_model,
    export_model,
    set_rope_theta,
    tokenizer_folder,
)
from qnext.train.checkpoint import (
    TrainingState,
    find_latest,
    load_checkpoint,
    save_checkpoint,
)
from qnext.train.monitor import Clock, Progress, RunLog, peak_flops, routing_report
from qnext.train.optim import TrainOptimizer
from qnext.train.samples import sample_texts
from qnext.train.schedule import lr_scale, stage_progress
from qnext.train.step import TrainStep

_logger = get_logger(__name__)

SAMPLE_TEMPERATURE = 0.8


@dataclass
class Counters:
    """How far the run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    stage_idx: int = 0
    stage_tokens: int = 0
    stage_seconds: float = 0.0
    seconds: float = 0.0


class Trainer:
    """One run on one device.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in the run's folder, if there is one.

    Raises:
        ValueError: the folder holds a run and resume is False, or anything the configuration
            names is missing or does not fit.
    """

    def __init__(self, config: TrainConfig, *, resume: bool) -> None:
        self.config = config
        self.folder = Path(expand_path(config.output))
        latest = find_latest(self.folder / "checkpoints")
        if latest is not None and not resume:
            raise ValueError(f"output {self.folder} holds a run ({latest.name}): pass --resume")
        self.device = resolve_device(config.runtime.device)
        _prepare_torch(config, self.device)
        self.shards = open_shards(expand_path(config.data.shards))
        self.tokenizer_folder = tokenizer_folder(config, self.shards)
        self.tokenizer = load_tokenizer(self.tokenizer_folder)
        max_documents = config.data.max_validation_documents
        self.validation = {
            domain: read_texts(expand_path(path), max_documents)
            for domain, path in config.data.validation.items()
        }
        self.model = build_model(config, self.tokenizer, self.device)
        self.optimizer = TrainOptimizer(
            dict(self.model.named_parameters()), self.model.config, config.optimizer
        )
        self.train_step = TrainStep(self.model, self.optimizer, config.loss, config.runtime)
        self.counters = Counters()
        self.loader_state: dict[str, Any] | None = None
        if latest is not None:
            self._restore(latest)
        log = config.log
        self.log = RunLog(
            self.folder, resume_step=self.counters.step, use_tensorboard=log.tensorboard
        )
        total = sum(stage.num_steps * stage.batch_tokens for stage in config.stage)
        self.progress = Progress(total, is_shown=log.progress)
        self.clock = Clock()
        self.is_asked_to_stop = False
        # Metrics and addresses of the steps since the last log point.
        self._pending: list[tuple[int, Tensor, str]] = []

    def run(self) -> Literal["finished", "stopped"]:
        """Train to the end, or to max_minutes or a signal, and leave a checkpoint.

        Returns:
            "finished" when the model has been exported, "stopped" when --resume would go on.

        Raises:
            ValueError: too many steps in a row were skipped.
        """
        self._log_start()
        try:
            with _stop_on_signal(self):
                while self.counters.stage_idx < len(self.config.stage):
                    if not self._run_stage(self.config.stage[self.counters.stage_idx]):
                        self._save()
                        _logger.info("stopped at step %d; --resume goes on", self.counters.step)
                        return "stopped"
        finally:
            self.log.close()
            self.progress.close()
        return "finished"

    def _run_stage(self, stage: StageConfig) -> bool:
        """Run a stage from where it stands to its end; False when asked to stop before."""
        counters, config = self.counters, self.config
        if stage.rope_theta is not None:
            set_rope_theta(self.model, stage.rope_theta)
        weight = config.loss.mtp_weight if stage.mtp_weight is None else stage.mtp_weight
        self.train_step.loss = replace(config.loss, mtp_weight=weight)
        loader = PackedLoader(
            self.shards,
            stage.mixture,
            context=stage.context,
            rows=stage.micro_tokens // stage.context,
            seed=config.seed,
            stage=stage.name,
        )
        if self.loader_state is not None:
            loader.load_state_dict(self.loader_state)
        num_mtp_steps = self.train_step.num_mtp_steps
        inputs = StepInputs(
            loader, stage.num_accumulation_steps, num_mtp_steps, pin=self.device.type == "cuda"
        )
        self.clock.skip()
        then = time.monotonic()
        try:
            while not self._is_stage_over(stage):
                if self._must_stop():
                    self._report(stage)
                    return False
                step_input = next(inputs)
                self._step(stage, step_input)
                now = time.monotonic()
                counters.stage_seconds += now - then
                counters.seconds += now - then
                then = now
                self._after_step(stage)
        finally:
            inputs.close()
        self._finish_stage(stage)
        return True

    def _is_stage_over(self, stage: StageConfig) -> bool:
        counters = self.counters
        return stage_progress(stage, counters.stage_tokens, counters.stage_seconds) >= 1

    def _must_stop(self) -> bool:
        limit = self.config.max_minutes
        spent = time.monotonic() - self._started
        return self.is_asked_to_stop or (limit is not None and spent > 60 * limit)

    def _step(self, stage: StageConfig, step_input: StepInput) -> None:
        counters = self.counters
        # The middle of the step: neither the first nor the last is made with a rate of 0.
        middle = counters.stage_tokens + stage.batch_tokens // 2
        scale = lr_scale(stage.schedule, stage_progress(stage, middle, counters.stage_seconds))
        schedule = stage.schedule
        muon_lr = schedule.lr if schedule.muon_lr is None else schedule.muon_lr
        self.optimizer.set_lr(schedule.lr * scale, muon_lr * scale)
        micro_batches = [micro.to(self.device) for micro in step_input.micro_batches]
        metrics = self.train_step.run(micro_batches)
        counters.step += 1
        counters.stage_tokens += stage.batch_tokens
        counters.tokens += stage.batch_tokens
        self.clock.add(stage.batch_tokens)
        self.loader_state = step_input.loader_state
        self.lr_scale = scale
        self._pending.append((counters.step, metrics.stacked(), step_input.address))

    def _after_step(self, stage: StageConfig) -> None:
        log, step = self.config.log, self.counters.step

        def is_due(every: int) -> bool:
            return every > 0 and step % every == 0

        if is_due(log.every_steps):
            self._report(stage)
        if is_due(log.routing_every_steps):
            self._log_routing()
        is_saved = is_due(log.checkpoint_every_steps)
        if is_saved:
            self._save()
        is_evaluated = is_due(log.eval_every_steps)
        if is_evaluated:
            self._evaluate()
        is_sampled = is_due(log.sample_every_steps)
        if is_sampled:
            self._sample()
        if is_saved or is_evaluated or is_sampled:
            self.clock.skip()

    def _report(self, stage: StageConfig) -> None:
        """Fetch what the steps since the last report left on the device, and log it."""
        if not self._pending:
            return
        values = torch.stack([metrics for _, metrics, _ in self._pending]).cpu()
        pending, self._pending = self._pending, []
        is_applied = values[:, 5] > 0
        for (step, _, address), row, good in zip(pending, values, is_applied, strict=True):
            if not good:
                details = {"loss": float(row[3]), "grad_norm": float(row[4]), "batch": address}
                self.log.write("skip", step, details)
                _logger.warning(
                    "step %d skipped: loss %.4g, gradient norm %.4g; batch %s",
                    *(step, float(row[3]), float(row[4]), address),
                )
        shown = values[is_applied] if bool(is_applied.any()) else values
        loss, mtp_loss, balance, _, grad_norm, _ = shown.mean(0).tolist()
        rate = self.clock.tokens_per_second()
        peak = peak_flops(self.device)
        flops = rate * training_flops_per_token(self.model.config, stage.context)
        record = {
            "stage": stage.name,
            "tokens": self.counters.tokens,
            "loss": loss,
            "mtp_loss": mtp_loss,
            "balance": balance,
            "grad_norm": grad_norm,
            "lr": stage.schedule.lr * self.lr_scale,
            "tokens_per_second": rate,
            "flops_per_second": flops,
            "seconds": self.counters.seconds,
            "skipped": int((~is_applied).sum()),
            "epochs": self._epochs(),
        }
        share = f", {flops / peak:.1%} of peak" if peak else ""
        if peak:
            record["share_of_peak"] = flops / peak
        self.log.write("train", self.counters.step, record)
        status = (
            f"step {self.counters.step:,}, loss {loss:.4f}, mtp {mtp_loss:.4f}, "
            f"{rate:,.0f} tokens/s{share}"
        )
        self.progress.show(stage.name, self.counters.tokens, status)
        skipped = int(self.optimizer.guard.state[2])
        if skipped >= self.config.optimizer.max_skipped_steps:
            raise ValueError(
                f"stopped: {skipped} steps in a row were skipped (NaN, or gradient spikes); the "
                f"weights are those before them; last batch: {pending[-1][2]}"
            )

    def _epochs(self) -> dict[str, int]:
        streams = (self.loader_state or {}).get("streams", {})
        return {name: stream["epoch"] for name, stream in streams.items()}

    def _log_routing(self) -> None:
        routing = self.train_step.take_routing()
        if routing is not None:
            report = routing_report(*(tensor.cpu() for tensor in routing))
            values = {
                name: {f"layer_{idx}": value for idx, value in enumerate(column)}
                for name, column in report.items()
            }
            self.log.write("routing", self.counters.step, values)

    def _evaluate(self) -> None:
        with self.train_step.evaluation_mode():
            for domain, texts in self.validation.items():
                report = score_texts(
                    self.model, self.tokenizer, texts, with_mtp=self.model.mtp is not None
                )
                values: dict[str, Any] = {"bits_per_byte": report.bits_per_byte}
                if report.mtp_agreement is not None:
                    values["mtp_agreement"] = report.mtp_agreement
                self.log.write("eval", self.counters.step, {domain: values})
                _logger.info("%s: %s", domain, values)

    def _sample(self) -> None:
        log = self.config.log
        if not log.sample_prompts:
            return
        with self.train_step.evaluation_mode():
            samples = sample_texts(
                self.model,
                self.tokenizer,
                log.sample_prompts,
                num_tokens=log.sample_tokens,
                temperature=SAMPLE_TEMPERATURE,
                seed=derive_seed(self.config.seed, "samples", self.counters.step),
            )
        self.log.write("sample", self.counters.step, samples)

    def _finish_stage(self, stage: StageConfig) -> None:
        self._report(stage)
        if self.counters.step % max(1, self.config.log.eval_every_steps):
            self._evaluate()
        self.counters.stage_idx += 1
        self.counters.stage_tokens = 0
        self.counters.stage_seconds = 0.0
        self.loader_state = None
        is_last = self.counters.stage_idx == len(self.config.stage)
        name = "model" if is_last else f"model-{stage.name}"
        export_model(self.model, self.tokenizer_folder, self.folder / name)
        self._save()
        _logger.info("stage %s is done: %s", stage.name, self.folder / name)

    def _save(self) -> None:
        state = TrainingState(
            step=self.counters.step,
            model=dict(self.model.named_parameters()),
            optimizer=self.optimizer.state_tensors(),
            counters={
                **vars(self.counters),
                "loader": self.loader_state,
                "rope_theta": self.model.config.rope.theta,
                "config": to_table(self.config),
            },
        )
        save_checkpoint(self.folder / "checkpoints", state, keep=self.config.log.keep_checkpoints)

    @torch.no_grad()
    def _restore(self, path: Path) -> None:
        state = load_checkpoint(path, device=self.device, restore_random=True)
        params = dict(self.model.named_parameters())
        if state.model.keys() != params.keys():
            different = sorted(state.model.keys() ^ params.keys())
            raise ValueError(f"{path} is of another model: parameters {different[:5]} differ")
        for name, param in params.items():
            if param.shape != state.model[name].shape:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(state.model[name].shape)}, the model "
                    f"{tuple(param.shape)}"
                )
            param.copy_(state.model[name])
        self.optimizer.load_state_tensors(state.optimizer)
        saved = dict(state.counters)
        self.loader_state = saved.pop("loader")
        set_rope_theta(self.model, saved.pop("rope_theta"))
        saved.pop("config")
        self.counters = Counters(**saved)
        _logger.info("resumed from %s", path)

    def _log_start(self) -> None:
        self._started = time.monotonic()
        self.lr_scale = 0.0
        loss = self.config.loss
        parameters = sum(param.numel() for param in self.model.parameters())
        values = {
            "config": to_table(self.config),
            "model": self.model.config.to_hf(),
            "parameters": parameters,
            "device": str(self.device),
            "torch": torch.__version__,
            "balance_counts": loss.balance_counts,
        }
        self.log.write("run", self.counters.step, values)
        _logger.info(
            "%s parameters on %s, expert shares counted: %s",
            *(f"{parameters:,}", self.device, loss.balance_counts),
        )


def _prepare_torch(config: TrainConfig, device: torch.device) -> None:
    runtime = config.runtime
    set_num_threads(runtime.num_threads)
    if runtime.deterministic and device.type == "cuda":
        if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
            raise ValueError(
                "runtime.deterministic on a GPU: set CUBLAS_WORKSPACE_CONFIG=:4096:8 before start"
            )
    seed_everything(config.seed, deterministic=runtime.deterministic)
    if device.type == "cuda" and runtime.dtype == "bfloat16" and runtime.tf32:
        torch.set_float32_matmul_precision("high")
    if runtime.compile:
        # Two kinds of layer and the MTP layer, for each of a few shapes.
        torch._dynamo.config.recompile_limit = 64


@contextmanager
def _stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if trainer.is_asked_to_stop:
            raise KeyboardInterrupt
        trainer.is_asked_to_stop = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
