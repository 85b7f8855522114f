import random
from pathlib import Path

import pytest

from qnext import tokenizer as tokenizer_package
from qnext.tokenizer.stream import IncrementalDetokenizer

NANO = Path(__file__).parents[2] / "qnext/assets/nano"
TEXT = "naïve 平方根 😀👩‍👩‍👧‍👦 𝔘𝔫 مرحبا <|im_end|> a\r\nb"


@pytest.fixture(scope="module")
def nano():
    return tokenizer_package.load(NANO)


def streamed(tokenizer, ids, cuts, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    bounds = [0, *cuts, len(ids)]
    pieces = [detokenizer.push(ids[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return [*pieces, detokenizer.finish()]


def test_no_split_emits_half_a_character(nano):
    ids = nano.encode(TEXT)
    assert len(ids) > len(TEXT), "the text should need several ids for one character"
    for cut in range(len(ids) + 1):
        pieces = streamed(nano, ids, [cut], skip_special_tokens=False)
        assert "".join(pieces) == TEXT
        assert not any("\ufffd" in piece for piece in pieces)
    pieces = streamed(nano, ids, range(1, len(ids)), skip_special_tokens=False)
    assert "".join(pieces) == TEXT
    assert TEXT.startswith("".join(pieces[:20]))


def test_any_ids_at_any_splits_give_what_decode_gives(nano):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(256) if rng.random() < 0.7 else rng.randrange(8192) for _ in range(30)]
        cuts = sorted(rng.sample(range(31), 4))
        text = "".join(streamed(nano, ids, cuts))
        assert text == nano.decode(ids, skip_special_tokens=True)
        assert text == nano.backend.decode(ids, skip_special_tokens=True)


def test_a_character_left_incomplete_ends_as_a_replacement(nano):
    ids = nano.encode("平")
    assert len(ids) > 1
    assert streamed(nano, ids[:1], []) == ["", "\ufffd"]


def test_special_tokens_are_hidden_unless_asked_for(nano):
    ids = nano.encode("<think>a</think><|im_end|>")
    assert "".join(streamed(nano, ids, [])) == "<think>a</think>"
    shown = "".join(streamed(nano, ids, [], skip_special_tokens=False))
    assert shown == "<think>a</think><|im_end|>"
