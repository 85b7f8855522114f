"""Short causal depthwise convolution and SiLU on a CPU."""

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from qnext.kernels import cpu_vectors as vectors
from qnext.kernels.cpu_lanes import array, floats_at, inner, ints_at, offset
from qnext.kernels.cpu_math import silu
from qnext.kernels.cpu_team import TeamKernel, share, thread_idx
from qnext.kernels.cpu_vectors import LANES, ColumnLoop, load_vector

WIDTH = 4
X, X_STRIDE, NUM_TOKENS, D, TAPS, POSITIONS, HISTORY, HAS_HISTORY, ROWS, OUT = range(10)


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.stride(1) != 1:
        return f"rows are fp32 on a CPU here, not {x.dtype} on {x.device}"
    if weight.shape[1] != WIDTH:
        return f"{WIDTH} taps are written out here, not {weight.shape[1]}"
    return None if x.shape[0] else "there are no rows"


def causal_conv1d_numba(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `causal_conv1d_reference`.

    Raises:
        ValueError: initial_state is given and positions restart inside x.
    """
    num_tokens, channels = x.shape
    positions = positions.to(torch.int64).contiguous()
    if initial_state is None:
        history = torch.zeros(1, channels)  # what a tap before a sequence's start reads
    else:
        history = initial_state.t().float().contiguous()
        if bool((positions[1:] == 0).any()):
            raise ValueError("causal_conv1d: initial_state is for one sequence, x holds several")
    taps = array(weight.t().float().contiguous())
    out = torch.empty(num_tokens, channels)
    num_threads = torch.get_num_threads()
    rows = np.empty(num_threads * WIDTH, dtype=np.int64)
    table = np.array(
        (
            x.data_ptr(),
            x.stride(0),
            num_tokens,
            channels,
            taps.ctypes.data,
            positions.data_ptr(),
            history.data_ptr(),
            initial_state is not None,
            rows.ctypes.data,
            out.data_ptr(),
        ),
        dtype=np.int64,
    )
    _convolve(table, num_threads)
    return out


@intrinsic
def _convolve_row(typingctx: Any, rows: Any, taps: Any, channels: Any, size: Any, out: Any) -> Any:
    """One token's channels up to `size`, a multiple of LANES, from the rows of its taps."""
    signature = types.void(rows, taps, types.int64, types.int64, out)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, taps, channels, size, out = args
        inputs, weights = [], []
        for tap in range(WIDTH):
            address = builder.load(builder.gep(rows, [vectors.I64(tap)]))
            inputs.append(builder.inttoptr(address, vectors.F32.as_pointer()))
            weights.append(builder.gep(taps, [builder.mul(channels, vectors.I64(tap))]))
        loop = ColumnLoop(builder, vectors.I64(0), size, LANES, [])
        total = vectors.constant(0.0)
        for row, weight in zip(inputs, weights, strict=True):
            value = load_vector(builder, row, loop.index, vectors.FLOATS, 4)
            factor = load_vector(builder, weight, loop.index, vectors.FLOATS, 4)
            total = vectors.multiply_add(builder, value, factor, total)
        vectors.store_vector(builder, vectors.silu(builder, total), out, loop.index)
        loop.close([])
        return context.get_dummy_value()

    return signature, generate


@inner
def _input_row(t: Any, token: Any, lag: Any) -> Any:
    """Address of the row that stands `lag` tokens before this one."""
    if t[HAS_HISTORY]:
        if lag > token:
            return t[HISTORY] + (WIDTH - 1 + token - lag) * t[D] * 4
    elif lag > ints_at(t[POSITIONS])[token]:
        return t[HISTORY]
    return t[X] + (token - lag) * t[X_STRIDE] * 4


@TeamKernel
def _convolve(t: Any) -> None:
    """Each thread takes some tokens."""
    channels, taps = t[D], floats_at(t[TAPS])
    whole = channels // LANES * LANES
    rows = offset(ints_at(t[ROWS]), thread_idx() * WIDTH)
    start, end = share(t[NUM_TOKENS], 1)
    for token in range(start, end):
        for tap in range(WIDTH):
            rows[tap] = _input_row(t, token, WIDTH - 1 - tap)
        out = offset(floats_at(t[OUT]), token * channels)
        _convolve_row(rows, taps, channels, whole, out)
        for c in range(whole, channels):
            total = np.float32(0.0)
            for tap in range(WIDTH):
                total += floats_at(rows[tap])[c] * taps[tap * channels + c]
            out[c] = silu(total)
