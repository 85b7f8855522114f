"""The shipped nano model: small enough, opens, writes on, and answers in form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.data.arithmetic import exercises
from qnext.engine.llm import LLM
from qnext.engine.request import SamplingParams

ASSETS = Path(__file__).resolve().parents[2] / "qnext" / "assets"
MAX_PARAMETERS = 15_000_000
MAX_BYTES = 30_000_000


@pytest.fixture(scope="module")
def llm():
    return LLM("nano", dtype="float32", device="cpu", max_model_len=512, max_num_seqs=4)


def test_it_is_within_its_size(llm):
    assert sum(parameter.numel() for parameter in llm.model.parameters()) <= MAX_PARAMETERS
    assert sum(path.stat().st_size for path in ASSETS.rglob("*.safetensors")) <= MAX_BYTES


def test_it_has_what_was_asked_of_it(llm):
    config = llm.model.config
    period = ("linear_attention",) * 3 + ("full_attention",)
    assert config.layer_types == period * (config.num_hidden_layers // 4)
    assert config.num_experts >= 32
    assert config.max_position_embeddings == 32768
    assert llm.model.has_mtp


def test_it_writes_on_in_words(llm):
    params = SamplingParams(temperature=0.0, max_tokens=24)
    (output,) = llm.generate("Once upon a time there was a king who had three", params)
    words = output.outputs[0].text.split()
    assert len(words) >= 12
    assert output.outputs[0].text.isprintable() or "\n" in output.outputs[0].text
    assert output.metrics.num_generated_tokens == 24


def test_it_answers_in_form_and_most_sums_rightly(llm):
    questions = list(exercises(20, 7, "held_out"))
    conversations = [[{"role": "user", "content": q.question}] for q in questions]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=96))
    answers = [output.outputs[0] for output in outputs]
    ended = sum(a.token_ids[-1] in llm.generation_config.eos_token_id for a in answers)
    right = sum(q.is_right(a.text) for q, a in zip(questions, answers, strict=True))
    assert ended >= 19
    assert right >= 12


def test_its_drafts_stand_more_often_than_not():
    llm = LLM("nano", dtype="float32", device="cpu", max_model_len=128, num_speculative_tokens=1)
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    llm.generate("The old man walked down to the sea, and", params)
    assert llm.engine.metrics.acceptance_rate > 0.5


def test_generate_opens_it_by_name():
    command = [sys.executable, "-m", "qnext", "generate", "The fox looked at the moon and"]
    command += ["--model", "nano", "--max-tokens", "8", "--temperature", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_generated_tokens"] == 8
