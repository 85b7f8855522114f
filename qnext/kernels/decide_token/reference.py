"""One token from a row of logits: cuts, a draw, the test of a draft. NumPy, float64."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]  # [W]


class Cuts(NamedTuple):
    """Which tokens may be drawn and how much the distribution is sharpened.

    Attributes:
        temperature: divides the logits, > 0.
        top_k: the largest this many; 0 for all.
        top_p: the smallest set of tokens whose share reaches this.
        min_p: tokens with at least this share of the largest probability.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float


class Draws(NamedTuple):
    """Numbers in [0, 1): to draw a token; to test a draft; to draw in a rejected draft's place."""

    token: float
    accept: float
    residual: float


@dataclass(frozen=True)
class Choice:
    """A token and what it was drawn from.

    Attributes:
        token_id: the token.
        weights: shares of the distribution after all cuts, not divided by their sum. [W]
        total: their sum.
    """

    token_id: int
    weights: FloatArray
    total: float

    def probability(self, token_id: int) -> float:
        """Of one token."""
        return float(self.weights[token_id]) / self.total


def decide_token_reference(
    logits: FloatArray, cuts: Cuts, draws: Draws, draft: Choice | None = None
) -> Choice:
    """Draw a token from the softmax of a row after temperature, min_p, top_k and top_p.

    A draft d that was drawn from q stands with probability min(1, p(d) / q(d)), and else the token
    comes from norm(max(p - q, 0)): what comes out is distributed as p. Among equal values at a cut
    the lowest ids stay.

    Args:
        logits: after the penalties. [W]
        cuts: as the request asks.
        draws: random numbers of this position.
        draft: the drafted token and its distribution; None to draw from p itself.

    Returns:
        The token, the draft's where it stands; -1 where the logits are no numbers. Weights and
        total are of the distribution that it was drawn from, or with which the draft was tested.

    Source: Fast Inference from Transformers via Speculative Decoding,
        https://arxiv.org/abs/2211.17192
    """
    weights = token_weights(logits, cuts)
    total = float(weights.sum())
    if not total > 0.0:
        return Choice(-1, weights, total)
    if draft is None:
        return Choice(pick(weights, draws.token), weights, total)
    share = float(weights[draft.token_id]) / total
    if draws.accept * draft.probability(draft.token_id) < share:
        return Choice(draft.token_id, weights, total)
    residual = residual_weights(weights / total, draft.weights / draft.total)
    return Choice(pick(residual, draws.residual), residual, float(residual.sum()))


def token_weights(logits: FloatArray, cuts: Cuts) -> FloatArray:
    """Weights of the tokens that may be drawn, the largest 1, the others 0. [W]"""
    logits = logits.astype(np.float64)
    ids = None
    if 0 < cuts.top_k < logits.size:
        ids = _largest_ids(logits, cuts.top_k)
    chosen = logits if ids is None else logits[ids]
    weights = np.exp((chosen - chosen.max()) / cuts.temperature)
    if cuts.min_p > 0.0:
        weights[weights < cuts.min_p] = 0.0
    if cuts.top_p < 1.0:
        _cut_top_p(weights, cuts.top_p)
    if ids is None:
        return weights
    spread = np.zeros(logits.size)
    spread[ids] = weights
    return spread


def _largest_ids(values: FloatArray, count: int) -> NDArray[np.int64]:
    """Indices of the largest values, ascending; the lowest indices among equals at the cut."""
    smallest = np.partition(values, -count)[-count]
    larger = np.flatnonzero(values > smallest)
    equal = np.flatnonzero(values == smallest)[: count - larger.size]
    return np.sort(np.concatenate([larger, equal]))


def _cut_top_p(weights: FloatArray, top_p: float) -> None:
    """Zero all but the fewest largest weights that reach the share top_p of the sum, in place."""
    descending = np.argsort(-weights, kind="stable")
    reached = np.cumsum(weights[descending])
    num_kept = int(np.searchsorted(reached, top_p * reached[-1])) + 1
    weights[descending[num_kept:]] = 0.0


def residual_weights(target: FloatArray, draft: FloatArray) -> FloatArray:
    """What the target has more of than the draft, not normalised. [W]

    A rejection means that some token has more, so the sum is positive; rounding alone can make it
    zero for equal distributions, and then the target itself is right.
    """
    residual = np.maximum(target - draft, 0.0)
    return residual if residual.any() else target


def pick(weights: FloatArray, u: float) -> int:
    """The token whose share of the unit interval holds u; never one of weight 0.

    Args:
        weights: non-negative, of any positive sum. [W]
        u: in [0, 1).
    """
    reached = np.cumsum(weights, dtype=np.float64)
    token_id = int(np.searchsorted(reached, u * reached[-1], side="right"))
    if token_id == weights.size:  # u * sum rounded up to the sum
        token_id = int(np.flatnonzero(weights)[-1])
    return token_id
