"""Devices and number types by name: "auto" resolved, mistakes named, threads and memory read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Of the address of each tensor of `upload`: kernels are compiled for addresses that are multiples.
ALIGNMENT_BYTES = 64

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class GpuInfo:
    """What decides how fast a GPU is and which kernels it can run."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    num_multiprocessors: int
    has_bfloat16: bool


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Turn a device name into a device that exists here.

    Args:
        name: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", "meta".

    Raises:
        ValueError: the name is unknown, or names a GPU that this machine does not have.
    """
    if str(name) == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {name!r}; want auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device is {name!r}; want auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device is {str(name)!r}, but torch sees {count} CUDA devices")
    return device


def resolve_dtype(name: str | torch.dtype) -> torch.dtype:
    """Number type by name ("bfloat16", "torch.bfloat16" or the type itself).

    Raises:
        ValueError: no such type among float32, float16, bfloat16 and float64.
    """
    if isinstance(name, torch.dtype):
        return name
    found = DTYPES.get(str(name).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {name!r}; want auto, int8, fp8 or one of {', '.join(DTYPES)}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a number type as configs write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def gpu_infos() -> list[GpuInfo]:
    """Every CUDA device that torch can use, in torch's order."""
    infos = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        infos.append(
            GpuInfo(
                name=properties.name,
                compute_capability=(properties.major, properties.minor),
                memory_bytes=properties.total_memory,
                num_multiprocessors=properties.multi_processor_count,
                has_bfloat16=properties.major >= 8,
            )
        )
    return infos


def set_num_threads(num_threads: int | None) -> int:
    """Set how many threads torch uses inside one operator; None leaves it. Returns the number.

    Raises:
        ValueError: the number is below 1.
    """
    if num_threads is not None:
        is_count = isinstance(num_threads, int) and not isinstance(num_threads, bool)
        if not is_count or num_threads < 1:
            raise ValueError(f"num_threads is {num_threads!r}; want an integer, at least 1")
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Arrays on a device, all in one copy for which the host does not wait.

    Args:
        arrays: of int64, int32 or floating-point numbers.

    Returns:
        Tensors of the same shapes and types, parts of one piece of memory.
    """
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    # A GPU fetches by itself only from memory that cannot be moved.
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    numbers = host.numpy()
    parts = list(zip(arrays, starts[:-1], strict=True))
    for array, start in parts:
        numbers[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view("u1")
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for array, start in parts
    ]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
