"""AdamW with narrow weights and moments on a GPU: one pass over all that a parameter has."""

import torch
import triton
import triton.language as tl

from qnext.kernels.adamw.moments import BLOCK, AdamWRule, Moments
from qnext.kernels.gpu_rows import DTYPES, IS_INTERPRETED

# Elements of a program: with four warps 16 to a thread, which loads them by 16 bytes.
TILE_ROWS = 8


def supports(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: Moments,
    rates: torch.Tensor,
    rule: AdamWRule,
    salt: int = 0,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if not (param.is_cuda or IS_INTERPRETED):
        return f"parameters are on a GPU here, not on {param.device}"
    if param.dtype not in DTYPES or grad.dtype not in DTYPES:
        return f"fp32, bf16 and fp16 here, not {param.dtype} and {grad.dtype}"
    if not (param.is_contiguous() and grad.is_contiguous()):
        return "parameter and gradient are contiguous here"
    return None


def adamw_triton(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: Moments,
    rates: torch.Tensor,
    rule: AdamWRule,
    salt: int = 0,
) -> None:
    """As `adamw_reference`, in one pass, which is bound by bytes."""
    size = param.numel()
    # The kernel writes in place to a leaf that wants a gradient.
    adamw_kernel[(triton.cdiv(size, TILE_ROWS * BLOCK),)](
        param.detach(), grad, moments.mean, moments.square, moments.mean_scale, moments.root_scale,
        rates, size, salt, rule.beta1, rule.beta2, rule.eps,
        IS_8BIT=moments.is_8bit, IS_STOCHASTIC=rule.is_stochastic, ROWS=TILE_ROWS, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["salt", "beta1", "beta2", "eps"])
def adamw_kernel(
    p_param: tl.tensor,
    p_grad: tl.tensor,
    p_mean: tl.tensor,
    p_square: tl.tensor,
    p_mean_scale: tl.tensor,
    p_root_scale: tl.tensor,
    p_rates: tl.tensor,
    size: tl.tensor,
    salt: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    eps: tl.tensor,
    IS_8BIT: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per ROWS blocks, each with scales of its own; a skipped step reads one number."""
    if tl.load(p_rates + 5) > 0:
        o_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        o_x = o_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask, m_block = o_x < size, o_block * BLOCK < size
        b_w = tl.load(p_param + o_x, mask, 0.0).to(tl.float32)
        b_g = tl.load(p_grad + o_x, mask, 0.0).to(tl.float32) * tl.load(p_rates)
        b_m = tl.load(p_mean + o_x, mask, 0).to(tl.float32)
        b_v = tl.load(p_square + o_x, mask, 0).to(tl.float32)
        if IS_8BIT:
            b_m_scale = tl.load(p_mean_scale + o_block, m_block, 0.0) * (1.0 / (127.0 * 127.0))
            b_v_scale = tl.load(p_root_scale + o_block, m_block, 0.0) * (1.0 / (255.0 * 255.0))
            b_m = b_m * tl.abs(b_m) * b_m_scale[:, None]
            b_v = b_v * b_v * b_v_scale[:, None]
            b_v = b_v * b_v
        b_m = beta1 * b_m + (1.0 - beta1) * b_g
        b_v = beta2 * b_v + (1.0 - beta2) * b_g * b_g
        b_root = tl.sqrt(b_v)
        rate = tl.load(p_rates + 1) * tl.load(p_rates + 3)
        b_w -= tl.load(p_rates + 2) * b_w
        b_w -= rate * b_m / (b_root * tl.load(p_rates + 4) + eps)
        if IS_STOCHASTIC:
            b_noise = random_bits(o_x, tl.load(p_rates + 6), salt)
            b_low = ((b_noise >> 16) & 0xFF).to(tl.float32) * (1.0 / 256.0)
            b_high = (b_noise >> 24).to(tl.float32) * (1.0 / 256.0)
        else:
            b_low, b_high = 0.5, 0.5
        if IS_STOCHASTIC and p_param.dtype.element_ty == tl.bfloat16:
            b_bits = (b_w.to(tl.uint32, bitcast=True) + (b_noise & 0xFFFF)) & 0xFFFF0000
            # A number that is not finite is left alone: the sum could turn it into another.
            b_w = tl.where(tl.abs(b_w) < float("inf"), b_bits.to(tl.float32, bitcast=True), b_w)
        tl.store(p_param + o_x, b_w.to(p_param.dtype.element_ty), mask)
        if IS_8BIT:
            b_size = tl.abs(b_m)
            b_top = tl.max(b_size, 1)
            tl.store(p_mean_scale + o_block, b_top, m_block)
            b_inverse = tl.where(b_top > 0.0, 1.0 / b_top, 0.0)
            b_code = tl.minimum(
                tl.floor(tl.sqrt(b_size * b_inverse[:, None]) * 127.0 + b_low), 127.0
            )
            tl.store(p_mean + o_x, tl.where(b_m < 0.0, -b_code, b_code).to(tl.int8), mask)
            b_top = tl.max(b_root, 1)
            tl.store(p_root_scale + o_block, b_top, m_block)
            b_inverse = tl.where(b_top > 0.0, 1.0 / b_top, 0.0)
            b_code = tl.floor(tl.sqrt(b_root * b_inverse[:, None]) * 255.0 + b_high)
            # A root that is not zero keeps a code that is not: the update divides by it.
            b_code = tl.where(b_root > 0.0, tl.minimum(tl.maximum(b_code, 1.0), 255.0), 0.0)
            tl.store(p_square + o_x, b_code.to(tl.int32).to(tl.uint8), mask)
        else:
            tl.store(p_mean + o_x, b_m.to(p_mean.dtype.element_ty), mask)
            tl.store(p_square + o_x, b_v.to(p_square.dtype.element_ty), mask)


@triton.jit
def random_bits(o_x: tl.tensor, step: tl.tensor, salt: tl.tensor) -> tl.tensor:
    """32 random bits for each element: a hash of its place, the step and the salt.

    Eight instructions, where a counter-based generator would take about thirty and more time than
    the bytes.
    """
    seed = step.to(tl.int64) * 0x9E3779B9 + salt.to(tl.int64) * 0x85EBCA6B
    b_x = o_x.to(tl.uint32) ^ seed.to(tl.uint32)
    b_x = (b_x ^ (b_x >> 16)) * 0x7FEB352D
    b_x = (b_x ^ (b_x >> 15)) * 0x846CA68B
    return b_x ^ (b_x >> 16)
