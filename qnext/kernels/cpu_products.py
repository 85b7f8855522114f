"""Rows times a matrix for decoding on a CPU: a weight is read once for all rows that need it.

Numba leaves the choice of vector code to LLVM, which takes one dot product at a time. Here the
instructions of a block, some rows of the weight times some rows of x, are written out as LLVM's
portable vectors of 16 numbers, which become 512, 256 or 128 bit instructions.

Exactness: an output is the sum of 16 running sums, each over every 16th product (in the order of
`arrange`), folded in halves, plus the products of the last columns one by one. That order depends
on the number of columns alone, so a row of x gives the same bits in any company.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qnext.kernels.cpu_lanes import emit_call, floats_at, halves_of, inner, offset, to_bits
from qnext.kernels.cpu_team import CompiledFunction
from qnext.kernels.cpu_vectors import (
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    SECOND_CACHE,
    ColumnLoop,
    fused_multiply_add,
    load_vector,
    prefetch,
)

LINE_BYTES = 64  # of a cache
CHUNK = 2 * LANES  # columns that a step of the inner loop takes

# Stands for bfloat16 weights whose rows of x are bfloat16 as well; types.uint16 for widened ones.
DUAL = types.int16


def _float_pair(builder: Any, weight: Any, index: Any) -> list[Any]:
    second = builder.add(index, I64(LANES))
    return [load_vector(builder, weight, i, FLOATS, 4) for i in (index, second)]


def _bfloat16_pair(builder: Any, weight: Any, index: Any) -> list[Any]:
    # Two bfloat16 in each 32 bits: the low one moved up, and the high one with the low bits
    # cleared, are fp32 numbers already. Widening them in order would take twice the instructions.
    both = load_vector(builder, weight, index, INTS, 2)
    low = builder.shl(both, ir.Constant(INTS, [16] * LANES))
    high = builder.and_(both, ir.Constant(INTS, [-65536] * LANES))
    return [builder.bitcast(bits, FLOATS) for bits in (low, high)]


def _bfloat16_words(builder: Any, weight: Any, index: Any) -> list[Any]:
    return [load_vector(builder, weight, index, INTS, 2)]


def dual_product(module: Any) -> Any:
    """AVX512-BF16's s + a[0] * b[0] + a[1] * b[1] in each of 16 lanes, a and b two bfloat16."""
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS, INTS])
    return module.globals.get(name) or ir.Function(module, kind, name)


@cache
def dual_objection() -> str | None:
    """Why this machine has no products of two bfloat16 pairs, or None."""
    if llvm.get_host_cpu_features().get("avx512bf16"):
        return None
    return "this CPU has no AVX512-BF16 products"


def _int8_pair(builder: Any, weight: Any, index: Any) -> list[Any]:
    second = builder.add(index, I64(LANES))
    narrow = ir.VectorType(ir.IntType(8), LANES)
    values = [load_vector(builder, weight, i, narrow, 1) for i in (index, second)]
    return [builder.sitofp(builder.sext(value, INTS), FLOATS) for value in values]


def _one_float(builder: Any, value: Any) -> Any:
    return value


def _one_bfloat16(builder: Any, value: Any) -> Any:
    bits = builder.shl(builder.zext(value, I32), I32(16))
    return builder.bitcast(bits, F32)


def _one_int8(builder: Any, value: Any) -> Any:
    return builder.sitofp(value, F32)


# How the elements of a weight become fp32: CHUNK of them as two vectors, and one.
_WIDENING: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    types.float32: (_float_pair, _one_float),
    types.uint16: (_bfloat16_pair, _one_bfloat16),
    types.int8: (_int8_pair, _one_int8),
    DUAL: (_bfloat16_words, _one_bfloat16),
}


def _halves(builder: Any, first: Any, second: Any, segment: int) -> Any:
    """Add the halves of each segment; `second` may be None. Segments keep their order."""
    lanes = first.type.count * (1 if second is None else 2)
    lower = [start + i for start in range(0, lanes, segment) for i in range(segment // 2)]
    other = ir.Constant(first.type, ir.Undefined) if second is None else second
    masks = [
        ir.Constant(ir.VectorType(I32, len(lower)), [i + shift for i in lower])
        for shift in (0, segment // 2)
    ]
    return builder.fadd(*[builder.shuffle_vector(first, other, mask) for mask in masks])


def _fold(builder: Any, sums: list[Any]) -> Any:
    """Add up the lanes of each of 2^n vectors, all at once: one lane for each, in order."""
    segment = LANES
    while segment > 1:
        if len(sums) > 1:
            pairs = zip(sums[::2], sums[1::2], strict=True)
            sums = [_halves(builder, first, second, segment) for first, second in pairs]
        else:
            sums = [_halves(builder, sums[0], None, segment)]
        segment //= 2
    return sums[0]


class _Block:
    """The code of a block: some rows of the weight times some rows of x.

    Sums and rows are listed row of x by row of x, the outputs of each side by side.
    """

    def __init__(self, builder: Any, kind: Any, weights: list[Any], rows: list[Any]) -> None:
        self.builder = builder
        self.pair, self.one = _WIDENING[kind]
        self.is_dual = kind == DUAL
        self.line = LINE_BYTES * 8 // kind.bitwidth  # elements of the weight
        self.weights, self.rows = weights, rows
        if self.is_dual:
            self.rows = [builder.bitcast(row, ir.IntType(16).as_pointer()) for row in rows]

    def whole_chunks(self, whole: Any, ahead: Any) -> list[Any]:
        """Sums over the first `whole` columns, while memory `ahead` is fetched."""
        builder, num_outputs = self.builder, len(self.weights)
        lanes = INTS if self.is_dual else FLOATS
        if self.is_dual:
            multiply = dual_product(builder.module)
        else:
            multiply = fused_multiply_add(builder.module, FLOATS)
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        loop = ColumnLoop(builder, I64(0), whole, CHUNK, [zero] * (num_outputs * len(self.rows)))
        # What is read next, fetched line after line: it comes as one stream, where rows side by
        # side would be a short stream each.
        done = builder.mul(loop.index, I64(num_outputs))
        for place in range(0, num_outputs * CHUNK, self.line):
            prefetch(builder, ahead, builder.add(done, I64(place)), SECOND_CACHE)
        parts = [self.pair(builder, weight, loop.index) for weight in self.weights]
        sums = list(loop.values)
        for half in range(len(parts[0])):
            place = builder.add(loop.index, I64(LANES * half))
            for r, row in enumerate(self.rows):
                value = load_vector(builder, row, place, lanes, 2)
                for n in range(num_outputs):
                    at = r * num_outputs + n
                    factors = [parts[n][half], value]
                    terms = [sums[at], *factors] if self.is_dual else [*factors, sums[at]]
                    sums[at] = builder.call(multiply, terms)
        folded = _fold(builder, loop.close(sums))
        return [builder.extract_element(folded, I32(i)) for i in range(len(sums))]

    def last_columns(self, whole: Any, length: Any, totals: list[Any]) -> list[Any]:
        """The sums with the columns from `whole` on, one by one."""
        builder, num_outputs = self.builder, len(self.weights)
        loop = ColumnLoop(builder, whole, length, 1, totals)

        def one_at(row: Any) -> Any:
            return builder.load(builder.gep(row, [loop.index]))

        last = [self.one(builder, one_at(weight)) for weight in self.weights]
        totals = list(loop.values)
        for r, row in enumerate(self.rows):
            value = self.one(builder, one_at(row)) if self.is_dual else one_at(row)
            for n in range(num_outputs):
                at = r * num_outputs + n
                totals[at] = builder.fadd(totals[at], builder.fmul(last[n], value))
        return loop.close(totals)


def _block(num_outputs: int, num_rows: int) -> Any:
    """An intrinsic for num_outputs rows of the weight times num_rows rows of x; see `products`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, stride, first, ahead, x, x_stride, x_rows, length, *targets = args
        out, out_stride, out_rows = targets
        outputs = [builder.add(first, I64(n)) for n in range(num_outputs)]
        weights = [builder.gep(weight, [builder.mul(output, stride)]) for output in outputs]
        which = [builder.load(builder.gep(x_rows, [I64(r)])) for r in range(num_rows)]
        rows = [builder.gep(x, [builder.mul(row, x_stride)]) for row in which]
        block = _Block(builder, signature.args[0].dtype, weights, rows)
        whole = builder.and_(length, I64(-CHUNK))
        totals = block.last_columns(whole, length, block.whole_chunks(whole, ahead))
        for r in range(num_rows):
            start = builder.mul(builder.load(builder.gep(out_rows, [I64(r)])), out_stride)
            for n, output in enumerate(outputs):
                place = builder.gep(out, [builder.add(start, output)])
                builder.store(totals[r * num_outputs + n], place)
        return context.get_dummy_value()

    @intrinsic
    def block(
        typingctx: Any,
        weight: Any,
        stride: Any,
        first_output: Any,
        ahead: Any,
        x: Any,
        x_stride: Any,
        x_rows: Any,
        length: Any,
        out: Any,
        out_stride: Any,
        out_rows: Any,
    ) -> Any:
        index = types.int64
        rows = (x, index, x_rows, index, out, index, out_rows)
        return types.void(weight, index, index, weight, *rows), generate

    return block


_block_8x1, _block_1x1 = _block(8, 1), _block(1, 1)
_block_4x2, _block_1x2 = _block(4, 2), _block(1, 2)
_block_4x4, _block_1x4 = _block(4, 4), _block(1, 4)


@inner
def _eight(weight: Any, stride: Any, n: Any, ahead: Any, x: Any, sizes: Any, out: Any) -> None:
    """Eight outputs of all rows. x: (rows, stride, which); sizes: (length, count); out: as x"""
    x_data, x_stride, x_rows = x
    out_data, out_stride, out_rows = out
    length, num_rows = sizes
    t = 0
    while t < num_rows:
        rows, targets = offset(x_rows, t), offset(out_rows, t)
        if num_rows - t >= 4:
            for i in range(0, 8, 4):
                _block_4x4(
                    weight, stride, n + i, offset(ahead, i * stride), x_data, x_stride, rows,
                    length, out_data, out_stride, targets,
                )  # fmt: skip
            t += 4
        elif num_rows - t >= 2:
            for i in range(0, 8, 4):
                _block_4x2(
                    weight, stride, n + i, offset(ahead, i * stride), x_data, x_stride, rows,
                    length, out_data, out_stride, targets,
                )  # fmt: skip
            t += 2
        else:
            _block_8x1(
                weight, stride, n, ahead, x_data, x_stride, rows,
                length, out_data, out_stride, targets,
            )  # fmt: skip
            t += 1
        ahead = offset(weight, n * stride)  # fetched once is enough


@inner
def _single(weight: Any, stride: Any, n: Any, ahead: Any, x: Any, sizes: Any, out: Any) -> None:
    """One output of all rows; arguments as for `_eight`."""
    x_data, x_stride, x_rows = x
    out_data, out_stride, out_rows = out
    length, num_rows = sizes
    t = 0
    while t < num_rows:
        rows, targets = offset(x_rows, t), offset(out_rows, t)
        if num_rows - t >= 4:
            _block_1x4(
                weight, stride, n, ahead, x_data, x_stride, rows,
                length, out_data, out_stride, targets,
            )  # fmt: skip
            t += 4
        elif num_rows - t >= 2:
            _block_1x2(
                weight, stride, n, ahead, x_data, x_stride, rows,
                length, out_data, out_stride, targets,
            )  # fmt: skip
            t += 2
        else:
            _block_1x1(
                weight, stride, n, ahead, x_data, x_stride, rows,
                length, out_data, out_stride, targets,
            )  # fmt: skip
            t += 1


def _multiply(
    weight: Any,
    stride: Any,
    start: Any,
    end: Any,
    following: Any,
    x: Any,
    x_stride: Any,
    x_rows: Any,
    length: Any,
    out: Any,
    out_stride: Any,
    out_rows: Any,
    num_rows: Any,
) -> None:
    """The code of PRODUCTS; `products` says what it does."""
    rows, targets, sizes = (x, x_stride, x_rows), (out, out_stride, out_rows), (length, num_rows)
    n = start
    while n < end:
        ahead = offset(weight, (n + 8) * stride) if n + 8 < end else following
        if end - n >= 8:
            _eight(weight, stride, n, ahead, rows, sizes, targets)
            n += 8
        else:
            _single(weight, stride, n, ahead, rows, sizes, targets)
            n += 1


_Index, _Floats, _Rows = types.int64, types.CPointer(types.float32), types.CPointer(types.int64)


def _signature(weight: Any) -> Any:
    rows = (_Floats, _Index, _Rows)
    return types.void(weight, _Index, _Index, _Index, weight, *rows, _Index, *rows, _Index)


def _for_weights_of(dtype: Any) -> CompiledFunction:
    return CompiledFunction(_multiply, _signature(types.CPointer(dtype)))


# How `arrange` lays rows out: as they are; each whole CHUNK with its even elements first, then its
# odd ones, as the two halves of a bfloat16 weight's 32-bit words come; rounded to bfloat16.
PLAIN, PAIRED, ROUNDED = range(3)
LAYOUTS = {
    "float32": PLAIN,
    "bfloat16": PAIRED,
    "int8": PLAIN,
    "bfloat16 dual": ROUNDED,
}
PRODUCTS = {
    "float32": _for_weights_of(types.float32),
    "bfloat16": _for_weights_of(types.uint16),
    "int8": _for_weights_of(types.int8),
    "bfloat16 dual": _for_weights_of(DUAL),
}


@intrinsic
def products(
    typingctx: Any,
    function: Any,
    weight: Any,
    stride: Any,
    start: Any,
    end: Any,
    following: Any,
    x: Any,
    x_stride: Any,
    x_rows: Any,
    length: Any,
    out: Any,
    out_stride: Any,
    out_rows: Any,
    num_rows: Any,
) -> Any:
    """out[out_rows[t], n] = weight[n] . x[x_rows[t]] for the outputs n in [start, end).

    Args:
        function: address of the one of PRODUCTS that takes this kind of weight. A call by address
            keeps its code out of all that use it, which compile many times faster so.
        weight: address of rows of `length` elements, `stride` apart.
        following: address of what is read after this, to be fetched meanwhile; any will do.
        x: rows as `arrange` lays them out for this kind of weight, x_stride fp32 apart.
        x_rows, out_rows: rows to read and to write. num_rows of int64
        out: fp32 rows, out_stride apart.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_call(builder, args[0], list(args[1:]))
        return context.get_dummy_value()

    return types.void(types.int64, *_signature(types.int64).args), generate


@inner
def arrange(row: Any, size: Any, layout: Any, out: Any) -> None:
    """Lay a row of x out as `products` reads it.

    Args:
        row, out: `size` fp32, not overlapping.
        layout: what the kind of weight wants, one of LAYOUTS.
    """
    if layout == ROUNDED:
        halves = halves_of(out)
        for i in range(size):
            bits = to_bits(row[i])
            # To the nearest bfloat16, and of two as near to the even one.
            halves[i] = np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return
    whole = size // CHUNK * CHUNK if layout == PAIRED else 0
    for start in range(0, whole, CHUNK):
        for i in range(LANES):
            out[start + i] = row[start + 2 * i]
            out[start + LANES + i] = row[start + 2 * i + 1]
    for i in range(whole, size):
        out[i] = row[i]


@inner
def scale_rows(
    scale: Any, start: Any, end: Any, out: Any, out_stride: Any, out_rows: Any, num_rows: Any
) -> None:
    """Multiply the outputs [start, end) by their rows' scales, which int8 weights have.

    scale: address of fp32, 0 for none.
    """
    if scale != 0:
        factors = floats_at(scale)
        for t in range(num_rows):
            row = offset(out, out_rows[t] * out_stride)
            for n in range(start, end):
                row[n] = row[n] * factors[n]
