"""Chat templates: the Jinja text that turns messages into one prompt, run in Jinja's sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

# Whatever a template can raise on messages it was not written for, beside Jinja's own errors.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)

# They bound the assistant's text while a training example is rendered. NUL cannot come in from a
# message: `render_with_spans` refuses it there.
_SPAN_START, _SPAN_END = "\0[", "\0]"
_MARK_OPTION = "_mark_generation"

# What a template without generation blocks writes around an assistant turn, in the family's form.
_TURN_START, _TURN_END = "<|im_start|>assistant\n", "<|im_end|>"


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: the part of a template the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Context, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{_SPAN_START}{text}{_SPAN_END}" if context.get(_MARK_OPTION) else text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: unlike Jinja's own filter, no HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(date_format: str) -> str:
    return datetime.datetime.now().strftime(date_format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        origin: where it came from, for error messages.
        special_tokens: names like "eos_token" that the template may use, with their text.

    Raises:
        ValueError: the text is not valid Jinja.
    """

    def __init__(
        self, source: str, origin: str, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.origin = origin
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except _TEMPLATE_ERRORS as error:
            raise ValueError(f"chat template {origin}{_line_of(error)}: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """Render messages to the text that the model reads.

        Args:
            messages: {"role", "content", ...}; content is a text, None beside tool calls, or a
                list of {"type": "text", "text"} parts, which are joined.
            tools: JSON schemas of functions, as the template wants them.
            add_generation_prompt: end with the start of the assistant's turn.
            template_options: further names for the template, such as enable_thinking.

        Raises:
            ValueError: a message that has no role, tools that are no list, or the template fails on
                these messages.
        """
        checked = [_checked_message(message, idx) for idx, message in enumerate(messages)]
        if tools is not None and (
            isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)
        ):
            raise ValueError(f"tools is {tools!r}: want a list of functions' JSON schemas")
        try:
            return self._template.render(
                **self._special_tokens,
                **template_options,
                messages=checked,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
            )
        except _TEMPLATE_ERRORS as error:
            raise ValueError(
                f"chat template {self.origin} fails on these {len(checked)} messages"
                f"{_line_of(error)}: {error}"
            ) from error

    def render_with_spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        **template_options: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a training example and say which characters the assistant wrote.

        The template's generation blocks tell; one without them must write turns in the family's
        form, `<|im_start|>assistant\\n ... <|im_end|>`, the closing token counted as written.

        Returns:
            The text, and the [start, end) bounds of each assistant span in it, in characters.

        Raises:
            ValueError: a message holds a NUL character, the template fails, or marks no span.
        """
        if "\0" in json.dumps(list(messages), ensure_ascii=False, default=str).replace(
            "\\u0000", "\0"
        ):
            raise ValueError("a message of a training example holds a NUL character (U+0000)")
        marked = self.render(
            messages, tools, add_generation_prompt=False, **template_options, **{_MARK_OPTION: True}
        )
        if _SPAN_START in marked:
            return _unmark(marked)
        spans = _family_turns(marked)
        if not spans and any(message.get("role") == "assistant" for message in messages):
            raise ValueError(
                f"chat template {self.origin} does not say what the assistant writes: it has "
                f"neither a generation block nor turns that start with {_TURN_START!r}"
            )
        return marked, spans


def _checked_message(message: Any, idx: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"messages[{idx}] is {str(message)[:80]!r}: want a mapping with a text under 'role'"
        )
    content = message.get("content")
    if isinstance(content, list | tuple):
        return {**message, "content": "".join(_text_of_part(part, idx) for part in content)}
    if content is not None and not isinstance(content, str):
        raise ValueError(
            f"messages[{idx}].content is of type {type(content).__name__}: want a text, None or "
            "a list of text parts"
        )
    return dict(message)


def _text_of_part(part: Any, idx: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"messages[{idx}].content has the part {str(part)[:80]!r}: only text is read")


def _line_of(error: BaseException) -> str:
    """Name the template's line that raised: from the syntax error, or from the traceback."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line is not None else ""


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the span marks out of a rendered text and return their places."""
    spans: list[tuple[int, int]] = []
    pieces: list[str] = []
    length = 0
    for position, piece in enumerate(marked.split(_SPAN_START)):
        inside, end, after = piece.partition(_SPAN_END) if position else ("", "", piece)
        if end:
            spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return "".join(pieces), spans


def _family_turns(text: str) -> list[tuple[int, int]]:
    spans = []
    position = text.find(_TURN_START)
    while position >= 0:
        start = position + len(_TURN_START)
        end = text.find(_TURN_END, start)
        end = len(text) if end < 0 else end + len(_TURN_END)
        spans.append((start, end))
        position = text.find(_TURN_START, end)
    return spans
