import random

import pytest

from qnext.data.dedup import ExactDedup, NearDedup


def words(seed, count=200):
    rng = random.Random(seed)
    return [f"word{rng.randrange(5000)}" for _ in range(count)]


def test_equal_up_to_case_and_spacing_is_seen():
    dedup = ExactDedup()
    assert dedup.is_new("A  story\nof ﬁre")
    assert not dedup.is_new("a story of FIRE ")
    assert dedup.is_new("a story of water")


def test_near_duplicates_are_seen_and_different_texts_kept():
    pytest.importorskip("datasketch")
    dedup = NearDedup(threshold=0.8)
    first = words(1)
    assert dedup.is_new(" ".join(first))
    assert not dedup.is_new(" ".join([*first[:-2], "other", "end"]).upper())
    assert dedup.is_new(" ".join([*first[:100], *words(2, 100)]))
    assert dedup.is_new("short")
    assert not dedup.is_new("Short")


def test_a_threshold_outside_its_range_is_refused():
    pytest.importorskip("datasketch")
    with pytest.raises(ValueError, match="threshold 1"):
        NearDedup(threshold=1)
