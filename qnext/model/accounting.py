"""Parameters, memory and floating-point operations of a model, from its configuration alone."""

import math
from dataclasses import dataclass

from qnext.config.model import ModelConfig
from qnext.io.names import EMBEDDING, HEAD, MTP_PREFIX, checkpoint_shapes

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
STATE_DTYPE_BYTES = 4

PARTS = (
    "embedding",
    "attention",
    "delta_net",
    "router",
    "experts",
    "shared_expert",
    "dense_mlp",
    "norms",
    "head",
    "mtp",
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one part: all of them, and those that one token passes through."""

    total: int
    active: int


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    A token passes through A of E experts. The head counts as active, the embedding does not (it is
    looked up); where they are one matrix it counts once, as active. The MTP head is no part of the
    main model's step: its active share is that of one draft step, the shared head not included.
    """

    parts: dict[str, ParameterCount]
    """By name, those of PARTS that the model has."""

    @property
    def total(self) -> int:
        """All parameters, the MTP head's too."""
        return sum(part.total for part in self.parts.values())

    @property
    def main(self) -> int:
        """All parameters but the MTP head's."""
        return sum(part.total for name, part in self.parts.items() if name != "mtp")

    @property
    def active(self) -> int:
        """Parameters that one token passes through in the main model."""
        return sum(part.active for name, part in self.parts.items() if name != "mtp")


def count_parameters(config: ModelConfig, *, has_mtp: bool) -> ParameterCounts:
    """Counts parameters by part, all and active."""
    totals: dict[str, int] = {}
    actives: dict[str, int] = {}
    for name, shape in checkpoint_shapes(config, has_mtp=has_mtp, layout="fused").items():
        part, size = part_of(name), math.prod(shape)
        active = size
        if ".experts." in name:
            active = size * config.num_experts_per_tok // config.num_experts
        elif name == EMBEDDING:
            active = size if config.tie_word_embeddings else 0
        totals[part] = totals.get(part, 0) + size
        actives[part] = actives.get(part, 0) + active
    return ParameterCounts(
        {part: ParameterCount(totals[part], actives[part]) for part in PARTS if part in totals}
    )


def part_of(name: str) -> str:
    """Returns which of PARTS a checkpoint tensor belongs to."""
    if name.startswith(MTP_PREFIX):
        return "mtp"
    if name in (EMBEDDING, HEAD):
        return "embedding" if name == EMBEDDING else "head"
    for mark, part in (
        (".self_attn.", "attention"),
        (".linear_attn.", "delta_net"),
        (".mlp.gate.", "router"),
        (".mlp.experts.", "experts"),
        (".mlp.shared_expert", "shared_expert"),
        (".mlp.", "dense_mlp"),
    ):
        if mark in name:
            return part
    return "norms"


def recurrent_state_bytes(config: ModelConfig, dtype_bytes: int = STATE_DTYPE_BYTES) -> int:
    """DeltaNet's states of one sequence, all layers; they do not grow with its length."""
    per_layer = config.value_dim * config.linear_key_head_dim
    return config.num_linear_layers * per_layer * dtype_bytes


def conv_state_bytes(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """The last inputs of DeltaNet's convolutions of one sequence, all layers."""
    per_layer = config.conv_dim * (config.linear_conv_kernel_dim - 1)
    return config.num_linear_layers * per_layer * dtype_bytes


def kv_bytes_per_token(config: ModelConfig, *, has_mtp: bool, dtype_bytes: int = 2) -> int:
    """Keys and values of one token, all attention layers, the MTP head's where there is one."""
    num_layers = config.num_attention_layers + int(has_mtp)
    return num_layers * 2 * config.num_key_value_heads * config.head_dim * dtype_bytes


def sequence_bytes(
    config: ModelConfig, context: int, *, has_mtp: bool, kv_dtype_bytes: int = 2
) -> int:
    """All memory of one running sequence of `context` tokens: states, keys and values."""
    kv_bytes = context * kv_bytes_per_token(config, has_mtp=has_mtp, dtype_bytes=kv_dtype_bytes)
    return recurrent_state_bytes(config) + conv_state_bytes(config, kv_dtype_bytes) + kv_bytes


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """Forward operations per token, averaged over a causal sequence of `context` tokens.

    Two per active parameter, and attention's two products over half the context on average. The
    delta rule, norms, softmax and MTP are not counted.
    """
    attention = 4 * config.num_attention_heads * config.head_dim * context / 2
    active = count_parameters(config, has_mtp=False).active
    return 2 * active + config.num_attention_layers * attention


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Operations of one training step per token: 6 x active parameters + causal attention.

    Recomputation and MTP are not counted, so a share of peak made from it compares across runs.
    """
    return 3 * forward_flops_per_token(config, context)


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """Operations of decoding one token that attends to `context` tokens."""
    attention = 4 * config.num_attention_heads * config.head_dim * context
    active = count_parameters(config, has_mtp=False).active
    return 2 * active + config.num_attention_layers * attention
