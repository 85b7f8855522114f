"""The model's configuration: read once from a Hugging Face `config.json`, then frozen.

Sizes carry the Hugging Face keys. Every key of a `config.json` is honoured (a field of
`ModelConfig` or `RopeConfig`), refused, or listed in `IGNORED_KEYS` with its reason; a key that is
none of these is an error, because a setting that changes the mathematics must not pass unseen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qnext.config.fields import (
    as_int,
    read_bool,
    read_float,
    read_int,
    read_optional_float,
    read_optional_int,
    read_token_ids,
)
from qnext.config.hf_keys import IGNORED_KEYS, REQUIRED_VALUES, ROPE_KEYS

LAYER_TYPES = ("linear_attention", "full_attention")
ROPE_TYPES = ("default", "yarn")
DTYPES = ("float32", "float16", "bfloat16", "float64")
DEFAULT_ATTENTION_INTERVAL = 4

# Names that older writers use for the two layer types.
_LAYER_TYPE_ALIASES = {"attention": "full_attention"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: plain, or rescaled by YaRN for contexts beyond training."""

    theta: float = 10_000.0
    partial_rotary_factor: float = 0.25
    """Share of head_dim that is rotated, from its first dimension on."""
    rope_type: str = "default"
    factor: float = 1.0
    """YaRN: context length wanted over context length trained."""
    original_max_position_embeddings: int | None = None
    """YaRN: the context length trained."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """YaRN: multiplies cos and sin; None computes 0.1 ln(factor) + 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """YaRN: round the bounds of the ramp between kept and rescaled frequencies outwards."""

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type = {self.rope_type!r}: allowed are {', '.join(map(repr, ROPE_TYPES))}"
            )
        if self.theta <= 0:
            raise ValueError(f"rope_theta = {self.theta}: it must be above 0")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(
                f"partial_rotary_factor = {self.partial_rotary_factor}: "
                "it must be above 0 and at most 1"
            )
        if self.rope_type == "default" and self.factor != 1:
            raise ValueError(
                f"factor = {self.factor} of rope_type 'default': it must be 1, or rope_type 'yarn'"
            )
        if self.rope_type == "yarn":
            if self.factor < 1:
                raise ValueError(f"factor = {self.factor} of yarn: it must be at least 1")
            if self.original_max_position_embeddings is None:
                raise ValueError(
                    "original_max_position_embeddings is missing: yarn needs the trained context"
                )
            if self.original_max_position_embeddings < 1:
                raise ValueError(
                    "original_max_position_embeddings = "
                    f"{self.original_max_position_embeddings}: it must be at least 1"
                )

    @classmethod
    def from_hf(cls, source: Mapping[str, Any]) -> "RopeConfig":
        """Reads both spellings: three top-level keys, or one `rope_parameters` dict.

        Args:
            source: a parsed config.json; `max_position_embeddings` is YaRN's trained context where
                the rope settings do not name one.

        Raises:
            ValueError: an unknown key or type, or two spellings that contradict each other.
        """
        merged: dict[str, Any] = {}
        for group in ("rope_parameters", "rope_scaling"):
            settings = source.get(group)
            if settings is None:
                continue
            if not isinstance(settings, Mapping):
                raise ValueError(f"{group} = {settings!r}: a table or null is allowed here")
            for key, value in settings.items():
                if key not in ROPE_KEYS:
                    raise ValueError(
                        f"{group}.{key} = {value!r}: allowed are {', '.join(sorted(ROPE_KEYS))}"
                    )
                _merge(merged, "rope_type" if key == "type" else key, value, group)
        for key in ("rope_theta", "partial_rotary_factor"):
            if source.get(key) is not None:
                _merge(merged, key, source[key], "config.json")
        rope_type = merged.get("rope_type") or "default"
        trained = read_optional_int(merged, "original_max_position_embeddings")
        if rope_type == "yarn" and trained is None:
            trained = read_int(
                source, "max_position_embeddings", ModelConfig.max_position_embeddings
            )
        factor = read_optional_float(merged, "factor")
        if rope_type == "yarn" and factor is None:
            raise ValueError("rope_parameters.factor is missing: yarn needs it")
        return cls(
            theta=read_float(merged, "rope_theta", cls.theta),
            partial_rotary_factor=read_float(
                merged, "partial_rotary_factor", cls.partial_rotary_factor
            ),
            rope_type=rope_type,
            factor=cls.factor if factor is None else factor,
            original_max_position_embeddings=trained,
            beta_fast=read_float(merged, "beta_fast", cls.beta_fast),
            beta_slow=read_float(merged, "beta_slow", cls.beta_slow),
            attention_factor=read_optional_float(merged, "attention_factor"),
            mscale=read_optional_float(merged, "mscale"),
            mscale_all_dim=read_optional_float(merged, "mscale_all_dim"),
            truncate=read_bool(merged, "truncate", cls.truncate),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns both spellings, so that readers of either find the settings."""
        parameters: dict[str, Any] = {"rope_type": self.rope_type}
        if self.rope_type == "yarn":
            parameters["factor"] = self.factor
            parameters["original_max_position_embeddings"] = self.original_max_position_embeddings
            parameters["beta_fast"] = self.beta_fast
            parameters["beta_slow"] = self.beta_slow
            for key in ("attention_factor", "mscale", "mscale_all_dim"):
                if getattr(self, key) is not None:
                    parameters[key] = getattr(self, key)
            if not self.truncate:
                parameters["truncate"] = False
        shared = {"rope_theta": self.theta, "partial_rotary_factor": self.partial_rotary_factor}
        return {
            **shared,
            "rope_scaling": dict(parameters) if self.rope_type != "default" else None,
            "rope_parameters": {**shared, **parameters},
        }


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model; absent keys take the defaults of `transformers`."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    """Width of a dense SwiGLU MLP, in layers that are no mixture."""
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    layer_types: tuple[str, ...] = ()
    """One of LAYER_TYPES per layer; left empty, every fourth layer is attention."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    rope: RopeConfig = field(default_factory=RopeConfig)
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    """Kept for other programs; batches here are packed and never padded."""
    dtype: str | None = None
    """Name of the dtype most weights are stored in, one of DTYPES."""
    quant_method: str | None = None
    """Method of a `quantization_config`; of "fp8" in blocks the weights can be read."""

    def __post_init__(self) -> None:
        if not self.layer_types:
            types = _interval_layer_types(self.num_hidden_layers, DEFAULT_ATTENTION_INTERVAL)
            object.__setattr__(self, "layer_types", types)
        _check_sizes(self)
        _check_heads(self)
        _check_layers(self)
        _check_experts(self)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}: allowed are {', '.join(DTYPES)}")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any]) -> "ModelConfig":
        """Reads a parsed `config.json` of model type `qwen3_next`.

        Args:
            source: the parsed file, in the form of transformers 4.57 or 5.

        Returns:
            The configuration, with `layer_types` written out.

        Raises:
            ValueError: an unknown or unsupported key, a wrong type or a contradiction; the
                text names key, value and limit.
        """
        _refuse_unsupported(source)
        sizes = {name: read_int(source, name, getattr(cls, name)) for name in _SIZE_KEYS}
        if source.get("head_dim", cls.head_dim) is None and sizes["num_attention_heads"] > 0:
            sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        mlp_only_layers = source.get("mlp_only_layers") or ()
        if not isinstance(mlp_only_layers, list | tuple):
            raise ValueError(f"mlp_only_layers = {mlp_only_layers!r}: a list of layers is allowed")
        return cls(
            **sizes,
            norm_topk_prob=read_bool(source, "norm_topk_prob", cls.norm_topk_prob),
            mlp_only_layers=tuple(as_int("mlp_only_layers", item) for item in mlp_only_layers),
            layer_types=_read_layer_types(source, sizes["num_hidden_layers"]),
            rms_norm_eps=read_float(source, "rms_norm_eps", cls.rms_norm_eps),
            initializer_range=read_float(source, "initializer_range", cls.initializer_range),
            router_aux_loss_coef=read_float(
                source, "router_aux_loss_coef", cls.router_aux_loss_coef
            ),
            tie_word_embeddings=read_bool(source, "tie_word_embeddings", cls.tie_word_embeddings),
            rope=RopeConfig.from_hf(source),
            bos_token_id=read_optional_int(source, "bos_token_id"),
            eos_token_id=read_token_ids(source, "eos_token_id"),
            pad_token_id=read_optional_int(source, "pad_token_id"),
            dtype=_read_dtype(source),
            quant_method=_read_quant_method(source),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the `config.json` that `from_hf` reads back equal and `transformers` opens.

        Raises:
            ValueError: the configuration describes quantised weights, which are never written here.
        """
        if self.quant_method is not None:
            raise ValueError(
                f"quant_method = {self.quant_method!r}: a configuration of quantised weights is "
                "read, never written"
            )
        result: dict[str, Any] = {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
            "use_sliding_window": False,
        }
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("rope", "eos_token_id", "quant_method"):
                result[item.name] = list(value) if isinstance(value, tuple) else value
        eos = self.eos_token_id
        result["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        result.update(self.rope.to_hf())
        interval = self.full_attention_interval
        if interval is not None:
            result["full_attention_interval"] = interval
        return dict(sorted(result.items()))

    def is_attention_layer(self, layer_idx: int) -> bool:
        """Says whether a layer's mixer is Gated Attention; otherwise it is Gated DeltaNet."""
        return self.layer_types[layer_idx] == "full_attention"

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Says whether a layer's second half is the mixture of experts; otherwise a dense MLP."""
        return (
            self.num_experts > 0
            and layer_idx not in self.mlp_only_layers
            and (layer_idx + 1) % self.decoder_sparse_step == 0
        )

    @property
    def full_attention_interval(self) -> int | None:
        """The interval that writes `layer_types` shorter, None where no interval does."""
        for interval in range(1, self.num_hidden_layers + 2):
            if _interval_layer_types(self.num_hidden_layers, interval) == self.layer_types:
                return interval
        return None

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each attention head that are rotated, from the first on."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def num_attention_layers(self) -> int:
        """Layers whose mixer is Gated Attention, the MTP head's not counted."""
        return sum(kind == "full_attention" for kind in self.layer_types)

    @property
    def num_linear_layers(self) -> int:
        """Layers whose mixer is Gated DeltaNet."""
        return self.num_hidden_layers - self.num_attention_layers

    @property
    def key_dim(self) -> int:
        """Channels of all DeltaNet keys together, Hk * K."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Channels of all DeltaNet values together, Hv * V."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution, [q | k | v]."""
        return 2 * self.key_dim + self.value_dim


_SIZE_KEYS = tuple(
    name
    for name, annotation in ModelConfig.__annotations__.items()
    if annotation is int or annotation == "int"
)
HONOURED_KEYS = ({item.name for item in fields(ModelConfig)} - {"rope", "quant_method"}) | {
    "torch_dtype",
    "quantization_config",
    "full_attention_interval",
    "rope_theta",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_parameters",
}


def _merge(merged: dict[str, Any], key: str, value: Any, where: str) -> None:
    if value is None:
        return
    if merged.get(key, value) != value:
        raise ValueError(
            f"{key} = {value!r} in {where} contradicts {merged[key]!r} given elsewhere; "
            "remove one of the two"
        )
    merged[key] = value


def _refuse_unsupported(source: Mapping[str, Any]) -> None:
    for key, allowed in REQUIRED_VALUES.items():
        value = source.get(key)
        if value is not None and value not in allowed:
            raise ValueError(f"{key} = {value!r} is not supported: {allowed[0]!r} is allowed")
    known = HONOURED_KEYS | REQUIRED_VALUES.keys() | IGNORED_KEYS.keys()
    for key, value in source.items():
        if key not in known:
            raise ValueError(
                f"{key} = {value!r} in config.json is unknown to qnext, and might change the "
                "model; remove the key if it does not"
            )


def _interval_layer_types(num_layers: int, interval: int) -> tuple[str, ...]:
    return tuple(
        "full_attention" if (i + 1) % interval == 0 else "linear_attention"
        for i in range(num_layers)
    )


def _read_layer_types(source: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    interval = read_int(source, "full_attention_interval", DEFAULT_ATTENTION_INTERVAL)
    if interval < 1:
        raise ValueError(f"full_attention_interval = {interval}: it must be at least 1")
    types: Any = source.get("layer_types")
    if types is None:
        return _interval_layer_types(num_layers, interval)
    if not isinstance(types, list | tuple) or not all(isinstance(kind, str) for kind in types):
        raise ValueError(f"layer_types = {types!r}: a list of {' | '.join(LAYER_TYPES)} is allowed")
    if not types:
        raise ValueError(f"layer_types has 0 entries, num_hidden_layers is {num_layers}")
    names: list[str] = list(types)
    return tuple(_LAYER_TYPE_ALIASES.get(name, name) for name in names)


def _read_dtype(source: Mapping[str, Any]) -> str | None:
    names: dict[str, Any] = {}
    for key in ("dtype", "torch_dtype"):
        value = source.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key} = {value!r}: allowed are {', '.join(DTYPES)}")
        _merge(names, "dtype", value.removeprefix("torch.") if value else None, key)
    return names.get("dtype")


def _read_quant_method(source: Mapping[str, Any]) -> str | None:
    settings = source.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return str(method) if method else "unnamed"


def _check_sizes(config: ModelConfig) -> None:
    may_be_zero = {"num_experts", "shared_expert_intermediate_size"}
    if config.num_experts == 0:
        may_be_zero |= {"num_experts_per_tok", "moe_intermediate_size"}
    for name in _SIZE_KEYS:
        value, least = getattr(config, name), 0 if name in may_be_zero else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} = {value!r}: it must be an integer of at least {least}")
    if not config.initializer_range >= 0:
        raise ValueError(f"initializer_range = {config.initializer_range}: it must be at least 0")
    if not config.rms_norm_eps > 0:
        raise ValueError(f"rms_norm_eps = {config.rms_norm_eps}: it must be above 0")


def _check_heads(config: ModelConfig) -> None:
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(config, many) % getattr(config, few) != 0:
            raise ValueError(
                f"{many} = {getattr(config, many)} is not a multiple of "
                f"{few} = {getattr(config, few)}"
            )
    if config.rotary_dim < 2 or config.rotary_dim % 2 != 0:
        raise ValueError(
            f"head_dim = {config.head_dim} times partial_rotary_factor = "
            f"{config.rope.partial_rotary_factor} rotates {config.rotary_dim} dimensions: "
            "the number must be even and at least 2"
        )


def _check_layers(config: ModelConfig) -> None:
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(config.layer_types)} entries, "
            f"num_hidden_layers is {config.num_hidden_layers}"
        )
    for layer_idx, kind in enumerate(config.layer_types):
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"layer_types[{layer_idx}] = {kind!r}: allowed are {', '.join(LAYER_TYPES)}"
            )
    for layer_idx in config.mlp_only_layers:
        if not 0 <= layer_idx < config.num_hidden_layers:
            raise ValueError(
                f"mlp_only_layers names layer {layer_idx}: layers go from 0 to "
                f"{config.num_hidden_layers - 1}"
            )


def _check_experts(config: ModelConfig) -> None:
    if 0 < config.num_experts < config.num_experts_per_tok:
        raise ValueError(
            f"num_experts_per_tok = {config.num_experts_per_tok} is more than "
            f"num_experts = {config.num_experts}"
        )
