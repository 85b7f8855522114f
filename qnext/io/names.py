"""Names and shapes of every tensor in a checkpoint, from the configuration alone.

Two layouts exist for the experts: one matrix per expert (`per_expert`, as published) and stacked
ones (`fused`: `experts.gate_up_proj` [E, 2I, C] with the gate's rows first, `experts.down_proj`
[E, C, I], as transformers 5 holds them).
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from qnext.config.model import ModelConfig

Layout = Literal["per_expert", "fused"]
LAYOUTS: tuple[Layout, ...] = ("per_expert", "fused")
Shape = tuple[int, ...]

MTP_PREFIX = "mtp."
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


def layer_prefix(layer_idx: int) -> str:
    """Returns how the names of a layer's tensors begin."""
    return f"model.layers.{layer_idx}."


MTP_LAYER_PREFIX = "mtp.layers.0."


def checkpoint_shapes(
    config: ModelConfig, *, has_mtp: bool, layout: Layout = "per_expert"
) -> dict[str, Shape]:
    """Returns name and shape of every tensor, in the order in which a checkpoint is written."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer_idx in range(config.num_hidden_layers):
        shapes.update(layer_shapes(config, layer_idx, layout))
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    if has_mtp:
        shapes.update(mtp_shapes(config, layout))
    return shapes


def layer_shapes(config: ModelConfig, layer_idx: int, layout: Layout) -> dict[str, Shape]:
    """Returns name and shape of each tensor of one layer."""
    prefix = layer_prefix(layer_idx)
    if config.is_attention_layer(layer_idx):
        mixer = _attention_shapes(config)
    else:
        mixer = _delta_net_shapes(config)
    is_moe = config.is_moe_layer(layer_idx)
    mlp = _mixture_shapes(config, layout) if is_moe else _dense_shapes(config)
    return _with_prefix(prefix, [*_norm_shapes(config), *mixer, *mlp])


def mtp_shapes(config: ModelConfig, layout: Layout) -> dict[str, Shape]:
    """Returns name and shape of each tensor of the Multi-Token Prediction head.

    Its layer is attention with a mixture of experts, dense where the model has no experts.
    """
    C = config.hidden_size
    mlp = _mixture_shapes(config, layout) if config.num_experts > 0 else _dense_shapes(config)
    own = [
        ("fc.weight", (C, 2 * C)),
        ("pre_fc_norm_embedding.weight", (C,)),
        ("pre_fc_norm_hidden.weight", (C,)),
        ("norm.weight", (C,)),
    ]
    layer = [*_norm_shapes(config), *_attention_shapes(config), *mlp]
    return _with_prefix(MTP_PREFIX, own) | _with_prefix(MTP_LAYER_PREFIX, layer)


def has_mtp_tensors(names: Iterable[str]) -> bool:
    """Says whether any tensor of a Multi-Token Prediction head is among the names."""
    return any(name.startswith(MTP_PREFIX) for name in names)


def mixture_prefixes(config: ModelConfig, *, has_mtp: bool) -> Iterator[str]:
    """Yields how the names of each mixture's tensors begin, `...mlp.`."""
    for layer_idx in range(config.num_hidden_layers):
        if config.is_moe_layer(layer_idx):
            yield layer_prefix(layer_idx) + "mlp."
    if has_mtp and config.num_experts > 0:
        yield MTP_LAYER_PREFIX + "mlp."


def fused_names(prefix: str) -> tuple[str, str]:
    """Returns the names of the stacked tensors of the mixture whose names begin with `prefix`."""
    return prefix + "experts.gate_up_proj", prefix + "experts.down_proj"


def expert_names(prefix: str, expert_idx: int) -> tuple[str, str, str]:
    """Returns the names of one expert's gate, up and down matrices."""
    start = f"{prefix}experts.{expert_idx}."
    return start + "gate_proj.weight", start + "up_proj.weight", start + "down_proj.weight"


def _with_prefix(prefix: str, shapes: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes}


def _norm_shapes(config: ModelConfig) -> list[tuple[str, Shape]]:
    C = config.hidden_size
    return [("input_layernorm.weight", (C,)), ("post_attention_layernorm.weight", (C,))]


def _attention_shapes(config: ModelConfig) -> list[tuple[str, Shape]]:
    C, D = config.hidden_size, config.head_dim
    q_dim, kv_dim = config.num_attention_heads * D, config.num_key_value_heads * D
    return [
        # Per head: the query's D rows, then its output gate's.
        ("self_attn.q_proj.weight", (2 * q_dim, C)),
        ("self_attn.k_proj.weight", (kv_dim, C)),
        ("self_attn.v_proj.weight", (kv_dim, C)),
        ("self_attn.o_proj.weight", (C, q_dim)),
        ("self_attn.q_norm.weight", (D,)),
        ("self_attn.k_norm.weight", (D,)),
    ]


def _delta_net_shapes(config: ModelConfig) -> list[tuple[str, Shape]]:
    C, Hv = config.hidden_size, config.linear_num_value_heads
    return [
        ("linear_attn.A_log", (Hv,)),
        ("linear_attn.dt_bias", (Hv,)),
        ("linear_attn.conv1d.weight", (config.conv_dim, 1, config.linear_conv_kernel_dim)),
        ("linear_attn.in_proj_qkvz.weight", (2 * config.key_dim + 2 * config.value_dim, C)),
        ("linear_attn.in_proj_ba.weight", (2 * Hv, C)),
        ("linear_attn.norm.weight", (config.linear_value_head_dim,)),
        ("linear_attn.out_proj.weight", (C, config.value_dim)),
    ]


def _dense_shapes(config: ModelConfig) -> list[tuple[str, Shape]]:
    return _swiglu_shapes("mlp.", config.hidden_size, config.intermediate_size)


def _swiglu_shapes(prefix: str, hidden_size: int, width: int) -> list[tuple[str, Shape]]:
    return [
        (prefix + "gate_proj.weight", (width, hidden_size)),
        (prefix + "up_proj.weight", (width, hidden_size)),
        (prefix + "down_proj.weight", (hidden_size, width)),
    ]


def _mixture_shapes(config: ModelConfig, layout: Layout) -> list[tuple[str, Shape]]:
    C, E, I = config.hidden_size, config.num_experts, config.moe_intermediate_size
    shapes: list[tuple[str, Shape]] = [("mlp.gate.weight", (E, C))]
    if layout == "fused":
        gate_up, down = fused_names("mlp.")
        shapes += [(gate_up, (E, 2 * I, C)), (down, (E, C, I))]
    else:
        for expert_idx in range(E):
            gate, up, down = expert_names("mlp.", expert_idx)
            shapes += [(gate, (I, C)), (up, (I, C)), (down, (C, I))]
    if config.shared_expert_intermediate_size > 0:
        width = config.shared_expert_intermediate_size
        shapes += _swiglu_shapes("mlp.shared_expert.", C, width)
        shapes.append(("mlp.shared_expert_gate.weight", (1, C)))
    return shapes
