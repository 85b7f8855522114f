"""Angles of the rotary embedding, YaRN included."""

import math

import torch

from qnext.config.model import ModelConfig, RopeConfig


def inverse_frequencies(
    rope: RopeConfig, rotary_dim: int, max_position_embeddings: int
) -> tuple[torch.Tensor, float]:
    """Radians per position of each rotated pair, and the factor of cos and sin.

    Args:
        rope: base and scaling.
        rotary_dim: dimensions of a head that are rotated, R.
        max_position_embeddings: context of the model, used where YaRN names no original one.

    Returns:
        [R / 2] in fp64, and 1.0 or YaRN's 0.1 ln(factor) + 1.

    Source: YaRN, https://arxiv.org/abs/2309.00071
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    plain = rope.theta**-exponents
    if rope.rope_type == "default":
        return plain, 1.0
    original = rope.original_max_position_embeddings or max_position_embeddings

    def pair_of(rotations: float) -> float:
        """Index of the pair that turns this often over the original context."""
        turns = original / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float64) - low) / (high - low)
    # Fast pairs keep their frequency, slow ones are stretched over the longer context.
    stretched = ramp.clamp(0, 1)
    return plain * (1 - stretched) + plain / rope.factor * stretched, _attention_factor(rope)


def _attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


class RotaryTable:
    """cos and sin for positions, worked out in fp32 (fp64 for a float64 model)."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies, self._factor = inverse_frequencies(
            config.rope, config.rotary_dim, config.max_position_embeddings
        )
        self._placed: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have the frequencies ready on a device, so that a captured step copies nothing."""
        self._placed[device, dtype] = self._frequencies.to(device, dtype)

    def __call__(
        self, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin. position_ids: [T]. Returns two of [T, R / 2] in fp32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        key = (position_ids.device, wide)
        if key not in self._placed:
            self.place(*key)
        angles = position_ids[:, None].to(wide) * self._placed[key]
        return angles.cos() * self._factor, angles.sin() * self._factor
