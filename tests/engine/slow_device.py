"""A stand-in for a GPU that takes rounds by itself, and sees whether the engine keeps its rules."""

import torch

from qnext.engine.llm import LLM
from qnext.kernels.decode_step.reference import LaunchedRounds, RoundsOutput


class SlowDevice:
    """Takes greedy rounds of a `MarkovModel`; a call is over long before the host reads it.

    Attributes:
        launches: for each call the number of those that nobody had read when it was launched.
    """

    def __init__(self, llm: LLM, num_rounds: int) -> None:
        self.llm, self.num_rounds = llm, num_rounds
        self.best = llm.model.target.argmax(-1).tolist()
        self.launches: list[int] = []
        self.newest: SlowRounds | None = None
        self.step_seconds: float | None = None  # what a call says of each of its steps
        self.owners = {}  # of the slots in the newest calls
        llm.engine.runner.launch_rounds = self.launch
        # As many rounds as this are asked for, whatever a step took.
        llm.engine._step_seconds = Always(num_rounds)

    def launch(self, requests, num_drafts, max_rounds, end_token_ids):
        assert self.newest is None or self.newest.is_read, "slots were in the hands of a call"
        runner = self.llm.engine.runner
        if num_drafts:
            runner._step_zero_rows(requests, num_drafts + 1)
        last_ids = [request.token_ids[-1] for request in requests]
        contexts = [request.num_computed for request in requests]
        pages = [request.page_ids for request in requests]
        self.owners = {request.state_slot: request for request in requests}
        return SlowRounds(self, (last_ids, contexts), pages, num_drafts, max_rounds)

    def check_slots(self):
        """Nobody else was given a slot whose state the host has yet to learn."""
        for request in self.llm.engine.scheduler.running:
            owner = self.owners.get(request.state_slot, request)
            assert owner is request, f"slot {request.state_slot} was given away in the air"

    def check_pages(self, pages, needs):
        """Every row has a page, which belongs to one running sequence alone."""
        running = self.llm.engine.scheduler.running
        held = [page for request in running for page in request.page_ids]
        assert len(held) == len(set(held)), "one page, two sequences"
        page_size = self.llm.engine.options.page_size
        for own, need in zip(pages, needs, strict=True):
            assert set(own) <= set(held), "pages of nobody"
            assert len(own) * page_size >= need, f"{need} rows in {len(own)} pages"


class Always(dict):
    """Says that steps take so long that num_rounds of them fit into what may go ahead."""

    def __init__(self, num_rounds: int) -> None:
        super().__init__()
        self.num_rounds = num_rounds

    def get(self, key, default=None):
        from qnext.engine import engine

        return engine.AHEAD_SECONDS / (self.num_rounds + 0.5)


class SlowRounds(LaunchedRounds):
    """A call, whose last tokens and contexts are on the device alone."""

    def __init__(self, device, state, pages, num_drafts, max_rounds, before=None) -> None:
        self.device, self.before, self.is_read = device, before, False
        self.num_drafts, self.count = num_drafts, max_rounds
        unread = 0 if before is None or before.is_read else 1
        device.launches.append(unread)
        device.newest = self
        last_ids, contexts = list(state[0]), list(state[1])
        self.tokens, hidden = [], []
        # However many tokens the calls before have yet to yield, there are pages.
        device.check_pages(pages, [c + max_rounds * (num_drafts + 1) for c in contexts])
        for _ in range(max_rounds):
            decided, rows = [], []
            for n, context in enumerate(contexts):
                # A draft stands or falls by its place alone.
                accepted = (context * 7 + n) % (num_drafts + 1)
                own, inputs = [], [last_ids[n]]
                for _ in range(accepted + 1):
                    own.append(device.best[inputs[-1]])
                    inputs.append(own[-1])
                inputs = (inputs[:-1] + [0] * num_drafts)[: num_drafts + 1]
                last_ids[n], contexts[n] = own[-1], context + len(own)
                decided.append(own)
                rows.append(inputs)
            self.tokens.append(decided)
            hidden.append(rows)
        width = 2 * device.llm.model.config.vocab_size
        kept = torch.tensor(hidden[-1] if num_drafts else hidden).squeeze(-1)
        self.hidden = torch.nn.functional.one_hot(kept, width).float()
        self.state = last_ids, contexts

    @property
    def num_rounds(self) -> int:
        return self.count

    @property
    def can_go_on(self) -> bool:
        return self.device.newest is self

    def read(self) -> RoundsOutput:
        assert self.before is None or self.before.is_read, "calls are read in their order"
        self.device.check_slots()
        self.is_read, self.before = True, None
        step_seconds = self.device.step_seconds
        seconds = None if step_seconds is None else step_seconds * self.count
        return RoundsOutput(self.tokens, self.hidden, device_seconds=seconds)

    def drop(self) -> None:
        self.is_read = True

    def go_on(self, pages, max_rounds) -> "SlowRounds":
        assert self.before is None or self.before.is_read, "three calls in the air"
        return SlowRounds(self.device, self.state, pages, self.num_drafts, max_rounds, self)
