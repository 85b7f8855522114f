"""AdamW with weights, gradients and moments all narrow, so that billions fit on one device."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qnext.train.optim import StepOutcome

MAX_NORM = 1.0
# Small: what is measured does not depend on it, and random weights stay as they are.
LEARNING_RATE = 1e-6
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1


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


def choose_moments(wanted: str) -> str:
    """Resolve "auto": "8bit" where torchao is installed, else "bf16".

    Raises:
        ModuleNotFoundError: "8bit" was asked for and torchao is missing.
    """
    if wanted == "bf16":
        return wanted
    try:
        import torchao.optim  # noqa: F401 - only whether it is there
    except ModuleNotFoundError:
        if wanted == "8bit":
            raise
        return "bf16"
    return "8bit"


class NarrowAdamW:
    """What `TrainOptimizer` does, with moments no wider than the weights: clip, test, update.

    `TrainOptimizer` keeps fp32 masters, gradients and moments, 16 bytes a parameter; here they
    are 8 with bf16 moments and 6 with 8-bit ones.

    Args:
        params: trained, with weights of any dtype.
        moments: "8bit" or "bf16", the latter meaning those of the weights' own dtype.
    """

    def __init__(self, params: Iterable[nn.Parameter], moments: str) -> None:
        self.params = [param for param in params if param.requires_grad]
        self.watch = Stopwatch(self.params[0].device)
        self.is_fused = moments == "bf16"
        self.adamw: torch.optim.Optimizer
        if self.is_fused:
            self.adamw = torch.optim.AdamW(
                self.params, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
            )
        else:
            from torchao.optim import AdamW8bit

            self.adamw = AdamW8bit(
                self.params, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
            )

    @torch.no_grad()
    def step(self, loss: Tensor) -> StepOutcome:
        """Clip by the common norm, update, and let the gradients go. Nothing waits.

        Args:
            loss: of the step; a NaN skips it, with bf16 moments. []
        """
        self.watch.mark()
        grads = [param.grad for param in self.params if param.grad is not None]
        norms = torch._foreach_norm(grads, 2, torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        is_good = (torch.isfinite(norm) & torch.isfinite(loss)).float()
        scale = torch.where(is_good > 0, torch.clamp(norm / MAX_NORM, min=1.0), 1.0)
        if self.is_fused:
            # Read by torch's fused AdamW, the way torch.amp.GradScaler hands them over.
            self.adamw.grad_scale = scale  # type: ignore[attr-defined]
            self.adamw.found_inf = 1 - is_good  # type: ignore[attr-defined]
        else:
            torch._foreach_div_(grads, scale)
        self.adamw.step()
        self.clear()
        self.watch.mark()
        return StepOutcome(grad_norm=norm, is_applied=is_good)

    def clear(self) -> None:
        """Let all gradients go."""
        self.adamw.zero_grad(set_to_none=True)
