"""From a row of logits to a token: penalties, temperature, cuts, log-probabilities, random numbers.

Everything works on one row at a time in float64, so a row's outcome does not depend on the rows
beside it. Random numbers are a function of (seed, position, purpose) and of nothing else.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from qnext.engine.request import Logprob, SamplingParams

FloatArray = NDArray[np.float64]  # [W]
LogitsRow = NDArray[np.float32]  # [W]


class Purpose(IntEnum):
    """What a random number decides; two purposes never share one."""

    TARGET = 0  # a token from the main model's distribution
    DRAFT = 1  # a token from the draft's distribution
    ACCEPT = 2  # whether a draft is accepted
    RESIDUAL = 3  # the token in a rejected draft's place
    REQUEST_SEED = 4  # the seed of a request that came without one


def random_bits(seed: int, position: int, purpose: Purpose) -> int:
    """64 random bits named by three numbers, the same on every machine.

    Counter-based generators such as Philox are this function too; hashing is faster from Python.

    Args:
        seed: 0 to 2^64 - 1.
        position: place in the sequence of the token that is decided.
    """
    name = struct.pack("<QQQ", seed, position, purpose)
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """A number in [0, 1) with 53 random bits, named like `random_bits`."""
    return (random_bits(seed, position, purpose) >> 11) * 2.0**-53


def request_seed(engine_seed: int, request_idx: int) -> int:
    """Seed of the request_idx-th request that brings none of its own."""
    return random_bits(engine_seed, request_idx, Purpose.REQUEST_SEED)


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


def transformed_probs(logits: FloatArray, params: SamplingParams) -> FloatArray:
    """The distribution that a token is drawn from: temperature, min_p, top_k, top_p, in this order.

    Among equal values at a cut the lowest ids stay.

    Args:
        logits: after the penalties. [W]

    Returns:
        Probabilities that sum to 1. [W]
    """
    size = logits.size
    if params.is_greedy:
        probs = np.zeros_like(logits)
        probs[int(logits.argmax())] = 1.0
        return probs
    ids = None
    if 0 < params.top_k < logits.size:
        ids = _largest_ids(logits, params.top_k)
        logits = logits[ids]
    weights = np.exp((logits - logits.max()) / params.temperature)  # the largest is 1
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0
    if params.top_p < 1.0:
        _cut_top_p(weights, params.top_p)
    weights /= weights.sum()
    if ids is None:
        return weights
    probs = np.zeros(size)
    probs[ids] = weights
    return probs


def _largest_ids(values: FloatArray, count: int) -> NDArray[np.int64]:
    """Indices of the largest values, ascending; the lowest indices among equals at the cut."""
    smallest = np.partition(values, -count)[-count]
    larger = np.flatnonzero(values > smallest)
    equal = np.flatnonzero(values == smallest)[: count - larger.size]
    return np.sort(np.concatenate([larger, equal]))


def _cut_top_p(weights: FloatArray, top_p: float) -> None:
    """Zero all but the fewest largest weights that reach the share top_p of the sum, in place."""
    goal = top_p * weights.sum()
    # Weights up to the missing share divided by their number cannot fill it, so the cut lies among
    # the larger ones: those few are sorted instead of a vocabulary.
    bound = (1.0 - 1e-9) * (1.0 - top_p) * weights.sum() / weights.size
    descending = np.sort(weights[weights > bound])[::-1]
    num_kept = int(np.searchsorted(np.cumsum(descending), goal)) + 1
    num_kept = min(num_kept, descending.size)
    _keep_largest(weights, descending[num_kept - 1], num_kept)


def _keep_largest(weights: FloatArray, smallest: float, num_kept: int) -> None:
    """Zero all but the num_kept largest in place; `smallest` is the least of them."""
    equal = np.flatnonzero(weights == smallest)
    num_larger = int(np.count_nonzero(weights > smallest))
    weights[weights < smallest] = 0.0
    weights[equal[num_kept - num_larger :]] = 0.0


def sample(probs: FloatArray, u: float) -> int:
    """The token whose share of the unit interval holds u; never one of probability 0.

    Args:
        probs: non-negative, of any positive sum. [W]
        u: in [0, 1).
    """
    reached = np.cumsum(probs)
    token_id = int(np.searchsorted(reached, u * reached[-1], side="right"))
    if token_id == probs.size:  # u * sum rounded up to the sum
        token_id = int(np.flatnonzero(probs)[-1])
    return token_id


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
