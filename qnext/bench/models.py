"""Models to measure with: the real sizes with fewer layers, weights drawn where they will run."""

import gc
import math
from dataclasses import replace

import torch
from torch import nn

from qnext.config.model import ModelConfig
from qnext.config.presets import preset
from qnext.kernels.fp8_blocks import device_objection
from qnext.model.gated_delta_net import GatedDeltaNet
from qnext.model.init import A_FLOOR, A_MAX, DT_MAX, DT_MIN
from qnext.model.norm import GatedRMSNorm, RMSNorm
from qnext.model.quantized import fp8_names, num_tail_rows, quantized
from qnext.model.qwen3_next import Qwen3Next


def bench_config(num_layers: int, *, is_small: bool) -> ModelConfig:
    """The 80B-A3B sizes with fewer layers, or sizes that a CPU runs in milliseconds."""
    config = replace(preset("next-80b-a3b"), num_hidden_layers=num_layers, layer_types=())
    if not is_small:
        return config
    return replace(
        config,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        layer_types=(),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=(0,),
    )


@torch.no_grad()
def random_model(
    config: ModelConfig,
    *,
    has_mtp: bool,
    dtype: torch.dtype,
    device: torch.device,
    is_fp8: bool = False,
    seed: int = 0,
) -> Qwen3Next:
    """A model whose weights are drawn on its device, tensor by tensor: seconds for 20 billion.

    Distributions are those of `init_weights` but for the router's rows, whose norms are left as
    they fall; the numbers differ from its numbers and between kinds of device.

    Args:
        is_fp8: hold the large matrices in fp8, each from the moment it is drawn.
    """
    if is_fp8 and (objection := device_objection(device)) is not None:
        raise ValueError(objection)
    model = Qwen3Next(config, has_mtp=has_mtp, dtype=dtype, device="meta")
    packed = frozenset(fp8_names(model)) if is_fp8 else frozenset()
    generator = torch.Generator(device).manual_seed(seed)
    for name, empty in list(model.named_parameters()):
        parent, _, own = name.rpartition(".")
        drawn = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        if drawn.dim() >= 2:
            drawn.normal_(0.0, config.initializer_range, generator=generator)
        made = nn.Parameter(drawn)
        if name in packed:
            made = quantized(drawn, num_tail_rows(model, name))
        setattr(model.get_submodule(parent), own, made)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.zero_()
        elif isinstance(module, GatedRMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, GatedDeltaNet):
            bound = module.conv1d.shape[1] ** -0.5
            module.conv1d.uniform_(-bound, bound, generator=generator)
            module.A_log.uniform_(0.0, A_MAX, generator=generator).clamp_min_(A_FLOOR).log_()
            steps = torch.empty_like(module.dt_bias)
            steps.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_()
            # Inverse of softplus.
            module.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))
    return model


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more, so that the next model finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
