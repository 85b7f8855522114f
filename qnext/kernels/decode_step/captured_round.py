"""One round of drafts, verification and decisions, captured as a CUDA graph.

Nothing in a round waits for the host. It writes what was decided to a log, and its own next inputs:
tokens, lengths, pending rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qnext.kernels.decode_step.reference import MAX_ROUNDS
from qnext.kernels.decode_step.sent_inputs import GrownPages, SentInputs
from qnext.kernels.decode_step.triton_fwd import Prepared
from qnext.kernels.decode_step.triton_layers import DeviceRows, StepTensors, logits_of, run_step
from qnext.kernels.first_pass import compile_ahead_of
from qnext.kernels.sample_rows.fields import (
    PenaltyFields,
    SampledRows,
    SampleWorkspace,
    SamplingFields,
    TokenCounts,
    Window,
)
from qnext.kernels.sample_rows.triton_accept import accept_drafts_triton
from qnext.kernels.sample_rows.triton_fwd import sample_rows_triton
from qnext.kernels.sample_rows.triton_penalties import apply_penalties_triton, count_tokens_triton
from qnext.runtime.random_bits import Purpose

STATE_BLOCK = 4096  # numbers of states that a warp copies at once, its loads all on their way


@triton.jit
def advance_rounds_kernel(
    p_tokens: tl.tensor,
    p_accepted: tl.tensor,
    p_lens: tl.tensor,
    p_contexts: tl.tensor,
    p_positions: tl.tensor,
    p_pending: tl.tensor,
    p_last: tl.tensor,
    p_draft_ids: tl.tensor,
    p_draft_lens: tl.tensor,
    p_draft_contexts: tl.tensor,
    p_draft_ends: tl.tensor,
    p_log: tl.tensor,
    p_round: tl.tensor,
    p_logits: tl.tensor,
    p_states: tl.tensor,
    p_kept: tl.tensor,
    num_seqs: tl.tensor,
    W: tl.tensor,
    C: tl.tensor,
    Q: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """One program per sequence: log what was decided and make it the next round's input.

    Where the last token's logit is not a number, the count that is logged is -1. States go to the
    round's place in p_kept, or with drafts to the sequence's, for the draft layer.
    """
    n = tl.program_id(0)
    is_real = tl.load(p_lens + n) > 0
    # Each sequence counts the rounds by itself: no program knows when the others have read.
    i_round = tl.load(p_round + n)
    tl.store(p_round + n, i_round + 1)
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
    tl.store(p_draft_ends + n, (n * Q + tl.maximum(count - 1, 0)).to(tl.int64))
    tl.store(p_last + n, last)
    tl.store(p_pending + n, accepted)
    tl.store(p_contexts + n, context + count)
    tl.store(p_positions + n, context + count + 1)
    p_states += n.to(tl.int64) * Q * C
    if Q > 1:
        p_kept += n.to(tl.int64) * Q * C
    else:
        p_kept += (i_round * num_seqs + n) * C
    for start in range(0, Q * C, BC):
        o_c = start + tl.arange(0, BC)
        tl.store(p_kept + o_c, tl.load(p_states + o_c, mask=o_c < Q * C), mask=o_c < Q * C)


@dataclass
class RoundBuffers:
    """Inputs and outputs of a captured round, for N sequences with D drafts, Q = D + 1."""

    lens: torch.Tensor  # [N], int32: Q, or 0 for padding
    is_real: torch.Tensor  # [N], int32: 1, or 0 for padding
    contexts: torch.Tensor  # [N], int32
    slots: torch.Tensor
    pending: torch.Tensor
    last_ids: torch.Tensor  # [N], int64
    pages: torch.Tensor  # [N, P], int32
    fields: SamplingFields
    draft_ids: torch.Tensor  # [N, Q], int64
    draft_lens: torch.Tensor  # [N], int32
    draft_contexts: torch.Tensor
    draft_ends: torch.Tensor  # the last draft row of each sequence. [N], int64
    draft_states: torch.Tensor  # [N * Q, C]
    log: torch.Tensor  # how many tokens were decided, and which. [MAX_ROUNDS, N, 1 + Q], int64
    log_states: torch.Tensor  # [MAX_ROUNDS, N, C]; of rounds without drafts
    round: torch.Tensor  # how many were taken. [N], int64


class CapturedRounds:
    """A round for up to N sequences with D drafts each.

    Args:
        trunk, draft: weights of both; draft is None where D = 0.
        has_filters: whether top_k, top_p or min_p may be asked for.
        counts: tokens seen by each slot, where penalties may be asked for.
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
        counts: TokenCounts | None = None,
    ) -> None:
        self.trunk, self.draft = trunk, draft
        self.num_seqs, self.num_drafts = sizes
        self.window = self.num_drafts + 1
        self.has_filters = has_filters
        self.counts = counts
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
            position=sent.ints[5],
        )
        self.penalties = PenaltyFields(*sent.floats[3:])
        self.buffers = RoundBuffers(
            lens=sent.ints[0],
            is_real=sent.ints[6],
            contexts=sent.ints[1],
            slots=sent.ints[2],
            pending=sent.ints[3],
            last_ids=sent.words[0],
            pages=sent.pages,
            fields=fields,
            draft_ids=zeros(n, q, dtype=torch.int64),
            draft_lens=zeros(n),
            draft_contexts=zeros(n),
            draft_ends=zeros(n, dtype=torch.int64),
            draft_states=zeros(n * q, size, dtype=dtype),
            log=zeros(MAX_ROUNDS, n, q + 1, dtype=torch.int64),
            log_states=zeros(MAX_ROUNDS, n, size, dtype=dtype),
            round=zeros(n, dtype=torch.int64),
        )
        # In a call a sequence fills the pages of its tokens and begins one.
        self.grown = GrownPages(sent.pages, n * (MAX_ROUNDS * q // step.page_size + 2))
        # Two calls may be on their way: each other one's log comes to the same half.
        self.host_log = torch.zeros(
            2, MAX_ROUNDS, n, q + 1, dtype=torch.int64, pin_memory=device.type == "cuda"
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
        """Compile the kernels, run them on padding alone, which touches no sequence, then record.

        All graphs work in one pool of memory: only one runs at a time, and what outlives a round
        lies in buffers outside of it.
        """
        if self.buffers.lens.device.type != "cuda":
            return  # the interpreter runs launch by launch
        compile_ahead_of(self._round, self.buffers.lens.device)
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

    def hidden(self, num_rounds: int) -> torch.Tensor:
        """Copy of the states that the last rounds left, as in `RoundsOutput`, padding included."""
        if self.draft is None:
            return self.buffers.log_states[:num_rounds].clone()
        return self.buffers.draft_states.view(self.num_seqs, self.window, -1).clone()

    def _round(self) -> None:
        b, q = self.buffers, self.window
        tokens = b.last_ids[:, None]
        if self.draft is not None:
            self.draft_all(self.draft)
            tokens = torch.cat([tokens, self.draft_tokens], dim=1)
        rows = DeviceRows(tokens.flatten(), b.lens, b.contexts, b.slots, b.pending, b.pages)
        states = run_step(self.trunk, rows)
        logits = logits_of(self.trunk, states)
        if self.counts is not None:
            self._penalize(logits, q)
        decided, accepted = self._decide(logits)
        if self.counts is not None:
            # Tokens of padding, and those behind the last, are none.
            seen = decided.view(-1, q)
            if q == 1:
                seen = torch.where(b.is_real[:, None] > 0, seen, -1)
            count_tokens_triton(seen, self.counts, b.slots, is_prompt=False)
        advance_rounds_kernel[(self.num_seqs,)](
            decided,
            accepted,
            b.lens,
            b.contexts,
            b.fields.position,
            b.pending,
            b.last_ids,
            b.draft_ids,
            b.draft_lens,
            b.draft_contexts,
            b.draft_ends,
            b.log,
            b.round,
            logits,
            states,
            b.log_states if self.draft is None else b.draft_states,
            self.num_seqs,
            logits.shape[1],
            states.shape[1],
            Q=q,
            BQ=triton.next_power_of_2(q),
            BC=min(STATE_BLOCK, triton.next_power_of_2(q * states.shape[1])),
            num_warps=1,  # a second one might read what the first has moved on already
        )

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

    def _penalize(self, logits: torch.Tensor, rows_per_seq: int, num_earlier: int = 0) -> None:
        """Penalise tokens seen so far, earlier drafts of the window as if they were decided.

        Args:
            rows_per_seq: Q for windows, whose row j follows j drafts.
            num_earlier: drafts before the first row.
        """
        assert self.counts is not None, "penalties without counts"
        apply_penalties_triton(
            logits,
            self.penalties,
            self.counts,
            self.buffers.slots,
            window_tokens=None if self.draft is None else self.draft_tokens,
            rows_per_seq=rows_per_seq,
            window_offset=num_earlier,
        )

    def draft_all(self, draft: StepTensors) -> None:
        """All drafts of a round: the first from the rows decided last, the others from drafts."""
        b, n = self.buffers, self.num_seqs
        ids, states = b.draft_ids.flatten(), b.draft_states
        lens, contexts = b.draft_lens, b.draft_contexts
        for depth in range(self.num_drafts):
            rows = DeviceRows(ids, lens, contexts, b.slots, b.pending, b.pages, states)
            states = run_step(draft, rows)
            if depth == 0:
                states = states.index_select(0, b.draft_ends)
                contexts, lens = b.contexts, b.is_real
            else:
                contexts = contexts + 1
            logits = logits_of(draft, states)
            if self.counts is not None:
                self._penalize(logits, 1, depth)
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
                query_lens=b.is_real,
                has_filters=self.has_filters,
                out=out,
                workspace=self.workspace,
            )
            # A row of padding was not drawn: its number must still be a token.
            ids = torch.where(b.is_real > 0, out.tokens, 0)
            self.draft_tokens[:, depth].copy_(ids)
