"""Text written by the model while it trains, to be read by people."""

from collections.abc import Sequence

import torch

from qnext.model.batch import ForwardBatch
from qnext.model.qwen3_next import Qwen3Next
from qnext.tokenizer.tokenizer import Tokenizer


@torch.no_grad()
def sample_texts(
    model: Qwen3Next,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    temperature: float,
    seed: int,
) -> dict[str, str]:
    """Continue each prompt; the whole text is read again for each token, without a cache.

    That costs more than the engine's way and depends on nothing but the forward pass that is
    being trained. All prompts run in one batch.

    Args:
        num_tokens: written per prompt; ends sooner at an end token.
        temperature: of the softmax that is drawn from; 0 takes the most probable token.
        seed: of the draws.

    Returns:
        Prompt -> continuation.
    """
    device = model.embed_tokens.device
    generator = torch.Generator().manual_seed(seed)
    ends = set(tokenizer.eos_token_ids)
    sequences = [tokenizer.encode(prompt) or [tokenizer.end_of_text_id] for prompt in prompts]
    starts = [len(ids) for ids in sequences]
    is_open = [True] * len(sequences)
    for _ in range(num_tokens):
        lengths = tuple(len(ids) for ids in sequences)
        flat = torch.tensor([token for ids in sequences for token in ids], device=device)
        hidden = model(ForwardBatch.packed(flat, lengths))
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits = model.compute_logits(hidden[last]).float().cpu()
        if temperature > 0:
            probs = (logits / temperature).softmax(-1)
            chosen = torch.multinomial(probs, 1, generator=generator)[:, 0].tolist()
        else:
            chosen = logits.argmax(-1).tolist()
        for idx, token in enumerate(chosen):
            if is_open[idx]:
                sequences[idx].append(token)
                is_open[idx] = token not in ends
        if not any(is_open):
            break
    return {
        prompt: tokenizer.decode(ids[start:])
        for prompt, ids, start in zip(prompts, sequences, starts, strict=True)
    }
