"""One long sequence in segments: what all chunks do at once runs beside the pass over the chunks.

The pass that carries the state waits for itself and leaves most of a GPU idle. Here it takes a
segment on a stream of its own while the other kernels work on the next one.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from qnext.kernels.gated_delta_rule.triton_chunks import CHUNK, Chunks, Inputs

# Tokens from which a single sequence is cut, and how many segments it then has at most.
SEGMENTED_TOKENS = 4096
SEGMENTS = 8
# Tokens of the shortest segment; all are multiples of STEP. Aligned pointers into the tables of
# slots and segments keep kernels from compiling twice.
SHORTEST_SEGMENT = 1024
STEP = 4 * CHUNK
ROW = 8

_chains: dict[tuple[int, int], torch.cuda.Stream] = {}


@triton.jit(do_not_specialize=["length"])
def segment_table_kernel(
    p_cu_seqlens: tl.tensor,
    p_table: tl.tensor,
    length: tl.tensor,
    ROW: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """Write a segment's first token, end and first slot; none of its tokens are padding."""
    i_segment = tl.program_id(0)
    num_tokens = tl.load(p_cu_seqlens + 1)
    start = i_segment * length
    p_row = p_table + i_segment * ROW
    tl.store(p_row, tl.minimum(start, num_tokens))
    tl.store(p_row + 1, tl.minimum(start + length, num_tokens))
    tl.store(p_row + ROW // 2, start // BT)


@dataclass(frozen=True)
class Segment:
    """A stretch of chunks of the only sequence, or all chunks of all sequences.

    Attributes:
        slots: its slots
        cu_seqlens: its first token and its end; all bounds. [2] or [N + 1], int32
        first: its first slot; that of each sequence. [1] or [N], int32
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


def segments(inputs: Inputs, chunks: Chunks) -> list[Segment]:
    """The segments of one long sequence in order; several or short ones are one segment."""
    num_tokens, num_slots = inputs.v.shape[0], inputs.num_slots
    if inputs.num_seqs != 1 or num_tokens < SEGMENTED_TOKENS:
        return [Segment(slice(0, num_slots), inputs.cu_seqlens, chunks.first)]
    length = max(SHORTEST_SEGMENT, triton.cdiv(num_tokens, SEGMENTS * STEP) * STEP)
    count = triton.cdiv(num_tokens, length)
    table = chunks.table.new_empty(count, ROW)
    segment_table_kernel[(count,)](inputs.cu_seqlens, table, length, ROW=ROW, BT=CHUNK)
    slots = [length // CHUNK * idx for idx in range(count)] + [num_slots]
    return [
        Segment(slice(slots[idx], slots[idx + 1]), row[:2], row[ROW // 2 : ROW // 2 + 1])
        for idx, row in enumerate(table)
    ]


class Chain:
    """A stream for the pass over the chunks beside the current one, or the current one itself."""

    def __init__(self, device: torch.device, *, is_used: bool) -> None:
        self.main = self.stream = None
        if is_used and device.type == "cuda":
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
