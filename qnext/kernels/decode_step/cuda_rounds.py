"""Rounds of drafts, verification and decisions as one CUDA graph that is replayed.

Nothing in a round waits for the host. It writes what was decided to a log, and its own next inputs:
tokens, lengths, pending rows. The host reads the log once for several rounds.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from qnext.kernels.decode_step.reference import NOT_NUMBERS, DecodeStep, Rounds, RoundsOutput
from qnext.kernels.decode_step.triton_fwd import (
    Prepared,
    commit_window,
    enter,
    prepare,
)
from qnext.kernels.decode_step.triton_layers import DeviceRows, StepTensors, logits_of, run_step
from qnext.kernels.sample_rows.fields import (
    SampledRows,
    SampleWorkspace,
    SamplingFields,
    Window,
)
from qnext.kernels.sample_rows.triton_accept import accept_drafts_triton
from qnext.kernels.sample_rows.triton_fwd import sample_rows_triton
from qnext.runtime.random_bits import Purpose

MAX_ROUNDS = 16  # of one call
# Numbers of sequences that graphs are captured for; others are filled up with padding, and those
# above the last to a multiple of it.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MAX_GRAPHS = 24  # kept; each has buffers of its own


@triton.jit
def advance_rounds_kernel(
    p_tokens: tl.tensor,
    p_accepted: tl.tensor,
    p_lens: tl.tensor,
    p_contexts: tl.tensor,
    p_pending: tl.tensor,
    p_last: tl.tensor,
    p_draft_ids: tl.tensor,
    p_draft_lens: tl.tensor,
    p_draft_contexts: tl.tensor,
    p_log: tl.tensor,
    p_round: tl.tensor,
    p_logits: tl.tensor,
    num_seqs: tl.tensor,
    W: tl.tensor,
    Q: tl.constexpr,
    BQ: tl.constexpr,
) -> None:
    """One program per sequence: log what was decided and make it the next round's input.

    Where the last token's logit is not a number, the count that is logged is -1.
    """
    n = tl.program_id(0)
    is_real = tl.load(p_lens + n) > 0
    i_round = tl.load(p_round)
    o_q = tl.arange(0, BQ)
    m_q = o_q < Q
    accepted = 0
    if Q > 1:
        accepted = tl.load(p_accepted + n)
    count = tl.where(is_real, accepted + 1, 0)
    # What lies behind them was never written.
    tokens = tl.load(p_tokens + n * Q + o_q, mask=m_q & (o_q < count), other=0)
    p_log += (i_round * num_seqs + n) * (Q + 1)
    tl.store(p_log + 1 + o_q, tokens, mask=m_q)
    last = tl.sum(tl.where(o_q == accepted, tokens, 0), 0)
    logit = tl.load(p_logits + (n * Q + accepted).to(tl.int64) * W + last, mask=is_real, other=0.0)
    tl.store(p_log, tl.where(logit == logit, count, -1).to(tl.int64))
    context = tl.load(p_contexts + n)
    tl.store(p_draft_ids + n * Q + o_q, tokens, mask=m_q)
    tl.store(p_draft_lens + n, count)
    tl.store(p_draft_contexts + n, context)
    tl.store(p_last + n, last)
    tl.store(p_pending + n, accepted)
    tl.store(p_contexts + n, context + count)


class SentInputs:
    """What the host sends before the first round, in one copy.

    Attributes:
        words: last tokens and seeds. [2, N], int64
        ints: rows of a window (0 is padding), contexts, slots, pending rows, top_k. [5, N], int32
        floats: temperature, top_p, min_p. [3, N], fp32
        pages: [N, P], int32
    """

    def __init__(self, num_seqs: int, max_pages: int, device: torch.device) -> None:
        sizes = (16 * num_seqs, 20 * num_seqs, 12 * num_seqs, 4 * num_seqs * max_pages)
        # On the host pinned, so that the copy needs no other.
        self.host = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self.words, self.ints, self.floats, self.pages = self._parts(self.device, sizes, num_seqs)
        parts = self._parts(self.host, sizes, num_seqs)
        self.host_words, self.host_ints, self.host_floats, self.host_pages = (
            part.numpy() for part in parts
        )

    @staticmethod
    def _parts(
        memory: torch.Tensor, sizes: tuple[int, ...], num_seqs: int
    ) -> tuple[torch.Tensor, ...]:
        words, ints, floats, pages = memory.split(sizes)
        return (
            words.view(torch.int64).view(2, num_seqs),
            ints.view(torch.int32).view(5, num_seqs),
            floats.view(torch.float32).view(3, num_seqs),
            pages.view(torch.int32).view(num_seqs, -1),
        )

    def send(self, rounds: Rounds, window: int, num_pending: list[int]) -> None:
        """Write the inputs of the first round; the copy before has ended."""
        rows, n = rounds.rows, len(rounds.cuts)
        self.host_ints[0] = 0
        self.host_ints[0, :n] = window
        self.host_ints[1, :n], self.host_ints[2, :n] = rows.context_lens, rows.state_slots
        self.host_ints[3, :n] = num_pending
        self.host_ints[4, :n] = [0 if cuts is None else cuts.top_k for cuts in rounds.cuts]
        self.host_floats[:, :n] = [
            [0.0 if cuts is None else cuts.temperature for cuts in rounds.cuts],
            [1.0 if cuts is None else cuts.top_p for cuts in rounds.cuts],
            [0.0 if cuts is None else cuts.min_p for cuts in rounds.cuts],
        ]
        self.host_words[0, :n] = rows.token_ids
        # Seeds are 64 bits without a sign, torch's integers have one.
        self.host_words[1, :n] = np.array(rounds.seeds, dtype=np.uint64).view(np.int64)
        for row, pages in zip(self.host_pages, rows.pages, strict=False):
            row[: len(pages)] = pages
        self.device.copy_(self.host, non_blocking=True)


@dataclass
class _Buffers:
    """Inputs and outputs of a captured round, for N sequences with D drafts, Q = D + 1."""

    lens: torch.Tensor  # [N], int32: Q, or 0 for padding
    contexts: torch.Tensor  # [N], int32
    slots: torch.Tensor
    pending: torch.Tensor
    last_ids: torch.Tensor  # [N], int64
    pages: torch.Tensor  # [N, P], int32
    fields: SamplingFields
    draft_ids: torch.Tensor  # [N, Q], int64
    draft_lens: torch.Tensor  # [N], int32
    draft_contexts: torch.Tensor
    draft_states: torch.Tensor  # [N * Q, C]
    log: torch.Tensor  # how many tokens were decided, and which. [MAX_ROUNDS, N, 1 + Q], int64
    log_states: torch.Tensor  # [MAX_ROUNDS, N, C]; of rounds without drafts
    round: torch.Tensor  # [1], int64


class CapturedRounds:
    """A round for up to N sequences with D drafts each.

    Args:
        trunk, draft: weights of both; draft is None where D = 0.
        has_filters: whether top_k, top_p or min_p may be asked for.
        max_pages: of a sequence.
    """

    def __init__(
        self,
        trunk: StepTensors,
        draft: StepTensors | None,
        sizes: tuple[int, int],
        *,
        has_filters: bool,
        max_pages: int,
    ) -> None:
        self.trunk, self.draft = trunk, draft
        self.num_seqs, self.num_drafts = sizes
        self.window = self.num_drafts + 1
        self.has_filters = has_filters
        step = trunk.step
        device, dtype = step.keys.device, step.keys.dtype
        n, q, size = self.num_seqs, self.window, step.config.hidden_size
        vocab_size = step.parameters[step.head].shape[0]

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sent = sent = SentInputs(n, max_pages, device)
        fields = SamplingFields(
            temperature=sent.floats[0],
            top_p=sent.floats[1],
            min_p=sent.floats[2],
            top_k=sent.ints[4],
            seed=sent.words[1],
            position=zeros(n),
        )
        self.buffers = _Buffers(
            lens=sent.ints[0],
            contexts=sent.ints[1],
            slots=sent.ints[2],
            pending=sent.ints[3],
            last_ids=sent.words[0],
            pages=sent.pages,
            fields=fields,
            draft_ids=zeros(n, q, dtype=torch.int64),
            draft_lens=zeros(n),
            draft_contexts=zeros(n),
            draft_states=zeros(n * q, size, dtype=dtype),
            log=zeros(MAX_ROUNDS, n, q + 1, dtype=torch.int64),
            log_states=zeros(MAX_ROUNDS, n, size, dtype=dtype),
            round=zeros(1, dtype=torch.int64),
        )
        self.workspace = SampleWorkspace.allocate(n * q, vocab_size, device)
        # q of each draft: its own logits and the cut that it was drawn under.
        depth = max(1, self.num_drafts)
        self.draft_logits = zeros(
            n if draft else 0, depth, vocab_size if draft else 0, dtype=torch.float32
        )
        self.draft_cuts = zeros(n, depth, 4, dtype=torch.int64)
        self.draft_tokens = zeros(n, depth, dtype=torch.int64)
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self, prepared: Prepared) -> None:
        """Compile the kernels on padding alone, which touches no sequence, then record a round.

        All graphs work in one pool of memory: only one runs at a time, and what outlives a round
        lies in buffers outside of it.
        """
        if self.buffers.lens.device.type != "cuda":
            return  # the interpreter runs launch by launch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._round()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        if prepared.graph_pool is None:
            prepared.graph_pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self.graph, pool=prepared.graph_pool):
            self._round()

    def replay(self, num_rounds: int) -> None:
        """Take rounds from what the buffers hold."""
        self.buffers.round.zero_()
        for _ in range(num_rounds):
            if self.graph is None:
                self._round()
            else:
                self.graph.replay()

    def _round(self) -> None:
        b, q = self.buffers, self.window
        torch.add(b.contexts, 1, out=b.fields.position)
        tokens = b.last_ids[:, None]
        if self.draft is not None:
            self._draft_tokens(self.draft)
            tokens = torch.cat([tokens, self.draft_tokens], dim=1)
        rows = DeviceRows(tokens.flatten(), b.lens, b.contexts, b.slots, b.pending, b.pages)
        states = run_step(self.trunk, rows)
        logits = logits_of(self.trunk, states)
        decided, accepted = self._decide(logits)
        if self.draft is not None:
            b.draft_states.copy_(states)
        else:
            b.log_states.index_copy_(0, b.round, states[None])
        advance_rounds_kernel[(self.num_seqs,)](
            decided,
            accepted,
            b.lens,
            b.contexts,
            b.pending,
            b.last_ids,
            b.draft_ids,
            b.draft_lens,
            b.draft_contexts,
            b.log,
            b.round,
            logits,
            self.num_seqs,
            logits.shape[1],
            Q=q,
            BQ=triton.next_power_of_2(q),
            num_warps=1,
        )
        b.round.add_(1)

    def _decide(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [N, Q] and how many drafts stand [N]."""
        b = self.buffers
        if self.draft is None:
            rows = sample_rows_triton(
                logits,
                b.fields,
                purpose=int(Purpose.TARGET),
                query_lens=b.lens,
                has_filters=self.has_filters,
                workspace=self.workspace,
            )
            return rows.tokens, b.lens
        window = Window(self.draft_tokens, b.lens, self.draft_logits, self.draft_cuts)
        return accept_drafts_triton(
            logits, b.fields, window, has_filters=self.has_filters, workspace=self.workspace
        )

    def _draft_tokens(self, draft: StepTensors) -> None:
        """All drafts of a round: the first from the rows decided last, the others from drafts."""
        b, n, q = self.buffers, self.num_seqs, self.window
        is_real = (b.lens > 0).to(torch.int32)
        places = torch.arange(n, device=b.lens.device) * q
        last_rows = (places + b.draft_lens - 1).clamp_min(0)
        ids, states = b.draft_ids.flatten(), b.draft_states
        lens, contexts = b.draft_lens, b.draft_contexts
        for depth in range(self.num_drafts):
            rows = DeviceRows(ids, lens, contexts, b.slots, b.pending, b.pages, states)
            states = run_step(draft, rows)
            if depth == 0:
                states = states.index_select(0, last_rows)
                contexts, lens = b.contexts, is_real
            else:
                contexts = contexts + 1
            logits = logits_of(draft, states)
            self.draft_logits[:, depth].copy_(logits)
            out = SampledRows(
                torch.empty(n, dtype=torch.int64, device=logits.device),
                torch.empty(n, dtype=torch.float32, device=logits.device),
                self.draft_cuts[:, depth],
            )
            sample_rows_triton(
                logits,
                b.fields,
                purpose=int(Purpose.DRAFT),
                position_offset=depth,
                query_lens=is_real,
                has_filters=self.has_filters,
                out=out,
                workspace=self.workspace,
            )
            # A row of padding was not drawn: its number must still be a token.
            ids = torch.where(is_real > 0, out.tokens, 0)
            self.draft_tokens[:, depth].copy_(ids)


def decode_rounds(trunk: DecodeStep, draft: DecodeStep | None, rounds: Rounds) -> RoundsOutput:
    """As `rounds.decode_rounds`; rounds after the end of a text are taken and their tokens dropped.

    Raises:
        ValueError: logits are not numbers.
    """
    prepared: Prepared = trunk.prepared or prepare(trunk)
    enter(trunk, rounds.rows)
    num_seqs, num_drafts = len(rounds.cuts), rounds.num_drafts
    began = time.perf_counter()
    captured = _captured(trunk, draft, rounds)
    setup_seconds = time.perf_counter() - began
    b = captured.buffers
    pending = [prepared.slots[slot].num_pending for slot in rounds.rows.state_slots]
    captured.sent.send(rounds, captured.window, pending)
    if rounds.draft_rows is not None:
        _send_draft_rows(captured, rounds)
    num_rounds = min(rounds.max_rounds, MAX_ROUNDS)
    captured.replay(num_rounds)
    log = b.log[:num_rounds, :num_seqs].cpu().tolist()  # waits for the device, once
    tokens = [[own[1 : 1 + own[0]] for own in row] for row in log]
    counts = [[own[0] for own in row] for row in log]
    if min(map(min, counts)) < 0:
        raise ValueError(NOT_NUMBERS)
    slots = rounds.rows.state_slots
    for n, slot in enumerate(slots):
        total = sum(row[n] for row in counts)
        commit_window(trunk, [slot], [counts[-1][n]])
        prepared.slots[slot].num_tokens = rounds.rows.context_lens[n] + total
    if num_drafts:
        hidden = b.draft_states.view(captured.num_seqs, captured.window, -1)[:num_seqs].clone()
    else:
        hidden = b.log_states[:num_rounds, :num_seqs].clone()
    return RoundsOutput(tokens, hidden, setup_seconds)


def _captured(trunk: DecodeStep, draft: DecodeStep | None, rounds: Rounds) -> CapturedRounds:
    """The round of this shape, captured when it is first needed."""
    prepared: Prepared = trunk.prepared
    count = len(rounds.cuts)
    num_seqs = next((n for n in SIZES if n >= count), -(-count // SIZES[-1]) * SIZES[-1])
    has_filters = any(
        cuts is not None and (cuts.top_k > 0 or cuts.top_p < 1 or cuts.min_p > 0)
        for cuts in rounds.cuts
    )
    key = (num_seqs, rounds.num_drafts, has_filters)
    if key not in prepared.graphs:
        draft_tensors = None
        if rounds.num_drafts:
            assert draft is not None, "drafts without a draft layer"
            draft_tensors = (draft.prepared or prepare(draft)).tensors
        positions = prepared.tensors.rotation[0].shape[0]
        captured = CapturedRounds(
            prepared.tensors,
            draft_tensors,
            key[:2],
            has_filters=has_filters,
            max_pages=-(-positions // trunk.page_size),
        )
        captured.capture(prepared)
        prepared.graphs[key] = captured
        if len(prepared.graphs) > MAX_GRAPHS:
            del prepared.graphs[next(iter(prepared.graphs))]  # the one that was captured first
    found: CapturedRounds = prepared.graphs[key]
    return found


def _send_draft_rows(captured: CapturedRounds, rounds: Rounds) -> None:
    """Write the rows that the draft layer has not seen, at most a window of each sequence."""
    b, rows, window = captured.buffers, rounds.draft_rows, captured.window
    assert rows is not None and rows.hidden is not None, "a draft without states"
    num_seqs, device = len(rows.query_lens), b.lens.device
    own = [n * window + i for n, length in enumerate(rows.query_lens) for i in range(length)]
    ids = torch.zeros(captured.num_seqs * window, dtype=torch.int64)
    ids[own] = torch.tensor(rows.token_ids)
    b.draft_ids.copy_(ids.view(captured.num_seqs, window).to(device))
    b.draft_states[torch.tensor(own, device=device)] = rows.hidden
    lists = torch.zeros(2, captured.num_seqs, dtype=torch.int32)
    lists[:, :num_seqs] = torch.tensor([rows.query_lens, rows.context_lens])
    b.draft_lens.copy_(lists[0].to(device))
    b.draft_contexts.copy_(lists[1].to(device))
