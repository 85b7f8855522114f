"""The Python interface: shapes of inputs and outputs, and refusals before any work."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qnext.config.generation import GenerationConfig
from qnext.engine.llm import LLM
from qnext.engine.request import SamplingParams
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next
from tests.engine.tiny import greedy, id_prompts, tiny_config, tiny_llm, tiny_model, token_ids

BACKENDS = ("numba", "torch", "reference")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def llm(model):
    return tiny_llm(model, num_speculative_tokens=2)


def test_a_prompt_of_ids_needs_no_tokenizer(llm):
    (output,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, greedy(5))
    assert output.prompt is None
    assert output.prompt_token_ids == [1, 2, 3]
    assert output.finished
    completion = output.outputs[0]
    assert (completion.index, len(completion.token_ids)) == (0, 5)
    assert completion.finish_reason == "length"
    assert completion.finished()
    assert completion.logprobs is None
    assert output.metrics.num_generated_tokens == 5


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = id_prompts(30, 2, 11, 5, 8, 3)
    params = [greedy(length) for length in (2, 9, 4, 1, 6, 3)]
    outputs = llm.generate(prompts, params)
    assert [o.prompt_token_ids for o in outputs] == [p["prompt_token_ids"] for p in prompts]
    assert [len(ids) for ids in token_ids(outputs)] == [2, 9, 4, 1, 6, 3]
    assert len({o.request_id for o in outputs}) == 6


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([{"prompt_token_ids": []}], "prompt 0 is empty"),
        ([{"prompt_token_ids": [1]}, {"prompt_token_ids": [96]}], "prompt 1: token 0 is 96.*95"),
        ([{"prompt_token_ids": [1, -1]}], "prompt 0: token 1 is -1"),
        ([{"prompt_token_ids": [1.5]}], "token 0 is 1.5"),
        ([{"prompt_token_ids": "abc"}], "prompt_token_ids is 'abc'"),
        ([{"text": "abc"}], "prompt 0 is {'text': 'abc'}; want text or"),
        ([7], "prompt 0 is 7; want text or"),
        (["abc"], "a prompt of text needs a tokenizer"),
        ([{"prompt_token_ids": [1] * 128}], "prompt 0 has 128 tokens; max_model_len is 128"),
    ],
)
def test_a_bad_prompt_is_refused_before_any_work(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([{"prompt_token_ids": [5]}, *prompts][-len(prompts) :], greedy(3))
    assert not llm.engine.has_work
    assert llm.engine.metrics.num_prefill_tokens == 0


def test_good_prompts_beside_a_bad_one_are_not_run(llm):
    with pytest.raises(ValueError, match="prompt 1 has 200 tokens"):
        llm.generate(id_prompts(4, 200), greedy(3))
    assert llm.engine.metrics.num_prefill_tokens == 0


def test_numbers_of_params_and_prompts_must_agree(llm):
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate(id_prompts(4, 5), [greedy(3)])


@pytest.mark.parametrize("params", [{"temperature": 0}, [{"temperature": 0}], "greedy", 5])
def test_sampling_params_of_another_kind_are_refused(llm, params):
    with pytest.raises(ValueError, match="sampling_params is .*; want SamplingParams"):
        llm.generate(id_prompts(4), params)


@pytest.mark.parametrize("prompts", [None, 5])
def test_prompts_that_are_no_list_are_refused(llm, prompts):
    with pytest.raises(ValueError, match=f"prompts is {prompts}; want text, or a list"):
        llm.generate(prompts, greedy(3))


def test_numpy_integers_are_token_ids_too(llm):
    (plain,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, greedy(4))
    (output,) = llm.generate({"prompt_token_ids": list(np.array([1, 2, 3]))}, greedy(4))
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert all(type(token_id) is int for token_id in output.prompt_token_ids)


@pytest.mark.parametrize("messages", [None, [], "hi", {"role": "user", "content": "hi"}])
def test_messages_that_are_no_list_are_refused(llm, messages):
    with pytest.raises(ValueError, match="messages is .*; want a list"):
        llm.chat(messages)


def test_template_options_that_repeat_an_argument_are_refused(llm):
    with pytest.raises(ValueError, match="chat_template_kwargs holds 'tools'"):
        llm.chat([{"role": "user", "content": "hi"}], chat_template_kwargs={"tools": []})


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_model_without_attention_layers_runs(num_drafts):
    config = replace(tiny_config(), layer_types=("linear_attention",) * 3)
    model = Qwen3Next(config)
    init_weights(model, config, seed=0)
    outputs = tiny_llm(model, num_speculative_tokens=num_drafts).generate(id_prompts(4), greedy(5))
    assert len(token_ids(outputs)[0]) == 5


def test_an_answer_ends_at_max_model_len(llm):
    (output,) = llm.generate(id_prompts(120), SamplingParams(temperature=0.0, max_tokens=None))
    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_speculative_tokens": -1}, "num_speculative_tokens is -1"),
        ({"num_speculative_tokens": "many"}, "num_speculative_tokens is 'many'"),
        ({"num_speculative_tokens": 17}, 'want "auto" or an integer, 0 to 16'),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"page_size": 0}, "page_size is 0; want an integer, at least 1"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens is 0; want an integer"),
        ({"max_num_seqs": 1.5}, "max_num_seqs is 1.5; want an integer"),
        ({"max_model_len": "long"}, "max_model_len is 'long'; want an integer"),
        ({"max_model_len": 1}, "max_model_len is 1; want an integer, at least 2"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes is 0; want an integer"),
        ({"seed": -1}, "seed is -1; want an integer, 0 to"),
        ({"seed": None}, "seed is None"),
        ({"max_model_len": 513}, "max_model_len is 513; want 2 to 512"),
        (
            {"max_model_len": 100, "kv_cache_memory_bytes": 5000},
            "kv_cache_memory_bytes allows 5,000",
        ),
    ],
)
def test_a_bad_engine_size_is_refused_by_name_and_value(model, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_llm(model, **options)


def test_speculation_without_an_mtp_head_is_an_error_and_auto_means_off():
    plain = tiny_model(has_mtp=False)
    with pytest.raises(ValueError, match="num_speculative_tokens is 2, but .* no MTP head"):
        tiny_llm(plain, num_speculative_tokens=2)
    llm = tiny_llm(plain, num_speculative_tokens="auto")
    assert llm.engine.options.max_drafts == 0
    assert len(token_ids(llm.generate(id_prompts(4), greedy(4)))[0]) == 4


def test_open_sizes_follow_the_model_and_the_budget(model):
    llm = LLM.from_model(model)
    assert (llm.max_model_len, llm.engine.options.max_num_seqs) == (512, 8)
    page_bytes = 64 * 2 * 2 * 2 * 16 * 4  # tokens, k and v, layers with MTP's, heads, size, bytes
    small = LLM.from_model(model, kv_cache_memory_bytes=3 * page_bytes)
    assert (small.max_model_len, small.engine.options.num_pages) == (192, 3)


def test_the_end_token_and_the_defaults_come_from_the_generation_config(model):
    probe = tiny_llm(model, num_speculative_tokens=0)
    answer = token_ids(probe.generate(id_prompts(9), greedy(12)))[0]
    end = answer[7]
    config = GenerationConfig(temperature=0.0, eos_token_id=(end,), max_new_tokens=12)
    llm = tiny_llm(model, num_speculative_tokens=4, generation_config=config)
    (output,) = llm.generate(id_prompts(9))
    assert output.outputs[0].token_ids == answer[: answer.index(end) + 1]
    assert output.outputs[0].finish_reason == "stop"
    (longer,) = llm.generate(id_prompts(9), greedy(12, ignore_eos=True))
    assert longer.outputs[0].token_ids == answer
    assert llm.get_default_sampling_params(temperature=0.5).max_tokens == 12


def test_a_stream_gives_the_same_tokens_and_can_be_left(llm):
    expected = token_ids(llm.generate(id_prompts(7), greedy(15)))[0]
    chunks = list(llm.stream(id_prompts(7)[0], greedy(15)))
    assert chunks[-1].output.finished
    assert chunks[-1].output.outputs[0].token_ids == expected
    lengths = [len(chunk.output.outputs[0].token_ids) for chunk in chunks]
    assert lengths == sorted(set(lengths))
    for _ in llm.stream(id_prompts(7)[0], greedy(15)):
        break
    assert not llm.engine.has_work
    assert llm.engine.scheduler.slots.num_free == 4


def test_streams_may_run_side_by_side(llm):
    first, second = id_prompts(7, 12)
    expected = token_ids(llm.generate([first, second], greedy(10)))
    streams = [llm.stream(first, greedy(10)), llm.stream(second, greedy(10))]
    last = [list(stream)[-1] for stream in streams]
    assert [chunk.output.outputs[0].token_ids for chunk in last] == expected
    interleaved = [llm.stream(first, greedy(10)), llm.stream(second, greedy(10))]
    next(interleaved[0])
    tails = [list(stream)[-1] for stream in interleaved[::-1]][::-1]
    assert [chunk.output.outputs[0].token_ids for chunk in tails] == expected


def test_an_interrupted_call_leaves_the_model_usable(llm, monkeypatch):
    step = llm.engine.step
    calls = iter(range(100))

    def interrupted():
        if next(calls) == 6:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(id_prompts(5, 6, 7), greedy(20))
    monkeypatch.setattr(llm.engine, "step", step)
    assert not llm.engine.has_work
    assert llm.engine.scheduler.pages.num_free == llm.engine.scheduler.pages.size
    assert len(token_ids(llm.generate(id_prompts(5), greedy(4)))[0]) == 4


def test_weights_may_change_between_calls(model):
    llm = tiny_llm(tiny_model(seed=1), num_speculative_tokens=2)
    before = token_ids(llm.generate(id_prompts(9), greedy(10)))
    llm.model.load_state_dict(model.state_dict())
    expected = token_ids(
        tiny_llm(model, num_speculative_tokens=2).generate(id_prompts(9), greedy(10))
    )
    assert token_ids(llm.generate(id_prompts(9), greedy(10))) == expected != before


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match="no-such-model"):
        LLM("no-such-model")
    with pytest.raises(ValueError, match="num_speculative_tokens is 99"):
        LLM("no-such-model", num_speculative_tokens=99)
    with pytest.raises(ValueError, match="/no/such/folder"):
        LLM("nano", tokenizer="/no/such/folder")


@pytest.mark.gpu
def test_the_engine_runs_on_a_gpu(model):
    llm = tiny_llm(tiny_model().to("cuda"), num_speculative_tokens=3)
    assert llm.engine.runner.cache.kv_pool.k.is_cuda
    outputs = llm.generate(id_prompts(5, 20, 3), greedy(12))
    assert [len(ids) for ids in token_ids(outputs)] == [12, 12, 12]
    sampled = llm.generate(id_prompts(5, 20), SamplingParams(max_tokens=8, top_k=5, logprobs=1))
    assert torch.isfinite(torch.tensor([o.outputs[0].cumulative_logprob for o in sampled])).all()


@pytest.mark.parametrize("how", ["in place", "through data", "replaced", "data replaced"])
def test_weights_may_change_between_calls_in_any_way(how):
    changed = tiny_model()
    llm = tiny_llm(changed, num_speculative_tokens=2)
    prompts = id_prompts(5, 20)
    before = token_ids(llm.generate(prompts, greedy(30)))
    with torch.no_grad():
        if how == "replaced":
            state = {name: tensor * 1.3 for name, tensor in changed.state_dict().items()}
            changed.load_state_dict(state, assign=True)
        for parameter in changed.parameters() if how != "replaced" else ():
            if how == "in place":
                parameter *= 1.3
            elif how == "through data":
                parameter.data.mul_(1.3)
            else:
                parameter.data = parameter.data * 1.3
    after = token_ids(llm.generate(prompts, greedy(30)))
    fresh = tiny_llm(changed, num_speculative_tokens=0)
    assert after == token_ids(fresh.generate(prompts, greedy(30)))
    assert after != before
