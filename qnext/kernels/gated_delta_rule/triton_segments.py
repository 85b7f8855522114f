"""One long sequence in segments, each prepared beside the scan of the one before it.

The scan that carries the state of one sequence waits for itself and leaves half of a GPU idle.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from qnext.kernels.gated_delta_rule.triton_chunks import CHUNK, Chunks, Inputs

# Tokens of a full segment: a handful of microseconds pass between two. Sequences of less than two
# are not cut.
SEGMENT_TOKENS = 8192
# Nothing hides how the first segment is prepared, so it is short, and each next one longer by what
# can be prepared during a scan: 2, 3, 4 ... 8 eighths of SEGMENT_TOKENS.
EIGHTHS = 8
# Segments are multiples of STEP tokens, and a table's rows have ROW numbers: aligned pointers into
# the tables of slots and segments keep kernels from compiling twice.
STEP = 4 * CHUNK
ROW = 8

_chains: dict[tuple[int, int], torch.cuda.Stream] = {}


@triton.jit
def eighths_before(i_segment: tl.tensor) -> tl.tensor:
    """Eighths of SEGMENT_TOKENS before a segment: 0, 2, 5, 9, 14, 20, 27, 35, 43, ..."""
    num_full = (i_segment > 6) * (i_segment - 6)
    i_short = i_segment - num_full
    return i_short * (i_short + 3) // 2 + 8 * num_full


@triton.jit(do_not_specialize=["eighth"])
def segment_table_kernel(
    p_cu_seqlens: tl.tensor,
    p_table: tl.tensor,
    eighth: tl.tensor,
    ROW: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """Write a segment's first token, end and first slot; none of its tokens are padding."""
    i_segment = tl.program_id(0)
    num_tokens = tl.load(p_cu_seqlens + 1)
    start = eighths_before(i_segment) * eighth
    end = eighths_before(i_segment + 1) * eighth
    p_row = p_table + i_segment * ROW
    tl.store(p_row, tl.minimum(start, num_tokens))
    tl.store(p_row + 1, tl.minimum(end, num_tokens))
    tl.store(p_row + ROW // 2, start // BT)


@dataclass(frozen=True)
class Segment:
    """A stretch of chunks of the only sequence.

    Attributes:
        slots: its slots
        cu_seqlens: its first token and its end. [2], int32
        first: its first slot. [1], int32
    """

    slots: slice
    cu_seqlens: torch.Tensor
    first: torch.Tensor

    def inputs(self, whole: Inputs) -> Inputs:
        """The inputs with this segment's bounds."""
        return replace(whole, cu_seqlens=self.cu_seqlens)

    def chunks(self, whole: Chunks) -> Chunks:
        """The chunks with this segment's first slot."""
        return replace(whole, first=self.first)


def segments(inputs: Inputs) -> list[Segment]:
    """The segments of one long sequence, in order; none of a short one or of several."""
    num_tokens, num_slots = inputs.v.shape[0], inputs.num_slots
    if inputs.num_seqs != 1 or num_tokens < 2 * SEGMENT_TOKENS:
        return []
    eighth = triton.cdiv(SEGMENT_TOKENS, EIGHTHS * STEP) * STEP
    starts = [0]
    while (start := eighths_before.fn(len(starts)) * eighth) < num_tokens:
        starts.append(start)
    count = len(starts)
    table = inputs.cu_seqlens.new_empty(count, ROW)
    segment_table_kernel[(count,)](inputs.cu_seqlens, table, eighth, ROW=ROW, BT=CHUNK)
    slots = [start // CHUNK for start in starts] + [num_slots]
    return [
        Segment(slice(slots[idx], slots[idx + 1]), row[:2], row[ROW // 2 : ROW // 2 + 1])
        for idx, row in enumerate(table.unbind())
    ]


class Chain:
    """A stream for the pass over the chunks, beside the current stream; on a CPU, none."""

    def __init__(self, device: torch.device) -> None:
        self.main = self.stream = None
        if device.type == "cuda":
            self.main = torch.cuda.current_stream(device)
            key = (self.main.device.index, self.main.cuda_stream)
            if key not in _chains:
                # First in line: it waits for itself only, and the other stream waits for it.
                _chains[key] = torch.cuda.Stream(device, priority=-1)
            self.stream = _chains[key]

    def follow(self) -> None:
        """Wait, on the chain, for what the current stream was given."""
        if self.stream is not None and self.main is not None:
            self.stream.wait_stream(self.main)

    def lead(self) -> None:
        """Wait, on the current stream, for what the chain was given."""
        if self.stream is not None and self.main is not None:
            self.main.wait_stream(self.stream)

    def running(self) -> AbstractContextManager[object]:
        """What is launched in this context runs on the chain."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
