"""Keys of a Hugging Face `config.json` that are not fields of ours, and what becomes of each."""

from typing import Any

IGNORED_KEYS: dict[str, str] = {
    "_name_or_path": "where another program found the file",
    "architectures": "the class another program would build; `model_type` says what it is",
    "transformers_version": "which version wrote the file",
    "auto_map": "remote code, which is never run",
    "use_cache": "a default of another program's generate()",
    "output_router_logits": "training here always has them",
    "output_attentions": "an output switch of another program",
    "output_hidden_states": "an output switch of another program",
    "return_dict": "an output switch of another program",
    "torchscript": "an export switch of another program",
    "chunk_size_feed_forward": "a memory switch of another program, same result",
    "is_encoder_decoder": "false by construction",
    "is_decoder": "true by construction",
    "add_cross_attention": "false by construction",
    "id2label": "labels of a classification head",
    "label2id": "labels of a classification head",
    "num_labels": "labels of a classification head",
    "problem_type": "kind of a classification head",
    "sliding_window": "without effect while use_sliding_window is false",
    "max_window_layers": "without effect while use_sliding_window is false",
    "unsloth_version": "which version wrote the file",
    "unsloth_fixed": "a mark of the program that wrote the file",
}

# Keys with one allowed value: any other asks for mathematics that this model does not have.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3_next",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "use_sliding_window": (False,),
}

ROPE_KEYS = {
    "rope_theta",
    "partial_rotary_factor",
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
