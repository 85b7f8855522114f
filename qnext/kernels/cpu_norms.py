"""Norms of many short rows on a CPU, which differ in their factor and in what they end with."""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qnext.kernels import cpu_vectors as vectors
from qnext.kernels.cpu_lanes import array, floats_at, from_bits, inner, offset
from qnext.kernels.cpu_math import silu
from qnext.kernels.cpu_team import TeamKernel, share
from qnext.kernels.cpu_vectors import LANES, ColumnLoop, load_vector

X, ROWS, GROUPS, SIZE, ROW_STRIDE, GROUP_STRIDE = range(6)
WEIGHT, SHIFT, GATE, GATE_ROW_STRIDE, GATE_GROUP_STRIDE = range(6, 11)
IS_MEAN, EPS, SCALE, OUT = range(11, 15)
_ONE = np.float32(1.0)


def rows_objection(*tensors: torch.Tensor) -> str | None:
    """Why `norm_rows` cannot take these rows, or None."""
    for x in tensors:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"rows are fp32 on a CPU here, not {x.dtype} on {x.device}"
        if x.dim() not in (2, 3) or x.stride(-1) != 1 or x.numel() == 0:
            return "rows are contiguous, of one or two leading sizes, here"
    return None


def norm_rows(
    x: torch.Tensor,
    *,
    weight: torch.Tensor | None,
    shift: float,
    is_mean: bool,
    eps: float,
    scale: float = 1.0,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """x / sqrt(sum of squares, or their mean, + eps) * scale * (shift + weight) * silu(gate).

    Args:
        x, gate: fp32 rows. [T, C] or [T, H, C]
        weight: [C]; None for a factor of 1.

    Returns:
        Contiguous rows.
    """
    out = torch.empty(x.shape)
    factors = torch.zeros(x.shape[-1]) if weight is None else weight.float().contiguous()
    numbers = np.array([eps, scale, 1.0 if weight is None else shift], dtype=np.float32)
    eps_bits, scale_bits, shift_bits = numbers.view(np.int32).tolist()
    gate_place = (0, 0, 0) if gate is None else (gate.data_ptr(), *_strides(gate))
    groups = x.shape[1] if x.dim() == 3 else 1
    table = np.array(
        (
            x.data_ptr(),
            x.shape[0],
            groups,
            x.shape[-1],
            *_strides(x),
            array(factors).ctypes.data,
            shift_bits,
            *gate_place,
            is_mean,
            eps_bits,
            scale_bits,
            out.data_ptr(),
        ),
        dtype=np.int64,
    )
    _norm(table, torch.get_num_threads())
    return out


def _strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def _scaled(*, has_gate: bool) -> Any:
    @intrinsic
    def scaled(
        typingctx: Any, x: Any, size: Any, factor: Any, weight: Any, shift: Any, gate: Any, out: Any
    ) -> Any:
        number = types.float32
        signature = types.void(x, types.int64, number, weight, number, gate, out)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, size, factor, weight, shift, gate, out = args
            factor = vectors.splat(builder, factor, vectors.FLOATS)
            shift = vectors.splat(builder, shift, vectors.FLOATS)
            loop = ColumnLoop(builder, ir.Constant(vectors.I64, 0), size, LANES, [])

            def load(pointer: Any) -> Any:
                return load_vector(builder, pointer, loop.index, vectors.FLOATS, 4)

            value = builder.fmul(builder.fmul(load(x), factor), builder.fadd(shift, load(weight)))
            if has_gate:
                value = builder.fmul(value, vectors.silu(builder, load(gate)))
            vectors.store_vector(builder, value, out, loop.index)
            loop.close([])
            return context.get_dummy_value()

        return signature, generate

    return scaled


_scaled_plain, _scaled_gated = _scaled(has_gate=False), _scaled(has_gate=True)


@inner
def _norm_row(t: Any, x: Any, gate: Any, out: Any) -> None:
    size, weight = t[SIZE], floats_at(t[WEIGHT])
    whole = size // LANES * LANES
    total = vectors.dot(x, x, whole)
    for i in range(whole, size):
        total += x[i] * x[i]
    if t[IS_MEAN]:
        total /= np.float32(size)
    eps, scale = from_bits(np.int32(t[EPS])), from_bits(np.int32(t[SCALE]))
    factor, shift = _ONE / np.sqrt(total + eps) * scale, from_bits(np.int32(t[SHIFT]))
    if t[GATE] != 0:
        _scaled_gated(x, whole, factor, weight, shift, gate, out)
    else:
        _scaled_plain(x, whole, factor, weight, shift, gate, out)
    for i in range(whole, size):
        out[i] = x[i] * factor * (shift + weight[i])
        if t[GATE] != 0:
            out[i] *= silu(gate[i])


@TeamKernel
def _norm(t: Any) -> None:
    """Each thread takes some rows."""
    start, end = share(t[ROWS], 1)
    groups, size = t[GROUPS], t[SIZE]
    for row in range(start, end):
        for group in range(groups):
            x = offset(floats_at(t[X]), row * t[ROW_STRIDE] + group * t[GROUP_STRIDE])
            place = row * t[GATE_ROW_STRIDE] + group * t[GATE_GROUP_STRIDE]
            out = offset(floats_at(t[OUT]), (row * groups + group) * size)
            _norm_row(t, x, offset(floats_at(t[GATE]), place), out)
