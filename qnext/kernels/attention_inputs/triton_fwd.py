"""Attention's inputs from a fused projection on a GPU, in one pass over its rows."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.attention_inputs.reference import AttentionSizes
from qnext.kernels.attention_inputs.triton_bwd import attention_inputs_bwd, pair_blocks
from qnext.kernels.gpu_rows import rows_objection
from qnext.kernels.graph_ops import graph_op

MAX_QUERY_BLOCK = 16384


def supports(
    fused: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    sizes: AttentionSizes,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if fused.dim() != 2 or fused.shape[1] != sum(sizes.columns):
        return f"rows {tuple(fused.shape)} are not the {sum(sizes.columns)} columns of sizes"
    if cos.shape[1] < 1 or 2 * cos.shape[1] > sizes.head_dim:
        return f"{cos.shape[1]} rotated pairs are not in a head of {sizes.head_dim}"
    blocks = pair_blocks(sizes, cos.shape[1])
    if 2 * blocks["BH"] * blocks["BG"] * blocks["BP"] > MAX_QUERY_BLOCK:
        return (
            f"a token's {sizes.num_heads} heads of {sizes.head_dim} are more than a program holds"
        )
    if not cos.is_contiguous() or not sin.is_contiguous():
        return "cos and sin are contiguous here"
    return rows_objection(fused, q_weight, k_weight, cos, sin)


def attention_inputs_triton(
    fused: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    sizes: AttentionSizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `attention_inputs_reference`; cos and sin get no gradient."""
    inputs = (fused, q_weight, k_weight, cos, sin)
    if torch.compiler.is_compiling():
        heads = [sizes.num_heads, sizes.num_kv_heads, sizes.head_dim]
        q, k = attention_inputs_graph(*inputs, eps, heads)
        return q, k, *_views_of(fused, sizes)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        q, k, v, gate = AttentionInputsFunction.apply(*inputs, eps, sizes)
        return q, k, v, gate
    return attention_inputs_fwd(*inputs, eps=eps, sizes=sizes)


class AttentionInputsFunction(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any,
        fused: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        sizes: AttentionSizes,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = (fused, q_weight, k_weight, cos, sin)
        ctx.save_for_backward(*inputs)
        ctx.eps, ctx.sizes = eps, sizes
        return attention_inputs_fwd(*inputs, eps=eps, sizes=sizes)

    @staticmethod
    def backward(ctx: Any, *d_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = attention_inputs_bwd(d_outputs, ctx.saved_tensors, ctx.eps, ctx.sizes)
        return *gradients, None, None, None, None


def attention_inputs_fwd(
    fused: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    sizes: AttentionSizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel. Arguments as those of `attention_inputs_reference`."""
    num_tokens, device = fused.shape[0], fused.device
    kv_shape = (num_tokens, sizes.num_kv_heads, sizes.head_dim)
    q = torch.empty(num_tokens, sizes.num_heads, sizes.head_dim, dtype=fused.dtype, device=device)
    k = torch.empty(kv_shape, dtype=fused.dtype, device=device)
    attention_inputs_fwd_kernel[(num_tokens,)](
        fused,
        q_weight,
        k_weight,
        cos,
        sin,
        q,
        k,
        fused.stride(0),
        eps,
        **pair_blocks(sizes, cos.shape[1]),
    )
    return q, k, *_views_of(fused, sizes)


def _views_of(fused: torch.Tensor, sizes: AttentionSizes) -> tuple[torch.Tensor, torch.Tensor]:
    _, gate, _, v = fused.split(sizes.columns, dim=-1)
    return v.view(fused.shape[0], sizes.num_kv_heads, sizes.head_dim), gate


def _shapes(
    fused: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, (heads, kv_heads, head_dim) = fused.shape[0], sizes
    return (
        fused.new_empty(num_tokens, heads, head_dim),
        fused.new_empty(num_tokens, kv_heads, head_dim),
    )


@graph_op("attention_inputs", shapes=_shapes)
def attention_inputs_graph(
    fused: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward kernel for graphs; v and gate, views, are left to them. sizes: Hq, Hkv, D"""
    inputs = (fused, q_weight, k_weight, cos, sin)
    q, k, _, _ = attention_inputs_fwd(*inputs, eps=eps, sizes=AttentionSizes(*sizes))
    return q, k


@graph_op("attention_inputs_backward", "fused", "q_weight", "k_weight")
def attention_inputs_graph_bwd(
    dq: torch.Tensor,
    dk: torch.Tensor,
    fused: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    sizes: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the first three inputs; those of the columns of v and gate are 0."""
    inputs = (fused, q_weight, k_weight, cos, sin)
    d_outputs = (dq, dk, None, None)
    d_fused, d_q, d_k = attention_inputs_bwd(d_outputs, inputs, eps, AttentionSizes(*sizes))
    return d_fused, d_q.clone(), d_k.clone()  # they share memory, which graphs forbid


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _formula(ctx: Any, *d_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    given: tuple[Any, ...] = (*d_outputs, *ctx.saved_tensors, ctx.eps, ctx.sizes)
    gradients = attention_inputs_graph_bwd(*given)
    return *gradients, None, None, None, None


torch.library.register_autograd("qnext::attention_inputs", _formula, setup_context=_keep)


@triton.jit
def _normalise_and_rotate(
    p_row: tl.tensor,
    p_out: tl.tensor,
    p_weight: tl.tensor,
    b_cos: tl.tensor,
    b_sin: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """H heads of one token. Dimensions come as pairs i, i + R/2 of groups of R.

    Only the first group is rotated; for the others cos is 1 and sin is 0.
    """
    o_h, o_j = tl.arange(0, BH)[:, None], tl.arange(0, BG * BP)[None, :]
    o_first = o_j // BP * R + o_j % BP
    o_second = o_first + R // 2
    is_first = (o_j % BP < R // 2) & (o_first < D)
    is_second = (o_j % BP < R // 2) & (o_second < D)
    row = o_h * D
    b_first = tl.load(p_row + row + o_first, is_first & (o_h < H), 0.0).to(tl.float32)
    b_second = tl.load(p_row + row + o_second, is_second & (o_h < H), 0.0).to(tl.float32)
    b_scale_first = 1.0 + tl.load(p_weight + o_first, is_first, 0.0).to(tl.float32)
    b_scale_second = 1.0 + tl.load(p_weight + o_second, is_second, 0.0).to(tl.float32)
    mean = tl.sum(b_first * b_first + b_second * b_second, 1) / D
    inverse = tl.rsqrt(mean + eps)[:, None]
    b_first = b_first * inverse * b_scale_first
    b_second = b_second * inverse * b_scale_second
    b_turned = b_first * b_cos - b_second * b_sin
    tl.store(p_out + row + o_first, b_turned, is_first & (o_h < H))
    b_turned = b_second * b_cos + b_first * b_sin
    tl.store(p_out + row + o_second, b_turned, is_second & (o_h < H))


@triton.jit(do_not_specialize=["eps"])
def attention_inputs_fwd_kernel(
    p_x: tl.tensor,
    p_qweight: tl.tensor,
    p_kweight: tl.tensor,
    p_cos: tl.tensor,
    p_sin: tl.tensor,
    p_q: tl.tensor,
    p_k: tl.tensor,
    stride_x: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BHKV: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """One program per token."""
    i_t = tl.program_id(0).to(tl.int64)
    o_j = tl.arange(0, BG * BP)[None, :]
    angles = i_t * (R // 2) + o_j
    b_cos = tl.load(p_cos + angles, o_j < R // 2, 1.0).to(tl.float32)
    b_sin = tl.load(p_sin + angles, o_j < R // 2, 0.0).to(tl.float32)
    p_row = p_x + i_t * stride_x
    p_q += i_t * H * D
    p_k += i_t * HKV * D
    _normalise_and_rotate(p_row, p_q, p_qweight, b_cos, b_sin, eps, H, D, R, BH, BG, BP)
    p_row += 2 * H * D
    _normalise_and_rotate(p_row, p_k, p_kweight, b_cos, b_sin, eps, HKV, D, R, BHKV, BG, BP)
