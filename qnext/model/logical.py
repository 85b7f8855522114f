"""Where each tensor of a checkpoint lies in the model's parameters, which are laid out for speed.

Projections are fused and de-interleaved inside: q_proj's query and gate rows, which alternate by
head, and in_proj_qkvz's rows, grouped by key head, become runs that are flat by head. Loading,
saving and the optimiser's rules all read this one map.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qnext.config.model import ModelConfig
from qnext.io.names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MTP_LAYER_PREFIX,
    MTP_PREFIX,
    Layout,
    Shape,
    expert_names,
    fused_names,
    layer_prefix,
    layer_shapes,
    mtp_shapes,
)

LayoutOf = Callable[[str], Layout]


@dataclass(frozen=True)
class Part:
    """Rows of one parameter that a checkpoint tensor, or a group-wise slice of it, fills."""

    parameter: str
    """Name in the model's `named_parameters()`."""
    start: int = 0
    stop: int | None = None
    """Rows [start, stop) of the parameter's first dimension, the expert's once one is chosen."""
    expert_idx: int | None = None
    """Index of the parameter's leading expert dimension."""
    num_groups: int = 1
    """Equal groups into which the tensor's rows fall."""
    group_start: int = 0
    group_stop: int | None = None
    """Rows [group_start, group_stop) of each group belong to this part."""


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor of a checkpoint and the parts of parameters that hold it."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]


def map_tensors(
    config: ModelConfig, *, has_mtp: bool, layout_of: LayoutOf
) -> dict[str, LogicalTensor]:
    """Maps every tensor of a checkpoint to the parameters of `Qwen3Next`.

    Args:
        config: the model's sizes.
        has_mtp: with the Multi-Token Prediction head.
        layout_of: the layout of the mixture whose names begin with the given prefix.

    Returns:
        By checkpoint name, in the order in which a checkpoint is written.
    """
    width = config.hidden_size
    tensors = [_whole(EMBEDDING, (config.vocab_size, width), "embed_tokens")]
    for layer_idx in range(config.num_hidden_layers):
        prefix = layer_prefix(layer_idx)
        shapes = layer_shapes(config, layer_idx, layout_of(prefix + "mlp."))
        tensors += _map_layer(config, prefix, f"layers.{layer_idx}.", shapes)
    tensors.append(_whole(FINAL_NORM, (width,), "norm.weight"))
    if not config.tie_word_embeddings:
        tensors.append(_whole(HEAD, (config.vocab_size, width), "lm_head"))
    if has_mtp:
        shapes = mtp_shapes(config, layout_of(MTP_LAYER_PREFIX + "mlp."))
        for own in ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "norm.weight"):
            tensors.append(_whole(MTP_PREFIX + own, shapes[MTP_PREFIX + own], "mtp." + own))
        tensors.append(_whole("mtp.fc.weight", shapes["mtp.fc.weight"], "mtp.fc"))
        tensors += _map_layer(config, MTP_LAYER_PREFIX, "mtp.layer.", shapes)
    return {tensor.name: tensor for tensor in tensors}


def _whole(name: str, shape: Shape, parameter: str) -> LogicalTensor:
    return LogicalTensor(name, shape, (Part(parameter),))


def _map_layer(
    config: ModelConfig, prefix: str, inside: str, shapes: dict[str, Shape]
) -> Iterator[LogicalTensor]:
    """Yields the tensors of the layer whose names begin with `prefix`; `inside` is the module."""
    parts: dict[str, tuple[Part, ...]] = {
        "input_layernorm.weight": (Part(inside + "input_layernorm.weight"),),
        "post_attention_layernorm.weight": (Part(inside + "post_attention_layernorm.weight"),),
    }
    parts |= _attention_parts(config, inside + "mixer.")
    parts |= _delta_net_parts(config, inside + "mixer.")
    is_moe = prefix + "mlp.gate.weight" in shapes
    mlp = inside + "mlp."
    parts |= _mixture_parts(config, mlp) if is_moe else _dense_parts(config, mlp)
    for name, shape in shapes.items():
        if name.startswith(prefix):
            yield LogicalTensor(name, shape, parts[name.removeprefix(prefix)])


def _attention_parts(config: ModelConfig, mixer: str) -> dict[str, tuple[Part, ...]]:
    D, heads = config.head_dim, config.num_attention_heads
    q_dim, kv_dim = heads * D, config.num_key_value_heads * D
    qkv = mixer + "qkv_proj"
    return {
        "self_attn.q_proj.weight": (
            Part(qkv, 0, q_dim, num_groups=heads, group_start=0, group_stop=D),
            Part(qkv, q_dim, 2 * q_dim, num_groups=heads, group_start=D, group_stop=2 * D),
        ),
        "self_attn.k_proj.weight": (Part(qkv, 2 * q_dim, 2 * q_dim + kv_dim),),
        "self_attn.v_proj.weight": (Part(qkv, 2 * q_dim + kv_dim, 2 * q_dim + 2 * kv_dim),),
        "self_attn.o_proj.weight": (Part(mixer + "o_proj"),),
        "self_attn.q_norm.weight": (Part(mixer + "q_norm.weight"),),
        "self_attn.k_norm.weight": (Part(mixer + "k_norm.weight"),),
    }


def _delta_net_parts(config: ModelConfig, mixer: str) -> dict[str, tuple[Part, ...]]:
    Hk, Hv = config.linear_num_key_heads, config.linear_num_value_heads
    K = config.linear_key_head_dim
    values = Hv // Hk * config.linear_value_head_dim
    in_proj = mixer + "in_proj"
    # Inside, the rows are [q | k | v | z | b | a]; in the file each key head has its share of all.
    sizes = [K, K, values, values]
    qkvz = tuple(_grouped_parts(in_proj, 0, Hk, sizes))
    ba = tuple(_grouped_parts(in_proj, Hk * sum(sizes), Hk, [Hv // Hk, Hv // Hk]))
    return {
        "linear_attn.in_proj_qkvz.weight": qkvz,
        "linear_attn.in_proj_ba.weight": ba,
        "linear_attn.conv1d.weight": (Part(mixer + "conv1d"),),
        "linear_attn.A_log": (Part(mixer + "A_log"),),
        "linear_attn.dt_bias": (Part(mixer + "dt_bias"),),
        "linear_attn.norm.weight": (Part(mixer + "norm.weight"),),
        "linear_attn.out_proj.weight": (Part(mixer + "out_proj"),),
    }


def _grouped_parts(parameter: str, row: int, num_groups: int, sizes: list[int]) -> Iterator[Part]:
    """Yields one part per size: consecutive in each group of the file, consecutive runs inside."""
    group_row = 0
    for size in sizes:
        stop, group_stop = row + num_groups * size, group_row + size
        yield Part(
            parameter,
            row,
            stop,
            num_groups=num_groups,
            group_start=group_row,
            group_stop=group_stop,
        )
        row, group_row = stop, group_stop


def _swiglu_parts(prefix: str, width: int, gate_up: str, down: str) -> dict[str, tuple[Part, ...]]:
    return {
        prefix + "gate_proj.weight": (Part(gate_up, 0, width),),
        prefix + "up_proj.weight": (Part(gate_up, width, 2 * width),),
        prefix + "down_proj.weight": (Part(down),),
    }


def _dense_parts(config: ModelConfig, mlp: str) -> dict[str, tuple[Part, ...]]:
    width = config.intermediate_size
    return _swiglu_parts("mlp.", width, mlp + "gate_up_proj", mlp + "down_proj")


def _mixture_parts(config: ModelConfig, mlp: str) -> dict[str, tuple[Part, ...]]:
    width = config.moe_intermediate_size
    gate_up, down = mlp + "experts_gate_up", mlp + "experts_down"
    fused_gate_up, fused_down = fused_names("mlp.")
    parts: dict[str, tuple[Part, ...]] = {
        "mlp.gate.weight": (Part(mlp + "gate"),),
        "mlp.shared_expert_gate.weight": (Part(mlp + "shared_expert_gate"),),
        fused_gate_up: (Part(gate_up),),
        fused_down: (Part(down),),
    }
    parts |= _swiglu_parts(
        "mlp.shared_expert.",
        config.shared_expert_intermediate_size,
        mlp + "shared_gate_up",
        mlp + "shared_down",
    )
    for expert_idx in range(config.num_experts):
        names = expert_names("mlp.", expert_idx)
        parts[names[0]] = (Part(gate_up, 0, width, expert_idx),)
        parts[names[1]] = (Part(gate_up, width, 2 * width, expert_idx),)
        parts[names[2]] = (Part(down, expert_idx=expert_idx),)
    return parts
