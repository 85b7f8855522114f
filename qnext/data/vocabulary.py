"""`qnext data tokenizer`: a vocabulary trained on samples of corpora."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qnext.data.sources import RecordFormat, expand_path, find_files, read_documents
from qnext.tokenizer.bpe import save_trained, train_bpe


@dataclass(frozen=True)
class SampleConfig:
    """What to read of some files; the limits hold for each file by itself."""

    inputs: tuple[str, ...]
    """Files or glob patterns; $NAME stands for an environment variable."""
    text_key: str = "text"
    share: float = 1.0
    """Share of the documents that are read, chosen evenly."""
    max_bytes: int | None = None
    """Stop before the document that would pass this many bytes of UTF-8."""
    max_characters: int | None = None
    """Read this much of a document's start."""
    languages: tuple[str, ...] = ()
    """Keep these only; empty keeps all."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share}: must be above 0 and at most 1")


@dataclass(frozen=True)
class VocabularyConfig:
    """A vocabulary and the text it is trained on."""

    vocab_size: int
    """Entries in all: 256 bytes, merges and special tokens."""
    output: str
    """Folder to write tokenizer.json and tokenizer_config.json to."""
    source: tuple[SampleConfig, ...]
    chat_template: str | None = None
    """Jinja file to put beside them."""


def sample_texts(config: VocabularyConfig) -> Iterator[str]:
    """Yield the training text, the same each time."""
    for source in config.source:
        for pattern in source.inputs:
            for file in find_files(pattern):
                yield from _sample_file(file, source)


def _sample_file(file: Path, source: SampleConfig) -> Iterator[str]:
    rng = random.Random(0)
    passed = 0
    for document in read_documents(file, RecordFormat(text_key=source.text_key)):
        if rng.random() > source.share:
            continue
        if source.languages and document.language not in source.languages:
            continue
        text = (document.text or "")[: source.max_characters]
        passed += len(text.encode())
        if source.max_bytes is not None and passed > source.max_bytes:
            return
        yield text


def train_vocabulary(config: VocabularyConfig, *, show_progress: bool = False) -> Path:
    """Train and save a vocabulary.

    Returns:
        The folder written.

    Raises:
        ValueError: an input is missing or damaged, or vocab_size does not fit the texts.
    """
    template = None
    if config.chat_template is not None:
        template = Path(expand_path(config.chat_template)).read_text(encoding="utf-8")
    trained = train_bpe(sample_texts(config), config.vocab_size, show_progress=show_progress)
    output = Path(expand_path(config.output))
    save_trained(trained, output, chat_template=template)
    return output
