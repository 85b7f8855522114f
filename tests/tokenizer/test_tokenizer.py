import json
import shutil

import pytest

from qnext import tokenizer as tokenizer_package
from qnext.tokenizer.bpe import save_trained, train_bpe

FAMILY_TEMPLATES = {
    "instruct": "templates/qwen3_instruct_2507.jinja",
    "thinking": "templates/qwen3_thinking_2507.jinja",
    "hybrid": "templates/qwen3_hybrid.jinja",
}


@pytest.fixture(scope="module")
def family(qnext_data):
    return tokenizer_package.load(qnext_data / "qwen/tokenizer")


@pytest.fixture
def folder(tmp_path):
    save_trained(train_bpe(["some text to learn from " * 9], 280), tmp_path)
    return tmp_path


def records(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_golden_tokenisations(family, qnext_data):
    cases = records(qnext_data / "qwen/golden_tokenizations.jsonl")
    assert len(cases) == 9
    for case in cases:
        assert family.encode(case["text"]) == case["ids"]
        assert family.decode(case["ids"]) == case["decoded"]


def test_golden_chat_renderings(qnext_data, tmp_path):
    cases = records(qnext_data / "qwen/golden_chat_renderings.jsonl")
    assert {case["template"] for case in cases} == set(FAMILY_TEMPLATES)
    shutil.copy(qnext_data / "qwen/tokenizer/tokenizer.json", tmp_path)
    for name, template in FAMILY_TEMPLATES.items():
        shutil.copy(qnext_data / "qwen" / template, tmp_path / "chat_template.jinja")
        loaded = tokenizer_package.load(tmp_path)
        for case in (case for case in cases if case["template"] == name):
            rendered = loaded.render_chat(**case["input"])
            assert rendered == case["rendered"]
            assert loaded.encode(rendered) == case["ids"]


@pytest.mark.parametrize("variant", ["Instruct", "Thinking"])
def test_the_checkpoints_own_config_gives_template_and_end_token(qnext_data, tmp_path, variant):
    source = qnext_data / f"qwen/Qwen3-Next-80B-A3B-{variant}/tokenizer_config.reconstructed.json"
    shutil.copy(qnext_data / "qwen/tokenizer/tokenizer.json", tmp_path)
    shutil.copy(source, tmp_path / "tokenizer_config.json")
    loaded = tokenizer_package.load(tmp_path)
    assert loaded.eos_token_ids == (151645, 151643)
    assert loaded.vocab_size == 151669
    prompt = loaded.render_chat([{"role": "user", "content": "Hi"}])
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == start + ("<think>\n" if variant == "Thinking" else "")


def test_vocab_and_merges_stand_in_for_tokenizer_json(family, qnext_data, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(qnext_data / "qwen/tokenizer" / name, tmp_path)
    shutil.copy(
        qnext_data / "qwen/tokenizer/tokenizer_config.qwen3_hybrid.json",
        tmp_path / "tokenizer_config.json",
    )
    loaded = tokenizer_package.load(tmp_path)
    text = "<|im_start|>user\nI'll square 42² 平方 <think>"
    assert loaded.encode(text) == family.encode(text)
    assert loaded.vocab_size == family.vocab_size


def test_enable_thinking_reaches_the_hybrid_template(qnext_data, tmp_path):
    shutil.copy(qnext_data / "qwen/tokenizer/tokenizer.json", tmp_path)
    shutil.copy(
        qnext_data / "qwen/tokenizer/tokenizer_config.qwen3_hybrid.json",
        tmp_path / "tokenizer_config.json",
    )
    loaded = tokenizer_package.load(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.render_chat(messages).endswith("assistant\n")
    closed = loaded.render_chat(messages, enable_thinking=False)
    assert closed.endswith("assistant\n<think>\n\n</think>\n\n")


def test_the_two_public_copies_of_the_instruct_template_agree_on_prompts(qnext_data, tmp_path):
    """They differ only in a trailing assistant turn: the README of the data tells how."""
    copy = (qnext_data / "qwen" / FAMILY_TEMPLATES["instruct"]).read_text()
    own = copy.replace(
        "{%- if reasoning_content %}",
        "{%- if loop.last or (not loop.last and reasoning_content) %}",
    )
    assert own != copy
    shutil.copy(qnext_data / "qwen/tokenizer/tokenizer.json", tmp_path)
    conversation = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d?"},
    ]
    rendered = {}
    for template in (copy, own):
        (tmp_path / "chat_template.jinja").write_text(template)
        loaded = tokenizer_package.load(tmp_path)
        rendered[template] = [loaded.render_chat(conversation[:n]) for n in (1, 3, 5, 2)]
    assert rendered[copy][:3] == rendered[own][:3]
    assert "<think>\n\n</think>" in rendered[own][3]
    assert "<think>" not in rendered[copy][3]


def test_added_tokens_of_the_config_are_read(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["added_tokens_decoder"]["280"] = {"content": "<|note|>", "special": True}
    config["eos_token"] = {"content": "<|note|>", "special": True}
    file.write_text(json.dumps(config))
    loaded = tokenizer_package.load(folder)
    assert loaded.encode("a<|note|>")[-1] == 280
    assert loaded.eos_token_id == 280
    assert loaded.decode([280], skip_special_tokens=True) == ""
    config["added_tokens_decoder"]["299"] = {"content": "<|far|>"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'<\|far\|>' the id 299"):
        tokenizer_package.load(folder)


def test_ids_beyond_the_vocabulary_decode_to_nothing(folder):
    loaded = tokenizer_package.load(folder)
    assert loaded.decode([*loaded.encode("some"), 9999]) == "some"
    assert loaded.token_bytes(9999) == b""


def test_named_templates_take_the_default_one(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "t"},
        {"name": "default", "template": "d"},
    ]
    file.write_text(json.dumps(config))
    assert tokenizer_package.load(folder).render_chat([]) == "d"


def test_faults_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        tokenizer_package.load(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="neither tokenizer.json nor vocab.json"):
        tokenizer_package.load(empty)
    loaded = tokenizer_package.load(folder)
    with pytest.raises(ValueError, match="has no chat template"):
        loaded.render_chat([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="text 0 of 1 is not valid Unicode"):
        loaded.encode("\ud800")
    with pytest.raises(ValueError, match="want a str"):
        loaded.encode(3)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        tokenizer_package.load(folder)


def test_a_template_that_is_no_utf_8_is_named(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        tokenizer_package.load(folder)
