"""Gated delta rule on a CPU: token by token, a head's state in the first cache."""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qnext.kernels import cpu_vectors as vectors
from qnext.kernels.cpu_lanes import floats_at, inner, ints_at, offset
from qnext.kernels.cpu_math import exp
from qnext.kernels.cpu_team import TeamKernel, share, thread_idx
from qnext.kernels.cpu_vectors import LANES, ColumnLoop, load_vector

NUM_SEQS, BOUNDS, STATES, HK, HV, K, V = range(7)
Q, KEYS, VALUES, G, BETA, OUT, CHANGES = range(7, 14)
Q_STRIDE, K_STRIDE, V_STRIDE, G_STRIDE, BETA_STRIDE, NUM_FIELDS = range(14, 20)
_BLOCKS = (4, 2, 1)  # vectors of columns that one pass over the rows takes


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    row_tokens: int | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    inputs = (q, k, v, g, beta) + (() if initial_state is None else (initial_state,))
    for x in inputs:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"rows are fp32 on a CPU here, not {x.dtype} on {x.device}"
    for x in (q, k, v):
        if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
            return "the heads of a token stand side by side here"
    if g.stride(1) != 1 or beta.stride(1) != 1:
        return "the gates of a token stand side by side here"
    return None if v.shape[1] % k.shape[1] == 0 else "heads do not divide"


def gated_delta_rule_numba(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    row_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `gated_delta_rule_reference`; a head's tokens go by on one thread."""
    (_, hk, kd), (num_tokens, hv, vd) = k.shape, v.shape
    num_threads = torch.get_num_threads()
    bounds = cu_seqlens.to(torch.int64).contiguous()
    num_seqs = bounds.shape[0] - 1
    if initial_state is None:
        states = torch.zeros(num_seqs, hv, kd, vd)
    else:
        states = initial_state.clone(memory_format=torch.contiguous_format)
    out = torch.empty(num_tokens, hv, vd)
    changes = np.empty(num_threads * 2 * vd, dtype=np.float32)
    table = np.zeros(NUM_FIELDS, dtype=np.int64)
    table[[NUM_SEQS, HK, HV, K, V]] = num_seqs, hk, hv, kd, vd
    strided = (q, k, v, g, beta)
    table[Q : Q + 5] = [x.data_ptr() for x in strided]
    table[Q_STRIDE : Q_STRIDE + 5] = [x.stride(0) for x in strided]
    table[BOUNDS], table[STATES] = bounds.data_ptr(), states.data_ptr()
    table[OUT], table[CHANGES] = out.data_ptr(), changes.ctypes.data
    _delta_rule(table, num_threads)
    return out, None if initial_state is None else states


def _token(lanes: int, num_vectors: int) -> Any:
    """An intrinsic for some columns of a state and one token; see `_take_token`."""

    @intrinsic
    def token(
        typingctx: Any, state: Any, shape: Any, first: Any, before: Any, now: Any, out: Any
    ) -> Any:
        vector = ir.VectorType(vectors.F32, lanes)
        signature = types.void(state, shape, types.int64, before, now, out)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            state, shape, first, before, now, out = args
            num_rows, size = (builder.extract_value(shape, i) for i in range(2))
            old_k, changes, old_decay = (builder.extract_value(before, i) for i in range(3))
            q, k, v, decay, beta, overlap = (builder.extract_value(now, i) for i in range(6))
            places = [builder.add(first, vectors.I64(n * lanes)) for n in range(num_vectors)]

            def load(pointer: Any) -> list[Any]:
                return [load_vector(builder, pointer, place, vector, 4) for place in places]

            def everywhere(value: Any) -> Any:
                return vectors.splat(builder, value, vector)

            def fma(a: Any, b: Any, c: Any) -> Any:
                return vectors.multiply_add(builder, a, b, c)

            change, shrink = load(changes), everywhere(old_decay)
            zero = ir.Constant(vector, [0.0] * lanes)
            loop = ColumnLoop(builder, vectors.I64(0), num_rows, 1, [zero] * (2 * num_vectors))
            row = builder.gep(state, [builder.mul(loop.index, size)])
            written, read_k, read_q = (
                everywhere(builder.load(builder.gep(pointer, [loop.index])))
                for pointer in (old_k, k, q)
            )
            sums = []
            for n, value in enumerate(load(row)):
                value = fma(written, change[n], builder.fmul(value, shrink))
                vectors.store_vector(builder, value, row, places[n])
                sums.append(fma(value, read_k, loop.values[2 * n]))
                sums.append(fma(value, read_q, loop.values[2 * n + 1]))
            sums = loop.close(sums)
            decay, beta, overlap = everywhere(decay), everywhere(beta), everywhere(overlap)
            negative = builder.fneg(decay)
            for n, value in enumerate(load(v)):
                change = builder.fmul(beta, fma(negative, sums[2 * n], value))
                result = fma(overlap, change, builder.fmul(decay, sums[2 * n + 1]))
                vectors.store_vector(builder, change, changes, places[n])
                vectors.store_vector(builder, result, out, places[n])
            return context.get_dummy_value()

        return signature, generate

    return token


_token_4, _token_2, _token_1 = (_token(LANES, count) for count in _BLOCKS)
_token_scalar = _token(1, 1)


@inner
def _take_token(state: Any, shape: Any, before: Any, now: Any, out: Any) -> None:
    """Write the token before into the state, then read the state for this one.

    Each element is loaded once and stored once: with S the state up to the token before,

        change = beta (v - a S^T k)        out = a S^T q + (k . q) change

    Args:
        state: of all tokens but the last before this one. [K, V]
        shape: (K, V).
        before: (k, change, decay) of the last token; the change becomes this token's.
        now: (q, k, v, a, beta, k . q) of this token.
        out: [V]
    """
    size = shape[1]
    first = 0
    while size - first >= 4 * LANES:
        _token_4(state, shape, first, before, now, out)
        first += 4 * LANES
    if size - first >= 2 * LANES:
        _token_2(state, shape, first, before, now, out)
        first += 2 * LANES
    if size - first >= LANES:
        _token_1(state, shape, first, before, now, out)
        first += LANES
    while first < size:
        _token_scalar(state, shape, first, before, now, out)
        first += 1


@inner
def _product(a: Any, b: Any, size: Any) -> Any:
    """Sum of a[i] * b[i], in an order that depends on size alone."""
    total = np.float32(0.0)
    whole = size // LANES * LANES
    if whole:
        total = vectors.dot(a, b, whole)
    for i in range(whole, size):
        total += a[i] * b[i]
    return total


@inner
def _take_head(t: Any, head: Any, start: Any, end: Any, state: Any, change: Any) -> None:
    """All tokens of one sequence for one head."""
    hk, hv, kd, vd = t[HK], t[HV], t[K], t[V]
    key_place = head // (hv // hk) * kd
    decay = np.float32(1.0)
    for j in range(vd):
        change[j] = np.float32(0.0)
    before = offset(floats_at(t[KEYS]), start * t[K_STRIDE] + key_place)
    for token in range(start, end):
        q = offset(floats_at(t[Q]), token * t[Q_STRIDE] + key_place)
        k = offset(floats_at(t[KEYS]), token * t[K_STRIDE] + key_place)
        v = offset(floats_at(t[VALUES]), token * t[V_STRIDE] + head * vd)
        beta = floats_at(t[BETA])[token * t[BETA_STRIDE] + head]
        next_decay = exp(floats_at(t[G])[token * t[G_STRIDE] + head])
        now = (q, k, v, next_decay, beta, _product(q, k, kd))
        out = offset(floats_at(t[OUT]), (token * hv + head) * vd)
        _take_token(state, (kd, vd), (before, change, decay), now, out)
        before, decay = k, next_decay
    # One more step, whose read-out nobody wants, writes the last token into the state.
    unread = offset(change, vd)
    one, zero = np.float32(1.0), np.float32(0.0)
    now = (before, before, change, one, zero, zero)
    _take_token(state, (kd, vd), (before, change, decay), now, unread)


@TeamKernel
def _delta_rule(t: Any) -> None:
    """Each thread takes some heads of every sequence."""
    hv, kd, vd = t[HV], t[K], t[V]
    change = offset(floats_at(t[CHANGES]), thread_idx() * 2 * vd)
    bounds = ints_at(t[BOUNDS])
    first, last = share(hv, 1)
    for n in range(t[NUM_SEQS]):
        if bounds[n + 1] > bounds[n]:
            for head in range(first, last):
                state = offset(floats_at(t[STATES]), (n * hv + head) * kd * vd)
                _take_head(t, head, bounds[n], bounds[n + 1], state, change)
