"""A whole decode, verification or draft step as one compiled function for a team of threads.

The kernel gets one table of sizes and addresses, so one compilation for each type of weights serves
any number of layers of any sizes; the model's own matrices are read where they are.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qnext.config.model import ModelConfig
from qnext.kernels import cpu_products
from qnext.kernels.cpu_lanes import array
from qnext.kernels.cpu_products import CHUNK, LAYOUTS, PRODUCTS
from qnext.kernels.cpu_team import TeamPace
from qnext.kernels.decode_step import fields as F
from qnext.kernels.decode_step.layers import ONE_STEP, run_layer, run_step
from qnext.kernels.decode_step.reference import (
    MAX_ROUNDS,
    NOT_NUMBERS,
    DecodeStep,
    StepOutput,
    WindowRows,
)
from qnext.kernels.experts.step import mix_experts
from qnext.kernels.gated_delta_window.step import mix_window
from qnext.kernels.paged_attention.step import attend_window
from qnext.runtime.log import log_once

_logger = logging.getLogger("qnext.kernels")
_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
MIN_ROWS = 8  # that there is room for from the start
MAX_STEPS = MAX_ROUNDS
MAX_WINDOW = 1 << 10  # rows of a sequence: no limit of the kernels' own
MAX_END_IDS = 16  # looked for between them; others end a text a few tokens later

# Small parameters are kept as fp32 copies; the others are read in place.
_SMALL = {
    F.LN1: "input_layernorm.weight",
    F.LN2: "post_attention_layernorm.weight",
    F.DT_BIAS: "mixer.dt_bias",
    F.GATED_NORM: "mixer.norm.weight",
    F.Q_NORM: "mixer.q_norm.weight",
    F.K_NORM: "mixer.k_norm.weight",
}
# The column after each of these is that of its scales.
_LARGE = {
    F.IN_PROJ: ("mixer.qkv_proj", "mixer.in_proj"),
    F.OUT_PROJ: ("mixer.o_proj", "mixer.out_proj"),
    F.EXPERTS_UP: ("mlp.experts_gate_up",),
    F.EXPERTS_DOWN: ("mlp.experts_down",),
    F.SHARED_UP: ("mlp.shared_gate_up", "mlp.gate_up_proj"),
    F.SHARED_DOWN: ("mlp.shared_down", "mlp.down_proj"),
}
_ROUTER, _SHARED_GATE = "mlp.gate", "mlp.shared_expert_gate"


@dataclass
class Prepared:
    """The table of a step with what it points to."""

    table: np.ndarray
    kept: list[Any]  # weights and copies
    room: dict[int, np.ndarray]  # by field
    num_positions: int
    pace: TeamPace = field(default_factory=TeamPace)
    num_threads: int = 0
    max_rows: int = 0
    max_seqs: int = 0
    pages_width: int = 0
    decide_sizes: tuple[int, int, int] = (0, 0, 0)  # sequences, window, threads with room to decide


def supports(step: DecodeStep, rows: WindowRows) -> str | None:
    """Say why this backend cannot run, or None."""
    if step.prepared is not None:
        return None
    if step.keys.device.type != "cpu":
        return f"the rows are on {step.keys.device}"
    if step.keys.dtype != torch.float32:
        return f"activations are fp32 here, not {step.keys.dtype}"
    return _weight_objection(step)


def _matrices(step: DecodeStep) -> list[tuple[str, torch.Tensor]]:
    names = [step.head, "embed_tokens"] + (["mtp.fc"] if step.prefix else [])
    for prefix in step.layer_names:
        names += [prefix + name for group in _LARGE.values() for name in group]
    return [(name, step.parameters[name]) for name in names if name in step.parameters]


def _weight_objection(step: DecodeStep) -> str | None:
    dtypes = set()
    for name, weight in _matrices(step):
        dtypes.add(weight.dtype)
        if not weight.is_contiguous():
            return f"{name} is not contiguous"
    if len(dtypes) > 1 or not dtypes <= set(_KINDS):
        return f"matrices are all fp32, all bf16 or all int8 here, not {sorted(map(str, dtypes))}"
    return None


def decode_step_numba(step: DecodeStep, rows: WindowRows) -> StepOutput:
    """As `decode_step_reference`; every row's sums run in one order, whatever the other rows."""
    prepared: Prepared = step.prepared or prepare(step)
    num_rows = len(rows.token_ids)
    fill_rows(step, prepared, rows, num_rows)
    table, room = prepared.table, prepared.room
    num_threads = fill_threads(prepared, num_rows)
    began = time.perf_counter()
    run_step(table, num_threads)
    prepared.pace.record(num_rows, num_threads, time.perf_counter() - began)
    num_scored = int(table[F.NUM_SCORED])
    best = room[F.BEST][:num_scored].tolist()
    if min(best) < 0:
        raise ValueError(NOT_NUMBERS)
    return StepOutput(
        hidden=torch.from_numpy(room[F.HIDDEN][:num_rows].copy()),
        logits=torch.from_numpy(room[F.LOGITS][:num_scored]),
        best=best,
    )


def fill_rows(step: DecodeStep, prepared: Prepared, rows: WindowRows, max_rows: int) -> None:
    """Write the rows of a call to the table.

    Args:
        max_rows: the most that the call will come to have.
    """
    num_rows = len(rows.token_ids)
    _make_room(step, prepared, rows, max(num_rows, max_rows))
    table, room = prepared.table, prepared.room
    table[F.NUM_ROWS], table[F.NUM_SEQS] = num_rows, len(rows.query_lens)
    room[F.TOKEN_IDS][:num_rows] = rows.token_ids
    start = 0
    for n, (length, pages) in enumerate(zip(rows.query_lens, rows.pages, strict=True)):
        start += length
        room[F.STARTS][n + 1] = start
        room[F.PAGES][n, : len(pages)] = pages
    room[F.SLOTS][: len(rows.state_slots)] = rows.state_slots
    room[F.CONTEXTS][: len(rows.context_lens)] = rows.context_lens
    if rows.hidden is not None:
        room[F.HIDDEN_IN][:num_rows] = rows.hidden.numpy()
    num_scored = len(rows.query_lens) if rows.scores_last else num_rows
    scored = room[F.STARTS][1 : num_scored + 1] - 1 if rows.scores_last else range(num_rows)
    table[F.NUM_SCORED], room[F.SCORED][:num_scored] = num_scored, scored


def fill_threads(prepared: Prepared, size: int) -> int:
    """Choose the threads of a call and prepare their meetings. size: as `TeamPace` takes it"""
    prepared.room[F.TEAM][0] = 0  # a team of another size may have counted before
    return prepared.pace.choose(size, prepared.num_threads)


def pending_rows(step: DecodeStep) -> np.ndarray:
    """Rows of each slot's last window that are accepted and not yet in its states. [slots]"""
    prepared: Prepared = step.prepared
    return prepared.room[F.PENDING]


def start_slot(step: DecodeStep, slot: int) -> None:
    """A sequence begins in a slot, or its states were changed by others than these kernels."""
    if step.prepared is not None:
        pending_rows(step)[slot] = 0


def settle(step: DecodeStep, commit: Callable[[tuple[int, ...], tuple[int, ...]], None]) -> None:
    """Take accepted rows into the states now, for others to read.

    Args:
        commit: as `HybridCache.commit`.
    """
    if step.prepared is None:
        return
    pending = pending_rows(step)
    slots = tuple(pending.nonzero()[0].tolist())
    if slots and step.config.num_linear_layers:
        commit(slots, tuple(pending[list(slots)].tolist()))
    pending[:] = 0


def read_weights(step: DecodeStep) -> None:
    """Find all matrices and copy the small weights anew; not every change of one can be noticed."""
    if step.prepared is not None:
        _read_weights(step, step.prepared)


def prepare(step: DecodeStep) -> Prepared:
    """Make the table of a step; room for rows is made when they come."""
    config = step.config
    cos, sin = (array(part.contiguous()) for part in step.rotation)
    prepared = Prepared(
        table=np.zeros(F.NUM_FIELDS, dtype=np.int64),
        kept=[],
        room={},
        num_positions=cos.shape[0],
    )
    table = prepared.table
    _set_sizes(table, config)
    dtype = step.parameters[step.head].dtype
    kind = _kind_of(dtype)
    table[F.WEIGHT_BYTES], table[F.LAYOUT] = dtype.itemsize, LAYOUTS[kind]
    functions = {
        F.PRODUCTS: PRODUCTS[kind],
        F.PRODUCTS_FLOAT: PRODUCTS["float32"],
        F.MIX_WINDOW: mix_window,
        F.ATTEND_WINDOW: attend_window,
        F.MIX_EXPERTS: mix_experts,
        F.RUN_LAYER: run_layer,
        F.ONE_STEP: ONE_STEP,
    }
    for name, function in functions.items():
        table[name] = function.address
    pools = {
        F.KEYS: array(step.keys),
        F.VALUES: array(step.values),
        F.COS: cos,
        F.SIN: sin,
        F.TEAM: np.zeros(8, dtype=np.int64),
    }
    names = (
        F.CONV_STATE,
        F.STATES,
        F.WINDOW_KEYS,
        F.WINDOW_CHANGES,
        F.WINDOW_DECAYS,
        F.WINDOW_INPUTS,
    )
    pools |= dict(zip(names, map(array, step.states), strict=True))
    _, num_slots, max_window = step.states[2].shape[:3]
    pools[F.PENDING] = np.zeros(num_slots, dtype=np.int64)
    for name, pool in pools.items():
        place(prepared, name, pool)
    table[F.KV_ROWS], table[F.PAGE_SIZE] = step.keys.shape[1], step.page_size
    table[F.NUM_SLOTS], table[F.MAX_WINDOW] = num_slots, max_window
    table[F.HOLDS_STATES] = not step.prefix and config.num_linear_layers > 0
    _read_weights(step, prepared)
    step.prepared = prepared
    return prepared


def _kind_of(dtype: torch.dtype) -> str:
    """Which of PRODUCTS takes these weights on this machine."""
    if dtype != torch.bfloat16:
        return _KINDS[dtype]
    objection = cpu_products.dual_objection()
    if objection is None:
        return "bfloat16 dual"
    log_once(_logger, f"{objection}: bfloat16 weights are widened, which is exact and slower")
    return "bfloat16"


def _set_sizes(table: np.ndarray, config: ModelConfig) -> None:
    table[F.C], table[F.D] = config.hidden_size, config.head_dim
    table[F.HQ], table[F.HKV] = config.num_attention_heads, config.num_key_value_heads
    table[F.HK], table[F.HV] = config.linear_num_key_heads, config.linear_num_value_heads
    table[F.K], table[F.V] = config.linear_key_head_dim, config.linear_value_head_dim
    table[F.WIDTH] = config.linear_conv_kernel_dim
    table[F.E], table[F.A] = config.num_experts, config.num_experts_per_tok
    table[F.I] = config.moe_intermediate_size
    table[F.HALF_ROTARY] = config.rotary_dim // 2
    table[F.NORM_TOPK] = config.norm_topk_prob
    table[F.EPS] = int(np.float32(config.rms_norm_eps).view(np.int32))


def place(prepared: Prepared, name: int, memory: np.ndarray) -> None:
    prepared.room[name] = memory
    prepared.table[name] = memory.ctypes.data


def _read_weights(step: DecodeStep, prepared: Prepared) -> None:
    kept: list[Any] = []
    names, table = step.parameters, prepared.table
    rows = np.zeros((len(step.layer_names), F.NUM_COLUMNS), dtype=np.int64)
    for row, prefix, mixer_idx in zip(rows, step.layer_names, step.mixer_idx, strict=True):
        _read_layer(row, prefix, names, kept)
        row[F.MIXER_IDX] = mixer_idx
    table[F.LAYERS], table[F.NUM_LAYERS] = rows.ctypes.data, len(rows)
    kept.append(rows)
    head = names[step.head]
    table[F.EMBEDDING], table[F.EMBEDDING_SCALE] = _matrix(names["embed_tokens"], kept)
    table[F.HEAD], table[F.HEAD_SCALE] = _matrix(head, kept)
    table[F.VOCAB] = head.shape[0]
    table[F.FINAL_NORM] = _copied(names[step.prefix + "norm.weight"], kept)
    if step.prefix:
        table[F.FC], table[F.FC_SCALE] = _matrix(names["mtp.fc"], kept)
        table[F.NORM_EMBEDDING] = _copied(names["mtp.pre_fc_norm_embedding.weight"], kept)
        table[F.NORM_HIDDEN] = _copied(names["mtp.pre_fc_norm_hidden.weight"], kept)
    prepared.kept = kept


def _read_layer(row: np.ndarray, prefix: str, names: Any, kept: list[Any]) -> None:
    row[F.IS_ATTENTION] = prefix + "mixer.qkv_proj" in names
    row[F.IS_MOE] = prefix + _ROUTER in names
    for column, choices in _LARGE.items():
        for name in choices:
            if prefix + name in names:
                row[column], row[column + 1] = _matrix(names[prefix + name], kept)
    for column, name in _SMALL.items():
        if prefix + name in names:
            row[column] = _copied(names[prefix + name], kept)
    if not row[F.IS_ATTENTION]:
        row[F.DECAY_RATE] = _copied(names[prefix + "mixer.A_log"].float().exp(), kept)
        row[F.CONV] = _copied(names[prefix + "mixer.conv1d"].t(), kept)
    for name in _LARGE[F.SHARED_DOWN]:
        if prefix + name in names:
            row[F.SHARED_WIDTH] = names[prefix + name].shape[1]
    if row[F.IS_MOE]:
        router = names[prefix + _ROUTER].float()
        gate = names.get(prefix + _SHARED_GATE)
        gate = torch.zeros(1, router.shape[1]) if gate is None else gate.float()
        row[F.ROUTER] = _copied(torch.cat([router, gate]), kept)


def _matrix(weight: torch.Tensor, kept: list[Any]) -> tuple[int, int]:
    """Addresses of a matrix, read in place, and of its rows' scales."""
    kept.append(array(weight))
    address = int(kept[-1].ctypes.data)
    scale = getattr(weight, "row_scale", None)
    return address, 0 if scale is None else _copied(scale, kept)


def _copied(tensor: torch.Tensor, kept: list[Any]) -> int:
    copy = array(tensor.detach().float().contiguous().clone())
    kept.append(copy)
    return int(copy.ctypes.data)


def _whole(size: int) -> int:
    """A row stride that keeps rows of fp32 at whole cache lines."""
    return -(-size // CHUNK) * CHUNK


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that start at a cache line."""
    count = int(np.prod(shape))
    raw = np.zeros(count * np.dtype(dtype).itemsize + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


def _make_room(step: DecodeStep, prepared: Prepared, rows: WindowRows, num_rows: int) -> None:
    """Grow what holds the rows of a call, if it is too small."""
    num_threads = torch.get_num_threads()
    num_seqs = len(rows.query_lens)
    width = max(map(len, rows.pages))
    if (
        num_threads != prepared.num_threads
        or num_rows > prepared.max_rows
        or num_seqs > prepared.max_seqs
    ):
        prepared.num_threads = num_threads
        prepared.max_rows = max(num_rows, prepared.max_rows, MIN_ROWS)
        prepared.max_seqs = max(num_seqs, prepared.max_seqs)
        _allocate(step.config, prepared)
        prepared.pages_width = 0
    if width > prepared.pages_width:
        prepared.pages_width = 2 * width
        shape = (prepared.max_seqs, prepared.pages_width)
        place(prepared, F.PAGES, np.zeros(shape, dtype=np.int64))
        prepared.table[F.PAGES_WIDTH] = prepared.pages_width


def _allocate(config: ModelConfig, prepared: Prepared) -> None:
    threads, num_rows, seqs = prepared.num_threads, prepared.max_rows, prepared.max_seqs
    table = prepared.table
    size, num_active = config.hidden_size, config.num_experts_per_tok
    query = config.num_attention_heads * config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    projected = max(
        2 * query + 2 * config.num_key_value_heads * config.head_dim,
        config.conv_dim + config.value_dim + 2 * config.linear_num_value_heads,
        size,
    )
    width = max(
        config.moe_intermediate_size if config.num_experts else 0,
        config.shared_expert_intermediate_size,
        config.intermediate_size,
    )
    pairs = num_rows * (num_active if config.num_experts else 0)
    queries = num_rows * group
    strides = {
        F.STRIDE_C: _whole(size),
        F.STRIDE_FUSED: _whole(projected),
        F.STRIDE_HEADS: _whole(max(query, config.value_dim)),
        F.STRIDE_UP: _whole(2 * width),
        F.STRIDE_I: _whole(width),
        F.STRIDE_SCORES: queries * (int(table[F.PAGE_SIZE]) + config.head_dim + 2),
        F.STRIDE_ROUTES: _whole(config.num_experts + 1 + 4 * pairs),
        F.MAX_ROWS: num_rows,
    }
    work = (
        (pairs + num_rows) * strides[F.STRIDE_I],
        num_rows * strides[F.STRIDE_HEADS],
        num_rows * max(strides[F.STRIDE_C], 2 * size),
    )
    strides[F.STRIDE_WORK] = max(work)
    for name, value in strides.items():
        table[name] = value
    probs = num_rows * (config.num_experts + 1)
    heads = config.linear_num_value_heads
    floats: dict[int, tuple[int, ...]] = {
        F.HIDDEN_IN: (num_rows, size),
        F.HIDDEN: (max(MAX_STEPS * seqs, num_rows), size),
        F.LOGITS: (num_rows, int(table[F.VOCAB])),
        F.X: (num_rows, strides[F.STRIDE_C]),
        F.NORMED: (threads, num_rows, strides[F.STRIDE_C]),
        F.ARRANGED: (threads, strides[F.STRIDE_WORK]),
        F.FUSED: (num_rows, strides[F.STRIDE_FUSED]),
        F.CONVOLVED: (num_rows, strides[F.STRIDE_FUSED]),
        F.HEADS: (num_rows, strides[F.STRIDE_HEADS]),
        F.SCRATCH_STATE: (threads, config.linear_key_head_dim, config.linear_value_head_dim),
        F.STATE_READ: (seqs, heads, config.linear_value_head_dim),
        F.SCORES: (threads, strides[F.STRIDE_SCORES]),
        F.PROBS: (probs + threads * (probs + num_rows * (num_active + 1)),),
        F.EXPERT_UP: (pairs, strides[F.STRIDE_UP]),
        F.EXPERT_OUT: (pairs, strides[F.STRIDE_C]),
        F.SHARED_HIDDEN: (num_rows, strides[F.STRIDE_UP]),
        F.SHARED_OUT: (num_rows, strides[F.STRIDE_C]),
        F.BEST_VALUES: (threads, num_rows),
    }
    integers: dict[int, tuple[int, ...]] = {
        F.TOKEN_IDS: (num_rows,),
        F.SCORED: (num_rows,),
        F.STARTS: (seqs + 1,),
        F.SLOTS: (seqs,),
        F.CONTEXTS: (seqs,),
        F.BEST: (num_rows,),
        F.END_IDS: (MAX_END_IDS,),
        F.ROUTES: (threads, strides[F.STRIDE_ROUTES]),
        F.BEST_IDS: (threads, num_rows),
    }
    for name, shape in floats.items():
        place(prepared, name, _aligned(shape, np.float32))
    for name, shape in integers.items():
        place(prepared, name, _aligned(shape, np.int64))
    place(prepared, F.IDENTITY, np.arange(max(pairs, queries, num_rows) + 1, dtype=np.int64))


def commit_window(
    step: DecodeStep, state_slots: Sequence[int], num_accepted: Sequence[int]
) -> None:
    """As `HybridCache.commit`, bit for bit, but put off until the states are next read.

    Args:
        step: one that `decode_step_numba` has run.
        state_slots: slots of the sequences.
        num_accepted: rows of each window to replay.
    """
    pending_rows(step)[list(state_slots)] = num_accepted
