"""Who runs next: waiting and running sequences, their pages and their state slots. No torch.

A step is either some tokens of prompts or one window of every running sequence. Prompts go first,
in the order of their admission. Where a step holds one prompt, it is read alone and in chunks of a
fixed size, so that its arithmetic does not depend on company; where it holds many, each step is
filled up with the next ones. Pages are given out as sequences grow. When none is free, the youngest
sequence is preempted: it gives everything back, waits at the head of the line, and is computed
again from its prompt.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from qnext.cache.allocator import Allocator
from qnext.engine.request import Request, RequestStatus


@dataclass(frozen=True)
class PromptPart:
    """Tokens `start` to `end` of one prompt."""

    request: Request
    start: int
    end: int


@dataclass(frozen=True)
class PrefillStep:
    """Parts of different prompts, in the order of their admission."""

    parts: tuple[PromptPart, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all parts."""
        return sum(part.end - part.start for part in self.parts)


@dataclass(frozen=True)
class DecodeStep:
    """One window of each of these sequences, in the order of their admission."""

    requests: tuple[Request, ...]


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that the scheduler keeps to."""

    max_num_seqs: int  # state slots: sequences that run at once
    num_pages: int
    page_size: int  # tokens a page
    prefill_chunk_tokens: int  # of all prompts in a step
    max_drafts: int  # rows of a window beyond its first
    max_prefill_seqs: int = 1  # prompts that one step may hold parts of


class Scheduler:
    """Admits sequences in the order of arrival and hands out pages and slots.

    Raises:
        ValueError: `add` of a request that the pool cannot hold even alone.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pages = Allocator(limits.num_pages, "page")
        self.slots = Allocator(limits.max_num_seqs, "state slot")
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ValueError: it needs more pages than there are.
        """
        need = self._pages_for(request.max_total_tokens)
        if need > self.limits.num_pages:
            raise ValueError(
                f"request {request.request_id} may reach {request.max_total_tokens} tokens, "
                f"{need} pages of {self.limits.page_size}; the cache has {self.limits.num_pages} "
                f"pages (a smaller max_tokens or a larger kv_cache_memory_bytes makes it fit)"
            )

    def add(self, request: Request) -> None:
        """Put a request at the end of the line; `check` says when it is refused."""
        self.check(request)
        self.waiting.append(request)

    def schedule(self) -> PrefillStep | DecodeStep | None:
        """Choose the next step and give its sequences what memory it needs; None without work."""
        self._admit()
        if parts := self._prompt_parts():
            return PrefillStep(parts)
        if not self.running:
            assert not self.waiting, f"{len(self.waiting)} requests wait, none runs, no page free"
            return None
        self._grow_running()
        return DecodeStep(tuple(self.running))

    @property
    def can_admit(self) -> bool:
        """Whether the request at the head of the line would start now."""
        if not self.waiting or not self.slots.num_free:
            return False
        # A page for each running sequence to grow into, or the newcomer would be thrown out.
        need = self._num_missing_pages(self.waiting[0]) + len(self.running)
        return need <= self.pages.num_free

    def grow_ahead(self, request: Request, num_tokens: int) -> None:
        """Give a running sequence pages for so many tokens, as far as nobody else lacks them.

        Nobody is preempted, and a page for each running sequence stays free. Tokens beyond the end
        of the answer need none.
        """
        need = self._pages_for(min(num_tokens, request.max_total_tokens)) - len(request.page_ids)
        count = min(need, self.pages.num_free - len(self.running))
        if count > 0:
            request.page_ids += self.pages.allocate(count)

    def release(self, requests: Iterable[Request]) -> None:
        """Take back the memory of finished or aborted requests; unknown ones are ignored."""
        for request in requests:
            if request in self.running:
                self.running.remove(request)
                self._give_back(request)
            elif request in self.waiting:
                self.waiting.remove(request)

    def _prompt_parts(self) -> tuple[PromptPart, ...]:
        """The next tokens of the prompts that are not in the cache, as many as a step may hold."""
        parts: list[PromptPart] = []
        room = self.limits.prefill_chunk_tokens
        for request in self.running:
            if not room or len(parts) == self.limits.max_prefill_seqs:
                break
            if request.is_prefilling:
                start = request.num_computed
                end = min(start + room, request.num_prompt_tokens)
                parts.append(PromptPart(request, start, end))
                room -= end - start
        return tuple(parts)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)

    def _num_missing_pages(self, request: Request) -> int:
        """Pages to add before the next window, drafts included."""
        # The last token of an answer is never forwarded, so the total is bound enough.
        reach = min(request.num_tokens + self.limits.max_drafts, request.max_total_tokens)
        return max(0, self._pages_for(reach) - len(request.page_ids))

    def _admit(self) -> None:
        while self.can_admit:
            request = self.waiting.popleft()
            request.page_ids += self.pages.allocate(self._num_missing_pages(request))
            request.state_slot = self.slots.allocate(1)[0]
            request.status = RequestStatus.RUNNING
            self.running.append(request)

    def _grow_running(self) -> None:
        idx = 0
        while idx < len(self.running):
            request = self.running[idx]
            need = self._num_missing_pages(request)
            if need <= self.pages.num_free:
                if need:
                    request.page_ids += self.pages.allocate(need)
                idx += 1
            else:
                # Alone a sequence always fits, so the oldest one is never the victim.
                self._preempt(self.running.pop())

    def _preempt(self, request: Request) -> None:
        assert self.running, f"{request.request_id} does not fit alone: {len(request.page_ids)}"
        self._give_back(request)
        request.num_computed = 0
        request.status = RequestStatus.WAITING
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _give_back(self, request: Request) -> None:
        self.pages.free(request.page_ids)
        request.page_ids = []
        assert request.state_slot is not None, f"{request.request_id} runs without a slot"
        self.slots.free([request.state_slot])
        request.state_slot = None
