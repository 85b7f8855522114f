"""What drafts bring and cost, from what a worker counted."""

import pytest

from benchmarks.drafts import break_even, check_equal_text, summarise

LABELS = {"model": "nano", "cell": "drafts", "engine": "qnext", "width": "float32"}


def answer(seconds, num_steps, drafted=(), accepted=(), **times):
    written = num_steps + sum(accepted)
    return {
        "seconds": seconds,
        "num_steps": num_steps,
        "token_ids": [[0] * (written + 1)],
        "drafted": list(drafted),
        "accepted": list(accepted),
        "steps_by_drafts": {str(len(drafted)): num_steps},
        "draft_seconds": times.get("draft", 0.0),
        "window_seconds": times.get("window", seconds / num_steps),
    }


@pytest.mark.parametrize(
    "cost, num_drafts, acceptance", [(1.6, 1, 0.6), (1.75, 2, 0.5), (2.5, 1, 1.5), (1.0, 3, 0.0)]
)
def test_break_even_is_where_tokens_pay_for_the_step(cost, num_drafts, acceptance):
    assert break_even(cost, num_drafts) == pytest.approx(acceptance, abs=1e-9)


def test_costs_are_multiples_of_a_plain_step():
    answers = {
        "0": [answer(2.0, 100)],
        "2": [answer(1.4, 40, (40, 40), (30, 10), draft=0.008, window=0.025)],
    }
    found = {each.name: each for each in summarise("nano drafts", 0.0, answers, LABELS)}

    def value(what):
        return found[f"nano drafts, greedy, {what}"].median

    assert value("k = 0") == pytest.approx(50.0)
    assert value("k = 2") == pytest.approx(80 / 1.4)
    assert found["nano drafts, greedy, k = 2"].baseline == "nano drafts, greedy, k = 0"
    assert found["nano drafts, greedy, k = 2"].note == "2.00 tokens a step"
    assert value("k = 2, accepted at depth 1") == pytest.approx(75.0)
    assert value("k = 2, accepted at depth 2") == pytest.approx(25.0)
    assert value("k = 2, one step") == pytest.approx(1.4 / 40 / 0.02)
    assert value("k = 2, one draft") == pytest.approx(0.4)
    assert value("k = 2, window of 3 rows") == pytest.approx(1.25)
    assert value("k = 2, break-even acceptance") == pytest.approx(50.0)


def test_numbers_of_drafts_that_write_different_tokens_are_not_reported():
    check_equal_text({"0": [[1, 2]], "1": [[1, 2]]})
    with pytest.raises(ValueError, match="k = 1 differ from those with k = 0"):
        check_equal_text({"0": [[1, 2]], "1": [[1, 3]]})
