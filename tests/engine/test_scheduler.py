"""The scheduler with a fake model: order, pages, slots, preemption. No torch is needed."""

import random

import pytest

from qnext.engine.request import Request, RequestStatus, SamplingParams
from qnext.engine.scheduler import DecodeStep, PrefillStep, Scheduler, SchedulerLimits
from qnext.engine.text import OutputText


def scheduler_of(**changes) -> Scheduler:
    limits = {
        "max_num_seqs": 2,
        "num_pages": 16,
        "page_size": 4,
        "prefill_chunk_tokens": 8,
        "max_drafts": 0,
    }
    return Scheduler(SchedulerLimits(**{**limits, **changes}))


def request_of(name: str, num_prompt: int, max_tokens: int = 4) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1] * num_prompt,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        max_total_tokens=num_prompt + max_tokens,
        output_text=OutputText(None),
    )


def run_step(scheduler: Scheduler, window: int = 1) -> PrefillStep | DecodeStep | None:
    """What the engine does, with a model that always says 1 and accepts every draft."""
    step = scheduler.schedule()
    if isinstance(step, PrefillStep):
        changed = [part.request for part in step.parts]
        assert len(set(changed)) == len(changed) <= scheduler.limits.max_prefill_seqs
        assert 0 < step.num_tokens <= scheduler.limits.prefill_chunk_tokens
        for part in step.parts:
            assert part.start == part.request.num_computed < part.end
            part.request.num_computed = part.end
            if not part.request.is_prefilling and not part.request.output_token_ids:
                part.request.append_token(1, False, 0.0)
    elif isinstance(step, DecodeStep):
        changed = list(step.requests)
        for request in changed:
            capacity = len(request.page_ids) * scheduler.limits.page_size
            if request.is_replaying:
                request.num_computed += min(window, request.num_tokens - 1 - request.num_computed)
                continue
            num_rows = min(window, request.num_remaining)
            assert request.num_computed + num_rows <= capacity, "rows without a page"
            request.num_computed += num_rows
            for _ in range(num_rows):
                if request.finish_reason is None:
                    request.append_token(1, False, 0.0)
    else:
        return None
    scheduler.release([r for r in changed if r.finish_reason])
    return step


def spans_of(step: PrefillStep) -> list[tuple[str, int, int]]:
    return [(part.request.request_id, part.start, part.end) for part in step.parts]


def run_all(scheduler: Scheduler, window: int = 1) -> list[PrefillStep | DecodeStep]:
    steps = []
    while scheduler.has_work:
        steps.append(run_step(scheduler, window))
        held = [page for request in scheduler.running for page in request.page_ids]
        assert len(held) == len(set(held)), "one page, two sequences"
        assert len(held) + scheduler.pages.num_free == scheduler.limits.num_pages
        assert len(scheduler.running) + scheduler.slots.num_free == scheduler.limits.max_num_seqs
        assert len(steps) < 10_000, "no progress"
    return steps


def test_prompts_go_first_in_fixed_chunks_of_one_sequence():
    scheduler = scheduler_of()
    first, second = request_of("a", 19), request_of("b", 3)
    scheduler.add(first)
    scheduler.add(second)
    steps = [run_step(scheduler) for _ in range(5)]
    spans = [spans_of(step) for step in steps[:4]]
    assert spans == [[("a", 0, 8)], [("a", 8, 16)], [("a", 16, 19)], [("b", 0, 3)]]
    assert steps[4] == DecodeStep((first, second))


def test_a_step_is_filled_up_with_the_next_prompts_where_it_may_hold_many():
    scheduler = scheduler_of(max_prefill_seqs=3, max_num_seqs=6, num_pages=32)
    requests = [request_of(name, n) for name, n in zip("abcdef", (11, 2, 9, 1, 1, 1), strict=True)]
    for request in requests:
        scheduler.add(request)
    steps = [run_step(scheduler) for _ in range(5)]
    assert [spans_of(step) for step in steps[:4]] == [
        [("a", 0, 8)],
        [("a", 8, 11), ("b", 0, 2), ("c", 0, 3)],
        [("c", 3, 9), ("d", 0, 1), ("e", 0, 1)],
        [("f", 0, 1)],
    ]
    assert steps[4] == DecodeStep(tuple(requests))


def test_sequences_over_the_limit_wait_and_start_in_order():
    scheduler = scheduler_of(max_num_seqs=2)
    requests = [request_of(str(i), 3, max_tokens=2 + i) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    run_step(scheduler)
    assert [r.status for r in requests].count(RequestStatus.WAITING) == 3
    steps = run_all(scheduler)
    started = [spans_of(s)[0][0] for s in steps if isinstance(s, PrefillStep)]
    assert started == ["1", "2", "3", "4"]
    assert all(r.finish_reason == "length" for r in requests)


def test_an_idle_scheduler_has_no_step():
    assert scheduler_of().schedule() is None


def test_a_request_that_can_never_fit_is_refused_with_its_size():
    scheduler = scheduler_of(num_pages=4)
    with pytest.raises(ValueError, match=r"request big may reach 17 tokens, 5 pages of 4.*4 pages"):
        scheduler.add(request_of("big", 13, max_tokens=4))
    assert not scheduler.has_work


def test_the_youngest_sequence_is_preempted_and_starts_over_next():
    scheduler = scheduler_of(num_pages=5, max_num_seqs=2)
    old, young, waiting = request_of("old", 4, 12), request_of("young", 4, 8), request_of("c", 4)
    for request in (old, young, waiting):
        scheduler.add(request)
    while not young.metrics.num_preemptions:
        run_step(scheduler)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young, waiting]
    assert young.num_computed == 0
    assert young.page_ids == []
    assert young.output_token_ids, "what was generated is kept"
    run_all(scheduler)
    assert [len(r.output_token_ids) for r in (old, young, waiting)] == [12, 8, 4]


def test_drafts_get_pages_before_they_are_written():
    scheduler = scheduler_of(max_drafts=4, max_num_seqs=3)
    for i in range(3):
        scheduler.add(request_of(str(i), 3 + i, max_tokens=9))
    run_all(scheduler, window=5)


@pytest.mark.parametrize("seed", range(9))
def test_nothing_leaks_whatever_comes(seed):
    rng = random.Random(seed)
    window = rng.randint(1, 5)
    scheduler = scheduler_of(
        max_num_seqs=rng.randint(1, 5),
        num_pages=rng.randint(8, 14),
        max_drafts=window - 1,
        max_prefill_seqs=rng.randint(1, 4),
    )
    requests = [
        request_of(str(i), rng.randint(1, 20), max_tokens=rng.randint(1, 12)) for i in range(30)
    ]
    for request in requests:
        scheduler.add(request)
    run_all(scheduler, window)
    assert scheduler.pages.num_free == scheduler.limits.num_pages
    assert scheduler.slots.num_free == scheduler.limits.max_num_seqs
    assert all(len(r.output_token_ids) == r.params.max_tokens for r in requests)


def test_aborting_frees_what_is_held_and_what_waits():
    scheduler = scheduler_of(max_num_seqs=1)
    running, waiting = request_of("a", 5), request_of("b", 5)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    scheduler.release([waiting, running, running])
    assert not scheduler.has_work
    assert scheduler.pages.num_free == scheduler.limits.num_pages


def test_pages_ahead_are_given_while_a_page_is_left_for_everyone():
    scheduler = scheduler_of(num_pages=8, max_num_seqs=2)
    first, second = request_of("a", 4, max_tokens=40 - 12), request_of("b", 4, max_tokens=3)
    for request in (first, second):
        scheduler.add(request)
    run_step(scheduler)
    assert (len(first.page_ids), len(second.page_ids), scheduler.pages.num_free) == (1, 1, 6)
    scheduler.grow_ahead(second, 100)
    assert len(second.page_ids) == 2, "its answer needs no more"
    scheduler.grow_ahead(first, 100)
    assert (len(first.page_ids), scheduler.pages.num_free) == (4, 2)
    scheduler.grow_ahead(first, 5)
    assert len(first.page_ids) == 4
    scheduler.release([first, second])
    assert scheduler.pages.num_free == 8


def test_who_waits_may_start_when_a_slot_and_pages_are_free():
    scheduler = scheduler_of(num_pages=6, max_num_seqs=2)
    assert not scheduler.can_admit
    first, second = request_of("a", 8), request_of("b", 16, max_tokens=1)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.can_admit
    run_step(scheduler)
    assert second.state_slot is None and not scheduler.can_admit, "pages are missing"
    scheduler.release([first])
    assert scheduler.can_admit
