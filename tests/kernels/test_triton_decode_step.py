"""Whole steps and rounds of the GPU's kernels write what the model's own layers write."""

import pytest

from qnext.engine import fused
from qnext.engine.request import SamplingParams
from qnext.kernels.dispatch import use_backend
from tests.engine.slow_device import Always
from tests.engine.tiny import greedy, id_prompts, step_by_step, tiny_llm, tiny_model, token_ids
from tests.kernels.triton_env import DEVICE, IS_INTERPRETED

pytest.importorskip("triton")

NUM_TOKENS = 6 if IS_INTERPRETED else 40


@pytest.fixture(scope="module")
def model():
    return tiny_model().to(DEVICE)


@pytest.fixture
def triton_steps(monkeypatch):
    """The GPU's whole steps, on a CPU under the interpreter."""
    if IS_INTERPRETED:
        monkeypatch.setattr(fused, "_KERNELS_CPU", fused._KERNELS_GPU)
        monkeypatch.setattr(fused, "_ROUNDS_CPU", fused._ROUNDS_GPU)
    with use_backend("triton", op="decode_step"):
        yield


def expected_tokens(model, prompts, params, num_drafts):
    with use_backend("reference", op="decode_step"):
        llm = tiny_llm(model, num_speculative_tokens=num_drafts)
        return token_ids(llm.generate(prompts, params))


@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("goes_on", [False, True])
def test_greedy_text_is_that_of_the_layers(model, triton_steps, num_drafts, goes_on):
    prompts, params = id_prompts(3, 17, 9), greedy(NUM_TOKENS)
    expected = expected_tokens(model, prompts, params, 0)
    llm = tiny_llm(model, num_speculative_tokens=num_drafts)
    if not goes_on:
        step_by_step(llm)
    assert token_ids(llm.generate(prompts, params)) == expected
    if num_drafts:
        assert llm.engine.metrics.num_accepted_tokens > 0


def test_sampled_text_is_that_of_the_layers(model, triton_steps):
    prompts = id_prompts(3, 12)
    params = [
        SamplingParams(max_tokens=NUM_TOKENS, seed=3),
        SamplingParams(max_tokens=NUM_TOKENS, temperature=0.7, top_k=20, top_p=0.9, seed=5),
    ]
    expected = expected_tokens(model, prompts, params, 0)
    llm = tiny_llm(model, num_speculative_tokens=0)
    assert token_ids(llm.generate(prompts, params)) == expected


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_penalised_text_is_that_of_the_layers(model, triton_steps, num_drafts):
    # The third sequence comes into the slot of the first or second.
    prompts, length = id_prompts(5, 12, 5), NUM_TOKENS
    params = [
        greedy(length - 2, repetition_penalty=1.4),
        greedy(length, repetition_penalty=1.1, presence_penalty=2, frequency_penalty=2),
        greedy(length - 1, repetition_penalty=1.4),
    ]
    expected = expected_tokens(model, prompts, params, 0)
    plain = expected_tokens(model, prompts, [greedy(length)] * 3, 0)
    assert all(ours != text[: len(ours)] for ours, text in zip(expected, plain, strict=True))
    llm = tiny_llm(model, num_speculative_tokens=num_drafts, max_num_seqs=2)
    several_rounds(llm)
    assert token_ids(llm.generate(prompts, params)) == expected
    (captured, *_) = llm.engine.runner.captured_rounds()
    assert captured.counts is not None


def test_states_settle_to_those_of_the_layers(model, triton_steps):
    prompt, params = id_prompts(9), greedy(NUM_TOKENS)
    found = []
    for backend in ("triton", "reference"):
        with use_backend(backend, op="decode_step"):
            llm = tiny_llm(model, num_speculative_tokens=2, max_num_seqs=1)
            llm.generate(prompt, params)
            llm.engine.runner.settle()
            pool = llm.engine.runner.cache.state_pool
            found.append((pool.recurrent_state[:, 0].clone(), pool.conv_state[:, 0].clone()))
    # One may have drafted beyond the other's end, but both texts ended with the same token.
    for ours, expected in zip(*found, strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 1e-4


def test_convolutions_that_the_kernel_does_not_take_are_left_to_the_layers(triton_steps):
    from dataclasses import replace

    from qnext.kernels.decode_step import triton_fwd

    step = tiny_llm(tiny_model().to(DEVICE)).engine.runner._fused.trunk
    assert triton_fwd._objection(step) is None
    step.config = replace(step.config, linear_conv_kernel_dim=5)
    assert "convolutions of 5 taps" in triton_fwd._objection(step)


def several_rounds(llm, num_rounds=2):
    """Calls of as many rounds as this, whatever a step takes; notes which ones overlap."""
    overlaps = []
    go_on = llm.engine.runner.go_on
    llm.engine._step_seconds = Always(num_rounds)
    llm.engine.runner.go_on = lambda *args: overlaps.append(1) or go_on(*args)
    return overlaps


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_calls_behind_calls_that_nobody_has_read_write_the_same_text(
    model, triton_steps, monkeypatch, num_drafts
):
    from qnext.kernels.decode_step import cuda_rounds

    length = 2 * NUM_TOKENS
    prompts = id_prompts(7, 3)
    (stopped,) = expected_tokens(model, prompts[1], greedy(length), 0)
    params = [
        SamplingParams(max_tokens=length, temperature=0.7, top_k=20, top_p=0.9, seed=5),
        greedy(length, stop_token_ids=[stopped[NUM_TOKENS]]),
    ]
    found, num_overlaps = [], []
    for may_overlap in (True, False):
        if not may_overlap:
            monkeypatch.setattr(cuda_rounds.GraphRounds, "can_go_on", False)
        llm = tiny_llm(model, num_speculative_tokens=num_drafts)
        overlaps = several_rounds(llm, num_rounds=1 if num_drafts else 2)
        found.append(token_ids(llm.generate(prompts, params)))
        num_overlaps.append(len(overlaps))
        assert llm.engine.scheduler.pages.num_free == llm.engine.scheduler.limits.num_pages
    assert found[0] == found[1]
    assert found[0][1] == stopped[: stopped.index(stopped[NUM_TOKENS]) + 1]
    assert num_overlaps[0] > 0 and not num_overlaps[1]


def test_states_may_be_settled_and_weights_read_while_a_call_runs(model, triton_steps):
    prompts, params = id_prompts(3, 9), greedy(2 * NUM_TOKENS)
    llm = tiny_llm(model, num_speculative_tokens=0)
    several_rounds(llm)
    requests = llm._requests(prompts, params)
    for request in requests:
        llm.engine.add(request)
    interrupts = [llm.engine.runner.settle, llm.engine.runner.read_weights]
    while llm.engine.has_work:
        llm.engine.step()
        if interrupts and llm.engine._flights:
            interrupts.pop()()
    assert not interrupts, "calls must have been on their way"
    found = [request.output_token_ids for request in requests]
    assert found == expected_tokens(model, prompts, params, 0)
