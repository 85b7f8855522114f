"""Small random models for tests."""

import torch

from qnext.config.model import ModelConfig, RopeConfig
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 512,
    "rope": RopeConfig(theta=10_000.0, partial_rotary_factor=0.5),
}


def tiny_config(**changes: object) -> ModelConfig:
    """A hybrid of four layers that runs in a millisecond."""
    return ModelConfig(**{**TINY, **changes})


def tiny_model(
    *,
    seed: int = 0,
    decay: str = "paper",
    dtype: torch.dtype = torch.float32,
    scale: float = 4.0,
    has_mtp: bool = True,
    **changes: object,
) -> Qwen3Next:
    """A random model whose weights are large enough for its layers to matter."""
    config = tiny_config(initializer_range=0.02 * scale, **changes)
    model = Qwen3Next(config, has_mtp=has_mtp, dtype=dtype)
    init_weights(model, config, seed=seed, decay=decay)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or "layernorm" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.2 * noise).to(parameter.dtype))
    return model
