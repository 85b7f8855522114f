"""What one forward pass is told: tokens, borders, and where the cache holds their past."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from qnext.kernels.paged_attention.reference import CachedRows
from qnext.runtime.device import upload


@dataclass(frozen=True)
class CacheInputs:
    """Places in the cache of the sequences of a batch.

    Args:
        page_table: pages of each sequence in order, padded with any page. [N, P], int32
        slot_mapping: row of the key-value pool that each token is written to. [T], int64
        context_lens: tokens of each sequence that the cache already holds.
        state_slots: DeltaNet slot of each sequence.
        is_window: False: a prefill chunk, states advance and are written at once. True: decode
            or verification rows, committed states stay, and `HybridCache.commit` replays the
            accepted rows.
        state_slot_ids: state_slots on the device, None to copy them when they are first needed.
            [N], int64
    """

    page_table: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: tuple[int, ...]
    state_slots: tuple[int, ...]
    is_window: bool
    state_slot_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class ForwardBatch:
    """Packed tokens of one or more sequences; nothing is padded.

    Args:
        token_ids: [T], int64
        position_ids: position of each token in its sequence, for RoPE. [T], int64
        cu_seqlens: bounds of the sequences in T, 0 first. Trailing bounds may repeat T, so that
            a training step has static shapes. [N + 1], int32
        seq_lens: the same as host numbers; None in training.
        row_tokens: a sequence starts at every multiple of it, and T is one. Training only.
        cache_inputs: places in the cache; None without one.
        tail_padding: which of the last P rows fill up the batch. They belong to the last sequence
            for seq_lens and to none for cu_seqlens. [P], bool
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    seq_lens: tuple[int, ...] | None = None
    row_tokens: int | None = None
    cache_inputs: CacheInputs | None = None
    tail_padding: torch.Tensor | None = None

    @staticmethod
    def packed(token_ids: torch.Tensor, seq_lens: tuple[int, ...] | None = None) -> "ForwardBatch":
        """A batch without a cache. token_ids: [T]; seq_lens: one sequence of T if not given.

        Raises:
            ValueError: token_ids is not a vector of integers, or seq_lens do not add up to T.
        """
        if token_ids.dim() != 1 or token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"token_ids: shape {tuple(token_ids.shape)} of {token_ids.dtype}; "
                "must be a vector of int64"
            )
        num_tokens = token_ids.shape[0]
        seq_lens = (num_tokens,) if seq_lens is None else tuple(seq_lens)
        if sum(seq_lens) != num_tokens or min(seq_lens, default=1) < 0:
            raise ValueError(f"seq_lens = {seq_lens} must add up to {num_tokens} tokens")
        device = token_ids.device
        bounds = torch.tensor((0, *seq_lens)).cumsum(0)
        positions = torch.cat([torch.arange(length) for length in seq_lens])
        return ForwardBatch(
            token_ids=token_ids.long(),
            position_ids=positions.to(device),
            cu_seqlens=bounds.to(device, torch.int32),
            seq_lens=seq_lens,
        )

    @cached_property
    def _places_in_sequences(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence of each token, and its index there. Two of [T], int64"""
        bounds = self.cu_seqlens
        if self.tail_padding is not None:
            bounds = torch.cat([bounds[:-1], bounds.new_full((1,), self.token_ids.shape[0])])
        return _places(bounds, self.token_ids.shape[0])

    @property
    def local_positions(self) -> torch.Tensor:
        """Index of each token since its sequence's start in this batch. [T], int64"""
        return self._places_in_sequences[1]

    def last_rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of each sequence's last `count` tokens, and which of them are its own.

        Returns:
            Two of [N, count], int64 and bool: a row before the sequence's first is not its own, and
            may be negative.
        """
        key = f"_last_rows_{count}"
        if key not in self.__dict__:
            bounds = self.cu_seqlens.long()
            back = torch.arange(-count, 0, device=bounds.device)
            rows = bounds[1:, None] + back
            self.__dict__[key] = rows, rows >= bounds[:-1, None]
        found: tuple[torch.Tensor, torch.Tensor] = self.__dict__[key]
        return found

    @property
    def max_seqlen(self) -> int:
        """A bound on the sequences' lengths that needs no look at the device."""
        if self.seq_lens is not None:
            return max(self.seq_lens, default=0)
        return self.row_tokens or self.token_ids.shape[0]

    @property
    def is_window(self) -> bool:
        """Whether the rows are a decode or verification window."""
        return self.cache_inputs is not None and self.cache_inputs.is_window

    @property
    def row_stable(self) -> bool:
        """Whether every row's arithmetic must not depend on the other rows. See numerics.md."""
        return self.is_window and self.token_ids.device.type == "cpu"

    @property
    def num_rows(self) -> int:
        """Tokens, without the rows that fill up a window."""
        return self.token_ids.shape[0] if self.seq_lens is None else sum(self.seq_lens)

    @cached_property
    def state_slots(self) -> torch.Tensor:
        """DeltaNet slots of the sequences. [N], int64"""
        assert self.cache_inputs is not None, "state_slots of a batch without a cache"
        known = self.cache_inputs.state_slot_ids
        if known is None:
            slots = np.array(self.cache_inputs.state_slots, np.int64)
            (known,) = upload([slots], self.token_ids.device)
        return known

    @cached_property
    def token_state_slots(self) -> torch.Tensor:
        """DeltaNet slot of each token's sequence. [T], int64"""
        return self.state_slots[self._places_in_sequences[0]]

    @cached_property
    def window_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """State slot of each row, and its index in its window. Two of [T], int64"""
        assert self.cache_inputs is not None, "window rows of a batch without a cache"
        assert self.seq_lens is not None, "a batch with a cache has host lengths"
        slots: list[int] = []
        steps: list[int] = []
        for slot, length in zip(self.cache_inputs.state_slots, self.seq_lens, strict=True):
            slots += [slot] * length
            steps += range(length)
        device = self.token_ids.device
        return torch.tensor(slots, device=device), torch.tensor(steps, device=device)

    def cached_rows(self, page_size: int) -> CachedRows:
        """Pool rows of each sequence's tokens, this batch's included, and whose queries look there.

        A constant number of launches for any number of sequences, and once for all layers.
        """
        known: CachedRows | None = self.__dict__.get("_cached_rows")
        if known is not None:
            return known
        assert self.cache_inputs is not None, "token slots of a batch without a cache"
        assert self.seq_lens is not None, "a batch with a cache has host lengths"
        inputs, bounds = self.cache_inputs, self.cu_seqlens
        pairs = zip(inputs.context_lens, self.seq_lens, strict=True)
        key_lens = tuple(context + length for context, length in pairs)
        slots = inputs.slot_mapping  # where sequences begin here, the rows are all that they have
        if any(inputs.context_lens):
            # A sequence's first position here is the number of tokens before it.
            contexts = self.position_ids[self.cu_seqlens[:-1]]
            bounds = bounds.clone()
            bounds[1:] += contexts.cumsum(0)
            seq_idx, position = _places(bounds, sum(key_lens))
            pages = inputs.page_table[seq_idx, position // page_size].long()
            slots = pages * page_size + position % page_size
        known = CachedRows(
            slots=slots,
            key_lens=key_lens,
            query_lens=self.seq_lens,
            key_bounds=bounds,
            query_bounds=self.cu_seqlens,
        )
        self.__dict__["_cached_rows"] = known
        return known


def _places(bounds: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows 0 to num_rows - 1 the sequence and the index in it. bounds: [N + 1]"""
    index = torch.arange(num_rows, device=bounds.device)
    wide = bounds.to(index.dtype)
    seq_idx = torch.bucketize(index, wide[1:], right=True)
    return seq_idx, index - wide[seq_idx]
