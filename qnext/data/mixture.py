"""Endless streams over the documents of a source, and the choice among several by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.data.shards import ShardSet, TokenSource, View


class Segment(NamedTuple):
    """A run of one document's tokens, and where to find it again."""

    source: str
    shard_idx: int
    document_idx: int
    """Within the shard."""
    start: int
    """First token, counted from the document's start."""
    length: int


class Taken(NamedTuple):
    """What a stream hands out: a segment and its arrays, which are views of the shard."""

    segment: Segment
    tokens: NDArray[Any]
    loss_mask: NDArray[np.uint8] | None


class Stream:
    """The documents of one mixture entry, shuffled anew each epoch, without an end.

    Text flows on: a document cut at a row's end goes on in the stream's next row. A conversation
    (`is_chat`) starts again there instead, so that no answer stands without its question; one
    longer than a row flows. A view of long documents (`is_whole`) gives equal pieces of at most
    the context, meant for the start of a row.

    Args:
        key: with the epoch, decides the order.
        context: tokens in a row.
    """

    def __init__(self, name: str, shards: ShardSet, context: int, key: str) -> None:
        view = shards.views.get(name) or View(name, (name,))
        self.name = name
        self._key = key
        self._context = context
        self._members: list[TokenSource] = [shards.sources[source] for source in view.sources]
        self.is_whole = 0 < view.min_document_tokens <= context
        self.is_chat = not self.is_whole and all(member.is_chat for member in self._members)
        self._items = self._list_items(view)
        if not len(self._items):
            raise ValueError(
                f"mixture source {name!r} has no document of {view.min_document_tokens:,} to "
                f"{view.max_document_tokens or 'any'} tokens"
            )
        self.epoch = 0
        self.item_idx = 0
        self.offset = 0
        self.drawn_tokens = 0
        self._order = self._shuffled(0)

    def _list_items(self, view: View) -> NDArray[np.int64]:
        """Rows of (member, document, first token, end token)."""
        items = []
        for member_idx, member in enumerate(self._members):
            lengths = member.lengths
            keep = lengths >= view.min_document_tokens
            if view.max_document_tokens is not None:
                keep &= lengths <= view.max_document_tokens
            for document_idx in np.flatnonzero(keep).tolist():
                length = int(lengths[document_idx])
                num_pieces = -(-length // self._context) if self.is_whole else 1
                bounds = [length * piece // num_pieces for piece in range(num_pieces + 1)]
                items += [
                    (member_idx, document_idx, start, stop)
                    for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
                ]
        return np.array(items, dtype=np.int64).reshape(-1, 4)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        digest = hashlib.sha256(f"{self._key}/{self.name}/{epoch}".encode()).digest()
        generator = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
        # Raw draws, because only these stay the same from one NumPy release to the next.
        return np.argsort(generator.random_raw(len(self._items)), kind="stable")

    def take(self, limit: int) -> Taken:
        """Hand out at most `limit` tokens of the document at hand, and move on.

        Args:
            limit: tokens free in the row, at least 1.
        """
        member_idx, document_idx, first, end = self._items[self._order[self.item_idx]].tolist()
        member = self._members[member_idx]
        start = first + self.offset
        stop = min(end, start + limit)
        shard_idx, local_idx = member.locate(document_idx)
        tokens, loss_mask = member.read(document_idx, start, stop)
        self.drawn_tokens += stop - start
        if stop == end:
            self._next_item()
        elif not (self.is_whole or self.is_chat) or end - first > self._context:
            self.offset += stop - start
        segment = Segment(member.name, shard_idx, local_idx, start, stop - start)
        return Taken(segment, tokens, loss_mask)

    def _next_item(self) -> None:
        self.offset = 0
        self.item_idx += 1
        if self.item_idx == len(self._items):
            self.item_idx = 0
            self.epoch += 1
            self._order = self._shuffled(self.epoch)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return {
            "epoch": self.epoch,
            "item_idx": self.item_idx,
            "offset": self.offset,
            "drawn_tokens": self.drawn_tokens,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where a stream of the same shards, context and key stood."""
        self.epoch = state["epoch"]
        self.item_idx = state["item_idx"]
        self.offset = state["offset"]
        self.drawn_tokens = state["drawn_tokens"]
        self._order = self._shuffled(self.epoch)


class Mixture:
    """Several streams, drawn so that each one's share of the tokens follows its weight.

    The next stream is the one furthest behind its share. So the shares hold over any stretch of a
    few rows, not only on average, and the order depends on nothing but weights and documents.

    Args:
        weights: source or view of the shards -> weight above 0; scaled to sum 1.
        context: tokens in a row.
        key: seed of the document order, such as "<seed>/<stage>".

    Raises:
        ValueError: no weights, a weight that is not above 0, or a name that the shards lack.
    """

    def __init__(
        self, shards: ShardSet, weights: Mapping[str, float], context: int, key: str
    ) -> None:
        if not weights:
            raise ValueError("mixture: want at least one source")
        known = [*shards.sources, *shards.views]
        for name, weight in weights.items():
            if name not in known:
                raise ValueError(
                    f"mixture source {name!r} is not in {shards.folder}; known: {', '.join(known)}"
                )
            if not weight > 0:
                raise ValueError(f"mixture source {name!r}: weight {weight} must be above 0")
        total = sum(weights.values())
        # By name, so that the order of a table's keys changes nothing.
        self.streams = [Stream(name, shards, context, key) for name in sorted(weights)]
        self._shares = [weights[stream.name] / total for stream in self.streams]

    def next_stream(self, *, can_be_whole: bool) -> Stream:
        """The stream furthest behind its share of the tokens drawn so far.

        Args:
            can_be_whole: False inside a row, where a whole piece may not fit; streams of whole
                pieces are then the last resort.
        """
        drawn = sum(stream.drawn_tokens for stream in self.streams)
        best: Stream | None = None
        best_deficit = 0.0
        for stream, share in zip(self.streams, self._shares, strict=True):
            if stream.is_whole and not can_be_whole:
                continue
            deficit = share * (drawn + 1) - stream.drawn_tokens
            if best is None or deficit > best_deficit:
                best, best_deficit = stream, deficit
        return best if best is not None else self.streams[0]

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Where each stream stands."""
        return {stream.name: stream.state_dict() for stream in self.streams}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go to where a mixture of the same streams stood.

        Raises:
            ValueError: the state has other streams.
        """
        names = [stream.name for stream in self.streams]
        if sorted(state) != names:
            raise ValueError(f"loader state has the sources {sorted(state)}: want {names}")
        for stream in self.streams:
            stream.load_state_dict(state[stream.name])
