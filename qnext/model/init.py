"""Weights of a model that starts from nothing."""

import math

import torch

from qnext.config.model import ModelConfig
from qnext.model.gated_delta_net import GatedDeltaNet
from qnext.model.moe import MixtureOfExperts
from qnext.model.norm import GatedRMSNorm, RMSNorm

A_MAX = 16.0
A_FLOOR = 1e-4
DT_MIN, DT_MAX = 1e-3, 0.1


@torch.no_grad()
def init_weights(
    model: torch.nn.Module, config: ModelConfig, *, seed: int, decay: str = "paper"
) -> None:
    """Draw all weights of a model in place, reproducibly for a seed.

    Matrices are normal with the configured range, zero-centred norms 0, DeltaNet's output norm 1,
    convolution taps uniform within 1/sqrt(width). Rows of a router get one common norm, so that
    no expert is favoured early.

    Args:
        model: a `Qwen3Next` on a real device.
        config: its sizes.
        seed: of a generator used for this call alone.
        decay: "paper": A ~ U(0, 16), dt log-uniform in 0.001..0.1 (median half-life 11 tokens);
            "hf": A ~ U(0.01, 16), dt_bias 1 (0.07 tokens), as transformers draws them.

    Raises:
        ValueError: an unknown `decay`.
    """
    if decay not in ("paper", "hf"):
        raise ValueError(f"decay = {decay!r}: must be 'paper' or 'hf'")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() >= 2:
            drawn = torch.randn(parameter.shape, generator=generator) * config.initializer_range
            parameter.copy_(drawn)
            assert drawn.shape == parameter.shape, (name, drawn.shape, parameter.shape)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.zero_()
        elif isinstance(module, GatedRMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, MixtureOfExperts):
            _init_router(module.gate, config, generator)
        elif isinstance(module, GatedDeltaNet):
            _init_delta_net(module, generator, decay)


def _init_router(gate: torch.nn.Parameter, config: ModelConfig, generator: torch.Generator) -> None:
    rows = torch.randn(gate.shape, generator=generator)
    norm = config.initializer_range * math.sqrt(config.hidden_size)
    gate.copy_(rows / rows.norm(dim=-1, keepdim=True) * norm)


def _init_delta_net(module: GatedDeltaNet, generator: torch.Generator, decay: str) -> None:
    bound = module.conv1d.shape[1] ** -0.5
    taps = torch.rand(module.conv1d.shape, generator=generator)
    module.conv1d.copy_((2 * taps - 1) * bound)
    # Drawn in fp32 and floored: in bf16 some heads get exactly 0, whose logarithm is -inf.
    uniform = torch.rand(module.A_log.shape, generator=generator)
    if decay == "hf":
        module.A_log.copy_((0.01 + uniform * (A_MAX - 0.01)).log())
        module.dt_bias.fill_(1.0)
        return
    module.A_log.copy_((uniform * A_MAX).clamp_min(A_FLOOR).log())
    log_range = math.log(DT_MAX) - math.log(DT_MIN)
    steps = torch.rand(module.dt_bias.shape, generator=generator) * log_range + math.log(DT_MIN)
    dt = steps.exp()
    # Inverse of softplus, so that softplus(dt_bias) is dt where the token adds nothing.
    module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
