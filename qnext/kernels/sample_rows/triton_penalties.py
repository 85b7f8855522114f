"""Penalties on the GPU: walk the short list of seen tokens, not the vocabulary."""

import torch
import triton
import triton.language as tl

from qnext.kernels.sample_rows.fields import PenaltyFields, TokenCounts

BLOCK = 256  # tokens of a program's step
MAX_PROGRAMS = 16  # that share a row's list


@triton.jit
def _penalized(
    x: tl.tensor,
    times: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
) -> tl.tensor:
    """The logit of a token that was seen, `times` times in the answer."""
    x = tl.where(x > 0, x / repetition, x * repetition)
    return tl.where(times > 0, x - (frequency * times.to(tl.float32) + presence), x)


@triton.jit(
    do_not_specialize=["Q", "window_offset", "s_window"],
    do_not_specialize_on_alignment=[
        "p_repetition",
        "p_presence",
        "p_frequency",
        "p_num_ids",
        "p_slots",
        "p_window",
    ],  # fmt: skip
)
def apply_penalties_kernel(
    p_logits: tl.tensor,
    p_repetition: tl.tensor,
    p_presence: tl.tensor,
    p_frequency: tl.tensor,
    p_packed: tl.tensor,
    p_ids: tl.tensor,
    p_num_ids: tl.tensor,
    p_slots: tl.tensor,
    p_window: tl.tensor,
    s_logits: tl.tensor,
    s_window: tl.tensor,
    W: tl.tensor,
    Q: tl.tensor,
    window_offset: tl.tensor,
    BLOCK: tl.constexpr,
    BQ: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """One program per (share of the list, row); each seen token belongs to one lane."""
    i_p = tl.program_id(0)
    i_t = tl.program_id(1).to(tl.int64)
    i_n = i_t // Q
    repetition = tl.load(p_repetition + i_n)
    presence = tl.load(p_presence + i_n)
    frequency = tl.load(p_frequency + i_n)
    if (repetition == 1.0) & (presence == 0.0) & (frequency == 0.0):
        return
    slot = tl.load(p_slots + i_n).to(tl.int64)
    p_row = p_logits + i_t * s_logits
    p_slot = p_packed + slot * W
    num_drafts = 0
    if HAS_WINDOW:
        num_drafts = window_offset + (i_t % Q).to(tl.int32)
    num_ids = tl.load(p_num_ids + slot)
    for start in range(i_p * BLOCK, num_ids, tl.num_programs(0) * BLOCK):
        o_i = start + tl.arange(0, BLOCK)
        mask = o_i < num_ids
        ids = tl.load(p_ids + slot * W + o_i, mask=mask, other=0)
        times = tl.load(p_slot + ids, mask=mask, other=0) >> 1
        if HAS_WINDOW:
            for j in range(num_drafts):
                times += (ids == tl.load(p_window + i_n * s_window + j)).to(tl.int32)
        x = tl.load(p_row + ids, mask=mask, other=0.0)
        x = _penalized(x, times, repetition, presence, frequency)
        tl.store(p_row + ids, x, mask=mask)
    if HAS_WINDOW:
        if i_p == 0:
            # Drafts that were never seen before are in no list; the first of equal ones counts all.
            o_q = tl.arange(0, BQ)
            drafts = tl.load(p_window + i_n * s_window + o_q, mask=o_q < num_drafts, other=-1)
            o_other = tl.arange(0, BQ)
            others = tl.load(
                p_window + i_n * s_window + o_other, mask=o_other < num_drafts, other=-2
            )
            is_same = drafts[:, None] == others[None, :]
            times = tl.sum(is_same.to(tl.int32), 1)
            earlier = tl.sum((is_same & (o_other[None, :] < o_q[:, None])).to(tl.int32), 1)
            mask = (drafts >= 0) & (earlier == 0)
            mask = mask & (tl.load(p_slot + drafts, mask=mask, other=1) == 0)
            x = tl.load(p_row + drafts, mask=mask, other=0.0)
            x = _penalized(x, times, repetition, presence, frequency)
            tl.store(p_row + drafts, x, mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "s_tokens"],
    do_not_specialize_on_alignment=["p_tokens", "p_num_ids", "p_slots"],
)
def count_tokens_kernel(
    p_tokens: tl.tensor,
    p_packed: tl.tensor,
    p_ids: tl.tensor,
    p_num_ids: tl.tensor,
    p_slots: tl.tensor,
    s_tokens: tl.tensor,
    num_tokens: tl.tensor,
    W: tl.tensor,
    BLOCK: tl.constexpr,
    IS_PROMPT: tl.constexpr,
) -> None:
    """One program per (block of tokens, sequence); who first meets a token lists it."""
    i_n = tl.program_id(1).to(tl.int64)
    o_l = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(p_tokens + i_n * s_tokens + o_l, mask=o_l < num_tokens, other=-1)
    mask = tokens >= 0
    slot = tl.load(p_slots + i_n).to(tl.int64)
    p_place = p_packed + slot * W + tokens
    if IS_PROMPT:
        old = tl.atomic_or(p_place, 1, mask=mask, sem="relaxed")
    else:
        old = tl.atomic_add(p_place, 2, mask=mask, sem="relaxed")
    is_new = mask & (old == 0)
    rank = tl.cumsum(is_new.to(tl.int32), 0)
    count = tl.sum(is_new.to(tl.int32), 0)
    if count > 0:
        first = tl.atomic_add(p_num_ids + slot, count, sem="relaxed")
        tl.store(p_ids + slot * W + first + rank - 1, tokens.to(tl.int32), mask=is_new)


@triton.jit(do_not_specialize_on_alignment=["p_num_ids", "p_slots"])
def clear_counts_kernel(
    p_packed: tl.tensor,
    p_ids: tl.tensor,
    p_num_ids: tl.tensor,
    p_slots: tl.tensor,
    W: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program per slot, so that its list is whole until the last token is forgotten."""
    slot = tl.load(p_slots + tl.program_id(0)).to(tl.int64)
    num_ids = tl.load(p_num_ids + slot)
    for start in range(0, num_ids, BLOCK):
        o_i = start + tl.arange(0, BLOCK)
        ids = tl.load(p_ids + slot * W + o_i, mask=o_i < num_ids, other=0)
        tl.store(p_packed + slot * W + ids, 0, mask=o_i < num_ids)
    tl.debug_barrier()  # all threads have the number before one sets it back
    tl.store(p_num_ids + slot, 0)


def apply_penalties_triton(
    logits: torch.Tensor,
    fields: PenaltyFields,
    counts: TokenCounts,
    slots: torch.Tensor,
    *,
    window_tokens: torch.Tensor | None = None,
    rows_per_seq: int = 1,
    window_offset: int = 0,
) -> None:
    """As `apply_penalties_reference`."""
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    width = 1 if window_tokens is None else window_tokens.shape[1]
    # Few rows share their lists among more programs.
    num_programs = min(MAX_PROGRAMS, max(2, 256 // num_rows))
    apply_penalties_kernel[(num_programs, num_rows)](
        logits,
        fields.repetition,
        fields.presence,
        fields.frequency,
        counts.packed,
        counts.ids,
        counts.num_ids,
        slots,
        slots if window_tokens is None else window_tokens,
        logits.stride(0),
        0 if window_tokens is None else window_tokens.stride(0),
        vocab_size,
        rows_per_seq,
        window_offset,
        BLOCK=BLOCK,
        BQ=max(triton.next_power_of_2(width), 2),
        HAS_WINDOW=window_tokens is not None,
        num_warps=4,
    )


def count_tokens_triton(
    tokens: torch.Tensor, counts: TokenCounts, slots: torch.Tensor, *, is_prompt: bool
) -> None:
    """As `count_tokens_reference`."""
    num_seqs, num_tokens = tokens.shape
    if num_seqs == 0 or num_tokens == 0:
        return
    block = 32 if num_tokens <= 32 else BLOCK
    count_tokens_kernel[(-(-num_tokens // block), num_seqs)](
        tokens,
        counts.packed,
        counts.ids,
        counts.num_ids,
        slots,
        tokens.stride(0),
        num_tokens,
        counts.packed.shape[1],
        BLOCK=block,
        IS_PROMPT=is_prompt,
        num_warps=1 if block == 32 else 4,
    )


def clear_counts_triton(counts: TokenCounts, slots: torch.Tensor) -> None:
    """As `clear_counts_reference`."""
    if slots.shape[0] == 0:
        return
    clear_counts_kernel[(slots.shape[0],)](
        counts.packed,
        counts.ids,
        counts.num_ids,
        slots,
        counts.packed.shape[1],
        BLOCK=1024,
        num_warps=4,
    )
