"""Documents read one by one from jsonl, parquet and text files, plain or compressed."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One document of a corpus: a text, or the messages of a conversation."""

    text: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    tools: tuple[Any, ...] | None
    license: str
    language: str
    origin: str
    """File and line (or row) it came from."""


@dataclass(frozen=True)
class RecordFormat:
    """How a record of a jsonl or parquet file becomes a document."""

    is_chat: bool = False
    text_key: str = "text"
    """Key of the document's text; of the list of messages when is_chat."""
    text_format: str | None = None
    """Text made of several keys instead, such as "{question}\\n{answer}"."""
    remove_pattern: str | None = None
    """Regular expression whose matches are cut out of the text."""
    license: str = "unknown"
    """Licence of records that name none."""
    language: str = "unknown"
    """Language of records that name none."""


def expand_path(text: str) -> str:
    """Replace ~ and $NAME in a path.

    Raises:
        ValueError: an environment variable that is not set.
    """
    result = os.path.expanduser(os.path.expandvars(text))
    if "$" in result:
        raise ValueError(f"path {text!r} names an environment variable that is not set")
    return result


def find_files(pattern: str) -> list[Path]:
    """Files that match a glob pattern, in the order of their names.

    Raises:
        ValueError: there is none.
    """
    expanded = expand_path(pattern)
    found = sorted(glob.glob(expanded, recursive=True))
    if not found:
        raise ValueError(f"no file matches {expanded}")
    return [Path(name) for name in found]


def read_documents(path: Path, record_format: RecordFormat) -> Iterator[Document]:
    """Yield the documents of one file, by its name: .jsonl, .parquet, or else one text a file.

    .zst and .gz behind .jsonl and .txt are unpacked on the way.

    Raises:
        ValueError: a truncated or corrupt file, or a record without its keys; file and line named.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".zst", ".gz")]
    kind = suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path, record_format)
    elif kind == ".parquet":
        yield from _read_parquet(path, record_format)
    elif kind in (".txt", ".md", ""):
        text = "\n".join(line for _, line in read_lines(path))
        yield _text_document({}, text, record_format, str(path))
    else:
        raise ValueError(f"{path}: unknown kind of file; known are .jsonl, .parquet, .txt and .md")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 file, plain, .zst or .gz.

    Raises:
        ValueError: compressed data that is truncated or corrupt, or a line that is not UTF-8.
    """
    with path.open("rb") as file:
        rest = b""
        number = 0
        try:
            for chunk in _decompressed(file, path):
                lines = (rest + chunk).split(b"\n")
                rest = lines.pop()
                for line in lines:
                    number += 1
                    yield number, line.decode("utf-8")
            if rest:
                number += 1
                yield number, rest.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8: {error}") from error
        except _Corrupt as error:
            raise ValueError(f"{path}, after line {number}: {error}") from error


class _Corrupt(Exception):
    """Compressed data that ends early or does not decode."""


def _decompressed(file: BinaryIO, path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _unzstd(file)
    elif path.suffix == ".gz":
        try:
            with gzip.open(file, "rb") as unpacked:
                while chunk := unpacked.read(_CHUNK_BYTES):
                    yield chunk
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _Corrupt(f"truncated or corrupt gzip data: {error}") from error
    else:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Unpack every frame; zstandard's own reader takes a truncated file for a shorter one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    is_frame_open = False
    data = file.read(_CHUNK_BYTES)
    while data:
        try:
            chunk = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise _Corrupt(f"corrupt Zstandard data: {error}") from error
        if chunk:
            yield chunk
        is_frame_open = not frame.eof
        data = frame.unused_data if frame.eof else b""
        if frame.eof:
            frame = zstandard.ZstdDecompressor().decompressobj()
        data = data or file.read(_CHUNK_BYTES)
    if is_frame_open:
        raise _Corrupt("truncated Zstandard data: the file ends inside a frame")


def _read_jsonl(path: Path, record_format: RecordFormat) -> Iterator[Document]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        origin = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{origin}: not JSON: {error}") from error
        yield document_of(record, record_format, origin)


def _read_parquet(path: Path, record_format: RecordFormat) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield document_of(record, record_format, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}, after row {number}: corrupt parquet data: {error}") from error


def document_of(record: Any, record_format: RecordFormat, origin: str) -> Document:
    """Turn one record into a document.

    Raises:
        ValueError: it lacks the keys that the format names, or they hold something else.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{origin}: a {type(record).__name__}: want an object")
    if record_format.is_chat:
        return _chat_document(record, record_format, origin)
    if record_format.text_format is not None:
        try:
            text = record_format.text_format.format_map(record)
        except (KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{origin}: text_format {record_format.text_format!r} wants the key {error}; "
                f"the record has {sorted(record)}"
            ) from error
    else:
        found = record.get(record_format.text_key)
        if not isinstance(found, str):
            raise ValueError(
                f"{origin}: key {record_format.text_key!r} holds no text; "
                f"the record has {sorted(record)}"
            )
        text = found
    return _text_document(record, text, record_format, origin)


def _text_document(
    record: Mapping[str, Any], text: str, record_format: RecordFormat, origin: str
) -> Document:
    if record_format.remove_pattern is not None:
        text = re.sub(record_format.remove_pattern, "", text)
    return Document(text, None, None, *_licence_and_language(record, record_format), origin)


def _chat_document(record: Mapping[str, Any], record_format: RecordFormat, origin: str) -> Document:
    key = "messages" if record_format.text_key == "text" else record_format.text_key
    messages = record.get(key)
    if not isinstance(messages, list) or not all(isinstance(item, Mapping) for item in messages):
        raise ValueError(
            f"{origin}: key {key!r} holds no list of messages; the record has {sorted(record)}"
        )
    tools = record.get("tools")
    return Document(
        None,
        tuple(messages),
        tuple(tools) if tools else None,
        *_licence_and_language(record, record_format),
        origin,
    )


def _licence_and_language(
    record: Mapping[str, Any], record_format: RecordFormat
) -> tuple[str, str]:
    licence = record.get("license") or record_format.license
    language = record.get("lang") or record.get("language") or record_format.language
    return str(licence), str(language)
