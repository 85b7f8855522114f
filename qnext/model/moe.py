"""Mixture of experts, and the dense MLP of layers without one."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qnext.config.model import ModelConfig
from qnext.kernels import dispatch
from qnext.kernels.experts_shared.reference import add_shared
from qnext.model.batch import ForwardBatch
from qnext.model.linear import fill_rows, project


class RouterStats(NamedTuple):
    """What one layer's router did with the tokens of a batch.

    Attributes:
        prob_mean: mean softmax over the tokens; carries the gradient. [E]
        counts: (token, slot) pairs sent to each expert. [E], fp32
        z_mean: mean square of the log-sum-exp of the logits; carries the gradient. []
        entropy_mean: mean entropy of the softmax, in nats. []
    """

    prob_mean: torch.Tensor
    counts: torch.Tensor
    z_mean: torch.Tensor
    entropy_mean: torch.Tensor


class DenseMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), gate and up fused in one projection."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> tuple[torch.Tensor, None]:
        """Transform rows [T, C]; there are no router statistics."""
        return _swiglu(x, self.gate_up_proj, self.down_proj, batch), None


class MixtureOfExperts(nn.Module):
    """A of E routed experts per token, and a shared one behind a sigmoid gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.moe_intermediate_size
        shared = config.shared_expert_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Parameter(torch.empty(config.num_experts, size))
        self.experts_gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * width, size))
        self.experts_down = nn.Parameter(torch.empty(config.num_experts, size, width))
        self.has_shared = shared > 0
        if self.has_shared:
            self.shared_gate_up = nn.Parameter(torch.empty(2 * shared, size))
            self.shared_down = nn.Parameter(torch.empty(size, shared))
            self.shared_expert_gate = nn.Parameter(torch.empty(1, size))

    def forward(
        self, x: torch.Tensor, batch: ForwardBatch
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """Transform rows [T, C]; statistics are worked out when gradients are on."""
        rows = x[: batch.num_rows] if batch.row_stable else x
        weights, ids, logits = dispatch.router(
            rows, self.gate, self.top_k, self.norm_topk_prob, row_stable=batch.row_stable
        )
        if self.has_shared and rows.is_cuda and not batch.row_stable:
            # The shared expert is added in the pass that adds up the others.
            gate = project(x, self.shared_expert_gate, batch)
            shared = _swiglu(x, self.shared_gate_up, self.shared_down, batch)
            mixed = dispatch.experts_shared(
                rows, self.experts_gate_up, self.experts_down, weights, ids, shared, gate
            )
            return mixed, None if batch.cache_inputs is not None else _stats(logits, ids)
        routed = dispatch.experts(
            rows,
            self.experts_gate_up,
            self.experts_down,
            weights,
            ids,
            row_stable=batch.row_stable,
        )
        routed = fill_rows(routed, x.shape[0])
        if self.has_shared:
            gate = project(x, self.shared_expert_gate, batch)
            shared = _swiglu(x, self.shared_gate_up, self.shared_down, batch)
            routed = add_shared(routed, shared, gate)
        return routed, None if batch.cache_inputs is not None else _stats(logits, ids)


def _stats(logits: torch.Tensor, ids: torch.Tensor) -> RouterStats:
    return RouterStats(*dispatch.router_stats(logits, ids))


def _swiglu(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, batch: ForwardBatch
) -> torch.Tensor:
    if x.is_cuda and not batch.row_stable:
        return project(dispatch.silu_mul(project(x, gate_up, batch)), down, batch)
    if not batch.row_stable:
        out: torch.Tensor = dispatch.swiglu(x, gate_up, down)
        return out
    gate, up = project(x, gate_up, batch).chunk(2, dim=-1)
    return project(F.silu(gate) * up, down, batch)
