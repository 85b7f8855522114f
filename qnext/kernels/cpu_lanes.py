"""What the Numba kernels share: typed pointers, widening of bfloat16, compilation kept on disk.

Kernels are written over pointers rather than arrays: they compile several times faster, and LLVM
sees loops as C compilers do. Nothing is compiled with permission to reorder or contract sums, so
equal formulas give equal bits in different kernels.
"""

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qnext.runtime.log import log_once


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """A float32 of the bits of a bfloat16 held as uint16."""
    if value != types.uint16:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), generate


@intrinsic
def offset(typingctx: Any, start: Any, count: Any) -> Any:
    """A pointer `count` elements further on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return start(start, types.int64), generate


def emit_call(builder: Any, address: Any, values: list[Any]) -> None:
    """Code that calls a `CompiledFunction` by its address.

    What is called by address stays out of its caller's compilation: LLVM would go through all of it
    again at every level of calls. The call keeps Numba's own rules: room for a result and for an
    error come first, neither of which our functions use.
    """
    pointer = ir.IntType(8).as_pointer()
    result, error = (cgutils.alloca_once(builder, pointer) for _ in range(2))
    kinds = [result.type, error.type, *(value.type for value in values)]
    target = ir.FunctionType(ir.IntType(32), kinds).as_pointer()
    builder.call(builder.inttoptr(address, target), [result, error, *values])


@intrinsic
def call_at(typingctx: Any, address: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Call a compiled function of these four arguments by its address; it returns nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_call(builder, args[0], list(args[1:]))
        return context.get_dummy_value()

    return types.void(types.int64, first, second, third, fourth), generate


@intrinsic
def to_bits(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def halves_of(typingctx: Any, floats: Any) -> Any:
    """A pointer to the same memory as 16-bit numbers."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(floats), generate


@intrinsic
def from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


def _address_as(dtype: Any) -> Any:
    @intrinsic
    def as_pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), generate

    return as_pointer


# An address as a pointer to elements of one type; bfloat16 goes as its bits.
floats_at, ints_at = _address_as(types.float32), _address_as(types.int64)
bfloats_at, bytes_at = _address_as(types.uint16), _address_as(types.int8)
doubles_at, words_at = _address_as(types.float64), _address_as(types.uint64)


def cache_folder() -> str:
    """Folder of the compiled kernels: one for each state of all sources, versions and CPU.

    Numba looks at the file of a function alone, and would go on using code into which it had
    inlined a function of another file that has changed since.
    """
    digest = hashlib.sha256()
    kernels = Path(__file__).parent
    for path in sorted(kernels.rglob("*.py")):
        digest.update(path.relative_to(kernels).as_posix().encode())
        digest.update(path.read_bytes())
    digest.update(
        f"{numba.__version__} {sys.version} {llvmlite.binding.get_host_cpu_name()}".encode()
    )
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return str(Path(os.path.expanduser(base)) / "qnext" / f"kernels-{digest.hexdigest()[:16]}")


def _can_keep(folder: str) -> bool:
    """Whether compiled code can be kept there; says so once if not."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as fault:
        message = f"CPU kernels are compiled at every start: {folder} cannot be written: {fault}"
        log_once(logging.getLogger("qnext.kernels"), message)
        return False


_CACHE_FOLDER = cache_folder()
# Numba would go on to the folder of the sources, where nothing tells code of other sources apart.
IS_KEPT = _can_keep(_CACHE_FOLDER)


def compile_kept(decorate: Callable[[Callable[..., Any]], Any]) -> Callable[..., Any]:
    """A decorator of Numba's that keeps what it compiles in the kernels' own folder."""

    def apply(function: Callable[..., Any]) -> Any:
        before = numba.config.CACHE_DIR
        # Read by Numba while it decorates; other packages' functions keep their own places.
        numba.config.CACHE_DIR = _CACHE_FOLDER
        try:
            return decorate(function)
        finally:
            numba.config.CACHE_DIR = before

    return apply


def inner(function: Callable[..., Any]) -> Any:
    """Compile for other kernels only: without the wrappers for Python, which take a third of it."""
    decorate = njit(
        cache=IS_KEPT,
        nogil=True,
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
    )
    return compile_kept(decorate)(function)


def array(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy view of a CPU tensor; bfloat16 as uint16 bits."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()
