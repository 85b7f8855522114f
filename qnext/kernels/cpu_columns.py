"""Sums over the rows of a matrix, column by column, for decoding on a CPU.

The columns of a block stay in one vector register while the rows go by. Each column is a sum of its
own in the order of the rows, so how columns are grouped into vectors changes no bit.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qnext.kernels.cpu_lanes import inner, offset
from qnext.kernels.cpu_vectors import (
    F32,
    I64,
    LANES,
    ColumnLoop,
    fused_multiply_add,
    load_vector,
    splat,
    store_vector,
)


def _weighted(lanes: int) -> Any:
    @intrinsic
    def weighted(
        typingctx: Any,
        matrix: Any,
        stride: Any,
        num_rows: Any,
        weights: Any,
        first: Any,
        factor: Any,
        out: Any,
    ) -> Any:
        vector = ir.VectorType(F32, lanes)
        index = types.int64
        signature = types.void(matrix, index, index, weights, index, types.float32, out)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            matrix, stride, num_rows, weights, first, factor, out = args
            fma = fused_multiply_add(builder.module, vector)
            before = load_vector(builder, out, first, vector, 4)
            start = builder.fmul(before, splat(builder, factor, vector))
            loop = ColumnLoop(builder, I64(0), num_rows, 1, [start])
            place = builder.add(builder.mul(loop.index, stride), first)
            value = load_vector(builder, matrix, place, vector, 4)
            weight = builder.load(builder.gep(weights, [loop.index]))
            total = builder.call(fma, [value, splat(builder, weight, vector), loop.values[0]])
            (total,) = loop.close([total])
            store_vector(builder, total, out, first)
            return context.get_dummy_value()

        return signature, generate

    return weighted


_weighted_16, _weighted_1 = _weighted(LANES), _weighted(1)


@inner
def add_weighted_rows(
    matrix: Any, stride: Any, num_rows: Any, weights: Any, size: Any, factor: Any, out: Any
) -> None:
    """out = factor * out + sum over r of weights[r] * matrix[r].

    Args:
        matrix: num_rows rows of `size` fp32, `stride` apart.
        weights: num_rows fp32.
        out: `size` fp32.
    """
    whole = size // LANES * LANES
    for first in range(0, whole, LANES):
        _weighted_16(matrix, stride, num_rows, weights, first, factor, out)
    for first in range(whole, size):
        _weighted_1(matrix, stride, num_rows, weights, first, factor, out)


def _state_columns(lanes: int, is_updating: bool) -> Any:
    @intrinsic
    def state_columns(
        typingctx: Any,
        before: Any,
        after: Any,
        size: Any,
        num_rows: Any,
        first: Any,
        update: Any,
        k: Any,
        q: Any,
        from_k: Any,
        from_q: Any,
    ) -> Any:
        vector = ir.VectorType(F32, lanes)
        index = types.int64
        signature = types.void(before, after, index, index, index, update, k, q, from_k, from_q)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            before, after, size, num_rows, first, update, k, q, from_k, from_q = args
            fma = fused_multiply_add(builder.module, vector)
            old_k, old_change, old_decay = (builder.extract_value(update, i) for i in range(3))
            if is_updating:
                change = load_vector(builder, old_change, first, vector, 4)
                decay = splat(builder, old_decay, vector)
            zero = ir.Constant(vector, [0.0] * lanes)
            loop = ColumnLoop(builder, I64(0), num_rows, 1, [zero, zero])
            place = builder.add(builder.mul(loop.index, size), first)
            state = load_vector(builder, before, place, vector, 4)

            def scalar(pointer: Any) -> Any:
                return splat(builder, builder.load(builder.gep(pointer, [loop.index])), vector)

            if is_updating:
                # A product, a product and a sum, each rounded, as PyTorch does it elsewhere.
                written = builder.fmul(scalar(old_k), change)
                state = builder.fadd(builder.fmul(state, decay), written)
                store_vector(builder, state, after, place)
            sums = [
                builder.call(fma, [state, scalar(pointer), total])
                for pointer, total in zip((k, q), loop.values, strict=True)
            ]
            sums = loop.close(sums)
            store_vector(builder, sums[0], from_k, first)
            store_vector(builder, sums[1], from_q, first)
            return context.get_dummy_value()

        return signature, generate

    return state_columns


_read_16, _read_1 = _state_columns(LANES, False), _state_columns(1, False)
_update_16, _update_1 = _state_columns(LANES, True), _state_columns(1, True)


@inner
def read_state(
    before: Any,
    after: Any,
    is_updating: Any,
    update: Any,
    shape: Any,
    k: Any,
    q: Any,
    from_k: Any,
    from_q: Any,
) -> None:
    """from_k = S^T k and from_q = S^T q in one pass over a state S, which may be advanced first.

    Args:
        before: the state. [K, V]
        after: where S = decay * before + old_k change^T goes if is_updating; may be `before`.
        update: (old_k, change, decay): pointers to [K] and [V], and a number.
        shape: (K, V).
        k, q: [K]
        from_k, from_q: [V]
    """
    num_rows, size = shape
    whole = size // LANES * LANES
    for first in range(0, whole, LANES):
        if is_updating:
            _update_16(before, after, size, num_rows, first, update, k, q, from_k, from_q)
        else:
            _read_16(before, after, size, num_rows, first, update, k, q, from_k, from_q)
    for first in range(whole, size):
        if is_updating:
            _update_1(before, after, size, num_rows, first, update, k, q, from_k, from_q)
        else:
            _read_1(before, after, size, num_rows, first, update, k, q, from_k, from_q)


@inner
def advance_state(state: Any, k: Any, change: Any, decay: Any, shape: Any) -> None:
    """state = decay * state + k change^T, in place. state: [K, V]"""
    num_rows, size = shape
    for i in range(num_rows):
        row = offset(state, i * size)
        for j in range(size):
            row[j] = row[j] * decay + k[i] * change[j]
