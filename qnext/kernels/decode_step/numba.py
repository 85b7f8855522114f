"""A whole decode or verification step as one compiled function.

The layers' weights go in as a table of addresses, so that one compilation serves any number of
layers of any sizes; the model's own tensors are read where they are.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qnext.config.model import ModelConfig
from qnext.kernels.cpu_lanes import array
from qnext.kernels.decode_step import layers as L
from qnext.kernels.decode_step.reference import DecodeStep, WindowRows

SLOW_SECONDS = 1.5
COMPILING = "compiling the CPU kernels; later starts read them from the disk"

_logger = logging.getLogger("qnext.kernels")

# Small parameters are kept as fp32 copies; the others are read in place.
_SMALL = {
    L.LN1: "input_layernorm.weight",
    L.LN2: "post_attention_layernorm.weight",
    L.CONV: "mixer.conv1d",
    L.DT_BIAS: "mixer.dt_bias",
    L.GATED_NORM: "mixer.norm.weight",
    L.Q_NORM: "mixer.q_norm.weight",
    L.K_NORM: "mixer.k_norm.weight",
}
_LARGE = {
    L.ROUTER: "mlp.gate",
    L.EXPERTS_UP: "mlp.experts_gate_up",
    L.EXPERTS_DOWN: "mlp.experts_down",
    L.SHARED_UP: "mlp.shared_gate_up",
    L.SHARED_DOWN: "mlp.shared_down",
    L.SHARED_GATE: "mlp.shared_expert_gate",
    L.DENSE_UP: "mlp.gate_up_proj",
    L.DENSE_DOWN: "mlp.down_proj",
}
_IN_PROJ = ("mixer.qkv_proj", "mixer.in_proj")
_OUT_PROJ = ("mixer.o_proj", "mixer.out_proj")


@dataclass
class _Prepared:
    """Addresses, sizes and room for one step; `kept` holds what the addresses point to."""

    table: np.ndarray
    dims: np.ndarray
    kept: list[Any]
    like: np.ndarray
    rotation: tuple[np.ndarray, np.ndarray]
    scratch: tuple[np.ndarray, ...]
    final_norm: np.ndarray
    kv_pools: tuple[np.ndarray, np.ndarray]
    state_pools: tuple[np.ndarray, ...]


def supports(step: DecodeStep, rows: WindowRows) -> str | None:
    """Say why this backend cannot run, or None."""
    if rows.x.device.type != "cpu":
        return f"the rows are on {rows.x.device}"
    if rows.x.dtype != torch.float32:
        return f"activations are fp32 here, not {rows.x.dtype}"
    if step.prepared is not None:
        return None
    if step.keys.dtype != torch.float32:
        return f"keys and values are fp32 here, not {step.keys.dtype}"
    return _weight_objection(step)


def _weight_objection(step: DecodeStep) -> str | None:
    dtypes = set()
    for prefix in step.layer_names:
        for name in (*_LARGE.values(), *_IN_PROJ, *_OUT_PROJ):
            weight = step.parameters.get(prefix + name)
            if weight is None:
                continue
            dtypes.add(weight.dtype)
            if not weight.is_contiguous():
                return f"{prefix}{name} is not contiguous"
    if not dtypes <= {torch.float32} and not dtypes <= {torch.bfloat16}:
        return f"matrices are all fp32 or all bf16 here, not {sorted(map(str, dtypes))}"
    return None


def decode_step_numba(step: DecodeStep, rows: WindowRows) -> torch.Tensor:
    """As `decode_step_reference`; every row's sums run in one order, whatever the other rows."""
    watch = nullcontext() if step.prepared is not None else _saying_when_slow()
    prepared: _Prepared = step.prepared or _prepare(step)
    step.prepared = prepared
    num_rows = rows.x.shape[0]
    if num_rows > prepared.scratch[0].shape[0]:
        prepared.scratch = _scratch(step.config, num_rows, len(prepared.rotation[0]))
    starts = np.zeros(len(rows.query_lens) + 1, dtype=np.int64)
    np.cumsum(rows.query_lens, out=starts[1:])
    places = (
        starts,
        np.array(rows.state_slots, dtype=np.int64),
        np.array(rows.context_lens, dtype=np.int64),
        array(rows.page_table).astype(np.int64),
        step.page_size,
    )
    out = torch.empty_like(rows.x)
    with watch:
        L.run_layers(
            array(rows.x.clone()),
            prepared.table,
            prepared.dims,
            np.float32(step.config.rms_norm_eps),
            places,
            prepared.kv_pools,
            prepared.state_pools,
            prepared.rotation,
            prepared.scratch,
            prepared.final_norm,
            prepared.like,
            _LIKE32,
            array(out),
        )
    return out


@contextmanager
def _saying_when_slow() -> Iterator[None]:
    """Log one line when a call takes long enough to be a compilation."""
    timer = threading.Timer(SLOW_SECONDS, lambda: _logger.warning(COMPILING))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def commit_window(
    step: DecodeStep, state_slots: tuple[int, ...], num_accepted: tuple[int, ...]
) -> None:
    """As `HybridCache.commit`, bit for bit, in one call for all layers.

    Args:
        step: one that `decode_step_numba` has run.
        state_slots: slots of the sequences.
        num_accepted: rows of each window to replay.
    """
    prepared: _Prepared = step.prepared
    if step.config.num_linear_layers:
        L.commit_rows(
            np.array(state_slots, dtype=np.int64),
            np.array(num_accepted, dtype=np.int64),
            *prepared.state_pools,
        )


_LIKE32 = np.zeros(1, dtype=np.float32)


def _prepare(step: DecodeStep) -> _Prepared:
    table = np.zeros((len(step.layer_names), L.NUM_COLUMNS), dtype=np.int64)
    kept: list[Any] = []
    like = _LIKE32
    for row, prefix, mixer_idx in zip(table, step.layer_names, step.mixer_idx, strict=True):
        names = step.parameters
        is_attention = prefix + _IN_PROJ[0] in names
        row[L.IS_ATTENTION] = is_attention
        row[L.MIXER_IDX] = mixer_idx
        row[L.IS_MOE] = prefix + "mlp.gate" in names
        large = {L.IN_PROJ: _IN_PROJ[not is_attention], L.OUT_PROJ: _OUT_PROJ[not is_attention]}
        for column, name in (large | _LARGE).items():
            if prefix + name in names:
                weight = array(names[prefix + name])
                like = weight.reshape(-1)[:1]
                kept.append(weight)
                row[column] = weight.ctypes.data
        for column, name in _SMALL.items():
            if prefix + name in names:
                row[column] = _keep(kept, names[prefix + name])
        if not is_attention:
            row[L.DECAY_RATE] = _keep(kept, names[prefix + "mixer.A_log"].float().exp())
    cos, sin = step.rotation
    return _Prepared(
        table=table,
        dims=_dims(step.config),
        kept=kept,
        like=like,
        rotation=(array(cos.contiguous()), array(sin.contiguous())),
        scratch=_scratch(step.config, 8, cos.shape[0]),
        final_norm=array(step.parameters[step.final_norm].detach().float()),
        kv_pools=(array(step.keys), array(step.values)),
        state_pools=_state_pools(step),
    )


def _keep(kept: list[Any], tensor: torch.Tensor) -> int:
    copy = array(tensor.detach().float().contiguous().clone())
    kept.append(copy)
    return int(copy.ctypes.data)


def _dims(config: ModelConfig) -> np.ndarray:
    dims = np.zeros(16, dtype=np.int64)
    dims[L.C], dims[L.D] = config.hidden_size, config.head_dim
    dims[L.HQ], dims[L.HKV] = config.num_attention_heads, config.num_key_value_heads
    dims[L.HK], dims[L.HV] = config.linear_num_key_heads, config.linear_num_value_heads
    dims[L.K], dims[L.V] = config.linear_key_head_dim, config.linear_value_head_dim
    dims[L.WIDTH] = config.linear_conv_kernel_dim
    dims[L.E], dims[L.A] = config.num_experts, config.num_experts_per_tok
    dims[L.I], dims[L.SHARED] = config.moe_intermediate_size, config.shared_expert_intermediate_size
    dims[L.DENSE] = config.intermediate_size
    dims[L.HALF_ROTARY] = config.rotary_dim // 2
    dims[L.NORM_TOPK] = config.norm_topk_prob
    return dims


def _scratch(config: ModelConfig, num_rows: int, max_tokens: int) -> tuple[np.ndarray, ...]:
    """normed, fused, convolved, heads, result, scores, probs, ids, hidden, one temporary state."""
    query = config.num_attention_heads * config.head_dim
    fused = max(
        2 * query + 2 * config.num_key_value_heads * config.head_dim,
        config.conv_dim + config.value_dim + 2 * config.linear_num_value_heads,
    )
    width = max(
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
        config.intermediate_size,
    )
    state = (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )

    def room(*shape: int) -> np.ndarray:
        return np.zeros(shape, dtype=np.float32)

    return (
        room(num_rows, config.hidden_size),
        room(num_rows, fused),
        room(num_rows, config.conv_dim),
        room(num_rows, max(query, config.value_dim)),
        room(num_rows, config.hidden_size),
        room(max_tokens),
        room(max(1, config.num_experts)),
        np.zeros(max(1, config.num_experts_per_tok), dtype=np.int64),
        room(width),
        room(*state),
    )


def _state_pools(step: DecodeStep) -> tuple[np.ndarray, ...]:
    return tuple(array(tensor) for tensor in step.states)
