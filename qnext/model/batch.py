"""What one forward pass is told: tokens, borders, and where the cache holds their past."""

from dataclasses import dataclass
from functools import cached_property

import torch


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
    """

    page_table: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: tuple[int, ...]
    state_slots: tuple[int, ...]
    is_window: bool


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
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    seq_lens: tuple[int, ...] | None = None
    row_tokens: int | None = None
    cache_inputs: CacheInputs | None = None

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
    def local_positions(self) -> torch.Tensor:
        """Index of each token since its sequence's start in this batch. [T], int64"""
        index = torch.arange(self.token_ids.shape[0], device=self.token_ids.device)
        segment = torch.bucketize(index, self.cu_seqlens[1:].to(index.dtype), right=True)
        return index - self.cu_seqlens.to(index.dtype)[segment]

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
        return torch.tensor(self.cache_inputs.state_slots, device=self.token_ids.device)

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

    def token_slots(self, page_size: int) -> tuple[torch.Tensor, ...]:
        """Pool rows of each sequence's tokens, this batch's included, oldest first. N x [L]"""
        known = self.__dict__.get("_token_slots")
        if known is None:
            assert self.cache_inputs is not None, "token slots of a batch without a cache"
            assert self.seq_lens is not None, "a batch with a cache has host lengths"
            known = []
            for seq_idx, context in enumerate(self.cache_inputs.context_lens):
                index = torch.arange(context + self.seq_lens[seq_idx], device=self.token_ids.device)
                pages = self.cache_inputs.page_table[seq_idx].long()
                known.append(pages[index // page_size] * page_size + index % page_size)
            self.__dict__["_token_slots"] = known
        return tuple(known)
