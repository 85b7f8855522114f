"""What the GPU's row kernels share: what they take, how they divide rows, sums over programs."""

import os
from functools import cache

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton reads the same variable when it is imported; interpreted kernels take CPU tensors.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE_ELEMENTS = 2048
_MAX_ELEMENT_COLUMNS = 1024
_INTERPRETED_PROCESSORS = 2


def rows_objection(*tensors: torch.Tensor) -> str | None:
    """Why the row kernels cannot take these tensors, whose last dimension is read, or None."""
    for x in tensors:
        if not (x.is_cuda or IS_INTERPRETED):
            return f"rows are on a GPU here, not on {x.device}"
        if x.dtype not in DTYPES:
            return f"{x.dtype} is left to the reference"
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"the last dimension is contiguous here, not of stride {x.stride(-1)}"
        if x.numel() == 0:
            return "there are no rows"
    return None


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below size."""
    return 1 << max(size - 1, 0).bit_length()


@cache
def row_tile(columns: int, elements: int = _TILE_ELEMENTS) -> tuple[int, int, int]:
    """Rows and columns of a tile of about this many elements, and its warps.

    Sixteen elements per thread are two loads of 16 bytes in half precision, and few enough
    registers for the threads that hide the memory's latency.
    """
    block_columns = power_of_two(columns)
    block_rows = max(1, elements // block_columns)
    warps = min(16, max(1, block_rows * block_columns // 512))
    return block_rows, block_columns, warps


def element_tile(num_rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of a kernel that treats each element by itself."""
    block_rows, block_columns, warps = row_tile(min(columns, _MAX_ELEMENT_COLUMNS))
    grid = (
        (num_rows + block_rows - 1) // block_rows,
        (columns + block_columns - 1) // block_columns,
    )
    return grid, {"BR": block_rows, "BC": block_columns, "num_warps": warps}


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] as [T, C] with contiguous columns; copied only where strides ask for it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def column_sums(partials: torch.Tensor, dtype: torch.dtype, columns: int = 0) -> torch.Tensor:
    """Second stage of a sum over all rows: adds up what each program of the first one left.

    The order of the sum depends on the shapes alone, so that results repeat bit for bit.

    Args:
        partials: one row per program. [P, N], fp32
        dtype: of the result.
        columns: if given, N holds rows of this many columns, which are transposed.

    Returns:
        [N], or with columns [columns, N / columns].
    """
    num_partials, size = partials.shape
    inner = columns or size
    shape = (inner, size // inner) if columns else (size,)
    out = torch.empty(shape, dtype=dtype, device=partials.device)
    column_sums_kernel[(triton.cdiv(size, 32),)](
        partials, out, num_partials, N=size, INNER=inner, BP=64, BN=32, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["num_partials"])
def column_sums_kernel(
    p_partial: tl.tensor,
    p_out: tl.tensor,
    num_partials: tl.tensor,
    N: tl.constexpr,
    INNER: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """out[n % INNER, n // INNER] = sum over p of partial[p, n]."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_p = tl.arange(0, BP)
    b_sum = tl.zeros([BP, BN], tl.float32)
    for start in range(0, num_partials, BP):
        rows = start + o_p
        mask = (rows < num_partials)[:, None] & (o_n < N)[None, :]
        b_sum += tl.load(p_partial + rows[:, None].to(tl.int64) * N + o_n[None, :], mask, 0.0)
    place = (o_n % INNER) * (N // INNER) + o_n // INNER
    tl.store(p_out + place, tl.sum(b_sum, 0), o_n < N)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e^-x) by a squared root: a division costs twice as many instructions.

    Its relative error, 3e-7, is that of the division.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def log1p_exp(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x) with full relative precision, also where e^x vanishes beside 1."""
    small = tl.exp(-tl.abs(x))
    whole = 1.0 + small
    # Kahan's log1p: the rounding of 1 + u is divided out again.
    kept = tl.where(whole == 1.0, 1.0, whole - 1.0)
    rest = tl.where(whole == 1.0, small, tl.log(whole) * (small / kept))
    return tl.maximum(x, 0.0) + rest
