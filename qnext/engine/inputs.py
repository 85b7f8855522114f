"""The one place where lists become tensors: rows of sequences to a `ForwardBatch`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qnext.engine.request import Request
from qnext.model.batch import CacheInputs, ForwardBatch


@dataclass(frozen=True)
class SequenceRows:
    """Neighbouring tokens of one sequence that go through the model together."""

    request: Request
    token_ids: Sequence[int]
    start: int  # position of the first


def build_batch(
    sequences: Sequence[SequenceRows], page_size: int, device: torch.device, *, is_window: bool
) -> ForwardBatch:
    """Pack the rows of running sequences.

    Args:
        sequences: each holds the pages of all its rows and a state slot.
        page_size: tokens a page.
        is_window: rows of decoding and verification, whose states wait for a commit; else a chunk
            of a prompt.
    """
    token_ids: list[int] = []
    position_ids, slot_mapping = [], []
    bounds = [0]
    for rows in sequences:
        token_ids += rows.token_ids
        positions = torch.arange(rows.start, rows.start + len(rows.token_ids))
        pages = torch.tensor(rows.request.page_ids)
        position_ids.append(positions)
        slot_mapping.append(pages[positions // page_size] * page_size + positions % page_size)
        bounds.append(len(token_ids))
    cache_inputs = CacheInputs(
        page_table=_page_table(sequences, page_size).to(device, non_blocking=True),
        slot_mapping=torch.cat(slot_mapping).to(device),
        context_lens=tuple(rows.start for rows in sequences),
        state_slots=tuple(state_slot(rows.request) for rows in sequences),
        is_window=is_window,
    )
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, device=device),
        position_ids=torch.cat(position_ids).to(device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        seq_lens=tuple(len(rows.token_ids) for rows in sequences),
        cache_inputs=cache_inputs,
    )


def state_slot(request: Request) -> int:
    """Slot of a running sequence's DeltaNet states."""
    assert request.state_slot is not None, f"{request.request_id} is {request.status.value}"
    return request.state_slot


def _page_table(sequences: Sequence[SequenceRows], page_size: int) -> torch.Tensor:
    """Pages of each sequence up to its last row, filled up with page 0. [N, P], int32"""
    num_pages = [-(-(rows.start + len(rows.token_ids)) // page_size) for rows in sequences]
    width = max(num_pages)
    table = [
        rows.request.page_ids[:count] + [0] * (width - count)
        for rows, count in zip(sequences, num_pages, strict=True)
    ]
    return torch.tensor(table, dtype=torch.int32)
