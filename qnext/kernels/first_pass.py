"""Compile the Triton kernels of a first pass on all cores, instead of one by one as they come.

A pass meets some 40 kernels, each of which takes Triton a fifth of a second that nothing else
happens in. So a pass is gone through once without its launches: each is handed to a pool of threads
(the compiler holds Python's lock for a small part of its time), and the pass that counts begins
when all are done. Triton keeps them on its disk cache as always.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_logger = logging.getLogger(__name__)

MAX_THREADS = 16
# One at a time: a pass without launches changes, while it lasts, how Triton launches.
_lock = threading.Lock()


class ZeroedTensors(TorchDispatchMode):
    """New tensors hold zeros: what no kernel has written may be looked up as an index.

    So do the results of our own operators, inside of which the mode does not reach.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator; fill what it left open."""
        out = func(*args, **(kwargs or {}))
        is_open = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        if is_open or func.namespace == "qnext":
            for made in tree_leaves(out):
                if isinstance(made, torch.Tensor):
                    made.zero_()
        return out


def compile_ahead_of(run: Callable[[], object], device: torch.device) -> bool:
    """Go through `run` without launching a Triton kernel, and compile those it would launch.

    PyTorch's own operators do run, on zeros where a kernel would have written. So `run` must be
    harmless with any numbers, must not look at them, and must do its work when called again.

    A kernel that does not compile says so when it is launched, and what fails here is left to
    the pass that counts, with a warning.

    Returns:
        Whether `run` was called: not for a CPU, nor where Triton cannot compile beside the caller.
    """
    if device.type != "cuda" or not _can_compile_beside():
        return False
    try:
        with _lock, _no_launches(), ZeroedTensors():
            run()
    except Exception as problem:  # noqa: BLE001 - it saves time, no more
        _logger.warning("kernels are compiled one by one, not ahead of a first pass: %s", problem)
    return True


def _can_compile_beside() -> bool:
    return (
        find_spec("triton") is not None and find_spec("triton.runtime._async_compile") is not None
    )


@contextmanager
def _no_launches() -> Iterator[None]:
    """Launches of this thread compile and do no more; all that compiles has ended at the end."""
    from triton.runtime import _async_compile
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        # The mode belongs to one thread; others go on launching.
        warmup = warmup or _async_compile.active_mode.get() is mode
        return launch(self, *args, grid=grid, warmup=warmup, **options)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        mode = _async_compile.AsyncCompileMode(pool, ignore_errors=True)
        JITFunction.run = compile_only
        try:
            with mode:
                yield
        finally:
            JITFunction.run = launch
            _async_compile.active_mode.set(None)  # Triton does not where its wait is interrupted
