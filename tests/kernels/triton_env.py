"""Where Triton kernels run in a test: on a GPU, or on the CPU under Triton's interpreter."""

import os

import torch

IS_INTERPRETED = not torch.cuda.is_available()
if IS_INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The interpreter's tl.dot is wrong in bfloat16.
HALF = torch.float16 if IS_INTERPRETED else torch.bfloat16


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that shows whoever reads it before it is written: all NaN."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN where anything is NaN."""
    ours, expected = ours.detach().double().cpu(), expected.detach().double().cpu()
    return float((ours - expected).norm() / expected.norm().clamp_min(1e-30))
