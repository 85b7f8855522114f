"""Text to token ids and back: `load(path)` opens the files that come with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnext.tokenizer.tokenizer import Tokenizer


def load(path: str | Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint directory; see `qnext.tokenizer.tokenizer.load_tokenizer`.

    Args:
        path: a directory with tokenizer.json (or vocab.json and merges.txt), or that file itself.

    Raises:
        ValueError: nothing there, or a file that cannot be read.
    """
    from qnext.tokenizer.tokenizer import load_tokenizer

    return load_tokenizer(path)
