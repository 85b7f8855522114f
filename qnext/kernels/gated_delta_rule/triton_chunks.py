"""What every pass over chunks needs: where the chunks lie, and what each knows without the state.

The derivation and the split into kernels are in this folder's README.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

CHUNK = 64
DECAYS: tl.constexpr = tl.constexpr(6)  # rows of `Chunks.decay`
# Value heads of one program of `prepare_kernel`, 1 or 2, where they share keys: two hide each
# other's waits, one leaves registers for more programs.
PREPARED_HEADS = 2
# Of a thread: three programs to a processor instead of two, for a few spills (-17 % on an H200).
MOST_REGISTERS = 168


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
def decay_between(
    b_high: tl.tensor, b_low: tl.tensor, nearest: tl.tensor, BT: tl.constexpr
) -> tl.tensor:
    """exp(G_i - G_j) for j <= i - nearest, else 0.

    Masked before the exponential, which could overflow.
    """
    o_i = tl.arange(0, BT)
    b_log = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    return tl.exp(tl.where(o_i[:, None] - nearest >= o_i[None, :], b_log, float("-inf")))


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
def small_product(b_a: tl.tensor, b_b: tl.tensor, IS_FP32: tl.constexpr) -> tl.tensor:
    """a b of fp32 batches, in three products of halves.

    Beside 16-bit keys the halves are fp16, half the instructions of tf32: with unit keys and
    beta <= 1 what is multiplied here is at most 1, so what both halves miss is about 2^-24.
    """
    if IS_FP32:
        b_c = tl.dot(b_a, b_b, input_precision="tf32x3")
    else:
        b_a1 = b_a.to(tl.float16)
        b_a2 = (b_a - b_a1.to(tl.float32)).to(tl.float16)
        b_b1 = b_b.to(tl.float16)
        b_b2 = (b_b - b_b1.to(tl.float32)).to(tl.float16)
        b_c = tl.dot(b_a2, b_b1)
        b_c = tl.dot(b_a1, b_b2, b_c)
        b_c = tl.dot(b_a1, b_b1, b_c)
    return b_c


@triton.jit
def first_of_pairs(b_x: tl.tensor) -> tl.tensor:
    """Matrices 0, 0, 2, 2, ... of a batch of 16 x 16."""
    PAIRS: tl.constexpr = b_x.shape[0] // 2
    b_first, _ = tl.split(tl.permute(tl.reshape(b_x, (PAIRS, 2, 16, 16)), (0, 2, 3, 1)))
    b_twice = tl.broadcast_to(tl.reshape(b_first, (PAIRS, 1, 16, 16)), (PAIRS, 2, 16, 16))
    return tl.reshape(b_twice, (PAIRS * 2, 16, 16))


@triton.jit
def one_of_four(b_x: tl.tensor, i_x: tl.constexpr) -> tl.tensor:
    """Matrix i_x of each four of a batch of 16 x 16, four times."""
    FOURS: tl.constexpr = b_x.shape[0] // 4
    b_x = tl.permute(tl.reshape(b_x, (FOURS, 2, 2, 16, 16)), (0, 3, 4, 2, 1))
    b_x, _ = tl.split(b_x)
    b_even, b_odd = tl.split(b_x)
    b_one = tl.reshape(b_odd if i_x == 1 else b_even, (FOURS, 1, 16, 16))
    return tl.reshape(tl.broadcast_to(b_one, (FOURS, 4, 16, 16)), (FOURS * 4, 16, 16))


@triton.jit
def unit_lower_inverses(
    b_a: tl.tensor, BH: tl.constexpr, IS_FP32: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """(I + A)^-1 of strictly lower triangular A [BH, 4, 16, 64], row blocks of 16.

    Returns its 16 x 16 blocks, each [BH * 4, 16, 16] by row block: on the diagonal, left of it in
    odd row blocks, and the two left ones of row blocks 2 and 3. Substitution by blocks that
    double: [[X, 0], [C, Y]]^-1 = [[X^-1, 0], [-Y^-1 C X^-1, Y^-1]].
    A row block stays in one warp, and what it needs of itself in that warp's registers.
    """
    b_x = tl.permute(tl.reshape(b_a, (BH * 4, 16, 2, 2, 16)), (0, 1, 4, 2, 3))
    b_even, b_odd = tl.split(b_x)  # column blocks 0 and 2, 1 and 3
    b_a0, b_a2 = tl.split(b_even)
    b_a1, b_a3 = tl.split(b_odd)
    o_b = (tl.arange(0, BH * 4) % 4)[:, None, None]
    o_ij = (tl.arange(0, 16)[:, None] ^ tl.arange(0, 16)[None, :])[None, :, :]
    b_diag = tl.where(o_b < 2, tl.where(o_b == 0, b_a0, b_a1), tl.where(o_b == 2, b_a2, b_a3))
    b_inv = tl.where(o_ij == 0, 1.0, 0.0) - tl.where(o_ij < 2, b_diag, 0.0)
    for i_level in tl.static_range(1, 4):  # masks: in the same block of twice the size, no smaller
        b_c = tl.where((o_ij >> i_level) == 1, b_diag, 0.0)
        b_inv -= small_product(small_product(b_inv, b_c, IS_FP32), b_inv, IS_FP32)

    b_c = tl.where(o_b == 1, b_a0, tl.where(o_b == 3, b_a2, 0.0))
    b_c = small_product(b_c, first_of_pairs(b_inv), IS_FP32)
    b_left = -small_product(b_inv, b_c, IS_FP32)  # zero in even row blocks

    b_c0 = small_product(b_a0, one_of_four(b_inv, 0), IS_FP32)
    b_c0 += small_product(b_a1, one_of_four(b_left, 1), IS_FP32)
    b_c1 = small_product(b_a1, one_of_four(b_inv, 1), IS_FP32)
    b_left0 = small_product(b_inv, b_c0, IS_FP32)
    b_left0 += small_product(b_left, first_of_pairs(b_c0), IS_FP32)
    b_left1 = small_product(b_inv, b_c1, IS_FP32)
    b_left1 += small_product(b_left, first_of_pairs(b_c1), IS_FP32)
    return b_inv, b_left, -b_left0, -b_left1


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
    BH: tl.constexpr,
    HAS_Q: tl.constexpr,
    IS_FP32: tl.constexpr,
) -> None:
    """Inverses, scores and decays of one chunk and BH (1 or 2) value heads of one key head."""
    NH: tl.constexpr = Hv // BH
    i_slot = tl.program_id(0) // NH
    i_h = tl.program_id(0) % NH * BH  # neighbours share keys
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
    i_tile = (i_slot.to(tl.int64) * Hv + i_h) * BT
    o_tile = o_i[:, None] * BT + o_i[None, :]
    b_kk = product(b_k, tl.trans(b_k), IS_FP32)
    if HAS_Q:
        b_q = tl.load(
            p_q + o_t64[:, None] * stride_q + i_hk * K + o_k[None, :], mask=m_tk, other=0.0
        )
        b_qk = product(b_q, tl.trans(b_k), IS_FP32)
    for i_g in tl.static_range(BH):
        # The last row's G is G_L: rows past the end add nothing.
        b_g = tl.load(p_g + o_t64 * Hv + i_h + i_g, mask=m_t, other=0.0)
        b_exact = tl.cumsum(b_g.to(tl.float64), axis=0)
        b_rest = tl.sum(tl.where(o_i == BT - 1, b_exact, 0.0), axis=0) - b_exact
        b_to_end = tl.exp(b_rest.to(tl.float32))
        # G as two words: one loses the digits of slow tokens that follow fast ones (g = -50).
        b_high = b_exact.to(tl.float32)
        b_low = (b_exact - b_high.to(tl.float64)).to(tl.float32)
        b_beta = tl.load(p_beta + o_t64 * Hv + i_h + i_g, mask=m_t, other=0.0)
        p_row = p_decay + DECAYS * (i_tile + i_g * BT) + o_i
        tl.store(p_row, tl.exp(b_high))
        tl.store(p_row + BT, b_to_end)
        tl.store(p_row + 2 * BT, b_to_end * b_beta)
        tl.store(p_row + 3 * BT, b_high)
        tl.store(p_row + 4 * BT, b_low)
        tl.store(p_row + 5 * BT, b_beta)
        b_decay = decay_between(b_high, b_low, 0, BT) * b_beta[None, :]
        if HAS_Q:
            p_tile = p_scores + (i_tile + i_g * BT) * BT + o_tile
            tl.store(p_tile, (b_qk * b_decay).to(p_scores.dtype.element_ty))
        b_a = tl.where(o_i[:, None] > o_i[None, :], b_kk * b_decay, 0.0)
        b_a = tl.broadcast_to(tl.reshape(b_a, (1, BT, BT)), (BH, BT, BT))
        if i_g == 0:
            b_all = b_a
        else:
            b_all = tl.where(tl.arange(0, BH)[:, None, None] == 0, b_all, b_a)
    b_all = tl.reshape(b_all, (BH, 4, 16, BT))
    b_inv, b_left, b_left0, b_left1 = unit_lower_inverses(b_all, BH, IS_FP32)

    # Column blocks 0 and 1, then 2 and 3, each pair side by side.
    o_b = (tl.arange(0, BH * 4) % 4)[:, None, None]
    b_0 = tl.where(o_b < 2, tl.where(o_b == 0, b_inv, b_left), b_left0)
    b_1 = tl.where(o_b < 2, tl.where(o_b == 1, b_inv, 0.0), b_left1)
    b_2 = tl.where(o_b < 2, 0.0, tl.where(o_b == 2, b_inv, b_left))
    b_3 = tl.where(o_b == 3, b_inv, 0.0)
    b_rows = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    b_rows = tl.reshape(tl.permute(b_rows, (0, 1, 3, 4, 2)), (BH * BT, BT))
    o_row = tl.arange(0, BH * BT)[:, None] * BT + o_i[None, :]
    tl.store(p_inverse + i_tile * BT + o_row, b_rows.to(p_inverse.dtype.element_ty))


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
        decay: e^G_i, e^(G_L - G_i), that times beta_i, the two words of G_i, and beta_i.
            [slots, Hv, 6, 64], fp32
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


def empty_chunks(inputs: Inputs) -> Chunks:
    """The chunk table, and memory that `prepare_slots` fills; without q, no scores."""
    _, num_heads, _, _ = inputs.sizes
    table, first = chunk_table(inputs)
    tile = (inputs.num_slots, num_heads, CHUNK, CHUNK)
    inverse = inputs.k.new_empty(tile)
    scores = inverse if inputs.q is None else inputs.k.new_empty(tile)
    decay = inputs.g.new_empty(inputs.num_slots, num_heads, DECAYS.value, CHUNK)
    return Chunks(table, first, inverse, scores, decay)


def prepare_slots(inputs: Inputs, chunks: Chunks, slots: slice) -> None:
    """Inverses, scores and decays of some slots."""
    num_key_heads, num_heads, key_dim, _ = inputs.sizes
    q, k = inputs.q, inputs.k
    heads = 1 if inputs.is_fp32 or num_heads // num_key_heads % 2 else PREPARED_HEADS
    prepare_kernel[((slots.stop - slots.start) * num_heads // heads,)](
        k if q is None else q,
        k,
        inputs.g,
        inputs.beta,
        chunks.table[slots],
        chunks.inverse[slots],
        chunks.scores[slots],
        chunks.decay[slots],
        k.stride(0) if q is None else q.stride(0),
        k.stride(0),
        Hk=num_key_heads,
        Hv=num_heads,
        K=key_dim,
        BK=block_size(key_dim),
        BT=CHUNK,
        BH=heads,
        HAS_Q=q is not None,
        IS_FP32=inputs.is_fp32,
        num_warps=4,
        num_stages=1,
        maxnreg=MOST_REGISTERS,
    )


def prepare_chunks(inputs: Inputs) -> Chunks:
    """Chunk table, inverses, scores and decays; without q, no scores."""
    chunks = empty_chunks(inputs)
    prepare_slots(inputs, chunks, slice(0, inputs.num_slots))
    return chunks
