"""Ids to text as they come: a character is handed out once all its bytes are there."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from qnext.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes a growing sequence of ids.

    The pieces returned by `push` and `finish`, joined, are `tokenizer.decode` of all the ids,
    wherever the sequence was split: a byte-level piece may end inside a character, and those
    bytes wait for the rest.

    Args:
        skip_special_tokens: leave special tokens such as <|im_end|> out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids; return the characters that they complete, maybe none."""
        data = b"".join(
            self._tokenizer.token_bytes(token_id)
            for token_id in ids
            if token_id not in self._skipped
        )
        return self._decoder.decode(data)

    def finish(self) -> str:
        """End the text: bytes still waiting become replacement characters, U+FFFD."""
        return self._decoder.decode(b"", final=True)
