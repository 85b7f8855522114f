"""Compile Triton kernels on all cores before they are timed; Triton's cache on disk is shared."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class TargetOnly:
    """What Triton asks a driver when it compiles and launches nothing: no GPU is touched."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(target: GPUTarget) -> None:
    """From here on launches in this process compile for `target` and do not run."""
    torch.set_num_threads(1)
    driver.set_active(TargetOnly(target))
    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_launch


def compile_ahead(
    launch: Callable[..., object],
    arguments: Iterable[tuple[Any, ...]],
    target: GPUTarget | None = None,
    num_processes: int | None = None,
) -> list[str]:
    """Compile the kernels that launch(*a) launches, for each a of `arguments`.

    Args:
        launch: a function of a module, which other processes import; on small tensors of the CPU
            it launches what is to be timed on large ones of the GPU.
        target: the current GPU if None.

    Returns:
        What failed, a line for each.
    """
    context = multiprocessing.get_context("spawn")
    target = target or driver.active.get_current_target()
    tries = list(arguments)
    num_processes = num_processes or max(1, min(len(tries), os.cpu_count() or 1))
    with ProcessPoolExecutor(num_processes, context, compile_only, (target,)) as pool:
        return [line for line in pool.map(partial(_objection, launch), tries) if line]


def _objection(launch: Callable[..., object], arguments: tuple[Any, ...]) -> str | None:
    try:
        launch(*arguments)
    except Exception as fault:  # noqa: BLE001 - at this border of a process a fault is a line
        return f"{arguments}: {type(fault).__name__}: {str(fault).strip().splitlines()[-1:]}"
    return None
