"""What every pass over chunks needs: where the chunks lie, and what each knows without the state.

The derivation and the split into kernels are in this folder's README.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

CHUNK = 64


@triton.jit(do_not_specialize=["num_seqs", "num_slots"])
def chunk_table_kernel(
    p_cu_seqlens: tl.tensor,
    p_table: tl.tensor,
    p_first: tl.tensor,
    num_seqs: tl.tensor,
    num_slots: tl.tensor,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Find each slot's tokens and each sequence's first slot; sequence n has ceil(len / BT) slots.

    Slots that no sequence needs get no tokens: start = end = 0.
    """
    i_s = tl.program_id(0)
    o_s = i_s * BS + tl.arange(0, BS)
    b_seq = tl.zeros([BS], dtype=tl.int32)  # sequences whose slots all lie before this one
    b_skipped = tl.zeros([BS], dtype=tl.int32)  # and their slots
    total = 0
    for i_n in range(0, num_seqs, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < num_seqs
        b_start = tl.load(p_cu_seqlens + o_n, mask=m_n, other=0)
        b_end = tl.load(p_cu_seqlens + o_n + 1, mask=m_n, other=0)
        b_count = (b_end - b_start + BT - 1) // BT
        b_stop = total + tl.cumsum(b_count, axis=0)
        b_passed = (b_stop[None, :] <= o_s[:, None]) & m_n[None, :]
        b_seq += tl.sum(b_passed.to(tl.int32), axis=1)
        b_skipped += tl.sum(tl.where(b_passed, b_count[None, :], 0), axis=1)
        if i_s == 0:
            tl.store(p_first + o_n, b_stop - b_count, mask=m_n)
        total += tl.sum(b_count, axis=0)
    m_s = b_seq < num_seqs
    b_start = tl.load(p_cu_seqlens + b_seq, mask=m_s, other=0)
    b_end = tl.load(p_cu_seqlens + b_seq + 1, mask=m_s, other=0)
    b_start = tl.where(m_s, b_start + (o_s - b_skipped) * BT, 0)
    b_end = tl.minimum(b_end, b_start + BT)
    tl.store(p_table + 2 * o_s, b_start, mask=o_s < num_slots)
    tl.store(p_table + 2 * o_s + 1, b_end, mask=o_s < num_slots)


@triton.jit
def running_log_decay(
    p_g: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    i_h: tl.tensor,
    Hv: tl.constexpr,
    BT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Sum of g since the chunk's start as two fp32 words; rows past the end add nothing.

    One word loses the digits of slow tokens that follow fast ones (g = -50).
    """
    o_t = start + tl.arange(0, BT)
    b_g = tl.load(p_g + o_t.to(tl.int64) * Hv + i_h, mask=o_t < end, other=0.0)
    b_exact = tl.cumsum(b_g.to(tl.float64), axis=0)
    b_high = b_exact.to(tl.float32)
    return b_high, (b_exact - b_high.to(tl.float64)).to(tl.float32)


@triton.jit
def decay_between(b_high: tl.tensor, b_low: tl.tensor, BT: tl.constexpr) -> tl.tensor:
    """exp(G_i - G_j) for j <= i, else 0; masked before the exponential, which could overflow."""
    o_i = tl.arange(0, BT)
    b_log = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    return tl.exp(tl.where(o_i[:, None] >= o_i[None, :], b_log, float("-inf")))


@triton.jit
def product(b_a: tl.tensor, b_b: tl.tensor, IS_FP32: tl.constexpr) -> tl.tensor:
    """a b in fp32: 16-bit factors exactly, fp32 factors as three products of tf32 halves.

    fp32 factors are cut along the inner dimension into a batch, summed at the end. That keeps
    them on the tensor cores' synchronous instructions: the asynchronous ones would take the halves
    of a from registers, which assemblers before CUDA 13.3 overwrite too early.
    """
    if IS_FP32:
        M: tl.constexpr = b_a.shape[0]
        L: tl.constexpr = b_a.shape[1]
        N: tl.constexpr = b_b.shape[1]
        PART: tl.constexpr = 16 if L <= 64 else L // 4
        b_a = tl.permute(tl.reshape(b_a, (M, L // PART, PART)), (1, 0, 2))
        b_b = tl.reshape(b_b, (L // PART, PART, N))
        b_c = tl.sum(tl.dot(b_a, b_b, input_precision="tf32x3"), axis=0)
    else:
        b_c = tl.dot(b_a, b_b)
    return b_c


@triton.jit
def unit_lower_inverse(b_a: tl.tensor) -> tuple[tl.tensor, ...]:
    """(I + A)^-1 of a strictly lower triangular A [64, 64]: upper left, lower left, lower right.

    Substitution by blocks that double: [[X, 0], [C, Y]]^-1 = [[X^-1, 0], [-Y^-1 C X^-1, Y^-1]].
    Blocks of 1 to 8 are all masks of four 16 x 16 matrices, then halves are cut and joined.
    """
    b_x = tl.permute(tl.reshape(b_a, (2, 32, 2, 32)), (1, 3, 0, 2))  # [32, 32, row, column]
    b_left, b_right = tl.split(b_x)
    b_a11, b_a21 = tl.split(b_left)
    _, b_a22 = tl.split(b_right)
    b_pair = tl.permute(tl.join(b_a11, b_a22), (2, 0, 1))  # [2, 32, 32]
    b_x = tl.permute(tl.reshape(b_pair, (2, 2, 16, 2, 16)), (0, 2, 4, 1, 3))
    b_left, b_right = tl.split(b_x)
    b_d1, b_lower = tl.split(b_left)  # [2, 16, 16]
    _, b_d2 = tl.split(b_right)
    b_diag = tl.reshape(tl.permute(tl.join(b_d1, b_d2), (0, 3, 1, 2)), (4, 16, 16))

    o_i = tl.arange(0, 16)[None, :, None]
    o_j = tl.arange(0, 16)[None, None, :]
    b_inv = tl.where(o_i == o_j, 1.0, 0.0) - tl.where((o_i // 2 == o_j // 2), b_diag, 0.0)
    for i_level in tl.static_range(1, 4):
        size = 2**i_level
        m_off = (o_i // (2 * size) == o_j // (2 * size)) & (o_i // size != o_j // size)
        b_step = tl.dot(b_inv, tl.where(m_off, b_diag, 0.0), input_precision="tf32x3")
        b_inv -= tl.dot(b_step, b_inv, input_precision="tf32x3")

    b_split = tl.permute(tl.reshape(b_inv, (2, 2, 16, 16)), (0, 2, 3, 1))
    b_inv1, b_inv2 = tl.split(b_split)  # [2, 16, 16]
    b_step = tl.dot(b_inv2, b_lower, input_precision="tf32x3")
    b_lower = -tl.dot(b_step, b_inv1, input_precision="tf32x3")
    b_rows = tl.join(tl.join(b_inv1, tl.zeros_like(b_inv1)), tl.join(b_lower, b_inv2))
    b_inv = tl.reshape(tl.permute(b_rows, (0, 4, 1, 3, 2)), (2, 32, 32))
    b_inv11, b_inv22 = tl.split(tl.permute(b_inv, (1, 2, 0)))
    b_step = tl.dot(b_inv22, b_a21, input_precision="tf32x3")
    return b_inv11, -tl.dot(b_step, b_inv11, input_precision="tf32x3"), b_inv22


@triton.jit
def prepare_kernel(
    p_q: tl.tensor,
    p_k: tl.tensor,
    p_g: tl.tensor,
    p_beta: tl.tensor,
    p_table: tl.tensor,
    p_inverse: tl.tensor,
    p_scores: tl.tensor,
    p_decay: tl.tensor,
    stride_q: tl.tensor,
    stride_k: tl.tensor,
    Hk: tl.constexpr,
    Hv: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    HAS_Q: tl.constexpr,
    IS_FP32: tl.constexpr,
) -> None:
    """Inverse, scores and decays of one chunk and one value head."""
    i_slot = tl.program_id(0) // Hv
    i_h = tl.program_id(0) % Hv  # neighbours share keys
    start = tl.load(p_table + 2 * i_slot)
    end = tl.load(p_table + 2 * i_slot + 1)
    if end <= start:
        return
    i_hk = i_h // (Hv // Hk)
    o_t = start + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_i = tl.arange(0, BT)
    m_t = o_t < end
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    o_t64 = o_t.to(tl.int64)
    b_k = tl.load(p_k + o_t64[:, None] * stride_k + i_hk * K + o_k[None, :], mask=m_tk, other=0.0)
    b_high, b_low = running_log_decay(p_g, start, end, i_h, Hv, BT)
    b_beta = tl.load(p_beta + o_t64 * Hv + i_h, mask=m_t, other=0.0)
    b_decay = decay_between(b_high, b_low, BT) * b_beta[None, :]
    i_tile = (i_slot.to(tl.int64) * Hv + i_h) * BT
    p_tile = p_scores + i_tile * BT + o_i[:, None] * BT + o_i[None, :]
    if HAS_Q:
        b_q = tl.load(
            p_q + o_t64[:, None] * stride_q + i_hk * K + o_k[None, :], mask=m_tk, other=0.0
        )
        b_qk = product(b_q, tl.trans(b_k), IS_FP32)
        tl.store(p_tile, (b_qk * b_decay).to(p_scores.dtype.element_ty))
    b_kk = product(b_k, tl.trans(b_k), IS_FP32)
    b_a = tl.where(o_i[:, None] > o_i[None, :], b_kk * b_decay, 0.0)
    b_inv11, b_inv21, b_inv22 = unit_lower_inverse(b_a)
    o_r = tl.arange(0, BT // 2)
    p_corner = p_inverse + i_tile * BT + o_r[:, None] * BT + o_r[None, :]
    tl.store(p_corner, b_inv11.to(p_inverse.dtype.element_ty))
    tl.store(p_corner + BT // 2, tl.zeros_like(b_inv11).to(p_inverse.dtype.element_ty))
    p_corner += BT // 2 * BT
    tl.store(p_corner, b_inv21.to(p_inverse.dtype.element_ty))
    tl.store(p_corner + BT // 2, b_inv22.to(p_inverse.dtype.element_ty))

    # G_L - G_i from both words; the last row's G is G_L, since rows past the end add nothing.
    m_last = o_i == BT - 1
    last_high = tl.sum(tl.where(m_last, b_high, 0.0), axis=0)
    last_low = tl.sum(tl.where(m_last, b_low, 0.0), axis=0)
    b_to_end = tl.exp((last_high - b_high) + (last_low - b_low))
    p_row = p_decay + 3 * i_tile + o_i
    tl.store(p_row, tl.exp(b_high))
    tl.store(p_row + BT, b_to_end)
    tl.store(p_row + 2 * BT, b_to_end * b_beta)


@dataclass(frozen=True)
class Inputs:
    """Checked inputs: q [T, Hk, K], k, v, g, beta; tokens may lie apart, a token's heads not."""

    q: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Hk, Hv, K, V."""
        return self.k.shape[1], self.v.shape[1], self.k.shape[2], self.v.shape[2]

    @property
    def num_seqs(self) -> int:
        """Packed sequences, empty ones too."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_slots(self) -> int:
        """Bound of the number of chunks that shapes alone give."""
        return -(-self.v.shape[0] // CHUNK) + self.num_seqs

    @property
    def is_fp32(self) -> bool:
        """Else 16-bit values."""
        return self.v.dtype == torch.float32


@dataclass(frozen=True)
class Chunks:
    """What the passes over the state read besides the inputs.

    Attributes:
        table: first token and end of each slot. [slots, 2], int32
        first: first slot of each sequence. [N], int32
        inverse: (I + N diag(beta))^-1. [slots, Hv, 64, 64], dtype of k
        scores: (q k^T) e^(G_i - G_j) beta_j for j <= i. [slots, Hv, 64, 64], dtype of k
        decay: e^G_i, e^(G_L - G_i), and that times beta_i. [slots, Hv, 3, 64], fp32
    """

    table: torch.Tensor
    first: torch.Tensor
    inverse: torch.Tensor
    scores: torch.Tensor
    decay: torch.Tensor


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where the values of a token lie together, else a copy."""
    together = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if together else x.contiguous()


def block_size(size: int) -> int:
    """Power of two that covers a head, at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def chunk_table(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`Chunks.table` and `Chunks.first`."""
    table = inputs.k.new_empty(inputs.num_slots, 2, dtype=torch.int32)
    first = inputs.k.new_empty(inputs.num_seqs, dtype=torch.int32)
    grid = (triton.cdiv(inputs.num_slots, 128),)
    chunk_table_kernel[grid](
        *(inputs.cu_seqlens, table, first, inputs.num_seqs, inputs.num_slots),
        BT=CHUNK,
        BS=128,
        BN=64,
    )
    return table, first


def prepare_chunks(inputs: Inputs) -> Chunks:
    """Chunk table, inverses, scores and decays; without q, no scores."""
    num_key_heads, num_heads, key_dim, _ = inputs.sizes
    num_slots, k, q = inputs.num_slots, inputs.k, inputs.q
    table, first = chunk_table(inputs)
    tile = (num_slots, num_heads, CHUNK, CHUNK)
    inverse = k.new_empty(tile)
    scores = inverse if q is None else k.new_empty(tile)
    decay = k.new_empty(num_slots, num_heads, 3, CHUNK, dtype=torch.float32)
    prepare_kernel[(num_slots * num_heads,)](
        k if q is None else q,
        k,
        inputs.g,
        inputs.beta,
        table,
        inverse,
        scores,
        decay,
        k.stride(0) if q is None else q.stride(0),
        k.stride(0),
        Hk=num_key_heads,
        Hv=num_heads,
        K=key_dim,
        BK=block_size(key_dim),
        BT=CHUNK,
        HAS_Q=q is not None,
        IS_FP32=inputs.is_fp32,
        num_warps=4,
        num_stages=1,
    )
    return Chunks(table, first, inverse, scores, decay)
