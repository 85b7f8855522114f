"""The delta rule's inputs from a fused projection on a GPU, in one pass over its rows."""

# Tuples of tiles grow in unrolled loops, which a checker of types takes for one variable.
# mypy: disable-error-code="assignment,var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.delta_inputs.reference import L2_EPS, DeltaSizes
from qnext.kernels.delta_inputs.triton_bwd import (
    channel_blocks,
    chunk_tokens,
    delta_inputs_bwd,
    kept_in,
    load_taps,
    rows_before,
)
from qnext.kernels.gpu_rows import log1p_exp, power_of_two, rows_objection, sigmoid
from qnext.kernels.graph_ops import graph_op

MAX_WIDTH = 8
MAX_KEY_HEAD_DIM = 1024
_CHUNK_BOUNDS = (8, 64)
_CHUNKS = 256


def supports(
    fused: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    local_positions: torch.Tensor,
    *,
    sizes: DeltaSizes,
    history: torch.Tensor | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if conv_weight.shape[1] > MAX_WIDTH:
        return f"{conv_weight.shape[1]} taps are over {MAX_WIDTH}, which registers hold"
    if sizes.key_head_dim > MAX_KEY_HEAD_DIM:
        return f"a key of {sizes.key_head_dim} columns is over {MAX_KEY_HEAD_DIM}"
    if fused.dim() != 2 or fused.shape[1] != sum(sizes.columns):
        return f"rows {tuple(fused.shape)} are not the {sum(sizes.columns)} columns of sizes"
    return rows_objection(fused, conv_weight, A_log, dt_bias)


def delta_inputs_triton(
    fused: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    local_positions: torch.Tensor,
    *,
    sizes: DeltaSizes,
    history: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """As `delta_inputs_reference`."""
    inputs = (fused, conv_weight, A_log, dt_bias, local_positions)
    if torch.compiler.is_compiling():
        heads = (sizes.num_key_heads, sizes.num_value_heads)
        dims = (sizes.key_head_dim, sizes.value_head_dim)
        return *delta_inputs_graph(*inputs, history, [*heads, *dims]), _z_of(fused, sizes)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out: tuple[torch.Tensor, ...] = DeltaInputsFunction.apply(*inputs, sizes, history)
        return out
    return delta_inputs_fwd(*inputs, sizes=sizes, history=history)


class DeltaInputsFunction(torch.autograd.Function):
    """Keeps its inputs alone: the backward convolves again."""

    @staticmethod
    def forward(
        ctx: Any,
        fused: torch.Tensor,
        conv_weight: torch.Tensor,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        local_positions: torch.Tensor,
        sizes: DeltaSizes,
        history: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        inputs = (fused, conv_weight, A_log, dt_bias, local_positions)
        ctx.save_for_backward(*inputs, history)
        ctx.sizes = sizes
        return delta_inputs_fwd(*inputs, sizes=sizes, history=history)

    @staticmethod
    def backward(ctx: Any, *d_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, history = ctx.saved_tensors
        gradients = delta_inputs_bwd(d_outputs, tuple(inputs), ctx.sizes, history)
        return *gradients, None, None, None


def delta_inputs_fwd(
    fused: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    local_positions: torch.Tensor,
    *,
    sizes: DeltaSizes,
    history: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Launch the forward kernel. Arguments as those of `delta_inputs_reference`."""
    num_tokens, device = fused.shape[0], fused.device
    keys = (num_tokens, sizes.num_key_heads, sizes.key_head_dim)
    q = torch.empty(keys, dtype=fused.dtype, device=device)
    k = torch.empty(keys, dtype=fused.dtype, device=device)
    values = (num_tokens, sizes.num_value_heads, sizes.value_head_dim)
    v = torch.empty(values, dtype=fused.dtype, device=device)
    g = torch.empty(num_tokens, sizes.num_value_heads, dtype=torch.float32, device=device)
    beta = torch.empty_like(g)
    blocks = channel_blocks(sizes)
    chunk = chunk_tokens(num_tokens, _CHUNKS, _CHUNK_BOUNDS)
    num_blocks = 2 * blocks["NUM_KEY_BLOCKS"] + blocks["NUM_VALUE_BLOCKS"] + 1
    delta_inputs_fwd_kernel[((num_tokens + chunk - 1) // chunk * num_blocks,)](
        fused,
        conv_weight,
        A_log,
        dt_bias,
        local_positions,
        fused if history is None else history,
        q,
        k,
        v,
        g,
        beta,
        num_tokens,
        fused.stride(0),
        0 if history is None else history.stride(0),
        0 if history is None else history.stride(1),
        chunk,
        L2_EPS,
        HAS_HISTORY=history is not None,
        W=conv_weight.shape[1],
        HV=sizes.num_value_heads,
        BHV=power_of_two(sizes.num_value_heads),
        **blocks,
        num_warps=4,
    )
    return q, k, v, g, beta, _z_of(fused, sizes)


def _z_of(fused: torch.Tensor, sizes: DeltaSizes) -> torch.Tensor:
    z = fused[:, sizes.conv_dim : sizes.conv_dim + sizes.value_dim]
    return z.view(fused.shape[0], sizes.num_value_heads, sizes.value_head_dim)


def _shapes(
    fused: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    local_positions: torch.Tensor,
    history: torch.Tensor | None,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, (key_heads, heads, key_dim, value_dim) = fused.shape[0], sizes
    return (
        fused.new_empty(num_tokens, key_heads, key_dim),
        fused.new_empty(num_tokens, key_heads, key_dim),
        fused.new_empty(num_tokens, heads, value_dim),
        fused.new_empty(num_tokens, heads, dtype=torch.float32),
        fused.new_empty(num_tokens, heads, dtype=torch.float32),
    )


@graph_op("delta_inputs", shapes=_shapes)
def delta_inputs_graph(
    fused: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    local_positions: torch.Tensor,
    history: torch.Tensor | None,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward kernel for graphs; z, a view, is left to them. sizes: Hk, Hv, K, V"""
    inputs = (fused, conv_weight, A_log, dt_bias, local_positions)
    q, k, v, g, beta, _ = delta_inputs_fwd(*inputs, sizes=DeltaSizes(*sizes), history=history)
    return q, k, v, g, beta


@graph_op("delta_inputs_backward", "fused", "conv_weight", "A_log", "dt_bias")
def delta_inputs_graph_bwd(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dg: torch.Tensor,
    dbeta: torch.Tensor,
    fused: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    local_positions: torch.Tensor,
    history: torch.Tensor | None,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the first four inputs; those of z's columns are 0."""
    d_outputs = (dq, dk, dv, dg, dbeta, None)
    inputs = (fused, conv_weight, A_log, dt_bias, local_positions)
    d_fused, d_conv, d_A, d_dt = delta_inputs_bwd(d_outputs, inputs, DeltaSizes(*sizes), history)
    return d_fused, d_conv, d_A.clone(), d_dt.clone()  # they share memory, which graphs forbid


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _formula(ctx: Any, *d_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    given: tuple[Any, ...] = (*d_outputs, *ctx.saved_tensors, ctx.sizes)
    gradients = delta_inputs_graph_bwd(*given)
    return *gradients, None, None, None


torch.library.register_autograd("qnext::delta_inputs", _formula, setup_context=_keep)


@triton.jit
def _gates(
    p_row: tl.tensor,
    p_A: tl.tensor,
    p_dt: tl.tensor,
    p_g: tl.tensor,
    p_beta: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    HV: tl.constexpr,
    BHV: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """Decay and write strength of the tokens from start to end. p_row: column b of token 0"""
    o_h = tl.arange(0, BHV)
    b_rate = -tl.exp(tl.load(p_A + o_h, o_h < HV, 0.0).to(tl.float32))[None, :]
    b_bias = tl.load(p_dt + o_h, o_h < HV, 0.0).to(tl.float32)[None, :]
    for t in range(start, end, BT):
        o_t = tl.cast(t, tl.int64) + tl.arange(0, BT)
        mask = (o_t < end)[:, None] & (o_h < HV)[None, :]
        o_b = o_t[:, None] * stride + o_h[None, :]
        b_b = tl.load(p_row + o_b, mask, 0.0).to(tl.float32)
        b_a = tl.load(p_row + HV + o_b, mask, 0.0).to(tl.float32)
        out = o_t[:, None] * HV + o_h[None, :]
        tl.store(p_g + out, b_rate * log1p_exp(b_a + b_bias), mask)
        tl.store(p_beta + out, sigmoid(b_b), mask)


@triton.jit(do_not_specialize=["num_tokens", "chunk", "stride_hd", "stride_hw", "eps"])
def delta_inputs_fwd_kernel(
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_A: tl.tensor,
    p_dt: tl.tensor,
    p_positions: tl.tensor,
    p_history: tl.tensor,
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_v: tl.tensor,
    p_g: tl.tensor,
    p_beta: tl.tensor,
    num_tokens: tl.tensor,
    stride_x: tl.tensor,
    stride_hd: tl.tensor,
    stride_hw: tl.tensor,
    chunk: tl.tensor,
    eps: tl.tensor,
    HAS_HISTORY: tl.constexpr,
    W: tl.constexpr,
    HV: tl.constexpr,
    BHV: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    NUM_KEY_BLOCKS: tl.constexpr,
    NUM_VALUE_BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """A program walks down a chunk of tokens with BH heads, its last inputs in registers."""
    NUM_BLOCKS: tl.constexpr = 2 * NUM_KEY_BLOCKS + NUM_VALUE_BLOCKS + 1
    i_b, i_t = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS
    start = i_t * chunk
    end = tl.minimum(start + chunk, num_tokens)
    if i_b == NUM_BLOCKS - 1:
        p_row = p_x + 2 * KEY_DIM + 2 * VALUE_DIM
        _gates(p_row, p_A, p_dt, p_g, p_beta, start, end, stride_x, HV, BHV, 8)
    else:
        part = tl.minimum(i_b // NUM_KEY_BLOCKS, 2)  # of q, k, v
        is_normed = part < 2
        # Values need no norm: their "heads" are runs of BK columns.
        o_h, o_k = tl.arange(0, BH)[:, None], tl.arange(0, BK)[None, :]
        head = (i_b - part * NUM_KEY_BLOCKS) * BH + o_h
        o_c = head * tl.where(is_normed, K, BK) + o_k
        size = tl.where(is_normed, KEY_DIM, VALUE_DIM)
        mask = o_c < size
        if BK != K:
            mask = mask & (o_k < tl.where(is_normed, K, BK))
        p_out = tl.where(part == 0, p_q, tl.where(part == 1, p_k, p_v)) + o_c
        o_d = part * KEY_DIM + o_c
        length = tl.where(part == 0, 1.0 / tl.sqrt(K * 1.0), 1.0)
        taps = load_taps(p_weight, o_d, mask, W)
        past = rows_before(
            p_x,
            p_history,
            p_positions,
            start,
            stride_x,
            stride_hd,
            stride_hw,
            o_d,
            mask,
            W,
            HAS_HISTORY,
        )
        for t in range(start, end, UNROLL):
            # All rows are asked for before the first is worked on.
            rows = ()
            positions = ()
            for u in tl.static_range(UNROLL):
                is_row = t + u < end
                p_row = p_x + (tl.cast(t, tl.int64) + u) * stride_x + o_d
                rows = rows + (tl.load(p_row, mask & is_row, 0.0),)
                positions = positions + (tl.load(p_positions + t + u, is_row, 0),)
            for u in tl.static_range(UNROLL):
                if not HAS_HISTORY:
                    past = kept_in(past, positions[u], W - 1)
                past = past + (rows[u].to(tl.float32),)
                b_sum = past[0] * taps[0]
                for w in tl.static_range(1, W):
                    b_sum += past[w] * taps[w]
                past = past[1:]
                b_y = b_sum * sigmoid(b_sum)
                if is_normed:
                    b_y = b_y * (tl.rsqrt(tl.sum(b_y * b_y, 1) + eps) * length)[:, None]
                out = (tl.cast(t, tl.int64) + u) * size
                tl.store(p_out + out, b_y, mask & (t + u < end))
