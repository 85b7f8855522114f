from pathlib import Path

import pytest

from qnext import tokenizer as tokenizer_package
from qnext.tokenizer.chat import ChatTemplate

NANO = Path(__file__).parents[2] / "qnext/assets/nano"
QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def nano():
    return tokenizer_package.load(NANO)


def test_the_sandbox_keeps_templates_from_python_and_from_the_messages():
    escape = ChatTemplate("{{ messages.__class__.__mro__ }}", "escape")
    with pytest.raises(ValueError, match="chat template escape"):
        escape.render([QUESTION])
    change = ChatTemplate("{% set _ = messages.append(1) %}", "change")
    with pytest.raises(ValueError, match="chat template change"):
        change.render([QUESTION])


def test_broken_templates_give_one_error_with_name_and_line():
    with pytest.raises(ValueError, match="chat template file.jinja, line 2"):
        ChatTemplate("a\n{% if %}", "file.jinja")
    wrong = ChatTemplate("a\n{{ messages[7].role + 1 }}", "file.jinja")
    with pytest.raises(ValueError, match="file.jinja fails on these 1 messages, line 2"):
        wrong.render([QUESTION])
    raising = ChatTemplate("{{ raise_exception('no system, please') }}", "file.jinja")
    with pytest.raises(ValueError, match="no system, please"):
        raising.render([QUESTION])


def test_json_keeps_letters_and_order_and_loops_can_break():
    template = ChatTemplate(
        "{% for tool in tools %}{{ tool | tojson }}{% break %}{% endfor %}"
        "{{ tools[0] | tojson(indent=1) }}{{ strftime_now('%%') }}{{ eos_token }}",
        "t",
        {"eos_token": "</s>"},
    )
    tool = {"name": "größe", "a": "<b>"}
    text = template.render([QUESTION], tools=[tool, tool])
    assert text == '{"name": "größe", "a": "<b>"}{\n "name": "größe",\n "a": "<b>"\n}%</s>'


def test_messages_are_checked_and_text_parts_joined():
    template = ChatTemplate("{{ messages[0].content }}", "t")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "ab"
    for bad in ({"content": "x"}, "text", {"role": "user", "content": 3}):
        with pytest.raises(ValueError, match=r"messages\[0\]"):
            template.render([bad])
    image = [{"type": "image_url", "image_url": "x"}]
    with pytest.raises(ValueError, match="only text is read"):
        template.render([{"role": "user", "content": image}])


def test_nano_template_renders_system_tools_and_thinking(nano):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "5"},
    ]
    text = nano.render_chat(messages, tools=[tool], enable_thinking=True)
    assert text == (
        "<|im_start|>system\nBe brief.\n\n"
        "Functions that you may call, one JSON object a line:\n"
        '{"type": "function", "function": {"name": "f", "parameters": {}}}\n'
        'To call one, write <tool_call>{"name": NAME, "arguments": {...}}</tool_call>.<|im_end|>\n'
        "<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n"
        '<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>5</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    with pytest.raises(ValueError, match="role parrot is none of"):
        nano.render_chat([{"role": "parrot", "content": ""}])


def test_nano_template_drops_reasoning_of_earlier_questions(nano):
    old = {**ANSWER, "reasoning_content": "long thought"}
    assert "long thought" in nano.render_chat([QUESTION, old])
    assert "long thought" not in nano.render_chat([QUESTION, old, QUESTION])


def test_loss_falls_on_the_assistants_tokens_only(nano):
    ids, mask = nano.encode_chat([QUESTION, ANSWER, {"role": "user", "content": "平?"}, ANSWER])
    assert len(ids) == len(mask)
    written = [nano.decode([idx]) for idx, counts in zip(ids, mask, strict=True) if counts]
    assert written == ["4", "<|im_end|>", "4", "<|im_end|>"]
    text = nano.render_chat([QUESTION, ANSWER], add_generation_prompt=False)
    assert nano.decode(ids).startswith(text)


def test_what_the_assistant_writes_follows_the_generation_prompt(nano):
    """Training and generation meet at the same token border."""
    ids, mask = nano.encode_chat([QUESTION, ANSWER])
    assert ids[: mask.index(1)] == nano.encode(nano.render_chat([QUESTION]))


def test_family_templates_without_generation_blocks_mark_whole_turns(qnext_data, nano):
    source = (qnext_data / "qwen/templates/qwen3_thinking_2507.jinja").read_text()
    template = ChatTemplate(source, "thinking")
    text, spans = template.render_with_spans([QUESTION, ANSWER, QUESTION, ANSWER])
    assert [text[start:end] for start, end in spans] == [
        "4<|im_end|>",
        "<think>\n\n</think>\n\n4<|im_end|>",
    ]


def test_templates_that_hide_the_assistant_are_refused():
    template = ChatTemplate("{{ messages[1].content }}", "t")
    with pytest.raises(ValueError, match="does not say what the assistant writes"):
        template.render_with_spans([QUESTION, ANSWER])
    with pytest.raises(ValueError, match="NUL"):
        template.render_with_spans([{"role": "user", "content": "\0["}])


@pytest.mark.parametrize("tools", [5, "search", {"name": "search"}])
def test_tools_that_are_no_list_are_refused(tools):
    with pytest.raises(ValueError, match="tools is .*: want a list"):
        ChatTemplate("{{ tools }}", "any").render([QUESTION], tools)
