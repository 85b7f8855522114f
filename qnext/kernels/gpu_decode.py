"""What the kernels of a GPU decode step share: launches that overlap, sortable keys, checks."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qnext.kernels.fp8_blocks import BLOCK, DTYPE, scale_shape

NUM_SMS = 132
# Elements of weight that a program without dots asks for at once. At 128 per thread three programs
# fit an SM, which then waits for 96 KB: several times what the memory's latency needs in flight.
TILE_ELEMENTS = 16384
THREAD_ELEMENTS = 128
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_IS_INTERPRETED = triton.knobs.runtime.interpret


def fma_block(num_outputs: int, row_elements: int, tile_elements: int = TILE_ELEMENTS) -> int:
    """Outputs of a program without dots: a tile full, but two programs for each SM."""
    block = min(16, max(1, tile_elements // row_elements))
    while block > 1 and num_outputs < 2 * NUM_SMS * block:
        block //= 2
    return block


def fma_warps(elements: int, per_thread: int = THREAD_ELEMENTS) -> int:
    """Warps of a program that asks for so many elements."""
    return max(1, min(8, elements // (32 * per_thread)))


def overlap_options(use_pdl: bool) -> dict[str, Any]:
    """Launch options of a kernel that may start while the one before it still runs.

    Programmatic dependent launch: such a kernel may read, before `wait_for_previous`, only what
    no kernel in flight writes, which means weights. Every program waits before it ends, so the
    end of a kernel also says that all kernels before it have ended.
    """
    options: dict[str, Any] = {"WAITS": _has_launch_control()}
    if use_pdl and options["WAITS"]:
        options["launch_pdl"] = True
    return options


@cache
def _has_launch_control() -> bool:
    return not _IS_INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def wait_for_previous(WAITS: tl.constexpr) -> None:
    """Wait until the kernel before this one has ended, and let the next one start early.

    It is there in launches that don't overlap too, where it waits for nothing: the compiler moves
    no load across it. Without it ptxas spreads a tile's loads among the sums to save registers,
    and few bytes are in flight.
    """
    if WAITS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def hold_loads(WAITS: tl.constexpr) -> None:
    """No load moves across this, after `wait_for_previous`; the wait is over by then."""
    if WAITS:
        gdc_wait()


@triton.jit
def order_bits(b_x: tl.tensor) -> tl.tensor:
    """int32 that sort as b_x does. Both zeros are equal, and NaN lies below minus infinity.

    The least int32 is none of them: it marks what is no candidate.
    """
    b_x = tl.where(b_x == 0.0, 0.0, b_x)
    b_bits = b_x.to(tl.int32, bitcast=True)
    # Bits of negative floats grow with the magnitude.
    b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_x != b_x, -0x7FFFFFFF, b_order)


@triton.jit
def order_value(b_order: tl.tensor) -> tl.tensor:
    """The fp32 value that sorts as this int32."""
    b_bits = tl.where(b_order < 0, b_order ^ 0x7FFFFFFF, b_order)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def order_key(b_x: tl.tensor, o_id: tl.tensor) -> tl.tensor:
    """int64 keys that sort as b_x does; of equal values the lowest id has the highest key."""
    return (order_bits(b_x).to(tl.int64) << 32) | (0x7FFFFFFF - o_id).to(tl.int64)


@triton.jit
def key_id(b_key: tl.tensor) -> tl.tensor:
    """The id in a key."""
    return 0x7FFFFFFF - b_key.to(tl.int32)


@triton.jit
def key_value(b_key: tl.tensor) -> tl.tensor:
    """The fp32 value in a key."""
    return order_value((b_key >> 32).to(tl.int32))


@triton.jit
def row_inverse_rms(p_x: tl.tensor, eps: tl.tensor, C: tl.constexpr, BC: tl.constexpr) -> tl.tensor:
    """1 / sqrt(mean(x^2) + eps) of one row."""
    o_c = tl.arange(0, BC)
    b_square = tl.zeros([BC], tl.float32)
    for i_c in range(0, C, BC):
        b_x = tl.load(p_x + i_c + o_c, mask=i_c + o_c < C, other=0.0).to(tl.float32)
        b_square += b_x * b_x
    return tl.rsqrt(tl.sum(b_square, 0) / C + eps)


@triton.jit
def block_scales(
    p_scale: tl.tensor, i_c: tl.tensor, C: tl.constexpr, BC: tl.constexpr, BLOCK_SIZE: tl.constexpr
) -> tl.tensor:
    """Scales of the blocks that BC columns from i_c on cross."""
    NB: tl.constexpr = (BC + BLOCK_SIZE - 1) // BLOCK_SIZE
    o_b = i_c // BLOCK_SIZE + tl.arange(0, NB)
    return tl.load(p_scale + o_b, mask=o_b * BLOCK_SIZE < C, other=0.0)


@triton.jit
def times_scales(b_x: tl.tensor, b_s: tl.tensor) -> tl.tensor:
    """A row with each block multiplied by its scale: cheaper than scaling every weight."""
    NB: tl.constexpr = b_s.shape[0]
    BC: tl.constexpr = b_x.shape[0]
    if NB == 1:
        return b_x * tl.sum(b_s, 0)
    else:
        return tl.reshape(tl.reshape(b_x, [NB, BC // NB]) * b_s[:, None], [BC])


@triton.jit
def widened(b_w: tl.tensor, b_x: tl.tensor) -> tl.tensor:
    """e4m3 weights in the dtype of the rows, in which they are exact.

    By way of fp16 and fp32 where that is bf16: hardware turns fp16 into bf16 at 16 per clock and
    SM, which is less than memory delivers, and each step of this detour at four times that.
    """
    if b_x.dtype == tl.bfloat16:
        return b_w.to(tl.float16).to(tl.float32).to(tl.bfloat16)
    else:
        return b_w.to(b_x.dtype)


def rows_objection(x: torch.Tensor, max_rows: int) -> str | None:
    """Why rows [T, C] are not for these kernels, or None."""
    if not x.is_cuda and not _IS_INTERPRETED:
        return f"rows on {x.device}, not on a GPU"
    if x.dtype not in FLOAT_DTYPES:
        return f"rows of {x.dtype}, not fp16, bf16 or fp32"
    if x.dim() != 2 or not x.is_contiguous():
        return f"rows of shape {tuple(x.shape)} and strides {x.stride()}, not contiguous [T, C]"
    if not 1 <= x.shape[0] <= max_rows:
        return f"{x.shape[0]} rows, not 1 to {max_rows}"
    return None


def weight_objection(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> str | None:
    """Why a weight is not for these kernels, or None."""
    if not weight.is_contiguous():
        return f"{name} is not contiguous: strides {weight.stride()}"
    if scale is None:
        return None if weight.dtype == dtype else f"{name} of {weight.dtype} for rows of {dtype}"
    if weight.dtype != DTYPE:
        return f"{name} of {weight.dtype} with scales, not {DTYPE}"
    if scale.dtype != torch.float32 or not scale.is_contiguous():
        return f"scales of {name} are not contiguous fp32"
    if tuple(scale.shape) != scale_shape(weight.shape):
        return f"scales of {name} have shape {tuple(scale.shape)}, not one per {BLOCK} x {BLOCK}"
    return None
