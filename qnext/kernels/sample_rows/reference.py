"""From logits to tokens, plain Python and PyTorch in float64: sampling, acceptance, penalties.

Random numbers are Philox-4x32-10 with the seed as key and (position, purpose, 0, 0) as counter.
"""

import math

import torch

from qnext.kernels.sample_rows.fields import (
    PenaltyFields,
    SampledRows,
    SampleWorkspace,
    SamplingFields,
    TokenCounts,
    Window,
)
from qnext.runtime.random_bits import Purpose, uniform

GREEDY_TEMPERATURE = 1e-5
MASS_BITS = 43


def order_key(x: torch.Tensor) -> torch.Tensor:
    """int32 that orders fp32 numbers as they are ordered; both zeros alike."""
    bits = torch.where(x == 0.0, 0.0, x).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def sample_rows_reference(
    logits: torch.Tensor,
    fields: SamplingFields,
    *,
    purpose: int,
    rows_per_seq: int = 1,
    position_offset: int = 0,
    query_lens: torch.Tensor | None = None,
    has_filters: bool = True,
    out: SampledRows | None = None,
    workspace: SampleWorkspace | None = None,
) -> SampledRows:
    """Draw one token from each row: temperature, top_k, min_p, top_p, then the inverse of the CDF.

    The kept tokens are the first few in the order (larger logit, lower id): at most top_k of them;
    those with at least min_p times the largest weight; the fewest whose mass reaches top_p of what
    the other two left. The token is the first, by id, at which the running mass exceeds u.

    Args:
        logits: after the penalties, no NaN, at least one finite. Rows may be strided. [T, W], fp32
        fields: row i belongs to sequence i // rows_per_seq and decides the token at
            position + position_offset + i % rows_per_seq.
        purpose: what the random number decides; its second counter word.
        query_lens: rows of each sequence that count; the others are not written. [N], int32
        has_filters: False promises that every row has top_k, top_p and min_p off.
        out: where to write the results.
        workspace: scratch memory that is kept between calls.

    Returns:
        Tokens, their log-probabilities and the cuts.
    """
    num_rows = logits.shape[0]
    out = out or SampledRows.empty(num_rows, logits.device)
    for row_idx in range(num_rows):
        seq_idx, depth = divmod(row_idx, rows_per_seq)
        if query_lens is not None and depth >= int(query_lens[seq_idx]):
            continue
        temperature = float(fields.temperature[seq_idx])
        order, weights = _kept_tokens(logits[row_idx], fields, seq_idx)
        probs = torch.zeros(logits.shape[1], dtype=torch.float64)
        probs[order] = weights / weights.sum()
        position = int(fields.position[seq_idx]) + position_offset + depth
        u = uniform(int(fields.seed[seq_idx]) % 2**64, position, purpose)
        token = int(order[0]) if temperature < GREEDY_TEMPERATURE else _draw(probs, u)
        out.tokens[row_idx] = token
        out.logprobs[row_idx] = float(probs[token].log())
        out.cuts[row_idx] = _cut_record(logits[row_idx], temperature, order, weights)
    return out


def _kept_tokens(
    row: torch.Tensor, fields: SamplingFields, seq_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that stay, larger logits and lower ids first, and their weights (the largest is 1)."""
    row = row.detach().cpu().double()
    order = torch.sort(row, descending=True, stable=True).indices
    temperature = float(fields.temperature[seq_idx])
    if temperature < GREEDY_TEMPERATURE:
        return order[:1], torch.ones(1, dtype=torch.float64)
    top_k, top_p = int(fields.top_k[seq_idx]), float(fields.top_p[seq_idx])
    if top_k > 0:
        order = order[:top_k]
    weights = ((row[order] - row[order[0]]) / temperature).exp()
    num_kept = int((weights >= float(fields.min_p[seq_idx])).sum())
    order, weights = order[:num_kept], weights[:num_kept]
    if top_p < 1.0:
        reached = weights.cumsum(0)
        num_kept = int((reached < top_p * reached[-1]).sum()) + 1
        order, weights = order[:num_kept], weights[:num_kept]
    return order, weights


def _draw(probs: torch.Tensor, u: float) -> int:
    """The token whose share of the unit interval holds u; never one of probability 0."""
    reached = probs.cumsum(0)
    token = int((reached <= u * reached[-1]).sum())
    return token if token < probs.numel() else int(probs.nonzero()[-1])


def _cut_record(
    row: torch.Tensor, temperature: float, order: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    row = row.detach().cpu()
    keys = order_key(row)
    inverse = 1.0 if temperature < GREEDY_TEMPERATURE else 1.0 / temperature
    exponent = float(row[order[0]]) * inverse * math.log2(math.e)
    mass = float(weights.sum()) * 2.0 ** (exponent - math.floor(exponent) + MASS_BITS)
    largest_bits = int(row[order[0]].view(torch.int32))
    return torch.tensor([largest_bits, int(keys[order[-1]]), int(order[-1]), int(mass)])


def cut_probs(row: torch.Tensor, temperature: float, cut: torch.Tensor) -> torch.Tensor:
    """The distribution that a cut stands for. [W], float64"""
    row, cut = row.detach().cpu(), cut.cpu()
    keys, ids = order_key(row), torch.arange(row.numel())
    kept = (keys > cut[1]) | ((keys == cut[1]) & (ids <= cut[2]))
    scale = 1.0 if temperature < GREEDY_TEMPERATURE else temperature
    weights = ((row.double() - row.double().max()) / scale).exp() * kept
    return weights / weights.sum()


def accept_drafts_reference(
    logits: torch.Tensor,
    fields: SamplingFields,
    window: Window,
    *,
    has_filters: bool = True,
    workspace: SampleWorkspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept each sequence's drafts from the left until one fails, then decide one token more.

    A draft d drawn from q stands with probability min(1, p(d) / q(d)); in a failed one's place
    comes a token from norm(max(p - q, 0)). What is decided is distributed as p.

    Args:
        logits: of the main model, after the penalties; row n * Q + j follows sequence n's j-th
            draft. [N * Q, W], fp32
        fields: as for `sample_rows`; the drafts were drawn with the same ones.
        window: the drafts and the distributions they were drawn from.
        has_filters, workspace: as for `sample_rows`.

    Returns:
        Decided tokens, -1 after the last [N, Q] int64; the number of accepted drafts [N] int32.

    Source: Fast Inference from Transformers via Speculative Decoding, https://arxiv.org/abs/2211.17192
    """
    num_seqs, depth = window.tokens.shape[0], window.tokens.shape[1] + 1
    rows = sample_rows_reference(
        logits,
        fields,
        purpose=int(Purpose.TARGET),
        rows_per_seq=depth,
        query_lens=window.query_lens,
    )
    tokens = torch.full((num_seqs, depth), -1, dtype=torch.int64)
    num_accepted = torch.zeros(num_seqs, dtype=torch.int32)
    for seq_idx in range(num_seqs):
        query_len = int(window.query_lens[seq_idx])
        for j in range(query_len):
            row_idx = seq_idx * depth + j
            tokens[seq_idx, j] = rows.tokens[row_idx]
            if j == query_len - 1:
                break
            temperature = float(fields.temperature[seq_idx])
            target = cut_probs(logits[row_idx], temperature, rows.cuts[row_idx])
            draft_id = int(window.tokens[seq_idx, j])
            draft = _draft_probs(window, seq_idx, j, temperature, target)
            name = (int(fields.seed[seq_idx]) % 2**64, int(fields.position[seq_idx]) + j)
            if uniform(*name, Purpose.ACCEPT) * draft[draft_id] >= target[draft_id]:
                residual = (target - draft).clamp_min(0.0)
                if temperature >= GREEDY_TEMPERATURE and residual.any():
                    tokens[seq_idx, j] = _draw(residual, uniform(*name, Purpose.RESIDUAL))
                break
            tokens[seq_idx, j] = draft_id
            num_accepted[seq_idx] += 1
    return tokens.to(logits.device), num_accepted.to(logits.device)


def _draft_probs(
    window: Window, seq_idx: int, j: int, temperature: float, target: torch.Tensor
) -> torch.Tensor:
    if window.logits is None or window.cuts is None:
        return torch.zeros_like(target).index_fill_(0, window.tokens[seq_idx, j].cpu(), 1.0)
    return cut_probs(window.logits[seq_idx, j], temperature, window.cuts[seq_idx, j])


def apply_penalties_reference(
    logits: torch.Tensor,
    fields: PenaltyFields,
    counts: TokenCounts,
    slots: torch.Tensor,
    *,
    window_tokens: torch.Tensor | None = None,
    rows_per_seq: int = 1,
    window_offset: int = 0,
) -> None:
    """Change logits in place by what each sequence has seen.

    A token of prompt or answer has a positive logit divided by `repetition` and a negative one
    multiplied by it; one of the answer then loses frequency * times + presence.

    Args:
        logits: row i belongs to sequence i // rows_per_seq. [T, W], fp32
        slots: the slot of each sequence in the counts. [N], int32
        window_tokens: drafts; the first window_offset + i % rows_per_seq of a sequence's count as
            if they were in the answer of row i. [N, at least that many], int64
    """
    for row_idx in range(logits.shape[0]):
        seq_idx, depth = divmod(row_idx, rows_per_seq)
        packed = counts.packed[int(slots[seq_idx])].clone()
        if window_tokens is not None:
            for token in window_tokens[seq_idx, : window_offset + depth].tolist():
                packed[token] += 2
        values, times = logits[row_idx].double(), (packed >> 1).double()
        factor = float(fields.repetition[seq_idx])
        values = torch.where(
            packed > 0, torch.where(values > 0, values / factor, values * factor), values
        )
        loss = float(fields.frequency[seq_idx]) * times + float(fields.presence[seq_idx])
        logits[row_idx] = torch.where(times > 0, values - loss, values).float()


def count_tokens_reference(
    tokens: torch.Tensor, counts: TokenCounts, slots: torch.Tensor, *, is_prompt: bool
) -> None:
    """Add tokens to the counts of their slots.

    Args:
        tokens: -1 where there is none. [N, L], int64
        slots: [N], int32
        is_prompt: the tokens are the prompt's, which only the repetition penalty looks at.
    """
    for seq_tokens, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        for token in seq_tokens:
            if token < 0:
                continue
            old = int(counts.packed[slot, token])
            if old == 0:
                counts.ids[slot, int(counts.num_ids[slot])] = token
                counts.num_ids[slot] += 1
            counts.packed[slot, token] = old | 1 if is_prompt else old + 2


def clear_counts_reference(counts: TokenCounts, slots: torch.Tensor) -> None:
    """Forget what the slots have seen. slots: [N], int32"""
    for slot in slots.tolist():
        counts.packed[slot] = 0
        counts.num_ids[slot] = 0
