"""What the Numba kernels share: addresses of weights, widening of bfloat16, one dot product.

Exactness rests on two rules. A sum over products runs in `dot`, whose order LLVM fixes when it
compiles it and which is then the same for every row. Everything else is compiled without
permission to reorder or contract, so that equal formulas give equal bits in different kernels.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Reordering lets LLVM keep several partial sums in registers; NaN and infinity stay as they are.
REORDERED = {"reassoc", "nsz", "contract"}


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """A float32 of a float32, or of the bits of a bfloat16 held as uint16."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]
    if value != types.uint16:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), generate


@intrinsic
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to elements of the dtype of an array.

    Weights go in as a table of addresses: a tuple of arrays would be compiled anew for every
    number of layers.
    """
    if not isinstance(like, types.Array):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


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


_CACHE_FOLDER = cache_folder()


def _compile(function: Callable[..., Any], **options: Any) -> Any:
    before = numba.config.CACHE_DIR
    # Read by Numba while it decorates; other packages' functions keep their own places. Where the
    # folder cannot be written, Numba goes on to the next place it knows.
    numba.config.CACHE_DIR = _CACHE_FOLDER
    try:
        return njit(cache=True, nogil=True, error_model="numpy", **options)(function)
    finally:
        numba.config.CACHE_DIR = before


def compiled(function: Callable[..., Any]) -> Any:
    """Compile for callers in Python, without reordering; cached on disk, without the lock."""
    return _compile(function)


def inner(function: Callable[..., Any]) -> Any:
    """Compile for other kernels only: without the wrappers for Python, which take a third of it."""
    return _compile(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def reordered(function: Callable[..., Any]) -> Any:
    """As `inner`, with permission to reorder sums; for `dot` alone."""
    wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return _compile(function, fastmath=REORDERED, **wrappers)


@reordered
def dot(a: Any, b: Any) -> Any:
    """Sum of a[i] * b[i] in fp32; b may be bfloat16 bits. [K], [K]"""
    total = np.float32(0.0)
    for i in range(a.shape[0]):
        total += a[i] * widen(b[i])
    return total


@compiled
def rows_times_matrix(x: Any, weight: Any, out: Any) -> None:
    """out[t, n] = weight[n] . x[t]; a row of the weight is read once for all t."""
    for n in range(weight.shape[0]):
        for t in range(x.shape[0]):
            out[t, n] = dot(x[t], weight[n])


@inner
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x) of one fp32 number."""
    return np.float32(1.0) / (np.float32(1.0) + np.exp(-x))


@inner
def inverse_rms(row: Any, eps: Any) -> Any:
    """1 / sqrt(mean square + eps). row: [C]"""
    return np.float32(1.0) / np.sqrt(dot(row, row) / np.float32(row.shape[0]) + eps)


@inner
def rms_norm_rows(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """Zero-centred RMSNorm of each row. x, out: [T, C]"""
    for t in range(x.shape[0]):
        inverse = inverse_rms(x[t], eps)
        for c in range(x.shape[1]):
            out[t, c] = x[t, c] * inverse * (np.float32(1.0) + weight[c])


def array(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy view of a CPU tensor; bfloat16 as uint16 bits."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()
