"""Sampling defaults and stop ids, read from a `generation_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qnext.config.fields import (
    as_int,
    read_float,
    read_int,
    read_optional_int,
    read_token_ids,
)

# Values at which a key of another program's sampler changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "early_stopping": (False,),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
}
IGNORED_KEYS = frozenset(
    {
        "_from_model_config",
        "cache_implementation",
        "disable_compile",
        "max_length",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "return_dict_in_generate",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of sampling; the values of this class are those of a file that sets nothing."""

    temperature: float = 1.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    """Ids that end an answer."""
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, value, is_allowed, limit in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2, "-2 to 2"),
            (
                "frequency_penalty",
                self.frequency_penalty,
                abs(self.frequency_penalty) <= 2,
                "-2 to 2",
            ),
        ):
            if not is_allowed:
                raise ValueError(f"{name} = {value}: it must be {limit}")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any]) -> "GenerationConfig":
        """Reads a parsed `generation_config.json`.

        `do_sample: false` is greedy decoding whatever the temperature; top_k of -1 means 0.

        Raises:
            ValueError: a value of the wrong type or out of range, or a key that asks for sampling
                we do not have; the text names key and value.
        """
        for key, value in source.items():
            if value is None or key in _HONOURED or key in IGNORED_KEYS:
                continue
            if key not in _NEUTRAL or value not in _NEUTRAL[key]:
                raise ValueError(
                    f"{key} = {value!r} in generation_config.json is not supported; "
                    "remove it to generate without it"
                )
        top_k = read_int(source, "top_k", cls.top_k)
        is_greedy = source.get("do_sample") is False
        limit = source.get("max_new_tokens")
        return cls(
            temperature=0.0 if is_greedy else read_float(source, "temperature", cls.temperature),
            top_p=read_float(source, "top_p", cls.top_p),
            top_k=0 if top_k == -1 else top_k,
            min_p=read_float(source, "min_p", cls.min_p),
            repetition_penalty=read_float(source, "repetition_penalty", cls.repetition_penalty),
            presence_penalty=read_float(source, "presence_penalty", cls.presence_penalty),
            frequency_penalty=read_float(source, "frequency_penalty", cls.frequency_penalty),
            max_new_tokens=None if limit is None else as_int("max_new_tokens", limit),
            bos_token_id=read_optional_int(source, "bos_token_id"),
            eos_token_id=read_token_ids(source, "eos_token_id"),
            pad_token_id=read_optional_int(source, "pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the `generation_config.json` that `from_hf` reads back equal."""
        default, eos = GenerationConfig(), self.eos_token_id
        result: dict[str, Any] = {"do_sample": self.temperature > 0}
        for name in sorted(_HONOURED - {"do_sample", "eos_token_id"}):
            if getattr(self, name) != getattr(default, name):
                result[name] = getattr(self, name)
        if self.temperature == 0:
            del result["temperature"]
        if eos:
            result["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
        return dict(sorted(result.items()))


_HONOURED = {*GenerationConfig.__dataclass_fields__, "do_sample"}
