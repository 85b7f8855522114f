"""What a run tells: a JSON line and TensorBoard scalars per log point, and a progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.runtime.log import get_logger

_logger = get_logger(__name__)

# Dense bf16 peak in FLOP/s, by a part of the device's name; datasheets of the SXM parts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's bf16 peak in FLOP/s, or None where no datasheet figure is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAK_FLOPS.items() if part in name), None)


class RunLog:
    """Appends records to `log.jsonl` and, where asked and installed, to TensorBoard.

    Args:
        folder: the run's folder.
        resume_step: records after this step are dropped, since they will come again.
        use_tensorboard: also write event files under `tensorboard/`.
    """

    def __init__(self, folder: Path, *, resume_step: int, use_tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        _drop_after(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if use_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError:
                _logger.warning("tensorboard is not installed: only log.jsonl is written")
            else:
                self._tensorboard = SummaryWriter(
                    str(folder / "tensorboard"), purge_step=resume_step + 1
                )

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one record; numbers also go to TensorBoard as `kind/key`.

        Args:
            kind: "train", "routing", "eval", "sample", "skip" or "run".
            step: optimiser steps made.
            values: JSON values; a dict inside becomes `kind/key/inner`.
        """
        record = {"kind": kind, "step": step, **_finite(values)}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in _scalars(kind, values):
                self._tensorboard.add_scalar(name, value, step)
            if kind == "sample":
                for prompt, text in values.items():
                    self._tensorboard.add_text(f"sample/{prompt}", str(text), step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep only whole records up to `step`: a killed run leaves later and torn ones."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write NaN and infinities as text: JSON has no word for them."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result[key] = _finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            result[key] = str(value)
        else:
            result[key] = value
    return result


def _scalars(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(f"{prefix}/{key}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}/{key}", float(value)))
    return found


def routing_report(
    counts: Tensor, mean_probs: Tensor, token_entropy: Tensor
) -> dict[str, list[float]]:
    """Describe how each layer's router spreads tokens.

    Args:
        counts: (token, slot) pairs sent to each expert since the last report. [L, E]
        mean_probs: mean of the router's softmax over the last step. [L, E]
        token_entropy: mean entropy of one token's softmax, in nats. [L]

    Returns:
        Per layer: `max_load` (busiest expert over the mean, 1 = balanced), `entropy` of the load
        as a share of log E, `token_entropy` likewise of one token's softmax (low: the router is
        sure), `dead_experts` (those that got nothing), `balance` (E sum f p, 1 = balanced).
    """
    counts, mean_probs, token_entropy = (
        tensor.double() for tensor in (counts, mean_probs, token_entropy)
    )
    num_experts = counts.size(1)
    load = counts / counts.sum(1, keepdim=True).clamp(min=1)
    log_experts = math.log(num_experts) if num_experts > 1 else 1.0

    return {
        "max_load": [float(x) for x in load.max(1).values * num_experts],
        "entropy": [float(x) for x in torch.special.entr(load).sum(1) / log_experts],
        "token_entropy": [float(x) for x in token_entropy / log_experts],
        "dead_experts": [float(x) for x in (counts == 0).sum(1)],
        "balance": [float(x) for x in (load * mean_probs).sum(1) * num_experts],
    }


class Progress:
    """A bar on standard error with loss, tokens/s, share of peak and time left.

    Args:
        total_tokens: of the whole run.
        is_shown: draw it; it also needs a terminal.
    """

    def __init__(self, total_tokens: int, *, is_shown: bool) -> None:
        self._bar: Any = None
        if is_shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>5.1f} %"),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("start", total=total_tokens, status="")

    def show(self, stage: str, tokens: int, status: str) -> None:
        """Move the bar, or log the same line where there is no terminal."""
        if self._bar is None:
            _logger.info("%s: %s", stage, status)
        else:
            self._bar.update(self._task, description=stage, completed=tokens, status=status)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


class Clock:
    """Wall time and tokens between log points."""

    def __init__(self) -> None:
        self._then = time.monotonic()
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count tokens of one step."""
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        """Return the mean since the last call and start again."""
        now = time.monotonic()
        rate = self._tokens / max(now - self._then, 1e-9)
        self._then, self._tokens = now, 0
        return rate

    def skip(self) -> None:
        """Leave out what happened since the last call: an evaluation or a checkpoint."""
        self._then, self._tokens = time.monotonic(), 0
