"""Pieces of LLVM code on vectors of 16 fp32 lanes, for the kernels that are written out in them."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
# Where `prefetch` brings memory.
FIRST_CACHE, SECOND_CACHE = 3, 2
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)

LOG2_E = 1.4426950408889634
# ln 2 in two parts; the first has so few bits that its product with a small integer is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Added, it leaves the nearest integer in the lowest bits of the sum.
_ROUNDING = 12582912.0
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def constant(value: float) -> Any:
    """The same fp32 number in all lanes."""
    return ir.Constant(FLOATS, [value] * LANES)


def integers(value: int) -> Any:
    """The same 32-bit integer in all lanes."""
    return ir.Constant(INTS, [value] * LANES)


def splat(builder: Any, value: Any, vector: Any) -> Any:
    """One value in all lanes of a vector of this type."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, I32(0))
    mask = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, undefined, mask)


def store_vector(builder: Any, value: Any, pointer: Any, index: Any, align: int = 4) -> None:
    """Store a vector from element `index` on."""
    place = builder.bitcast(builder.gep(pointer, [index]), value.type.as_pointer())
    builder.store(value, place, align=align)


def load_vector(builder: Any, pointer: Any, index: Any, vector: Any, align: int) -> Any:
    """A vector of elements from `index` on, aligned to this many bytes at least."""
    place = builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())
    return builder.load(place, align=align)


def fused_multiply_add(module: Any, vector: Any) -> Any:
    """LLVM's a * b + c, rounded once, for vectors of this type."""
    name = f"llvm.fma.v{vector.count}f32"
    return module.globals.get(name) or ir.Function(
        module, ir.FunctionType(vector, [vector] * 3), name
    )


class ColumnLoop:
    """A loop with some running values, as basic blocks of LLVM."""

    def __init__(self, builder: Any, start: Any, end: Any, step: int, initial: list[Any]) -> None:
        self.builder = builder
        before = builder.block
        self._body = builder.append_basic_block()
        self._after = builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", start, end), self._body, self._after)
        builder.position_at_end(self._body)
        self.index = builder.phi(I64)
        self.index.add_incoming(start, before)
        self.values = [builder.phi(value.type) for value in initial]
        for phi, value in zip(self.values, initial, strict=True):
            phi.add_incoming(value, before)
        self._before, self._initial, self._end, self._step = before, initial, end, step

    def close(self, values: list[Any]) -> list[Any]:
        """Go on with these values; returns those after the loop."""
        builder, body_end = self.builder, self.builder.block
        following = builder.add(self.index, I64(self._step))
        builder.cbranch(builder.icmp_signed("<", following, self._end), self._body, self._after)
        self.index.add_incoming(following, body_end)
        builder.position_at_end(self._after)
        results = []
        for phi, initial, value in zip(self.values, self._initial, values, strict=True):
            phi.add_incoming(value, body_end)
            result = builder.phi(value.type)
            result.add_incoming(initial, self._before)
            result.add_incoming(value, body_end)
            results.append(result)
        return results


def prefetch(builder: Any, pointer: Any, index: Any, cache: int = FIRST_CACHE) -> None:
    """Have the line of an element brought into a cache."""
    byte_pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte_pointer, I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    place = builder.bitcast(builder.gep(pointer, [index]), byte_pointer)
    builder.call(function, [place, I32(0), I32(cache), I32(1)])


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return builder.call(fused_multiply_add(builder.module, a.type), [a, b, c])


def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each two lanes; b where one is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def exp(builder: Any, x: Any) -> Any:
    """e^x within 2 units in the last place, for x up to 88; e^-87 below -87.

    Source of the polynomial: Cephes, expf
    """
    x = larger(builder, x, constant(-87.0))
    shifted = multiply_add(builder, x, constant(LOG2_E), constant(_ROUNDING))
    n = builder.fsub(shifted, constant(_ROUNDING))
    r = multiply_add(builder, n, constant(-_LN2_HIGH), x)
    r = multiply_add(builder, n, constant(-_LN2_LOW), r)
    p = constant(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = multiply_add(builder, p, r, constant(coefficient))
    y = builder.fadd(multiply_add(builder, p, builder.fmul(r, r), r), constant(1.0))
    power = builder.shl(builder.bitcast(shifted, INTS), integers(23))
    return builder.bitcast(builder.add(builder.bitcast(y, INTS), power), FLOATS)


def silu(builder: Any, x: Any) -> Any:
    """x / (1 + e^-x); e^-x is taken at most at x = -87, where the result is below rounding."""
    negative = builder.fneg(x)
    capped = builder.select(
        builder.fcmp_ordered("<", negative, constant(87.0)), negative, constant(87.0)
    )
    return builder.fdiv(x, builder.fadd(exp(builder, capped), constant(1.0)))


def round_to_high(builder: Any, values: Any) -> Any:
    """Bits of fp32 whose upper half is the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = builder.bitcast(values, INTS)
    odd = builder.and_(builder.lshr(bits, integers(16)), integers(1))
    return builder.add(bits, builder.add(odd, integers(0x7FFF)))


def pairs(builder: Any, first: Any, second: Any) -> Any:
    """Two vectors of fp32 as one of bfloat16 pairs, `first` in the lower halves."""
    low = builder.lshr(round_to_high(builder, first), integers(16))
    high = builder.and_(round_to_high(builder, second), integers(-65536))
    return builder.or_(low, high)


def swap_index_bit(builder: Any, vectors: list[Any], distance: int) -> list[Any]:
    """Swap one bit of the vectors' index with the same bit of the lanes'; all bits transpose."""
    result = list(vectors)
    lanes = range(LANES)
    low = [i if i & distance == 0 else LANES + i - distance for i in lanes]
    high = [i + distance if i & distance == 0 else LANES + i for i in lanes]
    for i in range(len(vectors)):
        if i & distance == 0:
            pair = (vectors[i], vectors[i + distance])
            for to, mask in ((i, low), (i + distance, high)):
                lane_mask = ir.Constant(ir.VectorType(I32, LANES), mask)
                result[to] = builder.shuffle_vector(*pair, lane_mask)
    return result


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), generate


@intrinsic
def pairs_at(typingctx: Any, address: Any) -> Any:
    """An address as a pointer to pairs of bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint32)(types.int64), generate


@intrinsic
def pack_pairs(typingctx: Any, first: Any, second: Any, out: Any) -> Any:
    """LANES pairs out of as many numbers of two fp32 rows."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [load_vector(builder, args[i], I64(0), FLOATS, 4) for i in range(2)]
        store_vector(builder, pairs(builder, *values), args[2], I64(0))
        return context.get_dummy_value()

    return types.void(first, second, out), generate


@intrinsic
def pack_swiglu(typingctx: Any, gate: Any, up: Any, distance: Any, out: Any) -> Any:
    """LANES pairs of silu(gate) * up; a pair's second number is `distance` behind its first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        gate, up, distance, out = args
        values = []
        for place in (I64(0), distance):
            g, u = (load_vector(builder, part, place, FLOATS, 4) for part in (gate, up))
            values.append(builder.fmul(silu(builder, g), u))
        store_vector(builder, pairs(builder, *values), out, I64(0))
        return context.get_dummy_value()

    return types.void(gate, up, types.int64, out), generate


def add_lanes(builder: Any, value: Any) -> Any:
    """The sum of all lanes, halves first."""
    count = LANES // 2
    while count:
        mask = ir.Constant(INTS, [(i + count) % LANES for i in range(LANES)])
        value = builder.fadd(value, builder.shuffle_vector(value, value, mask))
        count //= 2
    return builder.extract_element(value, I32(0))


@intrinsic
def dot(typingctx: Any, a: Any, b: Any, size: Any) -> Any:
    """Sum of a[i] * b[i] of two fp32 rows; size is a multiple of LANES."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, size = args
        loop = ColumnLoop(builder, I64(0), size, LANES, [constant(0.0)])
        x, y = (load_vector(builder, row, loop.index, FLOATS, 4) for row in (a, b))
        (total,) = loop.close([multiply_add(builder, x, y, loop.values[0])])
        return add_lanes(builder, total)

    return types.float32(a, b, types.int64), generate
