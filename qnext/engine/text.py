"""Text of a growing answer: stop strings found, unsafe ends held back, drafts told apart."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Detokenizer(Protocol):
    """Turns token ids into text one at a time, and never gives half a character."""

    def push(self, ids: Iterable[int]) -> str:
        """New text that these tokens complete; may be empty."""
        ...

    def finish(self) -> str:
        """Text still held when no more tokens come."""
        ...


class TextSegment(NamedTuple):
    """A piece of streamed text, and whether its tokens were accepted drafts."""

    text: str
    is_accepted_draft: bool


class OutputText:
    """The answer's text, cut before the first stop string.

    Args:
        detokenizer: None gives an answer without text (a prompt of ids, a model without tokenizer).
        stop: strings that end the answer; they are not part of it.

    Raises:
        ValueError: stop strings without a detokenizer.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: tuple[str, ...] = ()) -> None:
        if stop and detokenizer is None:
            raise ValueError(f"stop is {stop!r}, which needs a tokenizer; this model has none")
        self.text = ""
        self._detokenizer = detokenizer
        self._stop = stop
        self._longest_stop = max((len(text) for text in stop), default=0)
        self._num_taken = 0
        self._ends: list[tuple[int, bool]] = []  # text length after each token, and its kind
        self._is_finished = False

    def append(self, token_id: int, is_accepted_draft: bool) -> str | None:
        """Add a token's text. Returns the stop string that it completed, if any."""
        if self._detokenizer is None:
            return None
        return self._add(self._detokenizer.push([token_id]), is_accepted_draft)

    def extend(self, windows: Sequence[list[int]]) -> None:
        """Add the text of many tokens at once; there are no stop strings to look for.

        Args:
            windows: in each accepted drafts and one token more.
        """
        assert not self._stop, f"{self._stop} may end the text after any token"
        if self._detokenizer is None:
            return
        if all(len(window) == 1 for window in windows):
            self._add(self._detokenizer.push(window[0] for window in windows), False)
            return
        for window in windows:
            self._add(self._detokenizer.push(window[:-1]), True)
            self._add(self._detokenizer.push(window[-1:]), False)

    def finish(self) -> None:
        """Take what the detokenizer still holds, unless a stop string ended the answer."""
        if self._detokenizer is not None and not self._is_finished:
            self._add(self._detokenizer.finish(), False)
        self._is_finished = True

    def take_ready(self) -> list[TextSegment]:
        """Text not taken before that no stop string can cut any more."""
        end = len(self.text) if self._is_finished else len(self.text) - self._num_unsafe()
        segments: list[TextSegment] = []
        while self._ends and self._num_taken < end:
            token_end, is_accepted_draft = self._ends[0]
            piece_end = min(token_end, end)
            if piece_end > self._num_taken:
                piece = self.text[self._num_taken : piece_end]
                segments.append(TextSegment(piece, is_accepted_draft))
                self._num_taken = piece_end
            if token_end > end:
                break
            self._ends.pop(0)
        return segments

    def _add(self, new_text: str, is_accepted_draft: bool) -> str | None:
        if not new_text:
            return None
        # A stop string may have begun in earlier text, but not have ended there.
        search_from = max(0, len(self.text) - self._longest_stop + 1)
        self.text += new_text
        found = [(self.text.find(text, search_from), text) for text in self._stop]
        found = [(start, text) for start, text in found if start >= 0]
        stop = None
        if found:
            start, stop = min(found)
            self.text = self.text[:start]
            self._is_finished = True
        self._ends.append((len(self.text), is_accepted_draft))
        return stop

    def _num_unsafe(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(text.startswith(tail) for text in self._stop):
                return length
        return 0
