"""Token shards on disk: memory-mapped arrays and the manifest that says what they hold.

    <folder>/manifest.json
    <folder>/tokenizer/                             the tokenizer that made them
    <folder>/<source>/shard-00000.tokens.npy        uint16 or uint32 [T]
    <folder>/<source>/shard-00000.borders.npy       int64 [documents + 1], 0 to T
    <folder>/<source>/shard-00000.loss_mask.npy     uint8 [T], conversations only

A document is its tokens and the end-of-text token. It never crosses a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "qnext-shards-1"
MANIFEST = "manifest.json"
DEFAULT_SHARD_TOKENS = 1 << 25


@dataclass
class SourceCounts:
    """What one source gave; written to the manifest."""

    name: str
    kind: str
    """text or chat."""
    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    """Tokens that count in the loss; all of them in a text source."""
    bytes: int = 0
    """UTF-8 bytes of the documents' text, as the tokenizer read it."""
    dropped_exact: int = 0
    dropped_near: int = 0
    dropped_filter: int = 0
    licenses: dict[str, int] = field(default_factory=dict)
    """Documents by licence."""
    languages: dict[str, int] = field(default_factory=dict)
    """Documents by language."""
    inputs: list[str] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)
    """One entry a shard: name, documents, tokens, sha256 by file."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardWriter:
    """Collects one source's documents and writes a shard whenever enough tokens are there.

    Args:
        folder: the source's own; made when missing.
        counts: gets the documents, tokens and shard entries added.
        shard_tokens: a shard is closed by the document that reaches this many.
    """

    def __init__(
        self,
        folder: Path,
        counts: SourceCounts,
        dtype: np.dtype[Any],
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._counts = counts
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._tokens: list[NDArray[Any]] = []
        self._masks: list[NDArray[np.uint8]] = []
        self._num_tokens = 0

    def add(self, ids: list[int], loss_mask: list[int] | None = None) -> None:
        """Append one document, its end token included.

        Args:
            loss_mask: for each id 1 if it counts in the loss; None where all do (text sources).
        """
        self._tokens.append(np.asarray(ids, dtype=self._dtype))
        if loss_mask is not None:
            self._masks.append(np.asarray(loss_mask, dtype=np.uint8))
        self._num_tokens += len(ids)
        self._counts.documents += 1
        self._counts.tokens += len(ids)
        self._counts.loss_tokens += len(ids) if loss_mask is None else sum(loss_mask)
        if self._num_tokens >= self._shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected, if anything, as the next shard."""
        if not self._tokens:
            return
        name = f"shard-{len(self._counts.shards):05d}"
        lengths = [len(tokens) for tokens in self._tokens]
        borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        arrays = {"tokens": np.concatenate(self._tokens), "borders": borders}
        if self._masks:
            arrays["loss_mask"] = np.concatenate(self._masks)
        hashes = {}
        for part, array in arrays.items():
            file = self._folder / f"{name}.{part}.npy"
            np.save(file, array)
            hashes[file.name] = file_sha256(file)
        self._counts.shards.append(
            {
                "name": name,
                "documents": len(lengths),
                "tokens": int(borders[-1]),
                "sha256": hashes,
            }
        )
        self._tokens, self._masks, self._num_tokens = [], [], 0


def file_sha256(file: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    sources: list[SourceCounts],
    tokenizer: Mapping[str, Any],
    views: list[dict[str, Any]],
) -> None:
    """Write manifest.json, the last file of a set of shards."""
    manifest = {
        "format": FORMAT,
        "tokenizer": dict(tokenizer),
        "sources": [asdict(source) for source in sources],
        "views": views,
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Shard:
    """One shard, memory-mapped."""

    tokens: NDArray[Any]
    borders: NDArray[np.int64]
    loss_mask: NDArray[np.uint8] | None


class TokenSource:
    """The documents of one source, over all its shards.

    Args:
        folder: the shards' own.
        entry: the source's part of the manifest.

    Raises:
        ValueError: a shard is missing, truncated or of another size than the manifest says.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any]) -> None:
        self.name: str = entry["name"]
        self.is_chat = entry["kind"] == "chat"
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.shards = [self._open(folder, shard) for shard in entry["shards"]]
        counts = [len(shard.borders) - 1 for shard in self.shards]
        self._first_document = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _open(self, folder: Path, entry: Mapping[str, Any]) -> Shard:
        arrays: dict[str, NDArray[Any]] = {}
        num_tokens, num_documents = entry["tokens"], entry["documents"]
        parts = ["tokens", "borders", *(["loss_mask"] if self.is_chat else [])]
        for part in parts:
            file = folder / f"{entry['name']}.{part}.npy"
            try:
                # As a plain array: slicing np.memmap itself costs ten times as much.
                arrays[part] = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(
                    f"shard {file} is missing, truncated or corrupt: {error}"
                ) from error
            length = num_documents + 1 if part == "borders" else num_tokens
            if arrays[part].shape != (length,):
                raise ValueError(
                    f"shard {file} holds {arrays[part].shape} entries, the manifest says {length}"
                )
        borders = np.array(arrays["borders"])
        if borders[0] != 0 or borders[-1] != num_tokens or (np.diff(borders) < 0).any():
            raise ValueError(f"shard {folder / entry['name']}.borders.npy does not run to its end")
        return Shard(arrays["tokens"], borders, arrays.get("loss_mask"))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document. [documents]"""
        if not self.shards:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([np.diff(shard.borders) for shard in self.shards])

    def locate(self, document_idx: int) -> tuple[int, int]:
        """Index of a document's shard, and the document's index in that shard."""
        shard_idx = int(np.searchsorted(self._first_document, document_idx, side="right")) - 1
        return shard_idx, document_idx - int(self._first_document[shard_idx])

    def read(
        self, document_idx: int, start: int, stop: int
    ) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        """Tokens [start, stop) of a document and their loss mask (None: all count); no copies."""
        shard_idx, local_idx = self.locate(document_idx)
        shard = self.shards[shard_idx]
        base = int(shard.borders[local_idx])
        piece = slice(base + start, base + stop)
        mask = None if shard.loss_mask is None else shard.loss_mask[piece]
        return shard.tokens[piece], mask


@dataclass(frozen=True)
class View:
    """Documents of some sources chosen by their length; a mixture names it like a source."""

    name: str
    sources: tuple[str, ...]
    min_document_tokens: int = 0
    """With a context of at least this, documents are cut into equal pieces of at most the context,
    and a row starts with a piece."""
    max_document_tokens: int | None = None


class ShardSet:
    """A folder written by `qnext data prepare`.

    Raises:
        ValueError: the folder or its manifest is missing or damaged, or a shard is.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.sources = {
            entry["name"]: TokenSource(self.folder / entry["name"], entry)
            for entry in self.manifest["sources"]
        }
        self.views = {
            entry["name"]: View(
                entry["name"],
                tuple(entry["sources"]),
                entry["min_document_tokens"],
                entry["max_document_tokens"],
            )
            for entry in self.manifest["views"]
        }

    @property
    def tokenizer_sha256(self) -> str:
        """`Tokenizer.sha256` of the tokenizer that made the shards."""
        return str(self.manifest["tokenizer"]["sha256"])

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer that made the shards."""
        return self.folder / "tokenizer"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything the token stream depends on."""
        text = json.dumps(
            [self.manifest["sources"], self.manifest["views"], self.tokenizer_sha256],
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def verify(self) -> None:
        """Compare every file with the manifest's hash.

        Raises:
            ValueError: a file differs; the message names it.
        """
        for source in self.manifest["sources"]:
            for shard in source["shards"]:
                for name, expected in shard["sha256"].items():
                    file = self.folder / source["name"] / name
                    if file_sha256(file) != expected:
                        raise ValueError(f"shard {file} differs from the manifest's sha256")


def open_shards(folder: str | Path) -> ShardSet:
    """Open a folder written by `qnext data prepare`; see ShardSet."""
    return ShardSet(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check manifest.json.

    Raises:
        ValueError: it is missing, no JSON, or of another format.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}: want a folder written by `qnext data prepare`"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} has the format {found!r}: want {FORMAT!r}")
    return manifest
