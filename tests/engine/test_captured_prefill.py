"""Whole prompts filled up to the length of a graph."""

import pytest
import torch

from qnext.cache.hybrid import HybridCache
from qnext.engine import first_pass
from qnext.engine.captured_prefill import (
    MAX_GRAPHS,
    MAX_ROWS,
    CapturedPrefill,
    objection,
    padded_rows,
)
from qnext.engine.inputs import SequenceRows, build_batch
from qnext.engine.llm import LLM
from qnext.engine.request import Request
from qnext.engine.scheduler import PromptPart
from qnext.engine.text import OutputText
from qnext.kernels.dispatch import use_backend
from tests.engine.tiny import greedy, id_prompts, tiny_config, tiny_model, token_ids

PAGE_SIZE = 8
NUM_PAGES = 40


def make_request(num_tokens):
    (prompt,) = id_prompts(num_tokens)
    request = Request(
        request_id=str(num_tokens),
        prompt_token_ids=prompt["prompt_token_ids"],
        params=greedy(3),
        seed=0,
        max_total_tokens=num_tokens + 3,
        output_text=OutputText(None),
    )
    request.state_slot = 2
    pages = list(range(NUM_PAGES - 1))[::-1]  # in no order that could come by chance
    request.page_ids = pages[: -(-num_tokens // PAGE_SIZE)]
    return request


def make_cache(filled_with=0.0):
    cache = HybridCache(
        tiny_config(),
        has_mtp=False,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_state_slots=3,
        max_window=1,
        dtype=torch.float32,
    )
    for part in (cache.kv_pool.k, cache.kv_pool.v):
        part.fill_(filled_with)
    return cache


@pytest.fixture
def passes_for_nothing(monkeypatch):
    """What a pass without launches leaves behind on a GPU, a whole pass does here."""
    passes = []

    def run_for_nothing(run, device):
        passes.append(device)
        run()
        return True

    monkeypatch.setattr(first_pass, "compile_ahead_of", run_for_nothing)
    return passes


def test_what_a_pass_before_the_first_leaves_in_states_is_not_read(passes_for_nothing):
    results = []
    for has_compiled in (True, False):
        request, cache = make_request(19), make_cache()
        prefill = CapturedPrefill(tiny_model(has_mtp=False), cache)
        prefill._first_pass.is_over = has_compiled
        with torch.inference_mode():
            found = prefill.run(request)
        results.append([*(x.clone() for x in found), *cache.state_pool.tensors()])
        assert len(passes_for_nothing) == (0 if has_compiled else 1)
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_plain_passes_are_gone_through_before_the_first_alone(passes_for_nothing):
    texts = []
    for has_compiled in (True, False):
        llm = LLM.from_model(tiny_model(), max_model_len=64)
        llm.engine.runner._first_pass.is_over = has_compiled
        texts.append([token_ids(llm.generate(id_prompts(20, 9), greedy(6))) for _ in range(2)])
    assert texts[0] == texts[1]
    assert len(passes_for_nothing) == 1


def test_few_lengths_take_all_prompts_and_fill_up_an_eighth_at_most():
    found = [padded_rows(num_tokens) for num_tokens in range(1, MAX_ROWS + 1)]
    assert len(set(found)) <= MAX_GRAPHS
    for num_tokens, num_rows in enumerate(found, start=1):
        assert 0 <= num_rows - num_tokens < max(64, num_tokens / 8)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 130])
def test_what_fills_up_leaves_no_trace(num_tokens):
    model, request = tiny_model(has_mtp=False), make_request(num_tokens)
    plain, captured = make_cache(), make_cache()
    rows = SequenceRows(request, request.prompt_array, 0)
    batch = build_batch([rows], PAGE_SIZE, torch.device("cpu"), is_window=False)
    prefill = CapturedPrefill(model, captured)
    assert prefill.takes([PromptPart(request, 0, num_tokens)])
    with torch.inference_mode():
        expected = model(batch, plain)
        for _ in range(2):
            captured.state_pool.reset(torch.tensor([2]))
            hidden, logits = prefill.run(request)
        expected_logits = model.compute_logits(expected[-1:])
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits, expected_logits, atol=1e-3, rtol=1e-4)
    pairs = zip(plain.state_pool.tensors(), captured.state_pool.tensors(), strict=True)
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    own = slice(0, (NUM_PAGES - 1) * PAGE_SIZE)  # all but the page for what fills up
    for theirs, ours in (
        (plain.kv_pool.k, captured.kv_pool.k),
        (plain.kv_pool.v, captured.kv_pool.v),
    ):
        torch.testing.assert_close(ours[:, own], theirs[:, own], atol=2e-5, rtol=1e-4)


def test_without_memory_for_a_graph_prompts_go_on_uncaptured(monkeypatch, caplog):
    prefill, request = CapturedPrefill(tiny_model(has_mtp=False), make_cache()), make_request(70)
    refused = []

    def record(prompt):
        refused.append(prompt.token_ids.shape[0])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore words.")

    monkeypatch.setattr(prefill, "is_capturing", True)
    monkeypatch.setattr(prefill, "_record", record)
    logits = []
    with torch.inference_mode():
        for _ in range(4):
            prefill.cache.state_pool.reset(torch.tensor([2]))
            logits.append(prefill.run(request)[1].clone())
    assert all(torch.equal(again, logits[0]) for again in logits)
    assert refused == [128]
    (message,) = caplog.messages
    assert "128 tokens did not fit: CUDA out of memory. Tried to allocate 3 GiB." in message
    assert "More" not in message


def test_a_part_of_a_prompt_and_several_prompts_are_not_taken():
    prefill = CapturedPrefill(tiny_model(has_mtp=False), make_cache())
    first, second = make_request(20), make_request(9)
    assert not prefill.takes([PromptPart(first, 0, 16)])
    assert not prefill.takes([PromptPart(first, 16, 20)])
    assert not prefill.takes([PromptPart(first, 0, 20), PromptPart(second, 0, 9)])
    assert prefill.takes([PromptPart(second, 0, 9)])
    with use_backend("torch"):  # a captured pass would go on with the kernels that it knows
        assert not prefill.takes([PromptPart(second, 0, 9)])


def test_models_whose_delta_rule_is_not_triton_s_are_left_to_plain_passes():
    assert "on cpu" in objection(tiny_model(has_mtp=False))


@pytest.mark.gpu
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_captured_prompt_has_the_text_and_bits_of_the_first_pass(num_drafts):
    model = tiny_model().to("cuda", torch.bfloat16)
    llm = LLM.from_model(
        model, max_model_len=400, max_num_seqs=4, num_speculative_tokens=num_drafts
    )
    prompts = id_prompts(100, 70, 300, 128, 1, 127)
    alone = [[token_ids(llm.generate([prompt], greedy(12)))[0] for prompt in prompts]]
    for _ in range(3):
        alone.append([token_ids(llm.generate([prompt], greedy(12)))[0] for prompt in prompts])
    assert all(texts == alone[0] for texts in alone)
    captured = llm.engine.runner._captured
    graphs = [prompt.graph for prompt in captured._prompts.values()]
    assert len(graphs) == 3
    assert all(graph is not None for graph in graphs)
    del graphs  # the last that holds them once weights are replaced is the engine
    model.norm.weight.data = model.norm.weight.data.clone() + 0.5
    changed = [token_ids(llm.generate([prompt], greedy(12)))[0] for prompt in prompts]
    fresh = LLM.from_model(
        model, max_model_len=400, max_num_seqs=4, num_speculative_tokens=num_drafts
    )
    again = [token_ids(llm.generate([prompt], greedy(12)))[0] for prompt in prompts]
    assert changed == again
    assert changed == [token_ids(fresh.generate([p], greedy(12)))[0] for p in prompts]


@pytest.mark.gpu
def test_a_model_in_float64_runs_without_captured_prompts():
    model = tiny_model().to("cuda", torch.float64)
    assert "float64" in objection(model)
    llm = LLM.from_model(model, max_model_len=200, max_num_seqs=2, num_speculative_tokens=0)
    texts = [token_ids(llm.generate(id_prompts(65), greedy(8))) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]
