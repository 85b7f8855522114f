"""Batches made ready on a thread of their own, while the device works on the step before."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qnext.data.loader import PackedBatch, PackedLoader
from qnext.model.batch import ForwardBatch
from qnext.train.step import MicroBatch, shifted_targets

# cu_seqlens has room for so many documents, or for a larger power of two: batches then have few
# shapes, and layers are compiled a few times at most. Room that is not needed has a price too:
# attention starts programs for each document, as many as the longest possible one needs.
SEGMENT_COUNTS = (1, 8, 64, 512)
# Steps made ready ahead of the one that runs.
NUM_AHEAD = 2


@dataclass(frozen=True)
class StepInput:
    """Everything one optimiser step reads.

    Attributes:
        micro_batches: on the host, pinned for a GPU.
        loader_state: the loader's position after these; goes into the checkpoint of this step.
    """

    micro_batches: tuple[MicroBatch, ...]
    loader_state: dict[str, Any]

    @property
    def address(self) -> str:
        """Where the step's tokens lie in the shards."""
        return " | ".join(micro.address for micro in self.micro_batches)


def micro_batch(packed: PackedBatch, num_mtp_steps: int) -> MicroBatch:
    """Turn the loader's batch into the model's, with its targets.

    cu_seqlens is filled up to one of SEGMENT_COUNTS, or else to a power of two, with empty
    sequences, so that the number of documents, which differs from batch to batch, seldom changes a
    shape.
    """
    bounds = packed.cu_seqlens.long()
    num_tokens = packed.token_ids.numel()
    count = bounds.numel() - 1
    size = next((s for s in SEGMENT_COUNTS if s >= count), 1 << (count - 1).bit_length())
    padded = torch.full((size + 1,), num_tokens, dtype=torch.int32)
    padded[: bounds.numel()] = packed.cu_seqlens
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
    batch = ForwardBatch(
        token_ids=packed.token_ids,
        position_ids=torch.arange(num_tokens) - starts,
        cu_seqlens=padded,
        row_tokens=packed.row_tokens,
    )
    targets = shifted_targets(batch, packed.loss_mask, num_mtp_steps)
    counts = (targets >= 0).sum(1).tolist()
    return MicroBatch(batch, targets, tuple(counts), packed.address)


class StepInputs:
    """Iterator over the inputs of one stage's steps, made by a thread.

    Args:
        loader: where the stage goes on; used by the thread alone from here on.
        num_micro_batches: per step.
        num_mtp_steps: rows of targets beyond the next token's.
        pin: copy to pinned memory.
    """

    def __init__(
        self, loader: PackedLoader, num_micro_batches: int, num_mtp_steps: int, *, pin: bool
    ) -> None:
        self._queue: queue.Queue[StepInput | BaseException] = queue.Queue(NUM_AHEAD)
        self._is_closed = threading.Event()

        def produce() -> None:
            try:
                while not self._is_closed.is_set():
                    batches = [
                        micro_batch(next(loader), num_mtp_steps) for _ in range(num_micro_batches)
                    ]
                    if pin:
                        batches = [batch.pin() for batch in batches]
                    self._put(StepInput(tuple(batches), loader.state_dict()))
            except BaseException as error:  # noqa: BLE001 - handed to the thread that asks
                self._put(error)

        self._thread = threading.Thread(target=produce, name="qnext-batches", daemon=True)
        self._thread.start()

    def _put(self, item: StepInput | BaseException) -> None:
        while not self._is_closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def __iter__(self) -> Iterator[StepInput]:
        return self

    def __next__(self) -> StepInput:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._is_closed.set()
        self._thread.join()
