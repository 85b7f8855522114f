"""Which parameter is updated how, and one optimiser step without a wait of the host.

Gradients live in one flat float32 buffer that the parameters' `.grad` are views of: the norm,
the finite test and zeroing are one kernel each, whatever the number of parameters.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qnext.config.model import ModelConfig
from qnext.config.train import OptimConfig
from qnext.kernels.adamw.moments import AdamWRule
from qnext.train.adamw import AdamWGroup, NarrowAdamW
from qnext.train.muon import Muon

ParameterKind = Literal["matrix", "router", "norm", "embedding", "head", "plain"]

# First match wins. Names are those of qnext.model; a `.weight` at the end may be missing.
_KINDS: tuple[tuple[str, ParameterKind], ...] = (
    (r"embed_tokens", "embedding"),
    (r"lm_head", "head"),
    (r"mixer\.(A_log|dt_bias|conv1d)", "plain"),
    (r"mixer\.norm", "plain"),
    (r"mixer\.(q_norm|k_norm)", "norm"),
    (r"input_layernorm|post_attention_layernorm|norm", "norm"),
    (r"mtp\.(norm|pre_fc_norm_embedding|pre_fc_norm_hidden)", "norm"),
    (r"mlp\.(gate|shared_expert_gate)", "router"),
    (r"mixer\.(in_proj|out_proj|qkv_proj|o_proj)", "matrix"),
    (r"mlp\.(experts_gate_up|experts_down|shared_gate_up|shared_down)", "matrix"),
    (r"mlp\.(gate_up_proj|down_proj)", "matrix"),
    (r"mtp\.fc", "matrix"),
)
DECAYED_KINDS: tuple[ParameterKind, ...] = ("matrix", "router", "norm", "head")


def parameter_kind(name: str) -> ParameterKind:
    """Return what a parameter of the model is to the optimiser.

    Weight decay falls on matrices, the router and the untied head included, and on the weights of
    zero-centred norms, which would else grow without bound; on nothing else.

    Raises:
        ValueError: the name has no rule. A new parameter must be given one here.
    """
    stem = re.sub(r"^(mtp\.)?(layers\.\d+|layer)\.", "", name.removesuffix(".weight"))
    for pattern, kind in _KINDS:
        if re.fullmatch(pattern, stem):
            return kind
    raise ValueError(f"parameter {name!r} has no optimiser rule; known: {[p for p, _ in _KINDS]}")


def logical_rows(name: str, param: Tensor, config: ModelConfig) -> list[int]:
    """Return the rows of each checkpoint matrix inside a fused parameter, in order.

    Args:
        name: the parameter's name.
        param: the parameter. [.., rows, columns]
        config: sizes of the model.

    Returns:
        Row counts that sum to param.size(-2); one entry when the parameter is not fused.
    """
    rows = param.size(-2)
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "in_proj":
        heads = config.linear_num_value_heads
        # [q | k | v | z | b | a]
        return [config.key_dim] * 2 + [config.value_dim] * 2 + [heads, heads]
    if leaf == "qkv_proj":
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        # [q | gate | k | v]
        return [query, query, key, key]
    if leaf in ("experts_gate_up", "shared_gate_up", "gate_up_proj"):
        return [rows // 2, rows // 2]
    return [rows]


class FlatGradients:
    """All gradients in one float32 buffer; each parameter's `.grad` is a view of it.

    Args:
        params: the parameters, on one device.
    """

    # Views begin at multiples of 256 bytes, as fused kernels like them.
    ALIGNMENT = 64

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)
        aligned = [math.ceil(p.numel() / self.ALIGNMENT) * self.ALIGNMENT for p in self.params]
        device = self.params[0].device
        self.flat = torch.zeros(sum(aligned), dtype=torch.float32, device=device)
        start = 0
        for param, size in zip(self.params, aligned, strict=True):
            param.grad = self.flat[start : start + param.numel()].view(param.shape)
            start += size

    def zero(self) -> None:
        """Set every gradient to 0."""
        self.flat.zero_()

    def norm(self) -> Tensor:
        """Return the Euclidean norm of all gradients together. [], fp32"""
        return torch.linalg.vector_norm(self.flat)

    def clear_unless(self, is_good: Tensor) -> None:
        """Set every gradient to 0 where `is_good` is 0, also those that are NaN."""
        self.flat.masked_fill_(is_good == 0, 0.0)


class SpikeGuard:
    """Decides on the device whether a step is applied: finite, and of no unusual gradient norm.

    Args:
        config: spike_factor and spike_warmup_steps.
        device: where the running mean lives.
    """

    # Running mean over about 50 steps.
    UPDATE_RATE = 0.02

    def __init__(self, config: OptimConfig, device: torch.device) -> None:
        self.config = config
        # [running mean of the norm, applied steps, skipped steps in a row]
        self.state = torch.zeros(3, dtype=torch.float32, device=device)

    @torch.no_grad()
    def judge(self, grad_norm: Tensor, loss: Tensor) -> Tensor:
        """Return 1 to apply the step and 0 to skip it, and count it. [], fp32"""
        mean, count, skipped = self.state.unbind()
        is_finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        limit = mean * self.config.spike_factor
        if self.config.spike_factor > 0:
            is_warm = count >= self.config.spike_warmup_steps
            is_spike = is_warm & (grad_norm > limit)
            # A spike moves the mean as far as an unusual step may: a lasting change gets through.
            seen = torch.where(is_warm, torch.minimum(grad_norm, limit), grad_norm)
        else:
            is_spike, seen = torch.zeros_like(is_finite), grad_norm
        is_good = is_finite & ~is_spike
        rate = torch.clamp(1 / (count + 1), min=self.UPDATE_RATE)
        moved = torch.where(is_finite, mean + rate * (seen - mean), mean)
        self.state.copy_(
            torch.stack((moved, count + is_good, torch.where(is_good, 0.0, skipped + 1)))
        )
        return is_good.float()


@dataclass(frozen=True)
class StepOutcome:
    """What an optimiser step did, on the device: gradient norm and whether it was applied."""

    grad_norm: Tensor
    is_applied: Tensor


class TrainOptimizer:
    """AdamW, or Muon for matrices and AdamW for the rest, with clipping and the spike guard.

    Args:
        named_params: the model's parameters by name.
        model_config: sizes, for the logical parts of fused parameters.
        config: rates and rules.
    """

    def __init__(
        self,
        named_params: dict[str, nn.Parameter],
        model_config: ModelConfig,
        config: OptimConfig,
    ) -> None:
        self.config = config
        self.names = list(named_params)
        self.params = list(named_params.values())
        for name, param in named_params.items():
            assert param.dtype == torch.float32, f"{name} is {param.dtype}: masters are float32"
        device = self.params[0].device
        kinds = {name: parameter_kind(name) for name in self.names}
        with_muon = {n for n, kind in kinds.items() if kind == "matrix" and config.kind == "muon"}
        self.gradients = FlatGradients(self.params)
        self.guard = SpikeGuard(config, device)
        self.muon = Muon(
            {n: p for n, p in named_params.items() if n in with_muon},
            lambda name, param: logical_rows(name, param, model_config),
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
        )
        self.lr = torch.zeros((), dtype=torch.float32, device=device)
        self.embedding_lr = torch.zeros_like(self.lr)
        self.muon_lr = torch.zeros_like(self.lr)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, param in named_params.items():
            if name not in with_muon:
                is_embedding = kinds[name] in ("embedding", "head")
                groups.setdefault((is_embedding, kinds[name] in DECAYED_KINDS), []).append(param)
        self.adamw: torch.optim.AdamW | NarrowAdamW
        if config.moments == "float32":
            self.adamw = self._wide_adamw(groups)
        else:
            self.adamw = NarrowAdamW(
                [
                    AdamWGroup(members, *self._rates(is_embedding, is_decayed))
                    for (is_embedding, is_decayed), members in groups.items()
                ],
                AdamWRule(config.beta1, config.beta2, config.eps),
                config.moments,
            )

    def _rates(self, is_embedding: bool, is_decayed: bool) -> tuple[Tensor, float]:
        """Learning rate and weight decay of a group."""
        lr = self.embedding_lr if is_embedding else self.lr
        return lr, self.config.weight_decay if is_decayed else 0.0

    def _wide_adamw(self, groups: dict[tuple[bool, bool], list[nn.Parameter]]) -> torch.optim.AdamW:
        config = self.config
        rates = {key: self._rates(*key) for key in groups}
        adamw = torch.optim.AdamW(
            [
                {"params": members, "lr": rates[key][0], "weight_decay": rates[key][1]}
                for key, members in groups.items()
            ],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for group in adamw.param_groups:
            for param in group["params"]:
                adamw.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        return adamw

    def set_lr(self, lr: float, muon_lr: float) -> None:
        """Set the learning rates of the next step; they live on the device."""
        self.lr.fill_(lr)
        self.embedding_lr.fill_(lr * self.config.embedding_lr_scale)
        self.muon_lr.fill_(muon_lr)

    @torch.no_grad()
    def step(self, loss: Tensor) -> StepOutcome:
        """Clip, then update every weight, or none when the loss, gradient or norm is bad.

        Gradients are zeroed for the next step. Nothing here waits for the device.

        Args:
            loss: the step's loss; a NaN or infinite one skips the step. [], fp32
        """
        grad_norm = self.gradients.norm()
        is_good = self.guard.judge(grad_norm, loss)
        self.gradients.clear_unless(is_good)
        if self.config.grad_clip > 0:
            # Both optimisers divide by this; exactly 1 when the norm is within the limit.
            scale = torch.clamp(grad_norm / self.config.grad_clip, min=1.0)
            scale = torch.where(is_good > 0, scale, 1.0)
        else:
            scale = torch.ones_like(grad_norm)
        if self.muon.params:
            torch._foreach_div_([p.grad for p in self.muon.params if p.grad is not None], scale)
            self.muon.step(self.muon_lr, is_good)
        if isinstance(self.adamw, NarrowAdamW):
            self.adamw.step(scale, is_good)
        else:
            # Read by torch's fused AdamW, the way torch.amp.GradScaler hands them over.
            self.adamw.grad_scale = scale  # type: ignore[attr-defined]
            self.adamw.found_inf = 1 - is_good  # type: ignore[attr-defined]
            self.adamw.step()
        self.gradients.zero()
        return StepOutcome(grad_norm=grad_norm, is_applied=is_good)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the state by name; the tensors themselves, not copies."""
        tensors = {"guard": self.guard.state, **self.muon.state_tensors()}
        names = dict(zip(self.params, self.names, strict=True))
        if isinstance(self.adamw, NarrowAdamW):
            return tensors | self.adamw.state_tensors(names)
        for group in self.adamw.param_groups:
            for param in group["params"]:
                for key, value in self.adamw.state[param].items():
                    tensors[f"adamw.{key}/{names[param]}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy a saved state into this one.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        own = self.state_tensors()
        missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
        if missing or unexpected:
            raise ValueError(
                f"optimiser state does not fit: missing {sorted(missing)[:5]}, "
                f"unexpected {sorted(unexpected)[:5]}; was optimizer.kind or .moments changed?"
            )
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"optimiser state {name}: shape {tuple(tensors[name].shape)} saved, "
                    f"{tuple(tensor.shape)} needed"
                )
            tensor.copy_(tensors[name])
