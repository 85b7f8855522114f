"""One optimiser step: forward and backward over its micro-batches, then the update.

Nothing here waits for the device: losses, norms and the decision to skip stay there until the log
asks for them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qnext.config.train import LossConfig, RuntimeConfig
from qnext.kernels import dispatch
from qnext.kernels.grad_sums import adding_to_grads
from qnext.kernels.recompute import recompute_cheap_ops
from qnext.model.batch import ForwardBatch
from qnext.model.moe import RouterStats
from qnext.model.quantized import refuse_quantised
from qnext.model.qwen3_next import Qwen3Next
from qnext.train.optim import TrainOptimizer

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows and what they are to predict.

    Attributes:
        batch: the tokens.
        targets: row 0 the next token, row 1 + j what MTP step j predicts; -100 where the document
            ends first or the token does not count. [1 + k, T], int64
        num_targets: how many count in each row, on the host. 1 + k
        address: where the rows come from, for messages.
    """

    batch: ForwardBatch
    targets: Tensor
    num_targets: tuple[int, ...]
    address: str

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on the device, on its way without a wait when memory is pinned."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        batch = replace(
            self.batch,
            token_ids=move(self.batch.token_ids),
            position_ids=move(self.batch.position_ids),
            cu_seqlens=move(self.batch.cu_seqlens),
        )
        return replace(self, batch=batch, targets=move(self.targets))

    def pin(self) -> "MicroBatch":
        """Return a copy in pinned memory, which a GPU reads by itself."""
        batch = replace(
            self.batch,
            token_ids=self.batch.token_ids.pin_memory(),
            position_ids=self.batch.position_ids.pin_memory(),
            cu_seqlens=self.batch.cu_seqlens.pin_memory(),
        )
        return replace(self, batch=batch, targets=self.targets.pin_memory())


@dataclass(frozen=True)
class StepMetrics:
    """Scalars of one step, on the device; losses in nats per token.

    Attributes:
        loss: cross-entropy of the next token.
        mtp_loss: mean over MTP steps of theirs.
        balance: mean over layers of E sum f p; 1 is balanced.
        total: what was minimised.
        grad_norm: before clipping.
        is_applied: 0 when the step was skipped.
    """

    loss: Tensor
    mtp_loss: Tensor
    balance: Tensor
    total: Tensor
    grad_norm: Tensor
    is_applied: Tensor

    def stacked(self) -> Tensor:
        """Return all in the order of the attributes. [6], fp32"""
        return torch.stack([getattr(self, field.name).float() for field in fields(self)])


def shifted_targets(batch: ForwardBatch, loss_mask: Tensor | None, num_mtp_steps: int) -> Tensor:
    """Return what each position predicts: the next token, and one further for each MTP step.

    Args:
        batch: packed tokens, on the host.
        loss_mask: nonzero for tokens that count as targets; None: all do. [T]
        num_mtp_steps: k.

    Returns:
        Token ids, -100 past a document's end and for masked tokens. [1 + k, T], int64
    """
    tokens = batch.token_ids
    counted = tokens if loss_mask is None else tokens.masked_fill(loss_mask == 0, IGNORED)
    bounds = batch.cu_seqlens.long()
    ends = torch.repeat_interleave(bounds[1:], bounds.diff())  # [T]: end of each token's document
    index = torch.arange(tokens.numel())
    rows = []
    for shift in range(1, 2 + num_mtp_steps):
        shifted = counted.roll(-shift)
        rows.append(shifted.masked_fill(index + shift >= ends, IGNORED))
    return torch.stack(rows)


def balance_loss(mean_probs: Tensor, counts: Tensor) -> Tensor:
    """Return E sum_e f_e p_e of each layer; 1 when tokens are spread evenly.

    Args:
        mean_probs: mean of the router's softmax over this micro-batch, with gradient. [L, E]
        counts: pairs sent to each expert over all that f counts; no gradient. [L, E]

    Returns:
        [L], fp32

    Source: Switch Transformers, https://arxiv.org/abs/2101.03961; per layer, before the product,
        since pooling layers first hides routers that collapse on different experts.
    """
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return mean_probs.size(1) * (share * mean_probs).sum(1)


class TrainStep:
    """Losses, backward passes and the update of one model.

    Args:
        model: float32 masters; its compute_dtype is set here.
        optimizer: of its parameters.
        loss: weights of the terms.
        runtime: dtype, compilation and activation checkpointing.
    """

    def __init__(
        self,
        model: Qwen3Next,
        optimizer: TrainOptimizer,
        loss: LossConfig,
        runtime: RuntimeConfig,
    ) -> None:
        refuse_quantised(model, "train")
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        weight = loss.balance_weight
        self.balance_weight = model.config.router_aux_loss_coef if weight is None else weight
        self.compute_dtype = torch.bfloat16 if runtime.dtype == "bfloat16" else None
        self._training_forwards = _wrapped_forwards(model, runtime)
        self.is_cheap_recomputed = runtime.activation_checkpointing == "cheap"
        # Pairs per expert since the last routing report, and the last step's mean probabilities.
        self.expert_counts: Tensor | None = None
        self.mean_probs: Tensor | None = None
        self.token_entropy: Tensor | None = None

    @property
    def num_mtp_steps(self) -> int:
        """MTP steps that are trained; 0 without a head or with a weight of 0."""
        has_mtp = self.model.mtp is not None and self.loss.mtp_weight > 0
        return self.loss.mtp_steps if has_mtp else 0

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Run the model's layers compiled and checkpointed, as configured, inside a with block.

        Evaluation stays outside: its shapes vary, and each would be compiled anew.
        """
        plain_dtype = self.model.compute_dtype
        self.model.compute_dtype = self.compute_dtype
        for layer, forward in self._training_forwards:
            layer.forward = forward
        try:
            yield
        finally:
            self.model.compute_dtype = plain_dtype
            for layer, _ in self._training_forwards:
                del layer.forward  # the class's own again

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Run the model in the dtype of training, layers as they are, inside a with block."""
        plain_dtype = self.model.compute_dtype
        self.model.compute_dtype = self.compute_dtype
        try:
            yield
        finally:
            self.model.compute_dtype = plain_dtype

    def run(self, micro_batches: Sequence[MicroBatch]) -> StepMetrics:
        """Accumulate the gradient of all micro-batches and update the weights, or skip.

        The loss is a mean over the targets of the whole step: a micro-batch with fewer of them
        weighs less, so that accumulation equals one large batch.

        Args:
            micro_batches: on the model's device, of equal size.
        """
        num_targets = [
            max(1, sum(counts))
            for counts in zip(*(micro.num_targets for micro in micro_batches), strict=True)
        ]
        share = 1 / len(micro_batches)
        with self.training_mode():
            counts = self._first_pass(micro_batches)
            is_exact = counts is not None
            sums = torch.zeros(4, dtype=torch.float32, device=self.model.device)
            for micro in micro_batches:
                losses, mean_probs, seen = self._forward(micro, num_targets)
                if mean_probs is not None and seen is not None:
                    counts = seen if counts is None else counts if is_exact else counts + seen
                    balance = balance_loss(mean_probs, counts)
                    losses[2] = balance.mean() * share
                    losses[3] = losses[3] + self.balance_weight * share * balance.sum()
                with adding_to_grads():
                    losses[3].backward()
                sums += torch.stack([value.detach() for value in losses])
            self._remember(counts, mean_probs)
        outcome = self.optimizer.step(sums[3])
        loss, mtp_loss, balance, total = sums.unbind()
        return StepMetrics(loss, mtp_loss, balance, total, outcome.grad_norm, outcome.is_applied)

    def _forward(
        self, micro: MicroBatch, num_targets: list[int]
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Return [loss, mtp_loss, 0, total without balance], and the routers' p and counts."""
        stats: list[RouterStats] = []
        model, weight = self.model, self.model.head_weight
        cheap = recompute_cheap_ops if self.is_cheap_recomputed else nullcontext
        # Read once here, so that compiled layers find it ready.
        _ = micro.batch.local_positions
        with cheap():
            hidden = model(micro.batch, router_stats=stats)
        z_weight = self.loss.z_loss
        total, loss, _ = dispatch.linear_cross_entropy(hidden, weight, micro.targets[0], z_weight)
        total, loss = total / num_targets[0], loss / num_targets[0]
        mtp_loss = torch.zeros_like(loss)
        if self.num_mtp_steps:
            with cheap():
                drafts = model.mtp_hidden(
                    hidden, micro.batch, self.num_mtp_steps, router_stats=stats
                )
            for step, draft in enumerate(drafts, start=1):
                targets = micro.targets[step]
                part, plain, _ = dispatch.linear_cross_entropy(draft, weight, targets)
                scale = 1 / (num_targets[step] * self.num_mtp_steps)
                total = total + self.loss.mtp_weight * scale * part
                mtp_loss = mtp_loss + scale * plain
        losses = [loss, mtp_loss, torch.zeros_like(loss), total]
        if not stats:
            return losses, None, None
        self.token_entropy = torch.stack([layer.entropy_mean.detach() for layer in stats])
        mean_probs = torch.stack([layer.prob_mean for layer in stats])
        return losses, mean_probs, torch.stack([layer.counts.detach() for layer in stats])

    @torch.no_grad()
    def _first_pass(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """Count the experts' pairs over all micro-batches before any gradient. [L, E] or None"""
        if self.loss.balance_counts != "exact" or len(micro_batches) == 1:
            return None
        total: Tensor | None = None
        for micro in micro_batches:
            stats: list[RouterStats] = []
            _ = micro.batch.local_positions
            hidden = self.model(micro.batch, router_stats=stats)
            if self.num_mtp_steps:
                self.model.mtp_hidden(hidden, micro.batch, self.num_mtp_steps, router_stats=stats)
            if not stats:
                return None
            counts = torch.stack([layer.counts for layer in stats])
            total = counts if total is None else total + counts
        return total

    def _remember(self, counts: Tensor | None, mean_probs: Tensor | None) -> None:
        if counts is None or mean_probs is None:
            return
        before = self.expert_counts
        self.expert_counts = counts if before is None else before + counts
        self.mean_probs = mean_probs.detach()

    def take_routing(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what `monitor.routing_report` reads; None for a model without routers.

        Counts since the last call [L, E], and of the last micro-batch the mean probabilities
        [L, E] and the mean entropy of a token's probabilities, in nats [L]. The MTP layer's rows
        come last.
        """
        if self.expert_counts is None or self.mean_probs is None or self.token_entropy is None:
            return None
        counts, self.expert_counts = self.expert_counts, None
        return counts, self.mean_probs, self.token_entropy


def _wrapped_forwards(model: Qwen3Next, runtime: RuntimeConfig) -> list[tuple[Any, Any]]:
    """Return each layer with the forward that training runs."""
    layers: list[Any] = [*model.layers, *([model.mtp.layer] if model.mtp is not None else [])]
    if not runtime.compile and runtime.activation_checkpointing != "layers":
        return []
    wrapped = []
    for layer in layers:
        forward = layer.forward
        if runtime.compile:
            # Layers of a kind share one compilation: their parameters are inputs to it.
            forward = torch.compile(forward, dynamic=False)
        if runtime.activation_checkpointing == "layers":
            forward = partial(checkpoint, forward, use_reentrant=False)
        wrapped.append((layer, forward))
    return wrapped
