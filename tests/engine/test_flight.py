"""Calls launched behind calls that nobody has read yet: the same texts, and nothing is lost."""

import random
import time

import pytest

from qnext.engine.speculative import AutoSpeculation
from tests.engine.markov import MarkovModel
from tests.engine.slow_device import SlowDevice
from tests.engine.tiny import greedy, id_prompts, step_by_step, tiny_llm, token_ids

PROMPTS = id_prompts(1, 3, 17, 40, 5, 16, 33, 9)
LENGTHS = (50, 1, 33, 7, 41, 2, 21, 36)


@pytest.fixture(scope="module")
def model():
    """Its greedy text goes through the whole vocabulary before it repeats."""
    model = MarkovModel(96, seed=3)
    order = random.Random(0).sample(range(96), 96)
    model.target[order, order[1:] + order[:1]] += 100.0
    return model


def flying_llm(model, num_drafts=0, num_rounds=3, **options):
    llm = tiny_llm(model, num_speculative_tokens=num_drafts, **options)
    return llm, SlowDevice(llm, num_rounds)


def expected_tokens(model, prompts, params):
    return token_ids(
        step_by_step(tiny_llm(model, num_speculative_tokens=0)).generate(prompts, params)
    )


def assert_all_is_free(llm):
    scheduler = llm.engine.scheduler
    assert scheduler.pages.num_free == scheduler.limits.num_pages
    assert scheduler.slots.num_free == scheduler.limits.max_num_seqs
    assert not llm.engine.runner._pending
    assert not llm.engine.has_work


def run_out(llm):
    while llm.engine.has_work:
        llm.engine.step()


@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("num_rounds", [1, 3])
def test_texts_are_those_of_steps_one_by_one(model, num_drafts, num_rounds):
    params = [greedy(length) for length in LENGTHS]
    llm, device = flying_llm(model, num_drafts, num_rounds)
    assert token_ids(llm.generate(PROMPTS, params)) == expected_tokens(model, PROMPTS, params)
    assert sum(device.launches) > 3, "calls must have overlapped"
    assert_all_is_free(llm)


def test_a_step_lasts_as_long_as_the_device_says_whatever_the_caller_does_meanwhile(model):
    llm, device = flying_llm(model)
    device.step_seconds = 1e-4
    for _ in llm.stream(PROMPTS[2], greedy(30)):
        time.sleep(0.02)
    assert sum(device.launches) > 3, "calls must have overlapped"
    assert dict(llm.engine._step_seconds) == {0: pytest.approx(1e-4)}


def test_windows_after_an_answer_s_end_say_nothing_of_drafts(model):
    llm, _ = flying_llm(model, num_drafts=2)
    recorded = []
    llm.engine.speculation.record = lambda *args: recorded.extend(args[3])
    outputs = llm.generate(PROMPTS[2], greedy(30, stop_token_ids=[]))
    metrics = outputs[0].metrics
    assert len(recorded) == metrics.num_windows
    assert sum(accepted for _, accepted in recorded) == metrics.num_accepted_tokens


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_tokens_after_a_stop_token_are_dropped(model, num_drafts):
    whole = expected_tokens(model, PROMPTS[2:7], greedy(60))
    places = [[], [17], [40, 31], [], [1]]
    params = [
        greedy(60, stop_token_ids=[answer[i] for i in own])
        for answer, own in zip(whole, places, strict=True)
    ]
    expected = expected_tokens(model, PROMPTS[2:7], params)
    llm, device = flying_llm(model, num_drafts)
    found = llm.generate(PROMPTS[2:7], params)
    assert token_ids(found) == expected
    reasons = {output.outputs[0].finish_reason for output in found}
    assert reasons == {"stop", "length"}, "both ends must occur"
    assert sum(device.launches) > 3
    assert_all_is_free(llm)


def test_a_flight_that_nobody_waits_for_is_let_go_before_weights_are_read(model):
    (answer,) = expected_tokens(model, PROMPTS[3], greedy(40))
    stop = answer[20]
    params = greedy(100, stop_token_ids=[stop])
    llm, _ = flying_llm(model)
    first = token_ids(llm.generate(PROMPTS[3], params))
    assert first == [answer[:21]]
    assert llm.engine._flights, "the stop token must have been a surprise"
    assert_all_is_free(llm)
    (left,), read = llm.engine._flights, []
    llm.engine.runner.read_weights = lambda: read.append(left.launched.is_read)
    assert token_ids(llm.generate(PROMPTS[3], params)) == first
    assert read == [True]


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_an_abort_in_the_air_ends_one_and_leaves_the_others(model, num_drafts):
    llm, _ = flying_llm(model, num_drafts)
    params = [greedy(70) for _ in range(4)]
    expected = expected_tokens(model, PROMPTS[:4], params)
    requests = llm._requests(PROMPTS[:4], params)
    for request in requests:
        llm.engine.add(request)
    while not llm.engine._flights or requests[1].num_remaining > 40:
        llm.engine.step()
    llm.engine.abort([requests[1]])
    num_tokens = len(requests[1].output_token_ids)
    changed = llm.engine.step()
    assert requests[1] not in changed and len(requests[1].output_token_ids) == num_tokens
    run_out(llm)
    for n, (request, tokens) in enumerate(zip(requests, expected, strict=True)):
        assert request.output_token_ids == (tokens[:num_tokens] if n == 1 else tokens)
    assert_all_is_free(llm)


def test_aborting_all_in_the_air_leaves_no_work(model):
    llm, _ = flying_llm(model)
    requests = llm._requests(PROMPTS[:4], greedy(70))
    for request in requests:
        llm.engine.add(request)
    while not llm.engine._flights:
        llm.engine.step()
    llm.engine.abort(requests)
    assert_all_is_free(llm)
    assert llm.engine.step() == []
    assert token_ids(llm.generate(PROMPTS, greedy(9))) == expected_tokens(model, PROMPTS, greedy(9))


def test_a_wait_that_is_broken_off_loses_no_token(model):
    llm, device = flying_llm(model)
    expected = expected_tokens(model, PROMPTS[:2], greedy(60))
    requests = llm._requests(PROMPTS[:2], greedy(60))
    for request in requests:
        llm.engine.add(request)
    while not llm.engine._flights:
        llm.engine.step()
    (flight,) = llm.engine._flights
    read = flight.launched.read

    def break_off():
        flight.launched.read = read
        raise KeyboardInterrupt

    flight.launched.read = break_off
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    assert len(llm.engine._flights) == 2
    run_out(llm)
    assert [request.output_token_ids for request in requests] == expected
    assert_all_is_free(llm)


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_request_that_comes_in_the_air_starts_after_the_next_landing(model, num_drafts):
    llm, device = flying_llm(model, num_drafts)
    early = llm._requests(PROMPTS[:2], [greedy(60), greedy(60)])
    (late,) = llm._requests([PROMPTS[5]], greedy(20))
    for request in early:
        llm.engine.add(request)
    while not llm.engine._flights:
        llm.engine.step()
    num_launches = len(device.launches)
    llm.engine.add(late)
    llm.engine.step()
    assert len(device.launches) == num_launches, "the newcomer waits for no further call"
    llm.engine.step()
    assert late.output_token_ids, "its prompt is read at once"
    run_out(llm)
    expected = expected_tokens(
        model, [*PROMPTS[:2], PROMPTS[5]], [greedy(60), greedy(60), greedy(20)]
    )
    assert [request.output_token_ids for request in (*early, late)] == expected
    assert_all_is_free(llm)


def page_bytes(model, num_drafts):
    cache = tiny_llm(model, num_speculative_tokens=num_drafts).engine.runner.cache
    return 2 * cache.kv_pool.k[:, :8].nbytes


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_preempted_sequences_write_the_same_text_though_others_fly_on(model, num_drafts):
    params = [greedy(44), greedy(50), greedy(40), greedy(45)]
    expected = expected_tokens(model, PROMPTS[:2] + PROMPTS[4:6], params)
    llm, device = flying_llm(
        model,
        num_drafts,
        num_rounds=1,
        max_model_len=64,
        kv_cache_memory_bytes=16 * page_bytes(model, num_drafts),
    )
    assert token_ids(llm.generate(PROMPTS[:2] + PROMPTS[4:6], params)) == expected
    assert llm.engine.metrics.num_preemptions > 0, "pages must have run out"
    assert sum(device.launches) > 10, "calls must have overlapped"
    assert_all_is_free(llm)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_leaks_whatever_comes(model, seed):
    """Few pages, stop tokens, aborts and newcomers at any time; other texts never change."""
    rng = random.Random(seed)
    num_drafts = rng.choice([0, 2])
    llm, device = flying_llm(
        model,
        num_drafts,
        num_rounds=rng.randint(1, 4),
        max_model_len=64,
        max_num_seqs=6,
        kv_cache_memory_bytes=rng.randint(9, 16) * page_bytes(model, num_drafts),
    )
    count = 14
    prompts = id_prompts(*(rng.randint(1, 20) for _ in range(count)))
    params = [
        greedy(rng.randint(1, 40), stop_token_ids=rng.sample(range(96), rng.choice([0, 4])))
        for _ in range(count)
    ]
    expected = expected_tokens(model, prompts, params)
    requests = llm._requests(prompts, params)
    waiting = list(requests)
    while waiting or llm.engine.has_work:
        if waiting and rng.random() < 0.4:
            llm.engine.add(waiting.pop(0))
        going = [r for r in requests if r.finish_reason is None and r not in waiting]
        if going and rng.random() < 0.02:
            llm.engine.abort([rng.choice(going)])
        llm.engine.step()
    for request, tokens in zip(requests, expected, strict=True):
        if request.finish_reason == "abort":
            assert request.output_token_ids == tokens[: len(request.output_token_ids)]
        else:
            assert request.output_token_ids == tokens
    assert device.launches
    assert_all_is_free(llm)


def test_a_trial_is_neither_begun_nor_ended_by_a_call_in_the_air():
    speculation = AutoSpeculation(4)
    speculation._first_steps.clear()
    speculation._is_warm = True
    speculation._start_probe()
    (tried, *_) = speculation._probe
    speculation.record(1, speculation._best, 0.001, [(speculation._best, 0)])
    assert len(speculation._probe) == speculation.PROBE_STEPS
    assert speculation.choose(1) == tried
    speculation.record(1, tried, 0.001, [(tried, 0)])
    assert len(speculation._probe) == speculation.PROBE_STEPS - 1
