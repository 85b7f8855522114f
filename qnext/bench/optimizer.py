"""AdamW with weights, gradients and moments all narrow, so that billions fit on one device."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qnext.kernels.adamw.moments import AdamWRule
from qnext.train.adamw import AdamWGroup, NarrowAdamW
from qnext.train.optim import StepOutcome

MAX_NORM = 1.0
# Small: what is measured does not depend on it, and random weights stay as they are.
LEARNING_RATE = 1e-6
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1


class Stopwatch:
    """Time of pieces of a device's work, without a wait inside them."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        """Begin a piece, or end the one that was begun."""
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def discard(self) -> None:
        """Forget all pieces, also one that was begun and never ended."""
        self._marks = []

    def take_seconds(self) -> list[float]:
        """Seconds of each piece since the last call; the device has finished them."""
        marks, self._marks = self._marks, []
        found = []
        for begin, end in zip(marks[::2], marks[1::2], strict=True):
            if isinstance(begin, float) or isinstance(end, float):
                assert isinstance(begin, float) and isinstance(end, float), "one kind of mark"
                found.append(end - begin)
            else:
                found.append(begin.elapsed_time(end) / 1e3)
        return found


class BenchOptimizer:
    """What `TrainOptimizer` does, with moments no wider than the weights: clip, test, update.

    `TrainOptimizer` keeps fp32 masters and gradients, and moments as configured, up to 16 bytes a
    parameter; here they are 8 with bf16 moments and 6 with 8-bit ones. Weights in bf16 are rounded
    at random, so that small changes count.

    Args:
        params: trained, with weights of any dtype.
        moments: "8bit" or "bf16".
    """

    def __init__(self, params: Iterable[nn.Parameter], moments: str) -> None:
        self.params = [param for param in params if param.requires_grad]
        device = self.params[0].device
        self.watch = Stopwatch(device)
        lr = torch.full((), LEARNING_RATE, dtype=torch.float32, device=device)
        self.adamw = NarrowAdamW(
            [AdamWGroup(self.params, lr, WEIGHT_DECAY)],
            AdamWRule(*BETAS, EPS),
            "8bit" if moments == "8bit" else "bfloat16",
        )

    @torch.no_grad()
    def step(self, loss: Tensor) -> StepOutcome:
        """Clip by the common norm, update, and let the gradients go. Nothing waits.

        Args:
            loss: of the step; a NaN skips it. []
        """
        self.watch.mark()
        grads = [param.grad for param in self.params if param.grad is not None]
        norms = torch._foreach_norm(grads, 2, torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        is_good = (torch.isfinite(norm) & torch.isfinite(loss)).float()
        scale = torch.where(is_good > 0, torch.clamp(norm / MAX_NORM, min=1.0), 1.0)
        self.adamw.step(scale, is_good)
        self.clear()
        self.watch.mark()
        return StepOutcome(grad_norm=norm, is_applied=is_good)

    def clear(self) -> None:
        """Let all gradients go."""
        for param in self.params:
            param.grad = None
