"""Stop strings cut the text wherever tokens split them, and a stream never shows what is cut."""

import pytest

from qnext.engine.text import OutputText


class LetterDetokenizer:
    """Token n is the n-th entry of a list of strings."""

    def __init__(self, pieces, held=""):
        self.pieces = pieces
        self.held = held

    def push(self, ids):
        return "".join(self.pieces[token_id] for token_id in ids)

    def finish(self):
        return self.held


def feed(pieces, stop):
    """Append tokens until a stop string is met. Returns (text, stop, streamed text)."""
    text = OutputText(LetterDetokenizer(pieces), tuple(stop))
    streamed = ""
    for token_id in range(len(pieces)):
        met = text.append(token_id, False)
        if met is not None:
            text.finish()
        streamed += "".join(segment.text for segment in text.take_ready())
        assert text.text.startswith(streamed)
        if met is not None:
            return text.text, met, streamed
    text.finish()
    streamed += "".join(segment.text for segment in text.take_ready())
    return text.text, None, streamed


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_is_found_at_any_split(cut):
    whole = "ab<stop>cd"
    assert feed([whole[:cut], whole[cut:]], ["<stop>"]) == ("ab", "<stop>", "ab")
    assert feed(list(whole), ["<stop>"]) == ("ab", "<stop>", "ab")


def test_the_earliest_of_several_stop_strings_cuts():
    assert feed(["one two three"], ["three", "two"]) == ("one ", "two", "one ")


def test_what_only_looked_like_a_stop_string_comes_out():
    assert feed(["a", "<st", "ay"], ["<stop>"]) == ("a<stay", None, "a<stay")
    assert feed(["a", "<st"], ["<stop>"]) == ("a<st", None, "a<st")


def test_a_possible_stop_string_is_held_back_until_it_is_decided():
    text = OutputText(LetterDetokenizer(["hi <st", "ay"]), ("<stop>",))
    text.append(0, False)
    assert [segment.text for segment in text.take_ready()] == ["hi "]
    text.append(1, True)
    assert text.take_ready() == [("<st", False), ("ay", True)]


def test_held_bytes_come_out_at_the_end():
    text = OutputText(LetterDetokenizer(["a"], held="\N{REPLACEMENT CHARACTER}"))
    text.append(0, False)
    text.finish()
    text.finish()
    assert text.text == "a\N{REPLACEMENT CHARACTER}"


def test_accepted_drafts_keep_their_mark():
    text = OutputText(LetterDetokenizer(["a", "b", "", "c"]))
    for token_id, is_draft in enumerate([False, True, True, False]):
        text.append(token_id, is_draft)
    assert text.take_ready() == [("a", False), ("b", True), ("c", False)]
    assert text.take_ready() == []


def test_windows_at_once_keep_the_marks_of_their_tokens():
    text = OutputText(LetterDetokenizer(["a", "b", "c", "d"]))
    text.extend([[0], [1, 2, 3]])
    assert text.take_ready() == [("a", False), ("bc", True), ("d", False)]
    plain = OutputText(LetterDetokenizer(["a", "b", "c"]))
    plain.extend([[0], [1], [2]])
    assert plain.take_ready() == [("abc", False)]


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        OutputText(None, ("end",))
