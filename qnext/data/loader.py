"""Packed batches for training, endless, the same for the same seed, resumed at the exact token."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qnext.data.mixture import Mixture, Segment, Taken
from qnext.data.packing import pack_row
from qnext.data.shards import ShardSet, open_shards

_SHOWN_SEGMENTS = 4


@dataclass(frozen=True)
class PackedBatch:
    """Rows of documents behind one another, T = rows * row_tokens tokens."""

    token_ids: torch.Tensor
    """[T], int64."""
    loss_mask: torch.Tensor
    """1 where the token counts as a target of the loss. [T], uint8.

    The first token of a segment is never a target: nothing stands before it."""
    cu_seqlens: torch.Tensor
    """Bounds of the segments, 0 to T, T repeated up to a fixed length if one was asked for.
    [N + 1], int32."""
    row_tokens: int
    """There is a bound at every multiple of this."""
    first_row: int
    """Number of the batch's first row since the loader's start."""
    segments: tuple[Segment, ...]
    """Where each segment came from, without the padding of cu_seqlens."""

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return len(self.token_ids) // self.row_tokens

    @property
    def address(self) -> str:
        """Where the batch's tokens lie, short enough for an error message."""
        shown = [
            f"{item.source}/shard-{item.shard_idx:05d} document {item.document_idx} "
            f"from token {item.start}"
            for item in self.segments[:_SHOWN_SEGMENTS]
        ]
        more = len(self.segments) - len(shown)
        tail = f" and {more:,} more segments" if more else ""
        rows = f"rows {self.first_row:,} to {self.first_row + self.num_rows - 1:,}"
        return f"{rows}: {'; '.join(shown)}{tail}"

    @property
    def tokens_of_source(self) -> dict[str, int]:
        """Tokens of the batch by source."""
        counts: Counter[str] = Counter()
        for segment in self.segments:
            counts[segment.source] += segment.length
        return dict(counts)


class PackedLoader:
    """Endless iterator of PackedBatch over a mixture of shards.

    Args:
        shards: a folder written by `qnext data prepare`, or one that is open.
        mixture: source or view -> weight.
        context: tokens in a row.
        rows: rows in a batch; may differ after a resume without changing the token stream.
        seed: decides the order of the documents, with the stage's name.
        num_segments: make cu_seqlens num_segments + 1 long, so that compiled steps see one shape.

    Raises:
        ValueError: damaged shards, an unknown source, or a size below 1.
    """

    def __init__(
        self,
        shards: ShardSet | str | Path,
        mixture: Mapping[str, float],
        *,
        context: int,
        rows: int,
        seed: int,
        stage: str = "",
        num_segments: int | None = None,
    ) -> None:
        for name, value in (("context", context), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        self.shards = shards if isinstance(shards, ShardSet) else open_shards(shards)
        self.context = context
        self.rows = rows
        self.num_segments = num_segments
        self._mixture = Mixture(self.shards, mixture, context, f"{seed}/{stage}")
        self._rows_done = 0
        described = [self.shards.fingerprint, sorted(mixture.items()), context, seed, stage]
        self._fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        pieces: list[Taken] = []
        for _ in range(self.rows):
            pieces += pack_row(self._mixture, self.context)
        batch = self._assemble(pieces)
        self._rows_done += self.rows
        return batch

    def _assemble(self, pieces: list[Taken]) -> PackedBatch:
        num_tokens = self.rows * self.context
        token_ids = np.concatenate([piece.tokens for piece in pieces]).astype(np.int64)
        assert len(token_ids) == num_tokens, (len(token_ids), num_tokens)
        loss_mask = np.ones(num_tokens, dtype=np.uint8)
        bounds = np.cumsum([0, *(piece.segment.length for piece in pieces)])
        for start, piece in zip(bounds[:-1].tolist(), pieces, strict=True):
            if piece.loss_mask is not None:
                loss_mask[start : start + piece.segment.length] = piece.loss_mask
        return PackedBatch(
            token_ids=torch.from_numpy(token_ids),
            loss_mask=torch.from_numpy(loss_mask),
            cu_seqlens=torch.from_numpy(self._padded(bounds).astype(np.int32)),
            row_tokens=self.context,
            first_row=self._rows_done,
            segments=tuple(piece.segment for piece in pieces),
        )

    def _padded(self, bounds: np.ndarray) -> np.ndarray:
        if self.num_segments is None:
            return bounds
        missing = self.num_segments + 1 - len(bounds)
        if missing < 0:
            raise ValueError(
                f"num_segments {self.num_segments}: a batch holds {len(bounds) - 1} segments"
            )
        return np.pad(bounds, (0, missing), mode="edge")

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; plain values that JSON can hold."""
        return {
            "fingerprint": self._fingerprint,
            "rows_done": self._rows_done,
            "streams": self._mixture.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a position: the next batch is the one that would have come next there.

        Raises:
            ValueError: the position is of other shards, mixture, context, seed or stage.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "loader state was saved with other shards, mixture, context, seed or stage name: "
                "resume with the same ones, or start the stage anew"
            )
        self._mixture.load_state_dict(state["streams"])
        self._rows_done = state["rows_done"]
