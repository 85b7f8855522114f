"""The engine with a real, tiny model: the same tokens in any company, with any number of drafts."""

import numpy as np
import pytest
import torch

from qnext.engine.request import SamplingParams
from qnext.engine.speculative import Drafts
from tests.engine.tiny import (
    greedy,
    id_prompts,
    step_by_step,
    tiny_llm,
    tiny_model,
    token_ids,
)

BACKENDS = ("numba", "torch", "reference")

# Around the chunk size of 16, the window size, and a page of 8; they finish at different times.
PROMPT_LENGTHS = (1, 3, 17, 40, 5, 16, 33, 9)
ANSWER_LENGTHS = (20, 1, 13, 7, 18, 2, 11, 16)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompts():
    return id_prompts(*PROMPT_LENGTHS)


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Greedy answers of each prompt by itself, without drafts."""
    llm = tiny_llm(model, max_num_seqs=1, num_speculative_tokens=0)
    return [
        llm.generate(prompt, greedy(length))[0].outputs[0].token_ids
        for prompt, length in zip(prompts, ANSWER_LENGTHS, strict=True)
    ]


def all_params(**options) -> list[SamplingParams]:
    return [greedy(length, **options) for length in ANSWER_LENGTHS]


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("max_num_seqs", [1, 3, 8])
def test_greedy_tokens_are_the_same_in_any_company(model, prompts, alone, num_drafts, max_num_seqs):
    llm = tiny_llm(model, max_num_seqs=max_num_seqs, num_speculative_tokens=num_drafts)
    assert token_ids(llm.generate(prompts, all_params())) == alone
    if num_drafts:
        assert 0.1 < llm.engine.metrics.acceptance_rate < 0.95, "both outcomes must be exercised"


@pytest.mark.parametrize("num_seqs", range(1, 9))
def test_greedy_tokens_are_the_same_for_every_number_of_sequences(model, prompts, alone, num_seqs):
    llm = tiny_llm(model, max_num_seqs=8, num_speculative_tokens=num_seqs % 5)
    outputs = llm.generate(prompts[-num_seqs:], all_params()[-num_seqs:])
    assert token_ids(outputs) == alone[-num_seqs:]


def test_auto_writes_what_no_drafts_write(model, prompts, alone):
    llm = tiny_llm(model, num_speculative_tokens="auto")
    for _ in range(3):  # the choice moves while it learns
        assert token_ids(llm.generate(prompts, all_params())) == alone
    assert len(llm.engine.metrics.num_steps_by_speculation) > 1


def test_greedy_tokens_are_those_of_one_pass_over_the_text(model, prompts, alone):
    for prompt, answer in zip(prompts, alone, strict=True):
        ids = prompt["prompt_token_ids"]
        logits = model.logits(torch.tensor(ids + answer))[len(ids) - 1 : -1]
        gap = logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert gap.max() < 1e-3 * logits.abs().max()


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_greedy_penalties_and_logprobs_do_not_depend_on_drafts(
    model, prompts, num_drafts, max_num_seqs
):
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    params = greedy(12, logprobs=2, **penalties)
    reference = tiny_llm(model, max_num_seqs=1, num_speculative_tokens=0)
    llm = tiny_llm(model, max_num_seqs=max_num_seqs, num_speculative_tokens=num_drafts)
    expected = reference.generate(prompts[:4], params)
    found = llm.generate(prompts[:4], params)
    assert token_ids(found) == token_ids(expected)
    assert [o.outputs[0].logprobs for o in found] == [o.outputs[0].logprobs for o in expected]
    plain = token_ids(llm.generate(prompts[:4], greedy(12)))
    assert plain != token_ids(found), "the penalties must matter here"


def test_logprobs_are_of_the_raw_distribution(model, prompts):
    params = SamplingParams(temperature=0.5, top_k=5, max_tokens=6, logprobs=1, seed=1)
    (output,) = tiny_llm(model, num_speculative_tokens=2).generate(prompts[2], params)
    completion = output.outputs[0]
    ids = output.prompt_token_ids + completion.token_ids
    exact = torch.log_softmax(model.logits(torch.tensor(ids)).double(), dim=-1)
    for idx, (token_id, found) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        row = exact[len(output.prompt_token_ids) - 1 + idx]
        assert found[token_id].logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        assert len(found) in (1, 2)
    total = sum(
        f[i].logprob for f, i in zip(completion.logprobs, completion.token_ids, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_seed_gives_the_same_text_in_any_company(model, prompts, num_drafts):
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, max_tokens=length, seed=100 + idx)
        for idx, length in enumerate(ANSWER_LENGTHS)
    ]
    llm = tiny_llm(model, max_num_seqs=8, num_speculative_tokens=num_drafts, seed=1)
    together = token_ids(llm.generate(prompts, params))
    small = tiny_llm(model, max_num_seqs=1, num_speculative_tokens=num_drafts, seed=2)
    assert [token_ids(small.generate(p, s))[0] for p, s in zip(prompts, params, strict=True)] == (
        together
    )
    assert token_ids(llm.generate(prompts[::-1], params[::-1])) == together[::-1]
    other = [SamplingParams(temperature=0.9, top_p=0.95, max_tokens=20, seed=7)]
    assert token_ids(llm.generate(prompts[:1], other))[0] != together[0]


def test_requests_without_a_seed_differ_and_follow_the_models_seed(model, prompts):
    params = SamplingParams(max_tokens=12)
    first, second = (tiny_llm(model, num_speculative_tokens=2, seed=5) for _ in range(2))
    answers = token_ids(first.generate([prompts[4]] * 3, params))
    assert len({tuple(answer) for answer in answers}) == 3
    assert token_ids(second.generate([prompts[4]] * 3, params)) == answers
    assert token_ids(first.generate([prompts[4]] * 3, params)) != answers


def small_pool(model, num_pages: int, num_drafts: int, **options):
    """An engine whose pool has exactly num_pages pages of 8 tokens."""
    probe = tiny_llm(model, num_speculative_tokens=num_drafts).engine
    page_bytes = 2 * probe.runner.cache.kv_pool.k[:, :8].nbytes
    return tiny_llm(
        model,
        max_model_len=64,
        num_speculative_tokens=num_drafts,
        kv_cache_memory_bytes=num_pages * page_bytes,
        **options,
    )


@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_preempted_sequences_write_the_same_text(model, prompts, num_drafts, temperature):
    params = SamplingParams(temperature=temperature, max_tokens=22, seed=3)
    roomy = tiny_llm(model, num_speculative_tokens=num_drafts)
    tight = small_pool(model, 9, num_drafts)
    chosen = [prompts[0], prompts[2], prompts[4], prompts[7]]
    expected, found = roomy.generate(chosen, params), tight.generate(chosen, params)
    assert tight.engine.metrics.num_preemptions > 0, "pages must have run out"
    assert token_ids(found) == token_ids(expected)
    assert any(output.metrics.num_preemptions for output in found)


def test_all_memory_is_free_after_all_have_finished(model, prompts):
    for llm in (tiny_llm(model, num_speculative_tokens=3), small_pool(model, 12, 3)):
        llm.generate(prompts, all_params())
        scheduler = llm.engine.scheduler
        assert scheduler.pages.num_free == scheduler.limits.num_pages
        assert scheduler.slots.num_free == scheduler.limits.max_num_seqs
        assert not llm.engine.runner._pending


def cache_after(llm, prompt, max_tokens):
    """The sequence's part of the cache just before it is given back."""
    taken = {}
    release = llm.engine.scheduler.release

    def snapshot(requests):
        llm.engine.runner.settle()
        for request in requests:
            cache, slot = llm.engine.runner.cache, request.state_slot
            rows = [
                request.page_ids[p // cache.page_size] * cache.page_size + p % cache.page_size
                for p in range(request.num_computed)
            ]
            main_layers = slice(0, cache.mtp_layer_idx)
            taken["num_computed"] = request.num_computed
            taken["keys"] = cache.kv_pool.k[main_layers, rows].clone()
            taken["values"] = cache.kv_pool.v[main_layers, rows].clone()
            taken["conv_state"] = cache.state_pool.conv_state[:, slot].clone()
            taken["recurrent_state"] = cache.state_pool.recurrent_state[:, slot].clone()
        release(requests)

    llm.engine.scheduler.release = snapshot
    llm.generate(prompt, greedy(max_tokens))
    return taken


@pytest.mark.parametrize("kind", ["own", "always wrong", "sometimes right"])
def test_a_rejection_leaves_no_trace_in_the_cache(model, prompts, alone, kind):
    prompt, answer = prompts[4], alone[4]
    plain = cache_after(tiny_llm(model, num_speculative_tokens=0), prompt, 18)
    drafting = tiny_llm(model, num_speculative_tokens=4)
    if kind != "own":
        num_prompt = PROMPT_LENGTHS[4]

        def draft(requests, num_drafts):
            at = requests[0].num_tokens - num_prompt
            right = answer[at : at + num_drafts[0]]
            num_right = 0 if kind == "always wrong" else at % 4
            ids = [i if idx < num_right else (i + 1) % 96 for idx, i in enumerate(right)]
            return [Drafts(ids, [None] * len(ids))]

        step_by_step(drafting).engine.runner.draft = draft
    drafted = cache_after(drafting, prompt, 18)
    assert drafting.engine.metrics.num_accepted_tokens < drafting.engine.metrics.num_draft_tokens
    assert drafted.pop("num_computed") == plain.pop("num_computed") == len(answer) + 5 - 1
    for name, tensor in plain.items():
        assert torch.equal(drafted[name], tensor), name


def test_drafts_are_what_mtp_logits_give(model, prompts):
    llm = step_by_step(tiny_llm(model, num_speculative_tokens=3))
    seen = []
    draft = llm.engine.runner.draft

    def spy(requests, num_drafts):
        drafts = draft(requests, num_drafts)
        seen.extend((list(r.token_ids), d.token_ids) for r, d in zip(requests, drafts, strict=True))
        return drafts

    llm.engine.runner.draft = spy
    llm.generate([prompts[3], prompts[6]], greedy(10))
    assert len(seen) > 5
    for known, drafted in seen:
        ids = torch.tensor(known + drafted)
        logits = model.mtp_logits(ids, k=len(drafted))[len(known) - 2]  # [k, W]
        for depth, token_id in enumerate(drafted):
            gap = logits[depth].max() - logits[depth, token_id]
            assert gap < 1e-3 * logits[depth].abs().max()


SAMPLED = {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"min_p": 0.2}


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_rounds_in_a_kernel_decide_what_python_decides(
    model, prompts, monkeypatch, num_drafts, count
):
    """Bit for bit: greedy and sampled texts, drafts tested, alone and in company."""
    from qnext.engine import engine

    params = [greedy(40), *(SamplingParams(max_tokens=40, **options) for options in SAMPLED)]
    found = []
    for ahead_seconds in (None, 0.0, 10.0):
        monkeypatch.setattr(engine, "AHEAD_SECONDS", ahead_seconds or 0.0)
        llm = tiny_llm(model, max_num_seqs=count, num_speculative_tokens=num_drafts)
        if ahead_seconds is None:
            step_by_step(llm)
        found.append(token_ids(llm.generate(prompts[:4], params)))
        if num_drafts:
            assert 0.1 < llm.engine.metrics.acceptance_rate < 0.95, "both outcomes must occur"
    assert found[0] == found[1] == found[2]


def test_sampled_tokens_are_the_same_in_any_company(model, prompts):
    params = [SamplingParams(max_tokens=20, seed=n, top_p=0.9) for n in range(len(prompts))]
    penalized = SamplingParams(max_tokens=20, seed=99, repetition_penalty=1.1, logprobs=1)
    alone = [
        token_ids(tiny_llm(model, num_speculative_tokens=2).generate([prompt], [one]))[0]
        for prompt, one in zip(prompts, params, strict=True)
    ]
    # The last of these keeps its company from being decided in a kernel.
    llm = tiny_llm(model, max_num_seqs=8, num_speculative_tokens=2)
    together = token_ids(llm.generate([*prompts, prompts[0]], [*params, penalized]))
    assert together[:-1] == alone


def test_numbers_of_drafts_and_of_sequences_may_change_in_any_order(model, prompts, monkeypatch):
    llm = tiny_llm(model, num_speculative_tokens=4, max_num_seqs=8)
    expected = token_ids(llm.generate(prompts, all_params()))
    other = tiny_llm(model, num_speculative_tokens=4, max_num_seqs=8)
    for num_drafts, count in ((4, 1), (0, 3), (2, 2), (0, 8), (4, 8)):
        monkeypatch.setattr(other.engine.speculation, "max_drafts", num_drafts)
        found = token_ids(other.generate(prompts[:count], all_params()[:count]))
        assert found == expected[:count]


def test_a_seed_may_be_an_integer_of_any_kind(model, prompts):
    def text(seed):
        llm = tiny_llm(model, num_speculative_tokens=0)
        return token_ids(llm.generate(prompts[3], SamplingParams(max_tokens=8, seed=seed)))

    assert text(np.int64(5)) == text(np.int32(5)) == text(5)


def test_weights_that_are_no_numbers_are_reported_at_the_first_token(prompts):
    broken = tiny_model()
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    for params in (greedy(1), greedy(5), SamplingParams(max_tokens=1)):
        with pytest.raises(ValueError, match="logits are not numbers"):
            tiny_llm(broken, num_speculative_tokens=0).generate(prompts[3], params)


@pytest.mark.parametrize("ahead_seconds", [0.0, 0.004])
def test_hidden_rows_put_off_are_worked_off_in_time(model, prompts, monkeypatch, ahead_seconds):
    from qnext.engine import engine, runner

    monkeypatch.setattr(runner, "MAX_PENDING_ROWS", 6)
    monkeypatch.setattr(engine, "AHEAD_SECONDS", ahead_seconds)
    llm = tiny_llm(model, num_speculative_tokens=3)
    speculation = llm.engine.speculation
    first = 9 if not ahead_seconds else 1  # several tokens each, when steps go on by themselves
    counts = iter([0] * first + [3] * 3 + [0] * 2 + [1] * 100)
    monkeypatch.setattr(speculation, "choose", lambda num_seqs: next(counts))
    monkeypatch.setattr(speculation, "is_drafting", False)
    accepted = tiny_llm(model, num_speculative_tokens=3)
    expected = accepted.generate(prompts[3], greedy(80))
    assert token_ids(llm.generate(prompts[3], greedy(80))) == token_ids(expected)
    assert llm.engine.metrics.acceptance_rate > 0.1


def test_steps_that_go_on_by_themselves_end_where_an_answer_ends(
    model, prompts, monkeypatch, backend
):
    """The same tokens and reasons as one step at a time, for each way in which an answer ends."""
    from qnext.engine import engine

    vocabulary = range(96)
    params = [
        greedy(60),
        greedy(60, stop_token_ids=[token for token in vocabulary if token % 9 == 0]),
        greedy(7),
        SamplingParams(temperature=0.0, max_tokens=30, repetition_penalty=1.3),
    ]
    found = []
    for ahead_seconds in (0.0, 10.0):
        monkeypatch.setattr(engine, "AHEAD_SECONDS", ahead_seconds)
        llm = tiny_llm(model, num_speculative_tokens=0)
        calls = []
        launch = llm.engine.runner.launch_rounds
        monkeypatch.setattr(
            llm.engine.runner,
            "launch_rounds",
            lambda *args, launch=launch, calls=calls: calls.append(launch(*args)) or calls[-1],
        )
        outputs = [
            output.outputs[0]
            for group in (params[:1], params[:3], params[3:], params)
            for output in llm.generate([prompts[i] for i in range(len(group))], group)
        ]
        found.append([(o.token_ids, o.finish_reason, o.stop_reason) for o in outputs])
        longest = max(len(out.read().token_ids) if out else 0 for out in calls)
        assert (longest > 4) == (backend == "numba" and ahead_seconds > 0)
    assert found[0] == found[1]
