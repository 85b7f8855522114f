"""Sampling on the GPU without a sync: one launch, or three where a row has filters."""

import torch
import triton

from qnext.kernels.sample_rows.fields import (
    CHUNK,
    MAX_CANDIDATES,
    MAX_VOCAB_SIZE,
    SUB,
    SampledRows,
    SampleWorkspace,
    SamplingFields,
)
from qnext.kernels.sample_rows.triton_cut import row_cut_kernel, row_gather_kernel
from qnext.kernels.sample_rows.triton_stats import row_stats_kernel

SEARCH_BLOCK = 1024  # candidates that a row's last program looks at together
MAX_ROWS = 65535  # of a launch grid's second axis


def supports(
    logits: torch.Tensor,
    fields: SamplingFields,
    *,
    purpose: int,
    rows_per_seq: int = 1,
    position_offset: int = 0,
    query_lens: torch.Tensor | None = None,
    has_filters: bool = True,
    out: SampledRows | None = None,
    workspace: SampleWorkspace | None = None,
) -> str | None:
    """Say why this backend cannot run, or None."""
    if logits.dtype != torch.float32:
        return f"logits are {logits.dtype}, want float32"
    if logits.stride(1) != 1:
        return "a row of logits is not contiguous"
    if logits.shape[1] > MAX_VOCAB_SIZE:
        return f"{logits.shape[1]} tokens, at most {MAX_VOCAB_SIZE}"
    if logits.shape[0] > MAX_ROWS:
        return f"{logits.shape[0]} rows, at most {MAX_ROWS}"
    return None


def sample_rows_triton(
    logits: torch.Tensor,
    fields: SamplingFields,
    *,
    purpose: int,
    rows_per_seq: int = 1,
    position_offset: int = 0,
    query_lens: torch.Tensor | None = None,
    has_filters: bool = True,
    out: SampledRows | None = None,
    workspace: SampleWorkspace | None = None,
) -> SampledRows:
    """As `sample_rows_reference`."""
    num_rows, vocab_size = logits.shape
    out = out or SampledRows.empty(num_rows, logits.device)
    workspace = workspace or SampleWorkspace.allocate(num_rows, vocab_size, logits.device)
    room = workspace.plan.shape[0]
    assert num_rows <= room, f"{num_rows} rows, the workspace holds {room}"
    width = -(-vocab_size // CHUNK)
    assert workspace.chunk_max.shape[1] == width, f"{width} chunks, {workspace.chunk_max.shape[1]}"
    if num_rows == 0:
        return out
    numbers = (rows_per_seq, purpose, position_offset)
    sample_rows_fwd(logits, fields, numbers, query_lens, has_filters, out, workspace)
    return out


def sample_rows_fwd(
    logits: torch.Tensor,
    fields: SamplingFields,
    numbers: tuple[int, int, int],
    query_lens: torch.Tensor | None,
    has_filters: bool,
    out: SampledRows,
    workspace: SampleWorkspace,
) -> None:
    """Launch the kernels. numbers: rows_per_seq, purpose, position_offset."""
    num_rows, vocab_size = logits.shape
    rows_per_seq, purpose, position_offset = numbers
    num_chunks = -(-vocab_size // CHUNK)
    filters = (fields.temperature, fields.top_k, fields.top_p, fields.min_p)
    own = (*filters, fields.seed, fields.position)
    results = (out.tokens, out.logprobs, out.cuts)
    strides = (logits.stride(0), out.cuts.stride(0))
    sizes = (*strides, vocab_size, rows_per_seq, num_chunks, purpose, position_offset)
    padded_chunks = triton.next_power_of_2(num_chunks)
    row_stats_kernel[(num_chunks, num_rows)](
        logits,
        *own,
        fields.position if query_lens is None else query_lens,
        *results,
        workspace.chunk_max,
        workspace.chunk_id,
        workspace.chunk_mass,
        workspace.sub_max,
        workspace.sub_mass,
        workspace.plan,
        workspace.counters[0],
        *sizes,
        BW=CHUNK,
        SUB=SUB,
        BC=padded_chunks,
        HAS_FILTERS=has_filters,
        HAS_LENS=query_lens is not None,
        num_warps=8,
        maxnreg=64,  # four programs on a multiprocessor, so that loads overlap with sums
    )
    if not has_filters:
        return
    # Many rows fill the device with fewer programs each; the result is the same.
    num_inside = 1 if num_rows <= 16 else 8
    row_gather_kernel[(-(-num_chunks // num_inside), num_rows)](
        logits,
        workspace.chunk_max,
        workspace.plan,
        workspace.counters[1],
        workspace.candidate_x,
        workspace.candidate_id,
        logits.stride(0),
        vocab_size,
        num_chunks,
        num_inside,
        BW=CHUNK,
        ROOM=MAX_CANDIDATES,
        num_warps=8,
        maxnreg=80,
    )
    row_cut_kernel[(num_rows,)](
        logits,
        *own,
        *results,
        workspace.chunk_max,
        workspace.plan,
        workspace.counters[1],
        workspace.candidate_x,
        workspace.candidate_id,
        *sizes,
        BC=padded_chunks,
        BLOCK=SEARCH_BLOCK,
        ROOM=MAX_CANDIDATES,
        num_warps=8,
    )
