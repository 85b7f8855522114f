"""Token ids to measure with, the same for the same model and length."""

import random
from collections.abc import Callable

Encode = Callable[[str], list[int]]

PROMPTS = (
    "Once upon a time there was a little fox who lived at the edge of the forest.",
    "The old man walked slowly down to the harbour, where the boats",
    "In the morning the children ran out into the garden and",
    "It was a cold night, and nobody in the village expected a visitor.",
    "She opened the letter and read it twice before she",
    "The king had three sons, and the youngest of them",
    "Far away behind the mountains there is a lake which",
    "Nobody knew where the strange bird had come from, but",
)


def random_ids(num_tokens: int, vocab_size: int) -> list[int]:
    """Uniform ids; every length gives others."""
    generator = random.Random(num_tokens)
    return [generator.randrange(vocab_size) for _ in range(num_tokens)]


def decode_prompts(
    count: int, num_tokens: int, vocab_size: int, encode: Encode | None
) -> list[list[int]]:
    """Equally long prompts, all different; of sentences where the model has a tokenizer."""
    if encode is None:
        ids = random_ids(count * num_tokens, vocab_size)
        return [ids[start : start + num_tokens] for start in range(0, len(ids), num_tokens)]
    prompts = []
    for first in range(count):
        order = [PROMPTS[(first + offset) % len(PROMPTS)] for offset in range(len(PROMPTS))]
        # One turn of the sentences may be shorter than the prompt.
        ids = encode(" ".join(order)) * (1 + num_tokens // 32)
        prompts.append(ids[:num_tokens])
    return prompts
