"""Configurations with a name: the shipped model and its twin, benchmark shapes, the real model."""

from dataclasses import replace

from qnext.config.model import ModelConfig, RopeConfig

_NEXT_80B_A3B = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=5120,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    max_position_embeddings=262144,
    rope=RopeConfig(theta=1e7),
    bos_token_id=151643,
    eos_token_id=(151645,),
    dtype="bfloat16",
)

_NANO = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    # No layer is dense; the width is that of the active experts and the shared one together.
    intermediate_size=320,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    num_experts=40,
    num_experts_per_tok=6,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=128,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
    rope=RopeConfig(theta=1e6),
    dtype="bfloat16",
)

_BENCH_NANO = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    shared_expert_intermediate_size=128,
    rope=RopeConfig(theta=1e7),
    dtype="bfloat16",
)

_BENCH_SMALL = ModelConfig(
    vocab_size=16384,
    hidden_size=768,
    intermediate_size=1792,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=8,
    linear_num_value_heads=16,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    num_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=256,
    shared_expert_intermediate_size=256,
    rope=RopeConfig(theta=1e7),
    dtype="bfloat16",
)

PRESETS: dict[str, ModelConfig] = {
    "nano": _NANO,
    # Dense and all-attention: the width is the one nearest to nano's active parameters per token.
    "nano-dense": replace(
        _NANO,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        shared_expert_intermediate_size=0,
        layer_types=("full_attention",) * 8,
        intermediate_size=336,
    ),
    "bench-nano": _BENCH_NANO,
    "bench-small": _BENCH_SMALL,
    "next-12l": replace(_NEXT_80B_A3B, num_hidden_layers=12, layer_types=()),
    "next-80b-a3b": _NEXT_80B_A3B,
}


def preset(name: str) -> ModelConfig:
    """Returns the configuration of this name.

    Raises:
        ValueError: no preset has the name; the text lists those that exist.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    return PRESETS[name]
