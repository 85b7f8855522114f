"""The compiled choice of one token against NumPy in float64, and its random numbers."""

import numpy as np
import pytest

from qnext.kernels.decide_token.numba import decide_token_numba
from qnext.kernels.decide_token.reference import (
    Cuts,
    Draws,
    decide_token_reference,
    token_weights,
)
from qnext.runtime.random_bits import Purpose, philox, uniform

SIZES = (1, 2, 63, 64, 65, 1000, 8192)
CUTS = [
    Cuts(1.0, 0, 1.0, 0.0),
    Cuts(0.7, 0, 1.0, 0.0),
    Cuts(1e-4, 0, 1.0, 0.0),
    Cuts(0.7, 5, 1.0, 0.0),
    Cuts(0.7, 1, 1.0, 0.0),
    Cuts(1.3, 0, 0.9, 0.0),
    Cuts(1.0, 0, 1e-9, 0.0),
    Cuts(1.0, 0, 1.0, 0.05),
    Cuts(0.8, 40, 0.95, 0.02),
]
NONE = Draws(0.0, 0.0, 0.0)


def _row(size: int, seed: int) -> np.ndarray:
    return (4 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_weights_are_those_of_float64(size, cuts):
    for seed in range(5):
        row = _row(size, seed)
        choice = decide_token_numba(row, cuts, NONE)
        expected = token_weights(row, cuts)
        rtol = 2e-5 / cuts.temperature**0.5
        np.testing.assert_allclose(choice.weights, expected, rtol=rtol, atol=1e-37)
        assert choice.total == pytest.approx(choice.weights.sum(dtype=np.float64), rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_ties_at_a_cut_keep_the_lowest_ids(size):
    row = np.round(_row(size, 3) / 3).astype(np.float32)  # few different values
    for cuts in (Cuts(1.0, 7, 1.0, 0.0), Cuts(1.0, 0, 0.5, 0.0), Cuts(1.0, 9, 0.6, 0.0)):
        kept = np.flatnonzero(decide_token_numba(row, cuts, NONE).weights)
        assert kept.tolist() == np.flatnonzero(token_weights(row, cuts)).tolist()
    level = np.full(size, -3.5, np.float32)
    kept = np.flatnonzero(decide_token_numba(level, Cuts(1.0, 2, 1.0, 0.0), NONE).weights)
    assert kept.tolist() == list(range(min(2, size)))


def test_every_kept_token_is_drawn_over_its_own_share():
    row = _row(1000, 1)
    cuts = Cuts(0.9, 50, 1.0, 0.0)
    weights = decide_token_numba(row, cuts, NONE).weights.astype(np.float64)
    edges = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
    for token_id in np.flatnonzero(weights):
        low, high = edges[token_id], edges[token_id + 1]
        for u in (low + 1e-9, 0.5 * (low + high), high - 1e-9):
            assert decide_token_numba(row, cuts, Draws(u, 0, 0)).token_id == token_id
    last = np.flatnonzero(weights)[-1]
    assert decide_token_numba(row, cuts, Draws(1 - 2.0**-53, 0, 0)).token_id == last
    assert decide_token_numba(row, cuts, NONE).token_id == np.flatnonzero(weights)[0]


def test_extreme_rows_decide():
    row = np.full(200, -np.inf, np.float32)
    row[77] = -1e4
    for cuts in CUTS:
        assert decide_token_numba(row, cuts, Draws(0.999, 0, 0)).token_id == 77
    row = np.array([1e4, -1e4, 1e4], np.float32)
    assert decide_token_numba(row, CUTS[0], Draws(0.49, 0, 0)).token_id == 0
    assert decide_token_numba(row, CUTS[0], Draws(0.51, 0, 0)).token_id == 2


def test_a_row_that_is_no_distribution_decides_nothing():
    assert decide_token_numba(np.full(5, np.inf, np.float32), CUTS[0], NONE).token_id == -1
    assert decide_token_numba(np.full(5, np.nan, np.float32), CUTS[0], NONE).token_id == -1


@pytest.mark.parametrize("cuts", [CUTS[0], CUTS[3], CUTS[8]], ids=str)
def test_drafts_are_tested_as_in_float64(cuts):
    row, other = _row(500, 1), _row(500, 1) + 0.7 * _row(500, 2)
    generator = np.random.default_rng(0)
    accepted = 0
    for _ in range(300):
        draws = Draws(*generator.random(3))
        draft = decide_token_numba(other, cuts, draws)
        expected = decide_token_reference(row, cuts, draws, draft)
        assert decide_token_numba(row, cuts, draws, draft).token_id == expected.token_id
        accepted += expected.token_id == draft.token_id
    assert 30 < accepted < 290, "both outcomes must occur for this test to say anything"


def test_a_draft_of_the_same_distribution_always_stands():
    row = _row(500, 4)
    for u in (0.1, 0.6, 0.99):
        draft = decide_token_numba(row, CUTS[0], Draws(u, 0, 0))
        tested = decide_token_numba(row, CUTS[0], Draws(0, 1 - 2.0**-53, 0.5), draft)
        assert tested.token_id == draft.token_id


def test_random_words_are_those_of_philox():
    # Random123's own table of known answers.
    zero = philox((0, 0, 0, 0), (0, 0))
    assert zero == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = philox((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
    assert ones == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    digits = philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert digits == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert 0.0 <= uniform(2**64 - 1, 2**32 - 1, Purpose.RESIDUAL) < 1.0
