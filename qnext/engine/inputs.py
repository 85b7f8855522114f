"""The one place where lists become tensors: rows of sequences to a `ForwardBatch`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qnext.engine.request import Request
from qnext.model.batch import CacheInputs, ForwardBatch
from qnext.runtime.device import upload


@dataclass(frozen=True)
class SequenceRows:
    """Neighbouring tokens of one sequence that go through the model together."""

    request: Request
    token_ids: Sequence[int] | NDArray[np.int64]
    start: int  # position of the first


def build_batch(
    sequences: Sequence[SequenceRows], page_size: int, device: torch.device, *, is_window: bool
) -> ForwardBatch:
    """Pack the rows of running sequences. All that a GPU needs goes there in one copy.

    Args:
        sequences: each holds the pages of all its rows and a state slot.
        page_size: tokens a page.
        is_window: rows of decoding and verification, whose states wait for a commit; else parts of
            prompts.
    """
    seq_lens = tuple(len(rows.token_ids) for rows in sequences)
    starts = tuple(rows.start for rows in sequences)
    state_slots = tuple(state_slot(rows.request) for rows in sequences)
    bounds = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum(seq_lens, out=bounds[1:])
    position_ids = np.arange(bounds[-1], dtype=np.int64)
    position_ids += np.repeat(np.array(starts, np.int64) - bounds[:-1], seq_lens)
    page_table = _page_table(sequences, page_size)
    page_idx, in_page = np.divmod(position_ids, page_size)
    pages = page_table[np.repeat(np.arange(len(sequences)), seq_lens), page_idx]
    placed = upload(
        [
            np.concatenate([np.asarray(rows.token_ids, np.int64) for rows in sequences]),
            position_ids,
            pages.astype(np.int64) * page_size + in_page,
            np.array(state_slots, np.int64),
            page_table,
            bounds,
        ],
        device,
    )
    token_ids, positions, slot_mapping, slot_ids, table, cu_seqlens = placed
    cache_inputs = CacheInputs(
        page_table=table,
        slot_mapping=slot_mapping,
        context_lens=starts,
        state_slots=state_slots,
        is_window=is_window,
        state_slot_ids=slot_ids,
    )
    return ForwardBatch(
        token_ids=token_ids,
        position_ids=positions,
        cu_seqlens=cu_seqlens,
        seq_lens=seq_lens,
        cache_inputs=cache_inputs,
    )


def state_slot(request: Request) -> int:
    """Slot of a running sequence's DeltaNet states."""
    assert request.state_slot is not None, f"{request.request_id} is {request.status.value}"
    return request.state_slot


def _page_table(sequences: Sequence[SequenceRows], page_size: int) -> NDArray[np.int32]:
    """Pages of each sequence up to its last row, filled up with page 0. [N, P]"""
    num_pages = [-(-(rows.start + len(rows.token_ids)) // page_size) for rows in sequences]
    table = np.zeros((len(sequences), max(num_pages)), np.int32)
    for row, rows, count in zip(table, sequences, num_pages, strict=True):
        row[:count] = rows.request.page_ids[:count]
    return table
