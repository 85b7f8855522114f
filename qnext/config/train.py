"""What a training run is: model, data, stages, losses, optimiser and log, as read from TOML.

A run is a list of stages. Each stage has its own mixture of sources, context, rope base, schedule
and number of tokens; weights and optimiser moments carry over from one to the next.
"""

from dataclasses import dataclass, field, fields
from typing import Literal


def _require(is_valid: bool, name: str, value: object, limit: str) -> None:
    if not is_valid:
        raise ValueError(f"{name} = {value!r}: must be {limit}")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over one stage; fractions are of the stage's tokens."""

    kind: Literal["wsd", "cosine", "linear"] = "wsd"
    """wsd: warm up, hold, then fall linearly; cosine and linear: warm up, then fall at once."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, and of Muon unless muon_lr is given."""
    muon_lr: float | None = None
    """Peak learning rate of Muon (its updates have the root mean square of AdamW's, 0.2)."""
    warmup_fraction: float = 0.01
    """Share of the stage in which the rate rises from 0 to its peak."""
    decay_fraction: float = 0.3
    """wsd only: share of the stage, at its end, in which the rate falls."""
    final_lr_fraction: float = 0.0
    """Rate at the end of the stage, as a share of the peak."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "schedule.lr", self.lr, "> 0")
        _require(self.muon_lr is None or self.muon_lr > 0, "schedule.muon_lr", self.muon_lr, "> 0")
        for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"schedule.{name}", value, "between 0 and 1")
        total = self.warmup_fraction + (self.decay_fraction if self.kind == "wsd" else 0)
        _require(
            total <= 1, "schedule.warmup_fraction + decay_fraction", total, "at most 1 together"
        )


@dataclass(frozen=True)
class StageConfig:
    """One stage of a run."""

    name: str
    """Word for the log."""
    tokens: int
    """Tokens to see in this stage, rounded up to whole steps."""
    mixture: dict[str, float]
    """Weight of each source: the share of this stage's tokens drawn from it, after scaling to 1."""
    context: int = 4096
    """Length of one packed row, in tokens."""
    batch_tokens: int = 131072
    """Tokens of one optimiser step; a multiple of micro_batch_tokens."""
    micro_batch_tokens: int | None = None
    """Tokens of one forward and backward pass; a multiple of context. None: batch_tokens."""
    rope_theta: float | None = None
    """Base of the rotary frequencies from this stage on. None: as before."""
    mtp_weight: float | None = None
    """loss.mtp_weight of this stage. None: the run's."""
    time_budget_minutes: float | None = None
    """The schedule follows the larger of tokens / tokens asked for and time / this budget, so that
    a slow machine still reaches the end of the decay. None: tokens alone."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def micro_tokens(self) -> int:
        """Tokens of one forward and backward pass."""
        return self.micro_batch_tokens or self.batch_tokens

    @property
    def num_accumulation_steps(self) -> int:
        """Forward and backward passes per optimiser step."""
        return self.batch_tokens // self.micro_tokens

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the stage when time does not end it early."""
        return -(-self.tokens // self.batch_tokens)

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}: "
        for name in ("tokens", "context", "batch_tokens"):
            value = getattr(self, name)
            _require(value > 0, where + name, value, "> 0")
        _require(bool(self.mixture), where + "mixture", self.mixture, "at least one source")
        for source, weight in self.mixture.items():
            _require(weight > 0, f"{where}mixture.{source}", weight, "> 0")
        _require(
            self.micro_tokens > 0 and self.micro_tokens % self.context == 0,
            where + "micro_batch_tokens",
            self.micro_tokens,
            f"a multiple of context = {self.context}",
        )
        _require(
            self.batch_tokens % self.micro_tokens == 0,
            where + "batch_tokens",
            self.batch_tokens,
            f"a multiple of micro_batch_tokens = {self.micro_tokens}",
        )
        if self.mtp_weight is not None:
            _require(self.mtp_weight >= 0, where + "mtp_weight", self.mtp_weight, ">= 0")
        if self.rope_theta is not None:
            _require(self.rope_theta > 0, where + "rope_theta", self.rope_theta, "> 0")
        if self.time_budget_minutes is not None:
            budget = self.time_budget_minutes
            _require(budget > 0, where + "time_budget_minutes", budget, "> 0")


@dataclass(frozen=True)
class ModelSource:
    """Where the weights come from: a preset drawn anew, or a checkpoint folder to go on from."""

    preset: str | None = None
    """Name of a preset (`nano`, `nano-dense`, ...) or folder with a config.json: drawn anew."""
    override: dict[str, int | float | bool] = field(default_factory=dict)
    """Sizes of the preset to change, by their name in config.json."""
    path: str | None = None
    """Folder of a saved model to start from, tokenizer included."""
    mtp: bool = True
    """Has a Multi-Token Prediction head (preset only; a saved model says it itself)."""

    def __post_init__(self) -> None:
        given = [name for name in ("preset", "path") if getattr(self, name) is not None]
        _require(len(given) == 1, "model", given, "given by exactly one of preset and path")
        _require(
            self.path is None or not self.override, "model.override", self.override, "of a preset"
        )


@dataclass(frozen=True)
class DataConfig:
    """The prepared shards and the tokenizer that made them.

    In these paths, in output and in model.path, ~ and $NAME (an environment variable) are replaced.
    """

    shards: str
    """Folder written by `qnext data prepare`: one folder per source."""
    tokenizer: str | None = None
    """Tokenizer folder; None: the one beside the shards, or the model's own."""
    validation: dict[str, str] = field(default_factory=dict)
    """Domain -> jsonl(.zst) file whose bits per byte are measured as the run goes."""
    max_validation_documents: int = 64
    """Documents read from each validation file while training."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms that are summed into the loss."""

    mtp_weight: float = 0.1
    """Weight of the mean over the MTP steps (0.1; 0.3 early in training)."""
    mtp_steps: int = 1
    """How many MTP steps are unrolled."""
    balance_weight: float | None = None
    """Weight of the router's load balance, per layer. None: the model's router_aux_loss_coef."""
    balance_counts: Literal["exact", "running"] = "running"
    """With accumulation, the share of tokens each expert gets is counted over all micro-batches by
    a first pass without gradient (exact), or over those so far in the step (running)."""
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2), which keeps logits from drifting; 0 is off."""

    def __post_init__(self) -> None:
        _require(self.mtp_steps >= 1, "loss.mtp_steps", self.mtp_steps, ">= 1")
        for name in ("mtp_weight", "balance_weight", "z_loss"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"loss.{name}", value, ">= 0")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon for the matrices with AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: matrices and experts by Muon; router, embeddings, norms and vectors by AdamW."""
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Of AdamW. 8bit: blocks of 256 share a scale, and codes are rounded at random."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-10
    weight_decay: float = 0.1
    """Decoupled; scaled by the learning rate. On matrices and zero-centred norm weights."""
    embedding_lr_scale: float = 1.0
    """Learning rate of embeddings and head, as a multiple of AdamW's."""
    muon_momentum: float = 0.95
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 is off."""
    spike_factor: float = 10.0
    """A step whose gradient norm is this many times its running mean is skipped; 0 is off."""
    spike_warmup_steps: int = 100
    """Steps before spikes are looked for."""
    max_skipped_steps: int = 20
    """Skipped steps in a row that stop the run."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}", value, "in [0, 1)")
        for name in ("weight_decay", "grad_clip", "spike_factor", "embedding_lr_scale"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name}", value, ">= 0")
        _require(self.eps > 0, "optimizer.eps", self.eps, "> 0")
        limit = self.max_skipped_steps
        _require(limit >= 1, "optimizer.max_skipped_steps", limit, ">= 1")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how the step runs."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the matrix products; weights, moments and gradients are float32 always."""
    compile: bool = False
    """Compile the model's layers and the loss with torch.compile."""
    activation_checkpointing: Literal["off", "cheap", "layers"] = "off"
    """What the backward pass computes again instead of keeping it. cheap: norms, gates and
    convolutions, but no product and no mixer; not with compile. layers: each layer."""
    tf32: bool = True
    """With bfloat16 on a GPU: float32 products (DeltaNet's chunks) round their inputs to TF32."""
    deterministic: bool = False
    """Only kernels that give the same bits each run (slower on a GPU; on a CPU always so)."""
    num_threads: int | None = None
    """CPU threads. None: as torch chooses."""


@dataclass(frozen=True)
class LogConfig:
    """What is written when, in optimiser steps; 0 is never."""

    every_steps: int = 10
    """Losses, norms, speed and skipped steps; the only point where the host waits."""
    routing_every_steps: int = 100
    """Load, entropy and dead experts of each layer."""
    eval_every_steps: int = 500
    """Validation bits per byte and MTP acceptance, by domain."""
    sample_every_steps: int = 1000
    """Text written from each of sample_prompts."""
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 2
    """Newest training checkpoints kept."""
    sample_prompts: tuple[str, ...] = ("Once upon a time",)
    sample_tokens: int = 64
    tensorboard: bool = True
    progress: bool = True
    """Progress bar, when standard error is a terminal."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "log.every_steps", self.every_steps, ">= 1")
        kept = self.keep_checkpoints
        _require(kept >= 1, "log.keep_checkpoints", kept, ">= 1")
        for entry in fields(self):
            if entry.name.endswith("_steps"):
                value = getattr(self, entry.name)
                _require(value >= 0, f"log.{entry.name}", value, ">= 0")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    output: str
    """Folder of the run: log.jsonl, tensorboard/, checkpoints/ and, at the end, model/."""
    model: ModelSource
    data: DataConfig
    stage: tuple[StageConfig, ...]
    seed: int = 0
    """Draws the weights and the order of the data."""
    max_minutes: float | None = None
    """Stop with a checkpoint after this much wall time; --resume goes on. None: no limit."""
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(bool(self.stage), "stage", self.stage, "at least one [[stage]]")
        names = [stage.name for stage in self.stage]
        _require(len(set(names)) == len(names), "stage.name", names, "different for each stage")
        if self.runtime.compile and self.runtime.dtype != "bfloat16":
            dtype = self.runtime.dtype
            raise ValueError(f"runtime.dtype = {dtype!r}: runtime.compile needs 'bfloat16'")
        if self.runtime.compile and self.runtime.activation_checkpointing == "cheap":
            raise ValueError(
                "runtime.activation_checkpointing = 'cheap': compiled layers decide by themselves "
                "what to keep; set runtime.compile = false, or 'layers'"
            )
        if self.max_minutes is not None:
            _require(self.max_minutes > 0, "max_minutes", self.max_minutes, "> 0")
