"""Backward of the delta rule's inputs on a GPU, which convolves again instead of storing."""

# Tuples of tiles grow in unrolled loops, which a checker of types takes for one variable.
# mypy: disable-error-code="assignment,var-annotated"

import torch
import triton
import triton.language as tl

from qnext.kernels.delta_inputs.reference import L2_EPS, DeltaSizes
from qnext.kernels.gpu_rows import column_sums, log1p_exp, power_of_two, sigmoid

_BLOCK_ELEMENTS = 1024
_UNROLL = 4
_CHUNK_BOUNDS = (16, 256)
_CHUNKS = 64


def channel_blocks(sizes: DeltaSizes) -> dict[str, int]:
    """How programs share a row's channels: BH heads of q or k each, or as many columns of v."""
    block_columns = power_of_two(sizes.key_head_dim)
    heads = min(max(1, _BLOCK_ELEMENTS // block_columns), power_of_two(sizes.num_key_heads))
    return {
        "KEY_DIM": sizes.key_dim,
        "VALUE_DIM": sizes.value_dim,
        "K": sizes.key_head_dim,
        "BH": heads,
        "BK": block_columns,
        "NUM_KEY_BLOCKS": triton.cdiv(sizes.num_key_heads, heads),
        "NUM_VALUE_BLOCKS": triton.cdiv(sizes.value_dim, heads * block_columns),
        "UNROLL": _UNROLL,
    }


def chunk_tokens(num_tokens: int, chunks: int, bounds: tuple[int, int]) -> int:
    """Tokens that a program walks down: a power of two, about num_tokens / chunks."""
    return min(max(power_of_two(num_tokens // chunks), bounds[0]), bounds[1])


def delta_inputs_bwd(
    d_outputs: tuple[torch.Tensor | None, ...],
    inputs: tuple[torch.Tensor, ...],
    sizes: DeltaSizes,
    history: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Launch the backward kernel and the sums of the parameters' gradients over chunks.

    Args:
        d_outputs: gradients of q, k, v, g, beta, z; None for z where it is added elsewhere.
        inputs: fused, conv_weight, A_log, dt_bias, local_positions of the forward.
        sizes: heads of a row.
        history: as in the forward.

    Returns:
        Gradients of fused, conv_weight, A_log and dt_bias, in their dtypes.
    """
    fused, conv_weight, A_log, dt_bias, local_positions = inputs
    dq, dk, dv, dg, dbeta, dz = (x if x is None else x.contiguous() for x in d_outputs)
    num_tokens, heads = fused.shape[0], sizes.num_value_heads
    conv_dim, width = conv_weight.shape
    d_fused = torch.empty(fused.shape, dtype=fused.dtype, device=fused.device)
    chunk = chunk_tokens(num_tokens, _CHUNKS, _CHUNK_BOUNDS)
    num_chunks = triton.cdiv(num_tokens, chunk)
    blocks = channel_blocks(sizes)
    num_blocks = 2 * (blocks["NUM_KEY_BLOCKS"] + blocks["NUM_VALUE_BLOCKS"]) + 1
    # Taps apart from each other, so that a program writes whole rows of them.
    d_taps = torch.empty(num_chunks, width * conv_dim, dtype=torch.float32, device=fused.device)
    d_heads = torch.empty(num_chunks, 2 * heads, dtype=torch.float32, device=fused.device)
    delta_inputs_bwd_kernel[(num_chunks * num_blocks,)](
        dq,
        dk,
        dv,
        dg,
        dbeta,
        fused if dz is None else dz,
        fused,
        conv_weight,
        A_log,
        dt_bias,
        local_positions,
        fused if history is None else history,
        d_fused,
        d_taps,
        d_heads,
        num_tokens,
        fused.stride(0),
        0 if history is None else history.stride(0),
        0 if history is None else history.stride(1),
        chunk,
        L2_EPS,
        HAS_DZ=dz is not None,
        HAS_HISTORY=history is not None,
        W=width,
        HV=heads,
        BHV=power_of_two(heads),
        ROW=fused.shape[1],
        **blocks,
        num_warps=4,
    )
    d_weight = column_sums(d_taps, conv_weight.dtype, columns=conv_dim)
    d_A, d_dt = column_sums(d_heads, torch.float32).view(2, heads)
    return d_fused, d_weight, d_A.to(A_log.dtype), d_dt.to(dt_bias.dtype)


@triton.jit
def rows_before(
    p_x: tl.tensor,
    p_history: tl.tensor,
    p_positions: tl.tensor,
    start: tl.tensor,
    stride_x: tl.tensor,
    stride_hd: tl.tensor,
    stride_hw: tl.tensor,
    o_d: tl.tensor,
    mask: tl.tensor,
    W: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
) -> tl.tuple:
    """The W - 1 inputs of the convolution before token start, zero before its sequence's."""
    past = ()
    for w in tl.static_range(W - 1):
        t = tl.cast(start, tl.int64) + w - (W - 1)
        if HAS_HISTORY:
            p_past = p_history + o_d * stride_hd + (W - 1 + t) * stride_hw
            b_x = tl.load(p_x + t * stride_x + o_d, mask & (t >= 0), 0.0).to(tl.float32)
            b_x += tl.load(p_past, mask & (t < 0), 0.0).to(tl.float32)
        else:
            is_own = tl.load(p_positions + start) >= W - 1 - w
            b_x = tl.load(p_x + t * stride_x + o_d, mask & is_own, 0.0).to(tl.float32)
        past = past + (b_x,)
    return past


@triton.jit
def load_taps(p_weight: tl.tensor, o_d: tl.tensor, mask: tl.tensor, W: tl.constexpr) -> tl.tuple:
    """W tiles of taps from rows of W, which are read whole: a tap by itself is a strided load."""
    BW: tl.constexpr = W if W & (W - 1) == 0 else 8
    o_w = tl.arange(0, BW)[None, None, :]
    row = p_weight + (o_d * W)[:, :, None]
    b_rows = tl.load(row + o_w, mask[:, :, None] & (o_w < W), 0.0).to(tl.float32)
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(o_w == w, b_rows, 0.0), 2),)
    return taps


@triton.jit
def zero_tiles(BH: tl.constexpr, BK: tl.constexpr, N: tl.constexpr) -> tl.tuple:
    """N tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros([BH, BK], tl.float32),)
    return tiles


@triton.jit
def kept_in(past: tl.tuple, position: tl.tensor, N: tl.constexpr) -> tl.tuple:
    """N earlier inputs, zero from a sequence's first token on."""
    kept = ()
    for n in tl.static_range(N):
        kept = kept + (tl.where(position == 0, 0.0, past[n]),)
    return kept


@triton.jit
def _copy(
    p_from: tl.tensor,
    p_to: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first_column: tl.tensor,
    SIZE: tl.constexpr,
    ROW: tl.constexpr,
    BC: tl.constexpr,
    HAS_FROM: tl.constexpr,
) -> None:
    """Rows of SIZE columns, or zeros, into rows of ROW columns, BC of them."""
    BT: tl.constexpr = 4
    o_c = first_column + tl.arange(0, BC)[None, :]
    for t in range(start, end, BT):
        o_t = tl.cast(t, tl.int64) + tl.arange(0, BT)[:, None]
        mask = (o_t < end) & (o_c < SIZE)
        if HAS_FROM:
            b_x = tl.load(p_from + o_t * SIZE + o_c, mask)
        else:
            b_x = tl.zeros([BT, BC], p_to.dtype.element_ty)
        tl.store(p_to + o_t * ROW + o_c, b_x, mask)


@triton.jit
def _gates_backward(
    p_dg: tl.tensor,
    p_dbeta: tl.tensor,
    p_row: tl.tensor,
    p_A: tl.tensor,
    p_dt: tl.tensor,
    p_drow: tl.tensor,
    p_dheads: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    stride: tl.tensor,
    ROW: tl.constexpr,
    HV: tl.constexpr,
    BHV: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """Gradients of b and a, and this chunk's part of those of A_log and dt_bias.

    dg / dA_log = g and dg / da = -exp(A_log) sigmoid(a + dt_bias).
    """
    o_h = tl.arange(0, BHV)
    b_rate = -tl.exp(tl.load(p_A + o_h, o_h < HV, 0.0).to(tl.float32))[None, :]
    b_bias = tl.load(p_dt + o_h, o_h < HV, 0.0).to(tl.float32)[None, :]
    b_dA = tl.zeros([BT, BHV], tl.float32)
    b_ddt = tl.zeros([BT, BHV], tl.float32)
    for t in range(start, end, BT):
        o_t = tl.cast(t, tl.int64) + tl.arange(0, BT)
        mask = (o_t < end)[:, None] & (o_h < HV)[None, :]
        o_b = o_t[:, None] * stride + o_h[None, :]
        o_g = o_t[:, None] * HV + o_h[None, :]
        b_beta = sigmoid(tl.load(p_row + o_b, mask, 0.0).to(tl.float32))
        b_a = tl.load(p_row + HV + o_b, mask, 0.0).to(tl.float32) + b_bias
        b_dg = tl.load(p_dg + o_g, mask, 0.0).to(tl.float32) * b_rate
        b_dbeta = tl.load(p_dbeta + o_g, mask, 0.0).to(tl.float32)
        b_da = b_dg * sigmoid(b_a)
        b_dA += b_dg * log1p_exp(b_a)
        b_ddt += b_da
        out = o_t[:, None] * ROW + o_h[None, :]
        tl.store(p_drow + out, b_dbeta * b_beta * (1.0 - b_beta), mask)
        tl.store(p_drow + HV + out, b_da, mask)
    tl.store(p_dheads + o_h, tl.sum(b_dA, 0), o_h < HV)
    tl.store(p_dheads + HV + o_h, tl.sum(b_ddt, 0), o_h < HV)


@triton.jit
def _d_convolved(
    b_dout: tl.tensor, b_sum: tl.tensor, is_normed: tl.tensor, length: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """Gradient of the convolution's sum s from that of the normalised silu(s).

    With y = silu(s), r = 1 / |y| and out = length r y: dy = length r (d_out - r^2 y (y . d_out)).
    """
    b_sigmoid = sigmoid(b_sum)
    b_y = b_sum * b_sigmoid
    b_dy = b_dout
    if is_normed:
        inverse = tl.rsqrt(tl.sum(b_y * b_y, 1) + eps)
        along = inverse * inverse * tl.sum(b_y * b_dout, 1)
        b_dy = (b_dout - b_y * along[:, None]) * (inverse * length)[:, None]
    # silu' = sigmoid + silu (1 - sigmoid)
    return b_dy * (b_sigmoid + b_y * (1.0 - b_sigmoid))


@triton.jit(do_not_specialize=["num_tokens", "chunk", "stride_hd", "stride_hw", "eps"])
def delta_inputs_bwd_kernel(
    p_dq: tl.tensor,
    p_dk: tl.tensor,
    p_dv: tl.tensor,
    p_dg: tl.tensor,
    p_dbeta: tl.tensor,
    p_dz: tl.tensor,
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_A: tl.tensor,
    p_dt: tl.tensor,
    p_positions: tl.tensor,
    p_history: tl.tensor,
    p_dx: tl.tensor,
    p_dtaps: tl.tensor,
    p_dheads: tl.tensor,
    num_tokens: tl.tensor,
    stride_x: tl.tensor,
    stride_hd: tl.tensor,
    stride_hw: tl.tensor,
    chunk: tl.tensor,
    eps: tl.tensor,
    HAS_DZ: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    W: tl.constexpr,
    HV: tl.constexpr,
    BHV: tl.constexpr,
    ROW: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    NUM_KEY_BLOCKS: tl.constexpr,
    NUM_VALUE_BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """A program walks down a chunk with BH heads, and W - 1 tokens on, which read the chunk too.

    Token t's gradient is whole once t + W - 1 has been worked on; until then it waits in registers.
    """
    D: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    NUM_CHANNEL_BLOCKS: tl.constexpr = 2 * NUM_KEY_BLOCKS + NUM_VALUE_BLOCKS
    NUM_BLOCKS: tl.constexpr = NUM_CHANNEL_BLOCKS + NUM_VALUE_BLOCKS + 1
    i_b, i_t = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS
    start = i_t * chunk
    end = tl.minimum(start + chunk, num_tokens)
    if i_b == NUM_BLOCKS - 1:
        o_b = D + VALUE_DIM
        p_dheads += i_t * 2 * HV
        _gates_backward(
            p_dg,
            p_dbeta,
            p_x + o_b,
            p_A,
            p_dt,
            p_dx + o_b,
            p_dheads,
            start,
            end,
            stride_x,
            ROW,
            HV,
            BHV,
            8,
        )
    elif i_b >= NUM_CHANNEL_BLOCKS:
        column = (i_b - NUM_CHANNEL_BLOCKS) * BH * BK
        _copy(p_dz, p_dx + D, start, end, column, VALUE_DIM, ROW, BH * BK, HAS_DZ)
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
        p_dout = tl.where(part == 0, p_dq, tl.where(part == 1, p_dk, p_dv)) + o_c
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
        d_taps = zero_tiles(BH, BK, W)
        waiting = zero_tiles(BH, BK, W - 1)
        last = tl.minimum(end + W - 1, num_tokens)
        for t in range(start, end + W - 1, UNROLL):
            # All rows are asked for before the first is worked on.
            rows = ()
            d_rows = ()
            positions = ()
            for u in tl.static_range(UNROLL):
                row = tl.cast(t, tl.int64) + u
                is_row = t + u < last
                rows = rows + (tl.load(p_x + row * stride_x + o_d, mask & is_row, 0.0),)
                d_rows = d_rows + (tl.load(p_dout + row * size, mask & is_row, 0.0),)
                positions = positions + (tl.load(p_positions + row, is_row, 0),)
            for u in tl.static_range(UNROLL):
                if not HAS_HISTORY:
                    past = kept_in(past, positions[u], W - 1)
                past = past + (rows[u].to(tl.float32),)
                b_sum = past[0] * taps[0]
                for w in tl.static_range(1, W):
                    b_sum += past[w] * taps[w]
                b_ds = _d_convolved(d_rows[u].to(tl.float32), b_sum, is_normed, length, eps)
                b_own = tl.where(t + u < end, b_ds, 0.0)
                gathered = ()
                d_gathered = ()
                for w in tl.static_range(W):
                    d_gathered = d_gathered + (d_taps[w] + b_own * past[w],)
                    if w < W - 1:
                        b_reach = b_ds
                        if not HAS_HISTORY:
                            b_reach = tl.where(positions[u] >= W - 1 - w, b_ds, 0.0)
                        gathered = gathered + (waiting[w] + b_reach * taps[w],)
                past = past[1:]
                d_taps = d_gathered
                gathered = gathered + (b_ds * taps[W - 1],)
                done = t + u - (W - 1)
                is_done = mask & (done >= start) & (done < end)
                tl.store(p_dx + tl.cast(done, tl.int64) * ROW + o_d, gathered[0], is_done)
                waiting = gathered[1:]
        for w in tl.static_range(W):
            tl.store(p_dtaps + (i_t.to(tl.int64) * W + w) * D + o_d, d_taps[w], mask)
