"""A model small enough to run hundreds of tokens in a test, with every kind of layer."""

import torch

from qnext.config.model import ModelConfig
from qnext.engine.llm import LLM
from qnext.engine.request import SamplingParams
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next


def tiny_config(vocab_size: int = 96) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "eos_token_id": None,
        }
    )


@torch.no_grad()
def tiny_model(
    vocab_size: int = 96, seed: int = 0, scale: float = 6.0, has_mtp: bool = True
) -> Qwen3Next:
    """Random weights whose text wanders, and whose drafts are right about half of the time.

    The residual stream carries mostly the last token's embedding, which the draft layer is given
    too, so trunk and draft tend to agree; `scale` is how much the layers disturb that.
    """
    config = tiny_config(vocab_size)
    model = Qwen3Next(config, has_mtp=has_mtp)
    init_weights(model, config, seed=seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "layer" in name and "conv" not in name:
            parameter *= scale
    model.embed_tokens *= 50.0
    model.lm_head *= 15.0
    if model.mtp is not None:
        size = config.hidden_size
        model.mtp.fc[:, :size] = torch.eye(size)
    return model.eval()


def tiny_llm(model: Qwen3Next | None = None, **options) -> LLM:
    defaults = {"max_model_len": 128, "max_num_seqs": 4, "page_size": 8, "prefill_chunk_tokens": 16}
    return LLM.from_model(model or tiny_model(), **{**defaults, **options})


def step_by_step(llm: LLM) -> LLM:
    """Keep kernels from going on by themselves: every token is decided in Python."""
    llm.engine.runner.launch_rounds = lambda *args: None
    return llm


def id_prompts(*lengths: int, vocab_size: int = 96) -> list[dict[str, list[int]]]:
    """Prompts of these lengths, all different."""
    return [
        {"prompt_token_ids": [(7 * n + 13 * i * i + 3 * i) % vocab_size for i in range(n)]}
        for n in lengths
    ]


def greedy(max_tokens: int = 20, **options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)


def token_ids(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]
