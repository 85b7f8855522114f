"""Documents seen before: the same text up to case and spacing, or nearly the same words."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata

from qnext.data.sources import Document

_WORD = re.compile(r"\w+")


def document_text(document: Document) -> str:
    """The text that tells a document from others: of a conversation, roles and contents."""
    if document.text is not None:
        return document.text
    return json.dumps(
        [document.messages, document.tools], ensure_ascii=False, sort_keys=True, default=str
    )


def normalised(text: str) -> str:
    """Compatibility forms, case and spacing levelled: what exact deduplication compares."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class ExactDedup:
    """Remembers a 128-bit hash of each normalised text: 16 bytes a document."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Whether no equal text came before; remembers this one."""
        digest = hashlib.blake2b(normalised(text).encode(errors="replace"), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


class NearDedup:
    """MinHash over runs of words, through datasketch.

    Args:
        threshold: Jaccard similarity of two documents' runs from which on the later is dropped.
        num_permutations: hashes per document; the estimate's error is about 1/sqrt of it.
        shingle_words: words in a run.

    Source: Broder, On the resemblance and containment of documents, 1997
    """

    def __init__(
        self, threshold: float = 0.8, num_permutations: int = 128, shingle_words: int = 5
    ) -> None:
        from datasketch import MinHash, MinHashLSH

        if not 0 < threshold < 1:
            raise ValueError(f"near-duplicate threshold {threshold}: must be above 0 and below 1")
        self._minhash = MinHash(num_perm=num_permutations, seed=1)
        self._index = MinHashLSH(threshold=threshold, num_perm=num_permutations)
        self._threshold = threshold
        self._shingle_words = shingle_words
        self._sketches: list[MinHash] = []

    def is_new(self, text: str) -> bool:
        """Whether no similar text came before; remembers this one if so."""
        words = _WORD.findall(normalised(text))
        size = self._shingle_words
        runs = {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}
        sketch = self._minhash.copy()
        sketch.update_batch([run.encode(errors="replace") for run in sorted(runs)])
        candidates = self._index.query(sketch)
        if any(self._sketches[key].jaccard(sketch) >= self._threshold for key in candidates):
            return False
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return True
