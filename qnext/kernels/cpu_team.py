"""Numba kernels run by the threads that torch computes with.

A kernel is one compiled function that every thread of a team runs at once, on a table of numbers
and addresses. The threads are those of torch's own OpenMP pool: a second pool would fight with it
for the cores whenever a torch operator and a kernel follow each other. Between two Python threads
nothing is shared, since OpenMP keeps a team for each thread that starts one.
"""

import ctypes
import logging
import math
import os
import platform
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from qnext.kernels.cpu_lanes import IS_KEPT, compile_kept, inner
from qnext.runtime.log import log_once

COMPILING = "compiling the CPU kernels"
if IS_KEPT:
    COMPILING += "; later starts read them from the disk"
SLOW_SECONDS = 1.0

_logger = logging.getLogger("qnext.kernels")

Table, Floats = types.CPointer(types.int64), types.CPointer(types.float32)
SPIN_ROUNDS = 5000  # some 100 us, longer than one thread takes to decide a token alone
# Resolved when a kernel is linked, so that compiled code can be kept on disk.
thread_idx = types.ExternalFunction("qnext_team_thread_idx", types.int32())
team_size = types.ExternalFunction("qnext_team_size", types.int32())
_give_way = types.ExternalFunction("sched_yield", types.int32())


def _openmp_library() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, or None where it is not GNU's."""
    folder = Path(torch.__file__).parent
    site = Path(sysconfig.get_paths()["purelib"])
    for place in (folder / "lib", folder.parent / "torch.libs", site / "torch.libs"):
        for path in sorted(place.glob("libgomp*.so*")):
            # Loaded already: this gives the same library, not a second one.
            library = ctypes.CDLL(str(path))
            if hasattr(library, "GOMP_parallel"):
                return library
    return None


_OPENMP = _openmp_library()
# Without OpenMP a team is the calling thread alone.
_ALONE = (
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0),
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1),
)


def _bind_symbols() -> None:
    names = ("omp_get_thread_num", "omp_get_num_threads")
    symbols = ("qnext_team_thread_idx", "qnext_team_size")
    for symbol, name, alone in zip(symbols, names, _ALONE, strict=True):
        function = getattr(_OPENMP, name) if _OPENMP else alone
        llvm.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)


_bind_symbols()
_parallel: Any = None
if _OPENMP is not None:
    _parallel = _OPENMP.GOMP_parallel
    _parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _parallel.restype = None
_team_process = os.getpid()


def threading_layer() -> str:
    """What runs the kernels' threads, in words."""
    return "torch's OpenMP pool" if _OPENMP else "one thread (torch brings no GNU OpenMP here)"


class CompiledFunction:
    """A function that compiled code calls by its address, compiled when that is first asked for.

    Args:
        function: in the part of Python that Numba takes.
        signature: its arguments' types; it returns nothing.
    """

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self.function = function
        self.signature = signature

    @cached_property
    def address(self) -> int:
        """Of the machine code, for `emit_call`."""
        with _lock, saying_when_slow():
            compiled = inner(self.function)
            compiled.compile(self.signature.args)
            (found,) = compiled.overloads.values()
            self._compiled = found  # keeps the code in memory
            return int(found.library.get_pointer_to_function(found.fndesc.llvm_func_name))


def layer_part(function: Callable[..., None]) -> CompiledFunction:
    """A part of a layer inside a whole step, called by its address.

    Args:
        function: takes the tables of the step and of the layer, and this thread's copy of the
            normed rows [T, C], plain and laid out for products.
    """
    return CompiledFunction(function, types.void(Table, Table, Floats, Floats))


class TeamKernel(CompiledFunction):
    """A compiled function that all threads of a team run.

    Args:
        function: takes the table.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function, types.void(Table))

    @cached_property
    def address(self) -> int:
        """Of the machine code, to be called by C's rules."""
        decorate = cfunc(self.signature, nopython=True, cache=IS_KEPT, error_model="numpy")
        with _lock, saying_when_slow():
            self._compiled = compile_kept(decorate)(self.function)
            return int(self._compiled.address)

    @cached_property
    def _alone(self) -> Any:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def __call__(self, table: np.ndarray, num_threads: int) -> None:
        """Run on a table of int64, which the kernel may write to; the lock of Python is released.

        After a fork the child has none of the team's threads, so it runs alone.
        """
        if num_threads > 1 and _parallel is not None and os.getpid() == _team_process:
            _parallel(self.address, table.ctypes.data, num_threads, 0)
        else:
            self._alone(table.ctypes.data)


_lock = threading.RLock()


@contextmanager
def saying_when_slow() -> Iterator[None]:
    """Log one line when a block takes long enough to be a compilation; once is enough."""
    timer = threading.Timer(SLOW_SECONDS, log_once, (_logger, COMPILING))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class TeamPace:
    """Whether a kernel that is run again and again is faster with its team or alone.

    Small work may not be worth a team, and on a busy machine a team waits for its slowest thread,
    which another program may keep from its core for milliseconds. What is computed is the same.
    """

    KEPT_TIMES = 5
    TRIAL_RUNS = 4
    FIRST_INTERVAL, LAST_INTERVAL = 32, 2048  # runs from one trial to the next

    def __init__(self) -> None:
        self._times: dict[tuple[int, bool], deque[float]] = {}
        self._runs: dict[int, int] = {}  # by size, since the last trial
        self._interval: dict[int, int] = {}

    def choose(self, size: int, num_threads: int) -> int:
        """Threads for the next run.

        Args:
            size: of the work; times of one size are compared with each other.
            num_threads: of the whole team.
        """
        if num_threads == 1:
            return 1
        runs = self._runs[size] = self._runs.get(size, 0) + 1
        interval = self._interval.setdefault(size, self.FIRST_INTERVAL)
        is_alone = self._median(size, True) < self._median(size, False)
        if runs > interval:
            is_alone = not is_alone
            if runs == interval + self.TRIAL_RUNS:
                self._runs[size] = 0
                self._interval[size] = min(2 * interval, self.LAST_INTERVAL)
        return 1 if is_alone else num_threads

    def record(self, size: int, num_threads: int, seconds: float) -> None:
        """Learn the time of a run."""
        times = self._times.setdefault((size, num_threads == 1), deque(maxlen=self.KEPT_TIMES))
        times.append(seconds)

    def _median(self, size: int, is_alone: bool) -> float:
        times = self._times.get((size, is_alone))
        # Alone counts as slow until it was tried; a team counts as fast.
        return sorted(times)[len(times) // 2] if times else (math.inf if is_alone else 0.0)


@inner
def share(total: Any, step: Any) -> Any:
    """This thread's part [start, end) of `total` things, in whole steps but for the last."""
    parts = (total + step - 1) // step
    idx, size = thread_idx(), team_size()
    start = parts * idx // size * step
    end = parts * (idx + 1) // size * step
    return start, min(end, total)


def _relax(builder: Any) -> None:
    """Tell the core that this is a loop that waits."""
    void = ir.VoidType()
    if platform.machine() in ("x86_64", "AMD64"):
        hint = builder.module.declare_intrinsic(
            "llvm.x86.sse2.pause", (), ir.FunctionType(void, [])
        )
        builder.call(hint, [])
    elif platform.machine() in ("aarch64", "arm64"):
        kind = ir.FunctionType(void, [ir.IntType(32)])
        hint = builder.module.declare_intrinsic("llvm.aarch64.hint", (), kind)
        builder.call(hint, [ir.IntType(32)(1)])  # yield


@intrinsic
def _arrive(typingctx: Any, counter: Any) -> Any:
    """Add 1 to a counter that threads share; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "seq_cst")

    return types.int64(counter), generate


@intrinsic
def _look(typingctx: Any, counter: Any) -> Any:
    """Read a counter that another thread may be writing, after a short rest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _relax(builder)
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(counter), generate


@inner
def meet(counter: Any) -> None:
    """Wait until all threads of the team are here.

    A thread whose partner does not come soon gives its core away: on a busy machine the partner
    may be waiting for just this core, and would get it only after milliseconds.

    Args:
        counter: pointer to a number of the team's own, which counts arrivals and is never reset.
    """
    size = team_size()
    if size == 1:
        return
    goal = (_arrive(counter) // size + 1) * size
    rounds = 0
    while _look(counter) < goal:
        rounds += 1
        if rounds > SPIN_ROUNDS:
            _give_way()
