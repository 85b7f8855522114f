"""The tokenizer of a checkpoint: ids of a text, text of ids, prompts from messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from qnext.tokenizer.bpe import END_OF_TEXT, byte_of_character, family_pipeline
from qnext.tokenizer.chat import ChatTemplate, Message

_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A byte-level BPE tokenizer with an optional chat template; `load_tokenizer` makes it.

    Args:
        backend: the tokenizers library's object; its decoder must be ByteLevel.
        origin: where it came from, for error messages.
        token_names: "eos_token" and the like, with the token's text.
        chat_template: None when the checkpoint has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        origin: str,
        token_names: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.backend = backend
        self.origin = origin
        self.token_names = dict(token_names or {})
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(idx for idx, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Entries with an id, added tokens included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size()

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends an answer, None when the checkpoint names none."""
        name = self.token_names.get("eos_token")
        return None if name is None else self.backend.token_to_id(name)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids after which generation stops: the end of an answer, then the end of a document."""
        ids = (self.eos_token_id, self.backend.token_to_id(END_OF_TEXT))
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    @property
    def end_of_text_id(self) -> int:
        """The id that ends a document in training data.

        Raises:
            ValueError: the vocabulary has neither <|endoftext|> nor an end-of-answer token.
        """
        ids = self.eos_token_ids
        if not ids:
            raise ValueError(f"tokenizer {self.origin} names no end token such as {END_OF_TEXT}")
        return ids[-1]

    def token_id(self, text: str) -> int | None:
        """The id of an entry by its text, None when there is none."""
        return self.backend.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written out in it become their own ids.

        Raises:
            ValueError: text is no str, or holds half a surrogate pair, which UTF-8 cannot carry.
        """
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], *, use_special_tokens: bool = True
    ) -> list[list[int]]:
        """Ids of many texts, spread over the processor's cores.

        Args:
            use_special_tokens: False reads "<|im_end|>" in a text as ten ordinary characters,
                so that a document cannot bring control tokens into training data.
        """
        backend = self.backend if use_special_tokens else self._plain_backend
        try:
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise ValueError(_why_not_text(texts)) from error
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text and the [start, end) characters of the text each id stands for."""
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise ValueError(_why_not_text([text])) from error
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become replacement characters (U+FFFD).

        Ids that the vocabulary leaves unused give nothing: embeddings are often rounded up.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(idx) for idx in ids if idx not in skipped)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for, which may end inside a character; b"" for an unused id."""
        return self._bytes_of_id.get(token_id, b"")

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """Messages to a prompt; see `ChatTemplate.render`.

        Raises:
            ValueError: there is no chat template, or it fails on these messages.
        """
        template = self.require_chat_template()
        return template.render(messages, tools, add_generation_prompt, **template_options)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a training conversation, and for each whether the assistant wrote it (1 or 0).

        An id that straddles a border counts as written by the assistant when it starts there.
        """
        text, spans = self.require_chat_template().render_with_spans(messages, tools)
        ids, offsets = self.encode_with_offsets(text)
        mask = [0] * len(ids)
        remaining = iter(spans)
        span = next(remaining, None)
        for idx, (start, _) in enumerate(offsets):
            while span is not None and start >= span[1]:
                span = next(remaining, None)
            if span is None:
                break
            mask[idx] = int(start >= span[0])
        return ids, mask

    def require_chat_template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            ValueError: the checkpoint has none.
        """
        if self.chat_template is None:
            raise ValueError(
                f"tokenizer {self.origin} has no chat template: neither chat_template.jinja nor "
                "chat_template in tokenizer_config.json"
            )
        return self.chat_template

    @cached_property
    def sha256(self) -> str:
        """Hash of the vocabulary's texts and ids and of the chat template.

        Token shards carry it. It does not depend on how a library's release writes the file.
        """
        vocab = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        template = self.chat_template.source if self.chat_template else ""
        return hashlib.sha256(json.dumps([vocab, template]).encode()).hexdigest()

    @cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        table = byte_of_character()
        added = self.backend.get_added_tokens_decoder()
        return {
            token_id: text.encode()
            if token_id in added
            else b"".join(
                bytes((table[char],)) if char in table else char.encode() for char in text
            )
            for text, token_id in self.backend.get_vocab(with_added_tokens=True).items()
        }

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer as it comes with a checkpoint.

    Read: tokenizer.json, or else vocab.json and merges.txt; tokenizer_config.json for the names
    of the end tokens, for added tokens that tokenizer.json lacks, and for a chat template;
    chat_template.jinja, which wins over the one in the config.

    Args:
        path: the directory, or its tokenizer.json.

    Raises:
        ValueError: no such files, or one that cannot be read; the message names it.
    """
    given = Path(path)
    folder = given.parent if given.is_file() else given
    backend = _load_backend(given if given.is_file() else folder / "tokenizer.json")
    config = _load_config(folder / "tokenizer_config.json")
    _add_missing_tokens(backend, config)
    names = {
        name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None
    }
    template_source, template_origin = _find_template(folder, config)
    template = None
    if template_source is not None:
        template = ChatTemplate(template_source, template_origin, names)
    return Tokenizer(backend, str(given), names, template)


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    vocab, merges = file.with_name("vocab.json"), file.with_name("merges.txt")
    if file.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for any fault in the file
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
        if type(backend.decoder).__name__ != "ByteLevel":
            raise ValueError(
                f"{file} has the decoder {type(backend.decoder).__name__}: only ByteLevel, the "
                "family's, is read"
            )
        return backend
    if vocab.is_file() and merges.is_file():
        try:
            return family_pipeline(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # as above
            raise ValueError(f"{vocab} and {merges} are not a tokenizer: {error}") from error
    if not file.parent.is_dir():
        raise ValueError(f"tokenizer path {file.parent} does not exist")
    raise ValueError(f"{file.parent} has neither tokenizer.json nor vocab.json with merges.txt")


def _load_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}: want a JSON object")
    return config


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the config's tokens that tokenizer.json lacks, in the order of their ids."""
    entries = config.get("added_tokens_decoder") or {}
    for key in sorted(entries, key=int):
        entry = entries[key]
        text = entry["content"]
        if backend.token_to_id(text) is not None and text in _added_texts(backend):
            continue
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        token = AddedToken(text, **{flag: bool(entry.get(flag, False)) for flag in flags})
        backend.add_tokens([token])
        if backend.token_to_id(text) != int(key):
            raise ValueError(
                f"tokenizer_config.json gives {text!r} the id {key}, tokenizer.json's next free "
                f"id is {backend.token_to_id(text)}"
            )


def _added_texts(backend: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values()}


def _token_text(value: Any) -> str | None:
    """A token's text: tokenizer_config.json holds it bare or as an object."""
    return value.get("content") if isinstance(value, Mapping) else value


def _find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}") from error
    origin = str(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name; "default" is the one for conversations
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
        if template is None:
            raise ValueError(f"{origin} has chat templates {sorted(named)}, but none is 'default'")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{origin}: chat_template is a {type(template).__name__}: want a text")
    return template, origin


def _why_not_text(texts: Sequence[Any]) -> str:
    for idx, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {idx} of {len(texts)} is a {type(text).__name__}: want a str"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"text {idx} of {len(texts)} is not valid Unicode: {error}"
    return "the tokenizers library refused these texts"
