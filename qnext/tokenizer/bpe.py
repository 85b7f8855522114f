"""Byte-level BPE of the Qwen family: its special tokens, its word splitting, training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# Words, single digits, runs of punctuation, line ends, spaces: the family's published expression.
FAMILY_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

# (text, is_special): a special token can be left out of decoded text; the others are always shown.
FAMILY_SPECIAL_TOKENS: tuple[tuple[str, bool], ...] = (
    (END_OF_TEXT, True),
    (IM_START, True),
    (IM_END, True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)

NUM_BYTES = 256


def byte_of_character() -> dict[str, int]:
    """Map each character of the byte-level alphabet to the byte that it stands for.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, take the
    characters from U+0100 on.

    Source: GPT-2, https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(NUM_BYTES) if chr(byte) not in table]
    table.update({chr(NUM_BYTES + idx): byte for idx, byte in enumerate(others)})
    return table


def family_pipeline(model: models.BPE) -> tokenizers.Tokenizer:
    """Put the family's normalisation (NFC), word splitting and byte alphabet around a BPE model."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(FAMILY_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: tuple[tuple[str, bool], ...] = FAMILY_SPECIAL_TOKENS,
    show_progress: bool = False,
) -> tokenizers.Tokenizer:
    """Train a vocabulary with the family's word splitting; the special tokens take the last ids.

    Args:
        texts: the training text, in pieces of any length.
        vocab_size: entries in all: 256 bytes, merges and special tokens.
        special_tokens: (text, is_special) pairs, in the order of their ids.

    Raises:
        ValueError: vocab_size leaves no room for a merge, or the texts hold too few pairs for it.
    """
    smallest = NUM_BYTES + len(special_tokens) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is below {smallest}: {NUM_BYTES} bytes, "
            f"{len(special_tokens)} special tokens and at least one merge"
        )
    tokenizer = family_pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text, special in special_tokens]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} needs more text: the pairs seen at least twice in it "
            f"make {tokenizer.get_vocab_size()} entries"
        )
    return tokenizer


def save_trained(
    tokenizer: tokenizers.Tokenizer,
    directory: str | Path,
    *,
    chat_template: str | None = None,
    model_max_length: int = 32768,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if given, chat_template.jinja.

    transformers' AutoTokenizer opens the directory too.

    Args:
        directory: made when missing; files of these names in it are replaced.
        model_max_length: tokens; what other tools warn about, no limit of ours.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
