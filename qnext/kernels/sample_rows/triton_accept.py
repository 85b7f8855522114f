"""Verification of drafts on the GPU without a sync: the rows are sampled, then one launch."""

import torch
import triton
import triton.language as tl

from qnext.kernels.sample_rows.fields import (
    CHUNK,
    SampledRows,
    SampleWorkspace,
    SamplingFields,
    Window,
)
from qnext.kernels.sample_rows.triton_fwd import sample_rows_triton
from qnext.kernels.sample_rows.triton_mass import (
    GREEDY_TEMPERATURE,
    exponent_parts,
    mass_of,
    order_key,
    random_bits,
    row_scale,
    share_of,
)
from qnext.runtime.random_bits import Purpose

ACCEPT = tl.constexpr(int(Purpose.ACCEPT))
RESIDUAL = tl.constexpr(int(Purpose.RESIDUAL))
UNIT_MASS = tl.constexpr(float(2**62))  # of probability 1 in a residual


@triton.jit
def probs_of(
    x: tl.tensor, ids: tl.tensor, p_cut: tl.tensor, c: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    """Probabilities of logits under their rows' cuts, from the masses that were drawn from."""
    largest = tl.load(p_cut, mask=mask, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    last_key = tl.load(p_cut + 1, mask=mask, other=0)
    last_id = tl.load(p_cut + 2, mask=mask, other=0)
    total = tl.load(p_cut + 3, mask=mask, other=1)
    whole, extra = exponent_parts(largest, c)
    key = order_key(x).to(tl.int64)
    is_kept = (key > last_key) | ((key == last_key) & (ids <= last_id))
    share = mass_of(x, c, whole, extra).to(tl.float64) * (1.0 / total.to(tl.float64))
    return tl.where(is_kept, share, 0.0)


@triton.jit
def residual_masses(
    p_target: tl.tensor,
    p_target_cut: tl.tensor,
    p_draft: tl.tensor,
    p_draft_cut: tl.tensor,
    draft_id: tl.tensor,
    c: tl.tensor,
    o_w: tl.tensor,
    W: tl.tensor,
    HAS_DRAFT_LOGITS: tl.constexpr,
) -> tl.tensor:
    """max(p - q, 0) of some tokens, as integers. int64"""
    mask = o_w < W
    x = tl.load(p_target + o_w, mask=mask, other=-float("inf"))
    probs = probs_of(x, o_w, p_target_cut, c, True)
    if HAS_DRAFT_LOGITS:
        x = tl.load(p_draft + o_w, mask=mask, other=-float("inf"))
        probs -= probs_of(x, o_w, p_draft_cut, c, True)
    else:
        probs = tl.where(o_w == draft_id, 0.0, probs)
    return (tl.maximum(probs, 0.0) * UNIT_MASS).to(tl.int64)


@triton.jit(
    do_not_specialize=["s_draft_cut_seq", "s_draft_cut_row"],
    do_not_specialize_on_alignment=[
        "p_temperature",
        "p_seed",
        "p_position",
        "p_query_lens",
        "p_draft_tokens",
        "p_sampled",
        "p_tokens",
        "p_accepted",
        "p_arrivals",
    ],  # fmt: skip
)
def accept_drafts_kernel(
    p_logits: tl.tensor,
    p_temperature: tl.tensor,
    p_seed: tl.tensor,
    p_position: tl.tensor,
    p_query_lens: tl.tensor,
    p_draft_tokens: tl.tensor,
    p_draft_logits: tl.tensor,
    p_draft_cuts: tl.tensor,
    p_sampled: tl.tensor,
    p_cuts: tl.tensor,
    p_chunk_mass: tl.tensor,
    p_arrivals: tl.tensor,
    p_tokens: tl.tensor,
    p_accepted: tl.tensor,
    s_logits: tl.tensor,
    s_draft_seq: tl.tensor,
    s_draft_row: tl.tensor,
    s_draft_cut_seq: tl.tensor,
    s_draft_cut_row: tl.tensor,
    W: tl.tensor,
    num_chunks: tl.tensor,
    Q: tl.constexpr,
    BQ: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    HAS_DRAFT_LOGITS: tl.constexpr,
) -> None:
    """One program per (chunk, sequence). All decide alike; where a draft failed they share the
    residual, and the last one to finish draws from it.
    """
    i_c = tl.program_id(0)
    i_n = tl.program_id(1).to(tl.int64)
    query_len = tl.minimum(tl.load(p_query_lens + i_n), Q)
    temperature = tl.load(p_temperature + i_n)
    c = row_scale(temperature)
    seed = tl.load(p_seed + i_n)
    position = tl.load(p_position + i_n)

    o_q = tl.arange(0, BQ)
    is_draft = o_q < query_len - 1
    drafts = tl.load(p_draft_tokens + i_n * (Q - 1) + o_q, mask=is_draft, other=0)
    row = i_n * Q + o_q
    x = tl.load(p_logits + row * s_logits + drafts, mask=is_draft, other=-float("inf"))
    target = probs_of(x, drafts, p_cuts + row * 4, c, is_draft)
    bits = random_bits(tl.broadcast_to(seed, [BQ]), position + o_q, ACCEPT)
    u = (bits >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)
    if HAS_DRAFT_LOGITS:
        o_draft = i_n * s_draft_seq + o_q.to(tl.int64) * s_draft_row
        x = tl.load(p_draft_logits + o_draft + drafts, mask=is_draft, other=-float("inf"))
        p_cut = p_draft_cuts + i_n * s_draft_cut_seq + o_q * s_draft_cut_row
        u *= probs_of(x, drafts, p_cut, c, is_draft)
    is_accepted = u < target
    last = tl.maximum(query_len - 1, 0)
    accepted = tl.min(tl.where(is_draft & (is_accepted == 0), o_q, last), 0)
    if i_c == 0:
        is_other = (o_q < Q) & ((o_q != accepted) | (query_len == 0))
        kept = tl.where(o_q < accepted, drafts, -1)
        tl.store(p_tokens + i_n * Q + o_q, kept, mask=is_other)
        tl.store(p_accepted + i_n, accepted)
    if query_len == 0:
        return
    row_idx = i_n * Q + accepted
    p_token = p_tokens + row_idx
    if (accepted == last) | (temperature < GREEDY_TEMPERATURE):
        if i_c == 0:
            tl.store(p_token, tl.load(p_sampled + row_idx))
        return

    p_target = p_logits + row_idx * s_logits
    p_draft = p_draft_logits + i_n * s_draft_seq + accepted.to(tl.int64) * s_draft_row
    p_target_cut = p_cuts + row_idx * 4
    p_draft_cut = p_draft_cuts + i_n * s_draft_cut_seq + accepted * s_draft_cut_row
    draft_id = tl.load(p_draft_tokens + i_n * (Q - 1) + accepted)
    masses = residual_masses(
        p_target, p_target_cut, p_draft, p_draft_cut, draft_id, c,
        i_c * BW + tl.arange(0, BW), W, HAS_DRAFT_LOGITS,
    )  # fmt: skip
    tl.store(p_chunk_mass + i_n * num_chunks + i_c, tl.sum(masses, 0))
    # All threads' stores come before the one thread's release, and its acquire before all loads.
    tl.debug_barrier()
    if tl.atomic_add(p_arrivals + i_n, 1, sem="acq_rel", scope="gpu") != num_chunks - 1:
        return
    tl.debug_barrier()
    tl.store(p_arrivals + i_n, 0)
    o_c = tl.arange(0, BC)
    sums = tl.load(
        p_chunk_mass + i_n * num_chunks + o_c,
        mask=o_c < num_chunks,
        other=0,
        cache_modifier=".cg",
    )
    total = tl.sum(sums, 0)
    if total == 0:
        # Equal distributions apart from rounding: the target is right, and drawn already.
        tl.store(p_token, tl.load(p_sampled + row_idx))
        return
    goal = share_of(random_bits(seed, position + accepted, RESIDUAL), total)
    chunk = tl.sum((tl.cumsum(sums, 0) <= goal).to(tl.int32), 0)
    chunk = tl.minimum(chunk, num_chunks - 1)
    goal -= tl.sum(tl.where(o_c < chunk, sums, 0), 0)
    masses = residual_masses(
        p_target, p_target_cut, p_draft, p_draft_cut, draft_id, c,
        chunk * BW + tl.arange(0, BW), W, HAS_DRAFT_LOGITS,
    )  # fmt: skip
    token = chunk * BW + tl.sum((tl.cumsum(masses, 0) <= goal).to(tl.int32), 0)
    tl.store(p_token, tl.minimum(token, W - 1).to(tl.int64))


def accept_drafts_triton(
    logits: torch.Tensor,
    fields: SamplingFields,
    window: Window,
    *,
    has_filters: bool = True,
    workspace: SampleWorkspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `accept_drafts_reference`."""
    num_rows, vocab_size = logits.shape
    num_seqs, depth = window.tokens.shape[0], window.tokens.shape[1] + 1
    assert num_rows == num_seqs * depth, f"{num_rows} rows, {num_seqs} sequences of {depth}"
    assert window.tokens.is_contiguous(), f"draft tokens have strides {window.tokens.stride()}"
    workspace = workspace or SampleWorkspace.allocate(num_rows, vocab_size, logits.device)
    rows = sample_rows_triton(
        logits,
        fields,
        purpose=int(Purpose.TARGET),
        rows_per_seq=depth,
        query_lens=window.query_lens,
        has_filters=has_filters,
        workspace=workspace,
    )
    tokens = torch.empty(num_seqs, depth, dtype=torch.int64, device=logits.device)
    num_accepted = torch.empty(num_seqs, dtype=torch.int32, device=logits.device)
    if num_seqs > 0:
        accept_drafts_fwd(logits, fields, window, rows, tokens, num_accepted, workspace)
    return tokens, num_accepted


def accept_drafts_fwd(
    logits: torch.Tensor,
    fields: SamplingFields,
    window: Window,
    rows: SampledRows,
    tokens: torch.Tensor,
    num_accepted: torch.Tensor,
    workspace: SampleWorkspace,
) -> None:
    """Launch the kernel that decides, given what was drawn from the rows."""
    vocab_size = logits.shape[1]
    num_seqs, depth = tokens.shape
    num_chunks = -(-vocab_size // CHUNK)
    has_draft_logits = window.logits is not None and window.cuts is not None
    draft_logits = logits if window.logits is None else window.logits
    draft_cuts = rows.cuts if window.cuts is None else window.cuts
    draft_strides = (*draft_logits.stride()[:-1], *draft_cuts.stride()[:-1])
    accept_drafts_kernel[(num_chunks, num_seqs)](
        logits,
        fields.temperature,
        fields.seed,
        fields.position,
        window.query_lens,
        window.tokens,
        draft_logits,
        draft_cuts,
        rows.tokens,
        rows.cuts,
        workspace.chunk_mass,
        workspace.counters[0],
        tokens,
        num_accepted,
        logits.stride(0),
        *(draft_strides if has_draft_logits else (0, 0, 0, 0)),
        vocab_size,
        num_chunks,
        Q=depth,
        BQ=max(triton.next_power_of_2(depth), 2),
        BW=CHUNK,
        BC=triton.next_power_of_2(num_chunks),
        HAS_DRAFT_LOGITS=has_draft_logits,
        num_warps=8,
    )
