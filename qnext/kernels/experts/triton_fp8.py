"""Experts on a GPU with 8-bit weights in scaled blocks and rows rounded to 8 bits as they come."""

from typing import Any

import torch
import triton
import triton.language as tl

from qnext.kernels.experts.triton_config import Tile, default_config
from qnext.kernels.experts.triton_products import combine, describe
from qnext.kernels.experts.triton_sort import PairTable, max_tiles, sort_pairs
from qnext.kernels.fp8_blocks import BLOCK, DTYPE, LARGEST, block_scale_of, device_objection

# A group of zeros gets this scale, so that nothing is divided by zero.
SMALLEST_SCALE = 1e-12
# A block of weights is one step and one block of columns, so that it has one scale.
_TILES = {
    16: Tile(128, 128, 4, 4),
    32: Tile(128, 128, 4, 4),
    64: Tile(128, 128, 8, 4),
    128: Tile(128, 128, 8, 3),
}


def experts_fp8_supports(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if (objection := device_objection(x.device)) is not None:
        return objection
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"rows are fp32, fp16 or bf16 here, not {x.dtype}"
    if gate_up.dtype != DTYPE or down.dtype != DTYPE:
        return f"weights are {DTYPE} here, not {gate_up.dtype} and {down.dtype}"
    if gate_up_scale.dtype != torch.float32 or down_scale.dtype != torch.float32:
        return "scales are fp32 here"
    if x.shape[1] % BLOCK or down.shape[2] % BLOCK:
        return f"sizes are multiples of {BLOCK} here, not {x.shape[1]} and {down.shape[2]}"
    if torch.is_grad_enabled() and (x.requires_grad or top_weights.requires_grad):
        return "it has no gradient"
    if top_ids.dtype != torch.int64:
        return f"ids are int64 here, not {top_ids.dtype}"
    return None


def experts_fp8_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
    block_m: int | None = None,
) -> torch.Tensor:
    """As `experts_fp8_reference`, with x and the hidden rows rounded to 8 bits by groups of 128.

    Products of 128 numbers are summed by the tensor cores, and these sums, scaled, in fp32.

    Args:
        shared, shared_gate: as for `experts_shared_reference`, added in the last pass.
        block_m: another height of tiles than the one chosen by shape.
    """
    num_tokens, num_active = top_ids.shape
    num_experts, size, width = down.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    block_m = block_m or _block_m(num_tokens, num_active, num_experts)
    table = sort_pairs(top_ids.contiguous(), num_experts, block_m)
    rows, row_scale = quantize_rows(x.contiguous())
    hidden = torch.empty(num_tokens * num_active, width, dtype=DTYPE, device=x.device)
    hidden_scale = row_scale.new_empty(num_tokens * num_active, width // BLOCK)
    slots = x.new_empty(num_tokens * num_active, size)
    up = (rows, row_scale, gate_up, gate_up_scale, hidden, hidden_scale)
    down_product = (hidden, hidden_scale, down, down_scale, slots, hidden_scale)
    _multiply(up, table, num_active, block_m, is_up=True)
    _multiply(down_product, table, num_active, block_m, is_up=False)
    if shared is not None and shared_gate is not None:
        shared, shared_gate = shared.contiguous(), shared_gate.contiguous()
    top_weights = top_weights.contiguous()
    return combine(slots, table.inverse, num_active, top_weights, shared, shared_gate)


def _block_m(num_tokens: int, num_active: int, num_experts: int) -> int:
    """Rows of a tile, at most 64: tall tiles spare the L2 cache and lose all the same.

    At 32,768 tokens of the flagship 5,564 us with 128 rows and 4,612 with 64, one H100.
    """
    return min(64, default_config(num_tokens, num_active, num_experts, True).block_m)


def held_supports(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
) -> str | None:
    """As `experts_fp8_supports`, for weights that carry their scales."""
    scales = block_scale_of(gate_up), block_scale_of(down)
    return experts_fp8_supports(x, gate_up, scales[0], down, scales[1], top_weights, top_ids)


def experts_fp8_held(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_weights: torch.Tensor,
    top_ids: torch.Tensor,
    shared: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
) -> torch.Tensor:
    """As `experts_fp8_triton`, for weights that carry their scales."""
    scales = block_scale_of(gate_up), block_scale_of(down)
    given = (x, gate_up, scales[0], down, scales[1], top_weights, top_ids)
    return experts_fp8_triton(*given, shared, shared_gate)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn rows [T, C] and their groups' scales [T, C / 128], fp32."""
    num_rows, size = x.shape
    rows = torch.empty(num_rows, size, dtype=DTYPE, device=x.device)
    scale = torch.empty(num_rows, size // BLOCK, dtype=torch.float32, device=x.device)
    num_groups = num_rows * size // BLOCK
    quantize_groups_kernel[(triton.cdiv(num_groups, 16),)](
        x, rows, scale, num_groups, G=BLOCK, BG=16, LARGEST=LARGEST,
        SMALLEST=SMALLEST_SCALE, num_warps=4,
    )  # fmt: skip
    return rows, scale


def _multiply(
    tensors: tuple[torch.Tensor, ...], table: PairTable, num_active: int, block_m: int, is_up: bool
) -> None:
    """One grouped product; tensors are rows, weight and output, each with its scales."""
    rows, row_scale, weight, scale, out, out_scale = tensors
    tile, depth, num_columns = _TILES[block_m], rows.shape[1], out.shape[1]
    num_tiles = max_tiles(table.order.shape[0], weight.shape[0], block_m)
    experts_fp8_kernel[(num_tiles * (num_columns // tile.block_n),)](
        rows, row_scale, describe(weight.contiguous(), tile.block_n, tile.block_k),
        scale.contiguous(), table.order, table.tiles, out, out_scale,
        N=num_columns, K=depth, A=num_active, BM=block_m, G=BLOCK, IS_UP=is_up,
        LARGEST=LARGEST, SMALLEST=SMALLEST_SCALE,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@triton.jit
def to_fp8(b_x: "Any", LARGEST: tl.constexpr, SMALLEST: tl.constexpr) -> "Any":
    """8-bit rows of b_x, one group each, and their scales."""
    b_scale = tl.maximum(tl.max(tl.abs(b_x), 1) / LARGEST, SMALLEST)
    return (b_x / b_scale[:, None]).to(tl.float8e4nv), b_scale


@triton.jit(do_not_specialize=["num_groups"])
def quantize_groups_kernel(
    p_x: "Any", p_rows: "Any", p_scale: "Any", num_groups: "Any",
    G: tl.constexpr, BG: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
) -> None:  # fmt: skip
    """8-bit numbers and scales of BG groups."""
    o_g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    o_x = o_g[:, None] * G + tl.arange(0, G)[None, :]
    m_g = o_g < num_groups
    b_x = tl.load(p_x + o_x, mask=m_g[:, None], other=0.0).to(tl.float32)
    b_rows, b_scale = to_fp8(b_x, LARGEST, SMALLEST)
    tl.store(p_rows + o_x, b_rows, mask=m_g[:, None])
    tl.store(p_scale + o_g, b_scale, mask=m_g)


@triton.jit
def experts_fp8_kernel(
    p_rows: "Any", p_row_scale: "Any", weight: "Any", p_scale: "Any", p_order: "Any",
    p_tiles: "Any", p_out: "Any", p_out_scale: "Any",
    N: tl.constexpr, K: tl.constexpr, A: tl.constexpr, BM: tl.constexpr, G: tl.constexpr,
    IS_UP: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
) -> None:  # fmt: skip
    """One group of columns of one tile: x by gate and up with SwiGLU, or hidden rows by down.

    Up gathers its rows by token and rounds its output to 8 bits again.
    """
    NUM_N: tl.constexpr = N // G
    NUM_K: tl.constexpr = K // G
    FULL_N: tl.constexpr = 2 * N if IS_UP else N
    i_tile = tl.program_id(0) // NUM_N
    i_n = tl.program_id(0) % NUM_N
    expert = tl.load(p_tiles + 3 * i_tile)
    first = tl.load(p_tiles + 3 * i_tile + 1)
    last = tl.load(p_tiles + 3 * i_tile + 2)
    if first >= last:
        return
    o_g = tl.arange(0, G)
    o_m = first + tl.arange(0, BM)
    m_m = o_m < last
    o_out = o_m.to(tl.int64)
    o_row = o_out
    if IS_UP:
        o_row = (tl.load(p_order + o_m, mask=m_m, other=0) // A).to(tl.int64)
    p_block = p_scale + (expert * (FULL_N // G) + i_n) * NUM_K
    b_out = tl.zeros([BM, G], dtype=tl.float32)
    b_up = tl.zeros([BM, G], dtype=tl.float32)
    for i_k in range(NUM_K):
        p_x = p_rows + o_row[:, None] * K + i_k * G + o_g[None, :]
        b_x = tl.load(p_x, mask=m_m[:, None], other=0.0)
        b_s = tl.load(p_row_scale + o_row * NUM_K + i_k, mask=m_m, other=0.0)
        b_w = weight.load([expert * FULL_N + i_n * G, i_k * G]).T
        b_out += tl.dot(b_x, b_w) * (b_s * tl.load(p_block + i_k))[:, None]
        if IS_UP:
            b_w = weight.load([expert * FULL_N + N + i_n * G, i_k * G]).T
            b_up += tl.dot(b_x, b_w) * (b_s * tl.load(p_block + NUM_N * NUM_K + i_k))[:, None]
    p_columns = p_out + o_out[:, None] * N + i_n * G + o_g[None, :]
    if IS_UP:
        b_hidden, b_s = to_fp8(b_out * tl.sigmoid(b_out) * b_up, LARGEST, SMALLEST)
        tl.store(p_columns, b_hidden, mask=m_m[:, None])
        tl.store(p_out_scale + o_out * NUM_N + i_n, b_s, mask=m_m)
    else:
        tl.store(p_columns, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None])
