import itertools
import re

import pytest

from qnext.data.arithmetic import Exercise, conversations, exercises, split_of

SIGNS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def test_the_same_seed_gives_the_same_conversations():
    assert list(conversations(50, 3, "train")) == list(conversations(50, 3, "train"))
    assert list(conversations(50, 3, "train")) != list(conversations(50, 4, "train"))


def test_the_splits_share_no_question():
    train = {exercise.key for exercise in exercises(5000, 0, "train")}
    held_out = {exercise.key for exercise in exercises(1000, 1, "held_out")}
    assert not train & held_out
    assert {split_of(key) for key in held_out} == {"held_out"}
    assert len(held_out) > 300


def test_every_equation_is_true_and_holds_the_result():
    seen = set()
    for exercise in exercises(2000, 0, "train"):
        assert exercise.result in exercise.answer
        found = re.match(r"(\d+) ([-+x/]) (\d+) = (\d+)", exercise.answer)
        if found:
            a, sign, b, result = found.groups()
            seen.add(sign)
            assert SIGNS[sign](int(a), int(b)) == int(result) == int(exercise.result)
            assert a in exercise.question and b in exercise.question
    assert seen == set(SIGNS)


def test_answers_are_judged_by_their_result():
    for exercise in exercises(500, 2, "held_out"):
        assert exercise.is_right(exercise.answer)
        assert not exercise.is_right("")
        assert not exercise.is_right(exercise.answer.replace(exercise.result, "1" + "0" * 9))
    assert Exercise("", "", "", "19").is_right("12 + 7 = 19.")
    assert not Exercise("", "", "", "19").is_right("12 + 7 = 195")
    assert not Exercise("", "", "", "12").is_right("12 + 7 = 19")


def test_conversations_alternate_and_end_with_the_assistant():
    for messages in itertools.islice(conversations(300, 0, "train"), 300):
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split 'test'"):
        next(exercises(1, 0, "test"))
