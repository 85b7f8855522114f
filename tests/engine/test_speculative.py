"""Speculation keeps the distribution; the choice of how many drafts costs next to nothing."""

import itertools

import numpy as np
import pytest
import torch

from qnext.engine.llm import LLM
from qnext.engine.request import SamplingParams
from qnext.engine.speculative import AutoSpeculation
from qnext.kernels.decide_token import reference
from qnext.kernels.dispatch import use_backend
from tests.engine.markov import MarkovModel, chi_square_p_value, exact_distribution
from tests.engine.tiny import tiny_model

BACKENDS = ("numba", "torch", "reference")

VOCAB_SIZE = 4
PROMPT = [1, 2]
NUM_TOKENS = 3


def sampled_answers(model, params, seed, num_drafts=3, count=1500):
    llm = LLM.from_model(
        model,
        max_model_len=16,
        max_num_seqs=200,
        page_size=16,
        seed=seed,
        num_speculative_tokens=num_drafts,
    )
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * count, params)
    return [tuple(output.outputs[0].token_ids) for output in outputs], llm


@pytest.mark.parametrize("seed", range(5))
def test_sampled_text_with_drafts_has_the_exact_distribution(seed):
    model = MarkovModel(VOCAB_SIZE, seed=23)
    params = SamplingParams(max_tokens=NUM_TOKENS)
    answers, llm = sampled_answers(model, params, seed)
    assert 0.05 < llm.engine.metrics.acceptance_rate < 0.95, "both outcomes must be exercised"
    expected = exact_distribution(model, PROMPT, params, NUM_TOKENS)
    assert chi_square_p_value(answers, expected) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 1.0},
    ],
)
def test_transforms_and_penalties_hold_at_every_place_of_the_window(options):
    model = MarkovModel(VOCAB_SIZE, seed=23)
    params = SamplingParams(max_tokens=NUM_TOKENS, **options)
    answers, _ = sampled_answers(model, params, seed=3)
    expected = exact_distribution(model, PROMPT, params, NUM_TOKENS)
    assert chi_square_p_value(answers, expected) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_test_notices_a_residual_replaced_by_the_target(monkeypatch, seed):
    monkeypatch.setattr(reference, "residual_weights", lambda target, draft: target)
    model = MarkovModel(VOCAB_SIZE, seed=23)
    params = SamplingParams(max_tokens=NUM_TOKENS)
    with use_backend("reference", op="decide_token"):
        answers, _ = sampled_answers(model, params, seed)
    expected = exact_distribution(model, PROMPT, params, NUM_TOKENS)
    assert chi_square_p_value(answers, expected) < 1e-3


def test_a_draft_like_the_target_is_always_accepted():
    model = MarkovModel(VOCAB_SIZE)
    model.draft = model.target
    _, llm = sampled_answers(model, SamplingParams(max_tokens=NUM_TOKENS), seed=0, count=50)
    assert llm.engine.metrics.acceptance_rate == 1.0


def simulated_speed(policy, costs, acceptance, num_steps, rng, num_seqs=1):
    """Tokens per unit of time of a policy on a machine with noisy steps."""
    tokens = seconds = 0.0
    for _ in range(num_steps):
        num_drafts = policy.choose(num_seqs)
        cost = costs[num_drafts] * (1 + 0.05 * rng.random() + (rng.random() < 0.02) * 2)
        outcomes = []
        for _ in range(num_seqs):
            accepted = 0
            while accepted < num_drafts and rng.random() < acceptance[accepted]:
                accepted += 1
            outcomes.append((num_drafts, accepted))
            tokens += accepted + 1
        seconds += cost
        policy.record(num_seqs, num_drafts, cost, outcomes)
    return tokens / seconds


@pytest.mark.parametrize(
    "name, costs, acceptance",
    [
        ("drafts are useless", [1.0, 1.6, 2.2, 2.8, 3.4], [0.02, 0.02, 0.02, 0.02]),
        ("drafts are dear", [1.0, 2.0, 3.0, 4.0, 5.0], [0.8, 0.7, 0.6, 0.6]),
        ("drafts are cheap and right", [1.0, 1.1, 1.2, 1.3, 1.4], [0.9, 0.9, 0.9, 0.9]),
        ("one draft is best", [1.0, 1.25, 1.7, 2.2, 2.7], [0.7, 0.4, 0.3, 0.2]),
        ("two drafts are best", [1.0, 1.15, 1.3, 1.7, 2.2], [0.8, 0.7, 0.3, 0.2]),
        ("nothing matters", [1.0, 1.5, 2.0, 2.5, 3.0], [0.5, 0.99, 0.99, 0.99]),
    ],
)
def test_auto_keeps_up_with_off_and_with_the_best_fixed_number(name, costs, acceptance):
    expected = [1 + sum(np.prod(acceptance[:j]) for j in range(1, k + 1)) for k in range(5)]
    best = max(tokens / cost for tokens, cost in zip(expected, costs, strict=True))
    mean_noise = 1 + 0.025 + 0.04
    speeds = []
    for seed in range(15):
        policy = AutoSpeculation(4)
        speeds.append(simulated_speed(policy, costs, acceptance, 600, np.random.default_rng(seed)))
    median = float(np.median(speeds)) * mean_noise
    assert median >= 0.97 / costs[0], f"{name}: {median} against off"
    assert median >= 0.95 * best, f"{name}: {median} against {best}"


def test_auto_follows_when_acceptance_changes():
    policy, rng = AutoSpeculation(4), np.random.default_rng(0)
    costs = [1.0, 1.2, 1.4, 1.6, 1.8]
    simulated_speed(policy, costs, [0.0] * 4, 300, rng)
    assert policy.choose(1) <= 1
    simulated_speed(policy, costs, [0.95] * 4, 1500, rng)
    assert policy.choose(1) >= 3


def test_auto_shares_what_it_knows_with_other_batch_sizes():
    policy, rng = AutoSpeculation(4), np.random.default_rng(0)
    costs = [1.0, 1.1, 1.2, 1.3, 1.4]
    simulated_speed(policy, costs, [0.9] * 4, 600, rng, num_seqs=8)
    assert policy.rate(3, 4) > policy.rate(3, 0)
    assert AutoSpeculation(4).rate(1, 2) is None


def test_the_real_models_sampled_text_has_its_exact_distribution():
    model = tiny_model(vocab_size=4, seed=2)
    params = SamplingParams(max_tokens=3, temperature=1.5)
    llm = LLM.from_model(
        model, max_model_len=16, max_num_seqs=64, page_size=16, num_speculative_tokens=1
    )
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 400, params)
    answers = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert 0.05 < llm.engine.metrics.acceptance_rate < 0.95, "both outcomes must be exercised"
    expected = {}
    for answer in itertools.product(range(4), repeat=3):
        logits = model.logits(torch.tensor([*PROMPT, *answer[:2]])).double()
        probs = (logits / params.temperature).softmax(-1)[len(PROMPT) - 1 :]
        expected[answer] = float(torch.stack([probs[j, i] for j, i in enumerate(answer)]).prod())
    assert chi_square_p_value(answers, expected) > 1e-3


def test_auto_tries_seldom_when_a_trial_has_much_to_catch_up_with():
    rng = np.random.default_rng(0)
    num_trials = []
    for deferred_seconds in (0.0, 5.0):
        policy, drafted = AutoSpeculation(4), 0
        for _ in range(2000):
            num_drafts = policy.choose(1)
            drafted += num_drafts > 0
            cost = [1.0, 1.6, 2.2, 2.8, 3.4][num_drafts] + 0.01 * rng.random()
            deferred = deferred_seconds if num_drafts else 0.0
            policy.record(1, num_drafts, cost, [(num_drafts, 0)], deferred)
        num_trials.append(drafted)
    assert 0 < num_trials[1] < num_trials[0] / 3
