"""Penalties, cuts, log-probabilities and random numbers of one row."""

import math

import numpy as np
import pytest

from qnext.engine.request import SamplingParams
from qnext.engine.sampler import cuts_of, penalized_logits, raw_logprobs
from qnext.kernels.decide_token.reference import pick, residual_weights, token_weights
from qnext.runtime.random_bits import Purpose, request_seed, uniform

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.05, 0.25], np.float32))


def probs_with(**options) -> np.ndarray:
    weights = token_weights(LOGITS, cuts_of(SamplingParams(**options)))
    return weights / weights.sum()


def test_without_transforms_the_distribution_is_the_softmax():
    np.testing.assert_allclose(probs_with(), [0.1, 0.4, 0.2, 0.05, 0.25], rtol=1e-6)


def test_temperature_divides_the_logits():
    expected = np.array([0.1, 0.4, 0.2, 0.05, 0.25]) ** 2
    np.testing.assert_allclose(probs_with(temperature=0.5), expected / expected.sum(), rtol=1e-6)


def test_temperature_zero_draws_nothing():
    assert cuts_of(SamplingParams(temperature=0.0)) is None


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_k": -1}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.64}, [1, 4]),
        ({"top_p": 0.66}, [1, 2, 4]),
        ({"min_p": 0.3}, [1, 2, 4]),
        ({"top_k": 3, "top_p": 0.7}, [1, 4]),  # 0.65 / 0.85 reaches 0.7
    ],
)
def test_cuts_keep_the_right_tokens_and_their_proportions(options, kept):
    probs = probs_with(**options)
    assert np.flatnonzero(probs).tolist() == kept
    expected = np.exp(LOGITS[kept]) / np.exp(LOGITS[kept]).sum()
    np.testing.assert_allclose(probs[kept], expected, rtol=1e-6)


def test_equal_values_at_a_cut_keep_the_lowest_ids():
    logits = np.zeros(6)
    for options, kept in (({"top_k": 2}, [0, 1]), ({"top_p": 0.4}, [0, 1, 2])):
        weights = token_weights(logits, cuts_of(SamplingParams(**options)))
        assert np.flatnonzero(weights).tolist() == kept


def test_penalties_follow_their_definitions():
    logits = np.array([2.0, -1.0, 0.5, 3.0], np.float32)
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5, temperature=1.0
    )
    penalized = penalized_logits(logits, params, frozenset({0}), {1: 1}, window_ids=[1, 3])
    # 0 is in the prompt alone; 1 twice in the answer, one of them a draft; 3 once, as a draft.
    np.testing.assert_allclose(penalized, [1.0, -2.0 - 0.5 - 0.5, 0.5, 1.5 - 0.25 - 0.5])
    np.testing.assert_array_equal(logits, np.array([2.0, -1.0, 0.5, 3.0], np.float32))


def test_a_token_is_drawn_by_its_share_and_never_at_probability_zero():
    probs = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert pick(probs, 0.0) == 1
    assert pick(probs, 0.49) == 1
    assert pick(probs, 0.5) == 3
    assert pick(probs, np.nextafter(1.0, 0.0)) == 3
    assert pick(np.full(3, 1e-320), np.nextafter(1.0, 0.0)) == 2


def test_the_residual_of_equal_distributions_is_the_target():
    probs = np.array([0.25, 0.75])
    np.testing.assert_array_equal(residual_weights(probs, probs), probs)
    residual = residual_weights(probs, np.array([0.5, 0.5]))
    np.testing.assert_array_equal(residual, [0.0, 0.25])


def test_random_numbers_are_named_by_seed_position_and_purpose():
    one = uniform(1, 2, Purpose.TARGET)
    assert one == uniform(1, 2, Purpose.TARGET)
    others = {uniform(2, 2, Purpose.TARGET), uniform(1, 3, Purpose.TARGET)}
    others |= {uniform(1, 2, purpose) for purpose in Purpose}
    assert len(others) == 2 + len(Purpose)
    assert uniform(2**64 - 1, 10**9, Purpose.DRAFT) < 1.0
    assert request_seed(0, 0) != request_seed(0, 1)


def test_random_numbers_are_uniform_and_uncorrelated():
    draws = np.array([uniform(5, i, Purpose.TARGET) for i in range(4000)])
    other = np.array([uniform(5, i, Purpose.ACCEPT) for i in range(4000)])
    counts = np.histogram(draws, bins=16, range=(0, 1))[0]
    assert ((counts - 250) ** 2 / 250).sum() < 40  # chi-square of 15 degrees, p = 5e-4
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.06
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.06


def test_log_probabilities_are_of_the_raw_row_with_ranks():
    found = raw_logprobs(LOGITS, token_id=3, num_largest=2)
    assert list(found) == [3, 1, 4]
    assert found[3].logprob == pytest.approx(math.log(0.05), rel=1e-5)
    assert [found[i].rank for i in (3, 1, 4)] == [5, 1, 2]
    assert list(raw_logprobs(LOGITS, token_id=1, num_largest=2)) == [1, 4]
    assert list(raw_logprobs(LOGITS, token_id=0, num_largest=0)) == [0]
