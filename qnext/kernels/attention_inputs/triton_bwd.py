"""Backward of attention's inputs on a GPU."""

import torch
import triton
import triton.language as tl

from qnext.kernels.attention_inputs.reference import AttentionSizes
from qnext.kernels.gpu_rows import column_sums, num_processors, power_of_two

_PROGRAMS_PER_PROCESSOR = 2


def pair_blocks(sizes: AttentionSizes, pairs: int) -> dict[str, int]:
    """Sizes of the tiles that hold one token's heads, and their warps.

    A head of D dimensions is BG groups of BP pairs; a group spans R dimensions.
    """
    heads, head_dim = sizes.num_heads, sizes.head_dim
    groups, block_pairs = power_of_two(triton.cdiv(head_dim, 2 * pairs)), power_of_two(pairs)
    block_heads = power_of_two(heads)
    return {
        "H": heads,
        "HKV": sizes.num_kv_heads,
        "D": head_dim,
        "R": 2 * pairs,
        "BH": block_heads,
        "BHKV": power_of_two(sizes.num_kv_heads),
        "BG": groups,
        "BP": block_pairs,
        "num_warps": min(16, max(1, 2 * block_heads * groups * block_pairs // 512)),
    }


def attention_inputs_bwd(
    d_outputs: tuple[torch.Tensor | None, ...],
    inputs: tuple[torch.Tensor, ...],
    eps: float,
    sizes: AttentionSizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward kernel and the sums of the weights' gradients over programs.

    Args:
        d_outputs: gradients of q, k, v, gate; None for the two last, which are views of fused,
            where they are added elsewhere.
        inputs: fused, q_weight, k_weight, cos, sin of the forward.
        eps: as in the forward.
        sizes: heads of a row.

    Returns:
        Gradients of fused, q_weight and k_weight, in their dtypes.
    """
    fused, q_weight, k_weight, cos, sin = inputs
    dq, dk, dv, d_gate = (x if x is None else x.contiguous() for x in d_outputs)
    num_tokens, head_dim = fused.shape[0], sizes.head_dim
    d_fused = torch.empty(fused.shape, dtype=fused.dtype, device=fused.device)
    num_programs = min(_PROGRAMS_PER_PROCESSOR * num_processors(fused.device), num_tokens)
    partials = torch.empty(num_programs, 2 * head_dim, dtype=torch.float32, device=fused.device)
    attention_inputs_bwd_kernel[(num_programs,)](
        dq,
        dk,
        fused if dv is None else dv,
        fused if d_gate is None else d_gate,
        fused,
        q_weight,
        k_weight,
        cos,
        sin,
        d_fused,
        partials,
        num_tokens,
        fused.stride(0),
        eps,
        HAS_VIEWS=dv is not None and d_gate is not None,
        **pair_blocks(sizes, cos.shape[1]),
    )
    sums = column_sums(partials, torch.float32)
    return (
        d_fused,
        sums[:head_dim].to(q_weight.dtype),
        sums[head_dim:].to(k_weight.dtype),
    )


@triton.jit
def _pairs(
    p_row: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
) -> tl.tensor:
    """Places of the pairs of H heads from p_row on, and whether they exist."""
    o_h, o_j = tl.arange(0, BH)[:, None], tl.arange(0, BG * BP)[None, :]
    o_first = o_j // BP * R + o_j % BP
    o_second = o_first + R // 2
    is_pair = (o_j % BP < R // 2) & (o_h < H)
    is_first, is_second = is_pair & (o_first < D), is_pair & (o_second < D)
    return p_row + o_h * D + o_first, p_row + o_h * D + o_second, is_first, is_second


@triton.jit
def _load_pairs(
    p_row: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
) -> tl.tensor:
    """The pairs of H heads from p_row on, zero where there is none."""
    p_first, p_second, is_first, is_second = _pairs(p_row, H, D, R, BH, BG, BP)
    return tl.load(p_first, is_first, 0.0), tl.load(p_second, is_second, 0.0)


@triton.jit
def _turn_back(
    heads: tl.tensor,
    d_heads: tl.tensor,
    scales: tl.tensor,
    b_cos: tl.tensor,
    b_sin: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """Gradients of one token's heads and its part of the weight's gradient, all as pairs.

    The rotation is undone by the angle's negative; with n = x / rms(x) and e = d_normed (1 + w):
    dx = (e - n mean(e n)) / rms(x).
    """
    b_first, b_second = heads[0].to(tl.float32), heads[1].to(tl.float32)
    b_turned_first, b_turned_second = d_heads[0].to(tl.float32), d_heads[1].to(tl.float32)
    b_dfirst = b_turned_first * b_cos + b_turned_second * b_sin
    b_dsecond = b_turned_second * b_cos - b_turned_first * b_sin
    inverse = tl.rsqrt(tl.sum(b_first * b_first + b_second * b_second, 1) / D + eps)[:, None]
    b_first = b_first * inverse
    b_second = b_second * inverse
    b_wfirst = b_dfirst * b_first
    b_wsecond = b_dsecond * b_second
    b_dfirst = b_dfirst * scales[0]
    b_dsecond = b_dsecond * scales[1]
    along = (tl.sum(b_dfirst * b_first + b_dsecond * b_second, 1) / D)[:, None]
    b_dfirst = (b_dfirst - b_first * along) * inverse
    b_dsecond = (b_dsecond - b_second * along) * inverse
    return b_dfirst, b_dsecond, b_wfirst, b_wsecond


@triton.jit(do_not_specialize=["num_tokens", "eps"])
def attention_inputs_bwd_kernel(
    p_dq: tl.tensor,
    p_dk: tl.tensor,
    p_dv: tl.tensor,
    p_dgate: tl.tensor,
    p_x: tl.tensor,
    p_qweight: tl.tensor,
    p_kweight: tl.tensor,
    p_cos: tl.tensor,
    p_sin: tl.tensor,
    p_dx: tl.tensor,
    p_partial: tl.tensor,
    num_tokens: tl.tensor,
    stride_x: tl.tensor,
    eps: tl.tensor,
    HAS_VIEWS: tl.constexpr,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BHKV: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """Each program takes every P-th token and keeps its part of the weights' gradients."""
    i_p, num_programs = tl.program_id(0), tl.num_programs(0)
    Q: tl.constexpr = H * D
    KV: tl.constexpr = HKV * D
    BJ: tl.constexpr = BG * BP
    BQ: tl.constexpr = 2 * BH * BJ
    BKV: tl.constexpr = 2 * BHKV * BJ
    o_j, o_q, o_kv = tl.arange(0, BJ)[None, :], tl.arange(0, BQ), tl.arange(0, BKV)
    q_scales = _load_pairs(p_qweight, 1, D, R, 1, BG, BP)
    k_scales = _load_pairs(p_kweight, 1, D, R, 1, BG, BP)
    q_scales = 1.0 + q_scales[0].to(tl.float32), 1.0 + q_scales[1].to(tl.float32)
    k_scales = 1.0 + k_scales[0].to(tl.float32), 1.0 + k_scales[1].to(tl.float32)
    b_dq1 = tl.zeros([BH, BJ], tl.float32)
    b_dq2 = tl.zeros([BH, BJ], tl.float32)
    b_dk1 = tl.zeros([BHKV, BJ], tl.float32)
    b_dk2 = tl.zeros([BHKV, BJ], tl.float32)
    for i in range(i_p, num_tokens, num_programs):
        i_t = tl.cast(i, tl.int64)
        p_row, p_drow = p_x + i_t * stride_x, p_dx + i_t * 2 * (Q + KV)
        # Everything is asked for before the first store, which loads could not pass.
        q = _load_pairs(p_row, H, D, R, BH, BG, BP)
        dq = _load_pairs(p_dq + i_t * Q, H, D, R, BH, BG, BP)
        k = _load_pairs(p_row + 2 * Q, HKV, D, R, BHKV, BG, BP)
        dk = _load_pairs(p_dk + i_t * KV, HKV, D, R, BHKV, BG, BP)
        if HAS_VIEWS:
            b_dgate = tl.load(p_dgate + i_t * Q + o_q, o_q < Q)
            b_dv = tl.load(p_dv + i_t * KV + o_kv, o_kv < KV)
        else:
            b_dgate = tl.zeros([BQ], p_dx.dtype.element_ty)
            b_dv = tl.zeros([BKV], p_dx.dtype.element_ty)
        angles = i_t * (R // 2) + o_j
        b_cos = tl.load(p_cos + angles, o_j < R // 2, 1.0).to(tl.float32)
        b_sin = tl.load(p_sin + angles, o_j < R // 2, 0.0).to(tl.float32)
        tl.store(p_drow + Q + o_q, b_dgate, o_q < Q)
        tl.store(p_drow + 2 * Q + KV + o_kv, b_dv, o_kv < KV)
        b_first, b_second, b_w1, b_w2 = _turn_back(q, dq, q_scales, b_cos, b_sin, eps, D)
        p_first, p_second, is_first, is_second = _pairs(p_drow, H, D, R, BH, BG, BP)
        tl.store(p_first, b_first, is_first)
        tl.store(p_second, b_second, is_second)
        b_dq1 += b_w1
        b_dq2 += b_w2
        b_first, b_second, b_w1, b_w2 = _turn_back(k, dk, k_scales, b_cos, b_sin, eps, D)
        p_first, p_second, is_first, is_second = _pairs(p_drow + 2 * Q, HKV, D, R, BHKV, BG, BP)
        tl.store(p_first, b_first, is_first)
        tl.store(p_second, b_second, is_second)
        b_dk1 += b_w1
        b_dk2 += b_w2
    p_partial += i_p * 2 * D
    p_first, p_second, is_first, is_second = _pairs(p_partial, 1, D, R, 1, BG, BP)
    tl.store(p_first, tl.sum(b_dq1, 0)[None, :], is_first)
    tl.store(p_second, tl.sum(b_dq2, 0)[None, :], is_second)
    tl.store(p_first + D, tl.sum(b_dk1, 0)[None, :], is_first)
    tl.store(p_second + D, tl.sum(b_dk2, 0)[None, :], is_second)
