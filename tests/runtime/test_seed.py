import random

import numpy
import pytest
import torch

from qnext.runtime.seed import derive_seed, random_state, seed_everything, set_random_state


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_one_seed_repeats_every_stream():
    seed_everything(7)
    first = draws()
    assert draws() != first
    seed_everything(7)
    assert draws() == first


def test_a_saved_state_continues_where_it_was_taken():
    seed_everything(3)
    draws()
    state = random_state()
    expected = draws()
    set_random_state(state)
    assert draws() == expected


def test_seeds_of_different_purposes_differ_and_never_change():
    seeds = {derive_seed(s, *p) for s in (0, 1) for p in [("data",), ("data", 1), ("data", "1")]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "data") == 4895849776591316747


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed is -1"):
        seed_everything(-1)
