"""Generated conversations: sums, small word problems and one-line instructions.

Which split a question belongs to is decided by a hash of what it asks (the operation and its
numbers, or the words it works on), not of its wording: the same sum never stands in both.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 0.1
_MULTI_TURN_SHARE = 0.15
_SYSTEM_SHARE = 0.1

_NAMES = (
    "Anna Ben Clara David Ella Frank Grace Henry Ida Jack Kate Leo Mary Nina Oscar Paul Rosa Sam "
    "Tom Lucy Emma Max Lily Peter Jane Fred Alice Will Ruth Hugo"
).split()
_THINGS = (
    "apples pears books coins cards stones shells pens stamps eggs marbles cakes flowers buttons "
    "nuts cups hats toys balls keys plums candles ribbons letters"
).split()
_WORDS = (
    "river stone garden window candle forest bridge market silver winter summer orange yellow "
    "horse mouse table chair bread water paper music cloud island castle dragon pirate letter "
    "button pocket basket bottle mirror hammer ladder rabbit turtle monkey spider butter pepper "
    "morning evening teacher doctor farmer sailor soldier painter kitchen village mountain valley "
    "desert meadow feather shadow thunder whisper journey story flower tree bird fish moon star "
    "king queen ship train coat shoe lamp door house road field apple grape lemon peach onion"
).split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
    "January February March April May June July August September October November December"
).split()
_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer in one short sentence.",
    "You are a careful teacher of arithmetic.",
    "Be brief.",
)


@dataclass(frozen=True)
class Exercise:
    """One question and its answer."""

    key: str
    """What is asked, whatever the wording; it decides the split."""
    question: str
    answer: str
    result: str
    """The part of the answer that must be right: a number or a word."""

    def is_right(self, text: str) -> bool:
        """Whether an answer gives the result, behind its last equals sign if it has one."""
        said = text.rpartition("=")[2]
        return re.search(rf"(?<![\w,.-]){re.escape(self.result)}(?!\w|, \w)", said) is not None


def _number(rng: random.Random) -> int:
    """A number of one to three digits, small ones more often than evenly."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3)))


def _addition(rng: random.Random) -> Exercise:
    a, b = _number(rng), _number(rng)
    question = rng.choice(
        ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "Calculate {a} plus {b}.")
    ).format(a=a, b=b)
    key = f"add {min(a, b)} {max(a, b)}"
    return Exercise(key, question, f"{a} + {b} = {a + b}", str(a + b))


def _subtraction(rng: random.Random) -> Exercise:
    b, a = sorted((_number(rng), _number(rng)))
    question = rng.choice(
        (
            "What is {a} - {b}?",
            "{a} - {b} = ?",
            "Subtract {b} from {a}.",
            "Calculate {a} minus {b}.",
        )
    ).format(a=a, b=b)
    return Exercise(f"sub {a} {b}", question, f"{a} - {b} = {a - b}", str(a - b))


def _multiplication(rng: random.Random) -> Exercise:
    a, b = rng.randrange(13), rng.choice((rng.randrange(13), rng.randrange(100)))
    if rng.random() < 0.5:
        a, b = b, a
    question = rng.choice(
        ("What is {a} x {b}?", "{a} x {b} = ?", "Multiply {a} by {b}.", "Calculate {a} times {b}.")
    ).format(a=a, b=b)
    key = f"mul {min(a, b)} {max(a, b)}"
    return Exercise(key, question, f"{a} x {b} = {a * b}", str(a * b))


def _division(rng: random.Random) -> Exercise:
    b, quotient = rng.randrange(1, 13), rng.randrange(1, 21)
    a = b * quotient
    question = rng.choice(
        ("What is {a} / {b}?", "Divide {a} by {b}.", "Calculate {a} divided by {b}.")
    ).format(a=a, b=b)
    return Exercise(f"div {a} {b}", question, f"{a} / {b} = {quotient}", str(quotient))


def _comparison(rng: random.Random) -> Exercise:
    a, b = _number(rng), _number(rng)
    if a == b:
        b += 1
    word, chosen = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    question = rng.choice((f"Which is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?"))
    key = f"compare {min(a, b)} {max(a, b)}"
    return Exercise(key, question, f"{chosen} is {word}.", str(chosen))


def _sequence(rng: random.Random) -> Exercise:
    start, step = rng.randrange(60), rng.randrange(1, 11)
    terms = ", ".join(str(start + i * step) for i in range(4))
    question = rng.choice(
        ("Which number comes next: {t}?", "Continue the sequence: {t}", "What comes after {t}?")
    ).format(t=terms)
    result = str(start + 4 * step)
    return Exercise(f"sequence {start} {step}", question, result, result)


def _parity(rng: random.Random) -> Exercise:
    a = rng.randrange(1000)
    result = "odd" if a % 2 else "even"
    question = rng.choice((f"Is {a} even or odd?", f"Is the number {a} odd or even?"))
    return Exercise(f"parity {a}", question, f"{a} is {result}.", result)


def _word_problem(rng: random.Random) -> Exercise:
    name, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    b, a = sorted((rng.randrange(2, 60), rng.randrange(2, 60)))
    if rng.random() < 0.5:
        story = rng.choice(
            (
                "{n} has {a} {t}. {o} gives {n} {b} more. How many {t} does {n} have now?",
                "{n} has {a} {t} and {o} has {b} {t}. How many {t} do they have together?",
                "{n} found {a} {t} in the morning and {b} {t} in the evening. "
                "How many {t} did {n} find?",
            )
        )
        key, sign, result = f"story add {b} {a}", "+", a + b
    else:
        story = rng.choice(
            (
                "{n} has {a} {t}. {n} gives {b} of them to {o}. How many {t} are left?",
                "There were {a} {t} on the table. {o} took {b}. How many {t} remain?",
                "{n} had {a} {t} and lost {b}. How many {t} does {n} still have?",
            )
        )
        key, sign, result = f"story sub {a} {b}", "-", a - b
    question = story.format(n=name, o=other, t=thing, a=a, b=b)
    return Exercise(key, question, f"{a} {sign} {b} = {result} {thing}.", str(result))


def _repeat(rng: random.Random) -> Exercise:
    words = " ".join(rng.sample(_WORDS, rng.randrange(1, 5)))
    question = rng.choice(("Repeat after me: {w}", "Say: {w}", "Write this again: {w}"))
    return Exercise(f"repeat {words}", question.format(w=words), words, words)


def _letter(rng: random.Random) -> Exercise:
    word = rng.choice(_WORDS)
    which, idx = rng.choice((("first", 0), ("last", -1)))
    question = rng.choice(
        ("What is the {p} letter of the word {w}?", "Which letter is {p} in {w}?")
    ).format(p=which, w=word)
    result = word[idx].upper()
    return Exercise(f"letter {which} {word}", question, result, result)


def _calendar(rng: random.Random) -> Exercise:
    names, unit = rng.choice(((_DAYS, "day"), (_MONTHS, "month")))
    idx = rng.randrange(len(names))
    word, offset = rng.choice((("after", 1), ("before", -1)))
    result = names[(idx + offset) % len(names)]
    question = rng.choice(
        (f"Which {unit} comes {word} {names[idx]}?", f"What {unit} is {word} {names[idx]}?")
    )
    return Exercise(f"calendar {word} {names[idx]}", question, f"{result}.", result)


def _list_order(rng: random.Random) -> Exercise:
    numbers = rng.sample(range(100), 3)
    listed = ", ".join(map(str, numbers))
    is_rising = rng.random() < 0.5
    direction = "smallest to largest" if is_rising else "largest to smallest"
    result = ", ".join(map(str, sorted(numbers, reverse=not is_rising)))
    question = rng.choice(
        (f"Sort from {direction}: {listed}", f"Order these, {direction}: {listed}")
    )
    return Exercise(f"sort {sorted(numbers)}", question, result, result)


# (maker, weight)
_KINDS: tuple[tuple[Callable[[random.Random], Exercise], int], ...] = (
    (_addition, 6),
    (_subtraction, 5),
    (_multiplication, 4),
    (_division, 3),
    (_comparison, 2),
    (_sequence, 2),
    (_parity, 1),
    (_word_problem, 5),
    (_repeat, 2),
    (_letter, 1),
    (_calendar, 1),
    (_list_order, 2),
)


def split_of(key: str) -> Split:
    """The split a question belongs to, by the hash of what it asks."""
    digest = hashlib.sha256(key.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "held_out" if share < HELD_OUT_SHARE else "train"


def exercises(count: int, seed: int, split: Split) -> Iterator[Exercise]:
    """Yield questions of one split; the same count, seed and split give the same ones.

    Raises:
        ValueError: split is neither "train" nor "held_out".
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r}: must be 'train' or 'held_out'")
    rng = random.Random(f"{seed} {split}")
    makers = [maker for maker, _ in _KINDS]
    weights = [weight for _, weight in _KINDS]
    made = 0
    while made < count:
        exercise = rng.choices(makers, weights)[0](rng)
        if split_of(exercise.key) == split:
            made += 1
            yield exercise


def conversations(count: int, seed: int, split: Split) -> Iterator[list[dict[str, str]]]:
    """Yield conversations of one to three questions of one split, some with a system message.

    Raises:
        ValueError: split is neither "train" nor "held_out".
    """
    rng = random.Random(f"turns {seed} {split}")
    made = exercises(3 * count, seed, split)
    for _ in range(count):
        messages = []
        if rng.random() < _SYSTEM_SHARE:
            messages.append({"role": "system", "content": rng.choice(_SYSTEMS)})
        num_turns = rng.choice((2, 3)) if rng.random() < _MULTI_TURN_SHARE else 1
        for _ in range(num_turns):
            exercise = next(made)
            messages.append({"role": "user", "content": exercise.question})
            messages.append({"role": "assistant", "content": exercise.answer})
        yield messages
