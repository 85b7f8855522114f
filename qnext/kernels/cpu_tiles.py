"""Matrix products of many rows on a CPU that multiplies bfloat16 pairs, for prefill.

oneDNN, which torch would ask, makes new code for each number of rows, 2 ms a shape, and an expert
gets another number of rows every time. Here rows lie in panels of 16, one row in each lane of a
vector, and a weight is read as it is, two neighbours of a row at a time:

    sum[lane] += weight[n, 2p] * x[lane, 2p] + weight[n, 2p + 1] * x[lane, 2p + 1]

A block of 8 weight rows times up to 3 panels stays in registers while p runs. It gives a tile
[8, 16 * panels] of sums, from which the next step goes on: an activation works on tiles as they are
and packs its result for the next product; a last step turns them round into rows.

Exactness: both factors are rounded to bfloat16 and each sum is taken in the order of p by one lane,
so a row gives the same bits in any company and for any number of threads.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qnext.kernels.cpu_lanes import (
    bfloats_at,
    bytes_at,
    emit_call,
    floats_at,
    inner,
    ints_at,
    offset,
)
from qnext.kernels.cpu_products import dual_product
from qnext.kernels.cpu_team import CompiledFunction
from qnext.kernels.cpu_vectors import (
    F32,
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    ColumnLoop,
    bits_of,
    constant,
    integers,
    load_vector,
    pairs_at,
    prefetch,
    round_to_high,
    splat,
    store_vector,
    swap_index_bit,
)
from qnext.kernels.int8_rows import scale_of

TILE_ROWS = 8  # rows of a weight in a tile
MAX_PANELS = 3
TILE_SIZE = TILE_ROWS * MAX_PANELS * LANES
GROUP_PANELS = 12  # panels that share the second cache while a weight goes by


def _block(num_rows: int, num_panels: int, *, is_adding: bool = False) -> Any:
    """An intrinsic for num_rows rows of a weight times num_panels panels; see `multiply`."""

    @intrinsic
    def block(
        typingctx: Any, weight: Any, strides: Any, panels: Any, pairs: Any, factors: Any, tile: Any
    ) -> Any:  # fmt: skip
        signature = types.void(weight, strides, panels, types.int64, factors, tile)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weight, strides, panels, pairs, factors, tile = args
            stride, pair_stride, panel_size = (builder.extract_value(strides, i) for i in range(3))
            product = dual_product(builder.module)
            rows = [builder.gep(weight, [builder.mul(stride, I64(n))]) for n in range(num_rows)]
            starts = [
                builder.gep(panels, [builder.mul(panel_size, I64(p))]) for p in range(num_panels)
            ]
            places = [
                I64((n * num_panels + p) * LANES)
                for n in range(num_rows)
                for p in range(num_panels)
            ]
            sums = [constant(0.0)] * len(places)
            if is_adding:
                scales = [
                    load_vector(builder, factors, I64(p * LANES), FLOATS, 4)
                    for p in range(num_panels)
                ]
                before = [load_vector(builder, tile, place, FLOATS, 4) for place in places]
                sums = [builder.fmul(x, scales[i % num_panels]) for i, x in enumerate(before)]
            loop = ColumnLoop(builder, I64(0), pairs, 1, sums)
            at = builder.mul(loop.index, I64(LANES))
            lanes = [load_vector(builder, start, at, INTS, 4) for start in starts]
            if num_rows == TILE_ROWS:
                # The next rows' memory follows; fetched line after line it comes as one stream.
                ahead = builder.add(
                    builder.mul(stride, I64(TILE_ROWS)), builder.mul(loop.index, I64(16))
                )
                prefetch(builder, weight, ahead)
            column = builder.mul(loop.index, pair_stride)
            sums = list(loop.values)
            for n, row in enumerate(rows):
                place = builder.bitcast(builder.gep(row, [column]), I32.as_pointer())
                both = splat(builder, builder.load(place, align=2), INTS)
                for p, values in enumerate(lanes):
                    i = n * num_panels + p
                    sums[i] = builder.call(product, [sums[i], both, values])
            for place, total in zip(places, loop.close(sums), strict=True):
                store_vector(builder, total, tile, place)
            return context.get_dummy_value()

        return signature, generate

    return block


_block_8x1, _block_8x2, _block_8x3 = _block(8, 1), _block(8, 2), _block(8, 3)
_block_1x1, _block_1x2, _block_1x3 = _block(1, 1), _block(1, 2), _block(1, 3)
_adding_8x1 = _block(8, 1, is_adding=True)
_adding_8x2 = _block(8, 2, is_adding=True)
_adding_8x3 = _block(8, 3, is_adding=True)


@inner
def block_panels(num_panels: Any) -> Any:
    """How many panels the next block takes of those that are left: 3 and 2, 1 only alone."""
    return 3 if num_panels == 3 or num_panels > 4 else min(num_panels, 2)


def _multiply(
    weight: Any, stride: Any, pair_stride: Any, num_rows: Any, panels: Any, panel_stride: Any,
    num_panels: Any, pairs: Any, factors: Any, tile: Any,
) -> None:  # fmt: skip
    """The code behind `multiply`."""
    w, p, out = bfloats_at(weight), pairs_at(panels), floats_at(tile)
    strides = (stride, pair_stride, panel_stride)
    if factors != 0:
        f = floats_at(factors)
        if num_panels == 3:
            _adding_8x3(w, strides, p, pairs, f, out)
        elif num_panels == 2:
            _adding_8x2(w, strides, p, pairs, f, out)
        else:
            _adding_8x1(w, strides, p, pairs, f, out)
    elif num_rows == TILE_ROWS:
        if num_panels == 3:
            _block_8x3(w, strides, p, pairs, out, out)
        elif num_panels == 2:
            _block_8x2(w, strides, p, pairs, out, out)
        else:
            _block_8x1(w, strides, p, pairs, out, out)
    else:
        for n in range(num_rows):
            row, sums = offset(w, n * stride), offset(out, n * num_panels * LANES)
            if num_panels == 3:
                _block_1x3(row, strides, p, pairs, sums, sums)
            elif num_panels == 2:
                _block_1x2(row, strides, p, pairs, sums, sums)
            else:
                _block_1x1(row, strides, p, pairs, sums, sums)


@intrinsic
def _call(typingctx: Any, function: Any, arguments: Any) -> Any:
    """Call compiled code by its address, with numbers and addresses.

    It keeps that code out of all that use it, which compile many times faster so.
    """
    count = len(arguments)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_call(builder, args[0], [builder.extract_value(args[1], i) for i in range(count)])
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, count)), generate


@inner
def multiply(
    code: Any, weight: Any, stride: Any, pair_stride: Any, num_rows: Any, panels: Any,
    panel_stride: Any, num_panels: Any, pairs: Any, factors: Any, tile: Any,
) -> None:  # fmt: skip
    """tile[n, lane] = weight[n] . row in that lane, added to factors[lane] * tile[n, lane].

    Args:
        code: what `code_address` gives.
        weight: address of bfloat16.
        stride, pair_stride: elements from a row of the weight to the next, and from a pair of
            columns to the next.
        num_rows: 1 to TILE_ROWS; TILE_ROWS with factors.
        panels: address of num_panels panels of `pairs` times LANES pairs, panel_stride pairs apart.
        factors: address of a number for each lane; 0: the tile starts anew.
        tile: address of fp32 [num_rows, num_panels * LANES]
    """
    arguments = (
        weight, stride, pair_stride, num_rows, panels, panel_stride, num_panels, pairs, factors,
        tile,
    )  # fmt: skip
    _call(ints_at(code)[0], arguments)


@intrinsic
def _pack_32(typingctx: Any, rows: Any, start: Any, out: Any) -> Any:
    """Columns [start, start + 32) of 16 fp32 rows, given by their addresses, to pairs [16, 16]."""
    signature = types.void(rows, types.int64, out)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, start, out = args
        narrow = ir.VectorType(ir.IntType(16), LANES)
        joined = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
        vectors = []
        for lane in range(LANES):
            address = builder.load(builder.gep(rows, [I64(lane)]))
            row = builder.inttoptr(address, F32.as_pointer())
            halves = []
            for half in range(2):
                place = builder.add(start, I64(LANES * half))
                bits = round_to_high(builder, load_vector(builder, row, place, FLOATS, 4))
                halves.append(builder.trunc(builder.lshr(bits, integers(16)), narrow))
            vectors.append(builder.bitcast(builder.shuffle_vector(*halves, joined), INTS))
        for distance in (8, 4, 2, 1):
            vectors = swap_index_bit(builder, vectors, distance)
        for pair, vector in enumerate(vectors):
            store_vector(builder, vector, out, I64(pair * LANES))
        return context.get_dummy_value()

    return signature, generate


@inner
def round_bits(value: Any) -> Any:
    """fp32 to the nearest bfloat16, ties to even: its 16 bits as a number of 32."""
    bits = bits_of(value)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint32(np.uint32(bits + odd + np.uint32(0x7FFF)) >> np.uint32(16))


@inner
def pair_bits(first: Any, second: Any) -> Any:
    """Two fp32 numbers as one pair of bfloat16."""
    return np.uint32(round_bits(first) | np.uint32(round_bits(second) << np.uint32(16)))


def _pack_panel(rows: Any, size: Any, panel: Any) -> None:
    """The code behind `pack_panel`."""
    addresses, out = ints_at(rows), pairs_at(panel)
    whole = size // 32 * 32
    for start in range(0, whole, 32):
        _pack_32(addresses, start, offset(out, start // 2 * LANES))
    for lane in range(LANES):
        row = floats_at(addresses[lane])
        for p in range(whole // 2, size // 2):
            out[p * LANES + lane] = pair_bits(row[2 * p], row[2 * p + 1])


@inner
def pack_panel(code: Any, rows: Any, size: Any, panel: Any) -> None:
    """Round 16 rows to bfloat16 and lay them out as a panel [size / 2, 16] of pairs.

    Args:
        code: what `code_address` gives.
        rows: address of the addresses of 16 fp32 rows of `size`, an even number.
        panel: address of the pairs.
    """
    _call(ints_at(code)[1], (rows, size, panel))


@intrinsic
def _turn(typingctx: Any, tile: Any, stride: Any, out: Any, out_stride: Any) -> Any:
    """8 rows of 16 lanes of a tile to 16 rows of 8."""
    signature = types.void(tile, types.int64, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, stride, out, out_stride = args
        vectors = [
            load_vector(builder, tile, builder.mul(stride, I64(n)), FLOATS, 4)
            for n in range(TILE_ROWS)
        ]
        for distance in (4, 2, 1):
            vectors = swap_index_bit(builder, vectors, distance)
        for lane in range(LANES):
            first = lane // TILE_ROWS * TILE_ROWS
            mask = ir.Constant(ir.VectorType(I32, TILE_ROWS), list(range(first, first + 8)))
            vector = vectors[lane % TILE_ROWS]
            half = builder.shuffle_vector(vector, vector, mask)
            store_vector(builder, half, out, builder.mul(out_stride, I64(lane)))
        return context.get_dummy_value()

    return signature, generate


def _store_rows(
    tile: Any, num_panels: Any, num_outputs: Any, rows: Any, stride: Any, num_rows: Any
) -> None:
    """The code behind `store_rows`."""
    width = num_panels * LANES
    sums, out = floats_at(tile), floats_at(rows)
    for p in range(num_panels):
        start = p * LANES
        if num_outputs == TILE_ROWS and num_rows - start >= LANES:
            _turn(offset(sums, start), width, offset(out, start * stride), stride)
        else:
            for lane in range(start, min(start + LANES, num_rows)):
                for n in range(num_outputs):
                    out[lane * stride + n] = sums[n * width + lane]


@inner
def store_rows(
    code: Any, tile: Any, num_panels: Any, num_outputs: Any, rows: Any, stride: Any, num_rows: Any
) -> None:
    """Turn a tile round: rows[lane, n] = tile[n, lane] for the first num_rows lanes.

    Args:
        code: what `code_address` gives.
        tile: address of fp32 [num_outputs, num_panels * LANES]; at most TILE_ROWS outputs.
        rows: address of fp32 rows, `stride` elements apart.
    """
    _call(ints_at(code)[2], (tile, num_panels, num_outputs, rows, stride, num_rows))


def _widen_rows(weight: Any, count: Any, room: Any) -> None:
    """The code behind `weight_rows`: int8 to bfloat16, which holds them exactly."""
    rows, out = bytes_at(weight), bfloats_at(room)
    for i in range(count):
        out[i] = np.uint16(bits_of(np.float32(rows[i])) >> np.uint32(16))


_CODE = tuple(
    CompiledFunction(function, types.void(*(types.int64,) * count))
    for function, count in ((_multiply, 10), (_pack_panel, 3), (_store_rows, 6), (_widen_rows, 3))
)


@cache
def _code_table() -> np.ndarray:
    return np.array([function.address for function in _CODE], dtype=np.int64)


def scales_of(weight: torch.Tensor) -> torch.Tensor | None:
    """The contiguous scales of an int8 weight's rows; None for bfloat16."""
    return scale_of(weight).float().contiguous() if weight.dtype == torch.int8 else None


def code_address() -> int:
    """Address of the addresses of the compiled code that `multiply` and the others call."""
    return int(_code_table().ctypes.data)


@inner
def pack_rows(
    code: Any, x: Any, stride: Any, size: Any, span: Any, num_rows: Any, rows: Any, panels: Any
) -> None:
    """Pack panels [start, end) of consecutive rows; lanes past the last row repeat it.

    Args:
        code: what `code_address` gives.
        x: address of num_rows fp32 rows, `stride` elements apart.
        span: (start, end), panels.
        rows: address of room for 16 of int64.
        panels: address of all panels.
    """
    start, end = span
    addresses = ints_at(rows)
    for panel in range(start, end):
        for lane in range(LANES):
            addresses[lane] = x + min(panel * LANES + lane, num_rows - 1) * stride * 4
        pack_panel(code, rows, size, panels + panel * (size // 2) * LANES * 4)


@inner
def weight_rows(code: Any, weight: Any, size: Any, first: Any, num_rows: Any) -> Any:
    """Address of up to TILE_ROWS rows of a weight in bfloat16.

    Args:
        code: what `code_address` gives.
        weight: (address of contiguous rows, address of the rows' scales, address of room for
            TILE_ROWS rows of bfloat16); rows with scales are int8, others are bfloat16 and have 0.
        size: of a row.
    """
    rows, scales, room = weight
    if scales == 0:
        return rows + first * size * 2
    _call(ints_at(code)[3], (rows + first * size, num_rows * size, room))
    return room


@inner
def scale_tile(weight: Any, first: Any, num_rows: Any, width: Any, tile: Any) -> None:
    """Multiply a tile by the scales of its rows, if the weight has them. See `weight_rows`."""
    if weight[1] != 0:
        scales, sums = floats_at(weight[1]), floats_at(tile)
        for n in range(num_rows):
            for lane in range(width):
                sums[n * width + lane] *= scales[first + n]


@inner
def multiply_rows(
    code: Any, weight: Any, size: Any, outputs: Any, panels: Any, span: Any, tile: Any, rows: Any,
    stride: Any, num_rows: Any,
) -> None:  # fmt: skip
    """rows[row, n] = weight[n] . row for the outputs n and the panels of two spans.

    Args:
        code: what `code_address` gives.
        weight: as `weight_rows` takes it.
        size: of a row of the weight.
        outputs, span: (start, end) of rows of the weight, and of panels.
        panels: address of all panels.
        tile: address of room for TILE_SIZE fp32.
        rows: address of fp32 rows, `stride` elements apart; num_rows of them in all panels.
    """
    pairs = size // 2
    panel_size = pairs * LANES
    for group in range(span[0], span[1], GROUP_PANELS):
        group_end = min(group + GROUP_PANELS, span[1])
        for n in range(outputs[0], outputs[1], TILE_ROWS):
            num_outputs = min(TILE_ROWS, outputs[1] - n)
            part = weight_rows(code, weight, size, n, num_outputs)
            panel = group
            while panel < group_end:
                count = block_panels(group_end - panel)
                multiply(
                    code, part, size, 2, num_outputs,
                    panels + panel * panel_size * 4, panel_size, count, pairs, 0, tile,
                )  # fmt: skip
                scale_tile(weight, n, num_outputs, count * LANES, tile)
                first = panel * LANES
                target = rows + (first * stride + n) * 4
                store_rows(code, tile, count, num_outputs, target, stride, num_rows - first)
                panel += count
