"""What a request changes about a row of logits and asks to know of it.

Everything works on one row at a time, so a row's outcome does not depend on the rows beside it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qnext.engine.request import Logprob, SamplingParams
from qnext.kernels.decide_token.reference import Cuts, Draws
from qnext.runtime.random_bits import Purpose, uniform

FloatArray = NDArray[np.float64]  # [W]
LogitsRow = NDArray[np.float32]  # [W]
MAX_TOP_K = 2**31 - 1  # more than any vocabulary, and what kernels can hold


def penalized_logits(
    logits: LogitsRow,
    params: SamplingParams,
    prompt_ids: frozenset[int],
    output_counts: Mapping[int, int],
    window_ids: Sequence[int],
) -> FloatArray:
    """Logits after the penalties.

    Args:
        logits: raw logits of one position. [W]
        prompt_ids: the tokens of the prompt; only the repetition penalty counts them.
        output_counts: how often each token is in the answer so far.
        window_ids: drafts before this position, counted as if they were in the answer.
    """
    penalized = logits.astype(np.float64)
    if not params.has_penalties:
        return penalized
    counts = dict(output_counts)
    for token_id in window_ids:
        counts[token_id] = counts.get(token_id, 0) + 1
    if params.repetition_penalty != 1.0:
        seen = np.fromiter(prompt_ids.union(counts), np.int64)
        values = penalized[seen]
        factor = params.repetition_penalty
        penalized[seen] = np.where(values > 0, values / factor, values * factor)
    if counts:
        ids = np.fromiter(counts.keys(), np.int64)
        times = np.fromiter(counts.values(), np.float64)
        penalized[ids] -= params.frequency_penalty * times + params.presence_penalty
    return penalized


def cuts_of(params: SamplingParams) -> Cuts | None:
    """How tokens are drawn; None takes the best."""
    if params.is_greedy:
        return None
    top_k = min(max(params.top_k, 0), MAX_TOP_K)
    return Cuts(params.temperature, top_k, params.top_p, params.min_p)


def draws_at(seed: int, position: int, purpose: Purpose) -> Draws:
    """Random numbers of the token at a position, drawn for TARGET or DRAFT."""
    return Draws(
        token=uniform(seed, position, purpose),
        accept=uniform(seed, position, Purpose.ACCEPT),
        residual=uniform(seed, position, Purpose.RESIDUAL),
    )


def raw_logprobs(logits: LogitsRow, token_id: int, num_largest: int) -> dict[int, Logprob]:
    """Log-probabilities of the chosen token and of the most probable ones, without any transform.

    Args:
        logits: raw logits of one position. [W]
        num_largest: how many of the most probable tokens to list; the lowest ids among equals.

    Returns:
        By token id; the chosen token first, then the others from the most probable on.
    """
    row = logits.astype(np.float64)
    largest = row.max()
    log_sum = largest + np.log(np.exp(row - largest).sum())
    order = np.argsort(-row, kind="stable")[:num_largest] if num_largest else ()
    chosen_rank = int(np.count_nonzero(row > row[token_id])) + 1
    found = {token_id: Logprob(float(row[token_id] - log_sum), chosen_rank)}
    for rank, other in enumerate(order, start=1):
        if int(other) not in found:
            found[int(other)] = Logprob(float(row[other] - log_sum), rank)
    return found
