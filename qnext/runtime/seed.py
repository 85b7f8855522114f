"""One seed for everything: each use gets its own stream, and the streams can be saved."""

import hashlib
import random
from typing import Any

import numpy
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed of its own for one purpose, such as ("data", "epoch", 3).

    Streams of different purposes are independent, and adding a purpose changes no other stream;
    the result is the same on every machine and Python version. In 0 .. 2**63 - 1.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch, on every device.

    Args:
        seed: any non-negative integer.
        deterministic: also ask torch for kernels that give the same bits on every run; an operation
            that has none then raises where it is used. On a GPU, CUBLAS_WORKSPACE_CONFIG=:4096:8
            must be set before the process starts.

    Raises:
        ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; want 0 or more")
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def random_state() -> dict[str, Any]:
    """Where the global streams of Python, NumPy and torch stand, to be saved with a checkpoint."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue the streams from what `random_state` returned.

    Raises:
        ValueError: the state was taken with another number of GPUs.
    """
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    cuda_states = state.get("cuda", [])
    if torch.cuda.is_available() and cuda_states:
        count = torch.cuda.device_count()
        if len(cuda_states) != count:
            raise ValueError(
                f"random state holds {len(cuda_states)} GPU streams, this machine has {count} GPUs"
            )
        torch.cuda.set_rng_state_all(cuda_states)
