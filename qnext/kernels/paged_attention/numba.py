"""Causal attention of a prompt's chunk to cached keys on a CPU, in bfloat16 tiles."""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qnext.kernels import cpu_products, cpu_tiles
from qnext.kernels import cpu_vectors as vectors
from qnext.kernels.cpu_lanes import floats_at, from_bits, inner, ints_at, offset
from qnext.kernels.cpu_team import TeamKernel, meet, share, team_size, thread_idx
from qnext.kernels.cpu_tiles import (
    MAX_PANELS,
    TILE_ROWS,
    block_panels,
    multiply,
    pack_panel,
    pair_bits,
    store_rows,
)
from qnext.kernels.cpu_vectors import (
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    ColumnLoop,
    load_vector,
    pack_pairs,
    pairs_at,
)
from qnext.kernels.paged_attention.reference import CachedRows

BLOCK_KEYS = 64  # keys that a running softmax takes at a time
BLOCK_ROWS = MAX_PANELS * LANES

TEAM, Q, OUT, HQ, HKV, D, NUM_ROWS, NUM_KEYS, SCALE = range(9)
KEY_POOL, VALUE_POOL, SLOTS, KEYS, VALUES, ROWS, CODE = range(9, 16)
QUERIES, SCORES, WEIGHTS, SUMS, RUNNING, STRIDE_KEYS, NUM_FIELDS = range(16, 23)


def supports(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: CachedRows,
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if row_stable:
        return "windows take their rows in fp32"
    if product_dtype != torch.bfloat16:
        return f"products are in bfloat16 here, not {product_dtype or q.dtype}"
    if q.device.type != "cpu" or not q.dtype == k_cache.dtype == v_cache.dtype == torch.float32:
        return f"rows are fp32 on a CPU here, not {q.dtype} on {q.device}"
    if q.shape[2] % TILE_ROWS:
        return f"heads are of a multiple of {TILE_ROWS} here, not {q.shape[2]}"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "pools are contiguous here"
    return cpu_products.dual_objection()


def paged_attention_numba(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: CachedRows,
    scale: float,
    row_stable: bool = False,
    product_dtype: torch.dtype | None = None,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `paged_attention_reference`: blocks of keys under a running softmax, all sums in fp32."""
    q = q.contiguous()
    out = torch.zeros_like(q)
    start = 0
    for slots, num_rows in zip(rows.each(), rows.query_lens, strict=True):
        if num_rows:
            pools = (k_cache, v_cache)
            _attend_sequence(q[start:], pools, slots.contiguous(), num_rows, scale, out[start:])
        start += num_rows
    return out


def _attend_sequence(
    q: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    num_rows: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    (_, hq, d), hkv = q.shape, pools[0].shape[1]
    num_threads, num_keys = torch.get_num_threads(), slots.shape[0]
    stride = -(-num_keys // BLOCK_KEYS) * BLOCK_KEYS
    room: dict[int, np.ndarray] = {
        TEAM: np.zeros(1, dtype=np.int64),
        KEYS: np.empty(hkv * stride * d, dtype=np.uint16),
        VALUES: np.empty(hkv * stride // 2 * d, dtype=np.uint32),
        ROWS: np.empty(num_threads * LANES, dtype=np.int64),
        QUERIES: np.empty(num_threads * BLOCK_ROWS * d // 2, dtype=np.uint32),
        SCORES: np.empty(num_threads * BLOCK_KEYS * BLOCK_ROWS, dtype=np.float32),
        WEIGHTS: np.empty(num_threads * BLOCK_KEYS // 2 * BLOCK_ROWS, dtype=np.uint32),
        SUMS: np.empty(num_threads * d * BLOCK_ROWS, dtype=np.float32),
        RUNNING: np.empty(num_threads * 3 * BLOCK_ROWS, dtype=np.float32),
    }
    table = np.zeros(NUM_FIELDS, dtype=np.int64)
    table[[HQ, HKV, D, NUM_ROWS, NUM_KEYS]] = hq, hkv, d, num_rows, num_keys
    table[SCALE], table[STRIDE_KEYS] = np.float32(scale).view(np.int32), stride
    table[CODE] = cpu_tiles.code_address()
    for field, memory in room.items():
        table[field] = memory.ctypes.data
    tensors = {Q: q, OUT: out, KEY_POOL: pools[0], VALUE_POOL: pools[1], SLOTS: slots}
    for field, tensor in tensors.items():
        table[field] = tensor.data_ptr()
    _attend(table, num_threads)


def _softmax(*, is_masked: bool) -> Any:
    @intrinsic
    def softmax(
        typingctx: Any, scores: Any, width: Any, scale: Any, limit: Any, running: Any, out: Any
    ) -> Any:
        signature = types.void(scores, types.int64, types.float32, types.int64, running, out)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scores, width, scale, limit, running, out = args
            first = vectors.splat(builder, builder.trunc(limit, I32), INTS)
            limits = builder.add(first, ir.Constant(INTS, list(range(LANES))))
            factor = vectors.splat(builder, scale, FLOATS)

            def visible(key: Any) -> Any:
                idx = vectors.splat(builder, builder.trunc(key, I32), INTS)
                return builder.icmp_signed("<", idx, limits)

            def score(key: Any) -> Any:
                return load_vector(builder, scores, builder.mul(key, width), FLOATS, 4)

            loop = ColumnLoop(
                builder, I64(0), I64(BLOCK_KEYS), 1, [vectors.constant(float("-inf"))]
            )
            value = score(loop.index)
            if is_masked:
                value = builder.select(visible(loop.index), value, vectors.constant(float("-inf")))
            (highest,) = loop.close([vectors.larger(builder, value, loop.values[0])])
            tops, totals, factors = (I64(i * BLOCK_ROWS) for i in range(3))
            before = load_vector(builder, running, tops, FLOATS, 4)
            top = vectors.larger(builder, builder.fmul(highest, factor), before)
            negative = builder.fneg(top)
            loop = ColumnLoop(builder, I64(0), I64(BLOCK_KEYS), 2, [vectors.constant(0.0)])
            total, pair = loop.values[0], []
            for i in range(2):
                key = builder.add(loop.index, I64(i))
                shifted = vectors.multiply_add(builder, score(key), factor, negative)
                weight = vectors.exp(builder, shifted)
                if is_masked:
                    weight = builder.select(visible(key), weight, vectors.constant(0.0))
                total = builder.fadd(total, weight)
                pair.append(weight)
            place = builder.mul(loop.index, I64(LANES // 2))
            vectors.store_vector(builder, vectors.pairs(builder, *pair), out, place)
            (total,) = loop.close([total])
            shrink = vectors.exp(builder, builder.fsub(before, top))
            old = load_vector(builder, running, totals, FLOATS, 4)
            total = vectors.multiply_add(builder, old, shrink, total)
            for place, value in ((tops, top), (totals, total), (factors, shrink)):
                vectors.store_vector(builder, value, running, place)
            return context.get_dummy_value()

        return signature, generate

    return softmax


_softmax_all, _softmax_masked = _softmax(is_masked=False), _softmax(is_masked=True)


@inner
def _round_block(t: Any, block: Any) -> None:
    """Keys of a block to bfloat16 rows [D], and its values to pairs of neighbouring tokens."""
    hkv, d, stride = t[HKV], t[D], t[STRIDE_KEYS]
    slots, num_keys = ints_at(t[SLOTS]), t[NUM_KEYS]
    keys, values = floats_at(t[KEY_POOL]), floats_at(t[VALUE_POOL])
    for key in range(block * BLOCK_KEYS, (block + 1) * BLOCK_KEYS, 2):
        # Past the end stand the last token's: they get no weight, but must be numbers.
        first = slots[min(key, num_keys - 1)] * hkv * d
        second = slots[min(key + 1, num_keys - 1)] * hkv * d
        for head in range(hkv):
            place = head * stride * d // 2 + key // 2 * d
            k0, k1 = offset(keys, first + head * d), offset(keys, second + head * d)
            v0, v1 = offset(values, first + head * d), offset(values, second + head * d)
            pairs = offset(pairs_at(t[VALUES]), place)
            whole = d // LANES * LANES
            for i in range(0, whole, LANES):
                pack_pairs(offset(v0, i), offset(v1, i), offset(pairs, i))
            for i in range(whole, d):
                pairs[i] = pair_bits(v0[i], v1[i])
            rounded = offset(pairs_at(t[KEYS]), place)
            for i in range(d // 2):
                rounded[i] = pair_bits(k0[2 * i], k0[2 * i + 1])
                rounded[d // 2 + i] = pair_bits(k1[2 * i], k1[2 * i + 1])


@inner
def _take_keys(t: Any, head: Any, first: Any, first_row: Any, places: Any, count: Any) -> None:
    """One block of keys for up to BLOCK_ROWS rows of a head: scores, softmax, weighted values."""
    queries, scores, weights, sums, running = places
    d, width = t[D], count * LANES
    kv_place = head // (t[HQ] // t[HKV]) * t[STRIDE_KEYS] * d
    keys, values = t[KEYS] + (kv_place + first * d) * 2, t[VALUES] + (kv_place + first * d) * 2
    code, query_size = t[CODE], d // 2 * LANES
    for n in range(0, BLOCK_KEYS, TILE_ROWS):
        multiply(
            code, keys + n * d * 2, d, 2, TILE_ROWS, queries, query_size, count, d // 2,
            0, scores + n * width * 4,
        )  # fmt: skip
    scale = from_bits(np.int32(t[SCALE]))
    weight_size = BLOCK_KEYS // 2 * LANES
    for panel in range(count):
        tile = offset(floats_at(scores), panel * LANES)
        out = offset(pairs_at(weights), panel * weight_size)
        state = offset(floats_at(running), panel * LANES)
        # The first lane's query sees this many of the block's keys, the next one more each.
        limit = t[NUM_KEYS] - t[NUM_ROWS] + first_row + panel * LANES + 1 - first
        if limit >= BLOCK_KEYS:
            _softmax_all(tile, width, scale, limit, state, out)
        else:
            _softmax_masked(tile, width, scale, limit, state, out)
    factors = running + 2 * BLOCK_ROWS * 4
    for i in range(0, d, TILE_ROWS):
        multiply(
            code, values + i * 4, 2, 2 * d, TILE_ROWS, weights, weight_size, count,
            BLOCK_KEYS // 2, factors, sums + i * width * 4,
        )  # fmt: skip


@inner
def _rows_of_head(t: Any, head: Any, first_row: Any, count: Any) -> None:
    """Up to BLOCK_ROWS rows of one query head, over all keys that they see."""
    d, hq, thread = t[D], t[HQ], thread_idx()
    width = count * LANES
    queries = t[QUERIES] + thread * BLOCK_ROWS * d // 2 * 4
    scores = t[SCORES] + thread * BLOCK_KEYS * BLOCK_ROWS * 4
    weights = t[WEIGHTS] + thread * BLOCK_KEYS // 2 * BLOCK_ROWS * 4
    sums = t[SUMS] + thread * d * BLOCK_ROWS * 4
    running = t[RUNNING] + thread * 3 * BLOCK_ROWS * 4
    rows = t[ROWS] + thread * LANES * 8
    last_row = t[NUM_ROWS] - 1
    for panel in range(count):
        for lane in range(LANES):
            row = min(first_row + panel * LANES + lane, last_row)
            ints_at(rows)[lane] = t[Q] + (row * hq + head) * d * 4
        pack_panel(t[CODE], rows, d, queries + panel * (d // 2) * LANES * 4)
    state, out = floats_at(running), floats_at(sums)
    for lane in range(BLOCK_ROWS):
        state[lane] = np.float32(-1e30)
        state[BLOCK_ROWS + lane] = np.float32(0.0)
    for i in range(d * width):
        out[i] = np.float32(0.0)
    seen = t[NUM_KEYS] - last_row + min(first_row + width - 1, last_row)
    for first in range(0, seen, BLOCK_KEYS):
        _take_keys(t, head, first, first_row, (queries, scores, weights, sums, running), count)
    total = offset(state, BLOCK_ROWS)
    for lane in range(width):
        total[lane] = np.float32(1.0) / total[lane]
    for i in range(d):
        for lane in range(width):
            out[i * width + lane] *= total[lane]
    target = t[OUT] + (first_row * hq + head) * d * 4
    left = t[NUM_ROWS] - first_row
    for i in range(0, d, TILE_ROWS):
        tile = sums + i * width * 4
        store_rows(t[CODE], tile, count, TILE_ROWS, target + i * 4, hq * d, left)


@TeamKernel
def _attend(t: Any) -> None:
    """Round the keys and values once, then take the heads' rows in turns."""
    start, end = share(t[STRIDE_KEYS] // BLOCK_KEYS, 1)
    for block in range(start, end):
        _round_block(t, block)
    meet(ints_at(t[TEAM]))
    num_panels = (t[NUM_ROWS] + LANES - 1) // LANES
    turn = 0
    for head in range(t[HQ]):
        panel = 0
        while panel < num_panels:
            count = block_panels(num_panels - panel)
            if turn % team_size() == thread_idx():
                _rows_of_head(t, head, panel * LANES, count)
            turn += 1
            panel += count
