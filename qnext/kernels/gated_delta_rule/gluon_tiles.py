"""Tiles of a chunk between global and shared memory, for kernels in Gluon.

Shared tiles are swizzled as Hopper's products read them; four warps copy them.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def copy_rows(
    tile: gl.shared_memory_descriptor, p_rows: tl.tensor, stride: gl.constexpr, rows: tl.tensor,
    B: gl.constexpr,
) -> None:  # fmt: skip
    """Start copying B values of each of the first `rows` of 64 rows; the others become zero."""
    LANES: gl.constexpr = B // 8
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    o_t = gl.arange(0, 64, gl.SliceLayout(1, ROWS))[:, None]
    o_b = gl.arange(0, B, gl.SliceLayout(0, ROWS))[None, :]
    o_x = o_t.to(gl.int64) * stride + o_b  # 32 bits would be widened row by row
    m_t = (o_t < rows) & (o_b >= 0)
    async_copy.async_copy_global_to_shared(tile, p_rows + o_x, mask=m_t)


@gluon.jit
def copy_decay(tile: gl.shared_memory_descriptor, p_decay: tl.tensor, rows: tl.tensor) -> None:
    """Start copying the first four of a chunk's rows of decays, if it has tokens."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    o_r = gl.arange(0, 4, gl.SliceLayout(1, ROWS))[:, None]
    o_t = gl.arange(0, 64, gl.SliceLayout(0, ROWS))[None, :]
    m_r = (o_r >= 0) & (o_t >= 0) & (rows > 0)
    async_copy.async_copy_global_to_shared(tile, p_decay + (o_r * 64 + o_t), mask=m_r)


@gluon.jit
def store_rows(
    p_rows: tl.tensor, tile: gl.shared_memory_descriptor, stride: gl.constexpr, rows: tl.tensor,
    B: gl.constexpr,
) -> None:  # fmt: skip
    """Store B values of each of a tile's first `rows` rows, by all warps."""
    LANES: gl.constexpr = B // 8
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    o_r = gl.arange(0, tile.shape[0], gl.SliceLayout(1, ROWS))[:, None]
    o_v = gl.arange(0, B, gl.SliceLayout(0, ROWS))[None, :]
    o_x = o_r.to(gl.int64) * stride + o_v
    gl.store(p_rows + o_x, tile.load(ROWS), mask=(o_r < rows) & (o_v >= 0))


@gluon.jit
def hidden(x: tl.tensor) -> tl.tensor:
    """x, unknown to the compiler: addresses made of it do not wait in registers through a loop."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )
