"""`qnext data prepare`: corpora to token shards, written as a set or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from qnext.data.arithmetic import conversations
from qnext.data.dedup import ExactDedup, NearDedup, document_text
from qnext.data.shards import (
    DEFAULT_SHARD_TOKENS,
    ShardWriter,
    SourceCounts,
    View,
    token_dtype,
    write_manifest,
)
from qnext.data.sources import (
    Document,
    RecordFormat,
    document_of,
    expand_path,
    find_files,
    read_documents,
)
from qnext.tokenizer.tokenizer import Tokenizer, load_tokenizer

# Text handed to the tokenizer at once: enough long documents for every core, little memory.
_BATCH_CHARACTERS = 8_000_000

Report = Callable[[str], None]


@dataclass(frozen=True)
class SourceConfig:
    """One named source of a set of shards."""

    name: str
    inputs: tuple[str, ...] = ()
    """Files or glob patterns; $NAME stands for an environment variable."""
    kind: Literal["text", "chat"] = "text"
    """chat: lists of messages, rendered by the chat template, loss on the assistant's tokens."""
    generator: Literal["arithmetic"] | None = None
    """Made here instead of read: the training split of qnext.data.arithmetic."""
    generator_count: int = 0
    """Conversations to generate."""
    generator_seed: int = 0
    text_key: str = "text"
    text_format: str | None = None
    """Text made of several keys of a record, such as "{question}\\n{answer}"."""
    remove_pattern: str | None = None
    """Regular expression whose matches are cut out of the text."""
    license: str = "unknown"
    """Licence of records that name none."""
    language: str = "unknown"
    """Language of records that name none."""
    languages: tuple[str, ...] = ()
    """Keep these only; empty keeps all."""
    min_characters: int = 1
    max_characters: int | None = None
    """Longer documents are dropped; of a conversation, the contents are counted together."""
    max_answer_characters: int | None = None
    """Drop conversations with a longer assistant message."""
    ascii_only: bool = False
    """Drop documents with characters outside ASCII."""
    max_documents: int | None = None
    """Stop after this many have been kept."""

    def __post_init__(self) -> None:
        if bool(self.inputs) == bool(self.generator):
            raise ValueError(f"source {self.name!r}: give either inputs or generator")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"source name {self.name!r}: must do as the name of a folder")


@dataclass(frozen=True)
class PrepareConfig:
    """What `qnext data prepare` makes."""

    tokenizer: str
    """Folder of the tokenizer."""
    output: str
    """Folder to write; must not exist."""
    source: tuple[SourceConfig, ...]
    view: tuple[View, ...] = ()
    near_dedup: bool = False
    """Drop near duplicates too (MinHash; needs datasketch)."""
    near_dedup_threshold: float = 0.8
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    def __post_init__(self) -> None:
        names = [source.name for source in self.source] + [view.name for view in self.view]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"source name {twice[0]!r} is given twice")
        known = {entry.name for entry in self.source}
        for view in self.view:
            missing = sorted(set(view.sources) - known)
            if missing or not view.sources:
                raise ValueError(
                    f"view {view.name!r}: sources {missing or '()'} are not in {known}"
                )
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens {self.shard_tokens}: must be at least 1")


@dataclass
class _Filters:
    """Deduplication over all sources of one run."""

    exact: ExactDedup = field(default_factory=ExactDedup)
    near: NearDedup | None = None


def prepare(config: PrepareConfig, report: Report = print) -> Path:
    """Write the shards of every source and the manifest.

    The folder appears under its name only when complete: an error or a kill leaves none.

    Args:
        report: gets one line per source.

    Returns:
        The folder.

    Raises:
        ValueError: the output exists, an input is missing, truncated or corrupt, or no document
            of a source was kept.
    """
    output = Path(expand_path(config.output))
    if output.exists():
        raise ValueError(f"output {output} exists: remove it or name another")
    tokenizer = load_tokenizer(expand_path(config.tokenizer))
    near = NearDedup(config.near_dedup_threshold) if config.near_dedup else None
    filters = _Filters(near=near)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        counts = []
        for source in config.source:
            counts.append(_prepare_source(source, config, tokenizer, filters, partial))
            report(_summary(counts[-1]))
        _copy_tokenizer(Path(expand_path(config.tokenizer)), partial / "tokenizer")
        write_manifest(
            partial,
            counts,
            {
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text_id": tokenizer.end_of_text_id,
            },
            [asdict(view) for view in config.view],
        )
        partial.chmod(0o755)
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output


def _prepare_source(
    source: SourceConfig,
    config: PrepareConfig,
    tokenizer: Tokenizer,
    filters: _Filters,
    folder: Path,
) -> SourceCounts:
    counts = SourceCounts(source.name, source.kind)
    dtype = token_dtype(tokenizer.vocab_size)
    writer = ShardWriter(folder / source.name, counts, dtype, config.shard_tokens)
    documents = _kept(_documents(source, counts), source, filters, counts)
    if source.kind == "chat":
        for document in documents:
            _add_chat(document, tokenizer, writer, counts)
    else:
        for batch in _batches(documents):
            texts = [document.text or "" for document in batch]
            encoded = tokenizer.encode_batch(texts, use_special_tokens=False)
            for text, ids in zip(texts, encoded, strict=True):
                counts.bytes += len(text.encode())
                writer.add([*ids, tokenizer.end_of_text_id])
    writer.flush()
    if counts.documents == 0:
        raise ValueError(f"source {source.name!r}: no document was kept of {_summary(counts)}")
    return counts


def _documents(source: SourceConfig, counts: SourceCounts) -> Iterator[Document]:
    record_format = RecordFormat(
        is_chat=source.kind == "chat",
        text_key=source.text_key,
        text_format=source.text_format,
        remove_pattern=source.remove_pattern,
        license=source.license,
        language=source.language,
    )
    if source.generator:
        counts.inputs.append(f"generator {source.generator}, seed {source.generator_seed}")
        made = conversations(source.generator_count, source.generator_seed, "train")
        for idx, messages in enumerate(made):
            record = {"messages": messages, "license": source.license, "lang": source.language}
            yield document_of(record, record_format, f"{source.generator} {idx}")
    for pattern in source.inputs:
        for file in find_files(pattern):
            counts.inputs.append(file.name)
            yield from read_documents(file, record_format)


def _kept(
    documents: Iterable[Document], source: SourceConfig, filters: _Filters, counts: SourceCounts
) -> Iterator[Document]:
    """Pass on what the filters and the deduplication keep; count the rest."""
    kept = 0
    for document in documents:
        if kept == source.max_documents:
            return
        if not _passes(document, source):
            counts.dropped_filter += 1
            continue
        text = document_text(document)
        if not filters.exact.is_new(text):
            counts.dropped_exact += 1
            continue
        if filters.near is not None and not filters.near.is_new(text):
            counts.dropped_near += 1
            continue
        kept += 1
        counts.licenses[document.license] = counts.licenses.get(document.license, 0) + 1
        counts.languages[document.language] = counts.languages.get(document.language, 0) + 1
        yield document


def _passes(document: Document, source: SourceConfig) -> bool:
    messages = document.messages
    contents = [document.text or ""]
    if messages is not None:
        contents = [str(message.get("content") or "") for message in messages]
        answers = [
            content
            for message, content in zip(messages, contents, strict=True)
            if message.get("role") == "assistant"
        ]
        limit = source.max_answer_characters
        if not answers or (limit is not None and max(map(len, answers)) > limit):
            return False
    length = sum(map(len, contents))
    return (
        (not source.languages or document.language in source.languages)
        and length >= source.min_characters
        and (source.max_characters is None or length <= source.max_characters)
        and (not source.ascii_only or all(content.isascii() for content in contents))
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text or "")
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add_chat(
    document: Document, tokenizer: Tokenizer, writer: ShardWriter, counts: SourceCounts
) -> None:
    try:
        ids, mask = tokenizer.encode_chat(document.messages or (), document.tools)
    except ValueError as error:
        raise ValueError(f"{document.origin}: {error}") from error
    counts.bytes += len(tokenizer.decode(ids).encode())
    # The end-of-text token is no part of any answer: an answer has its own end.
    writer.add([*ids, tokenizer.end_of_text_id], [*mask, 0])


def _copy_tokenizer(path: Path, target: Path) -> None:
    folder = path if path.is_dir() else path.parent
    target.mkdir()
    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
    for name in (*names, "chat_template.jinja"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _summary(counts: SourceCounts) -> str:
    dropped = (
        f"{counts.dropped_exact:,} exact and {counts.dropped_near:,} near duplicates, "
        f"{counts.dropped_filter:,} filtered"
    )
    per_token = counts.bytes / counts.tokens if counts.tokens else 0.0
    return (
        f"{counts.name}: {counts.documents:,} documents, {counts.tokens:,} tokens "
        f"({counts.loss_tokens:,} in the loss), {per_token:.2f} bytes a token; dropped {dropped}"
    )
