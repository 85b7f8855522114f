"""Loss curves of one small model on two sets of kernels, over the same weights and data.

    python -m benchmarks.curves --steps 200

Each backend trains a fresh copy, with the seed, batches and optimiser of the first, in fp32 and
bf16. Two correct sets differ by rounding alone. How far rounding alone moves a curve is measured:
the first set runs once more from weights that are off by a millionth, and the curves of two sets
should lie no further apart than these two. The last line is JSON.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from qnext.config.model import ModelConfig
from qnext.config.presets import preset
from qnext.config.train import LossConfig, OptimConfig, RuntimeConfig
from qnext.data.loader import PackedBatch
from qnext.kernels.dispatch import use_backend
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.device import resolve_device
from qnext.train.batches import micro_batch
from qnext.train.optim import TrainOptimizer
from qnext.train.step import MicroBatch, TrainStep

FASTEST = "fastest"  # what dispatch chooses by itself
DTYPES = ("float32", "bfloat16")
LEARNING_RATE, WARM_UP_STEPS = 1e-3, 20
NUDGE, NUDGED = 1e-6, "nudged"  # relative change of the weights, and the curve's name
MOST_WORDS = 64
SMALL_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": (),
}


@dataclass(frozen=True)
class Difference:
    """How far one curve lies from another."""

    name: str
    largest: float
    mean: float
    finals: tuple[float, float]

    @classmethod
    def between(cls, name: str, ours: Sequence[float], theirs: Sequence[float]) -> "Difference":
        """Of curves of equal length; NaN anywhere gives NaN."""
        gaps = torch.tensor([abs(a - b) for a, b in zip(ours, theirs, strict=True)])
        return cls(name, float(gaps.max()), float(gaps.mean()), (ours[-1], theirs[-1]))

    def line(self) -> str:
        """For people."""
        return (
            f"{self.name:34}  largest {self.largest:.5f}  mean {self.mean:.5f}  "
            f"final {self.finals[0]:.5f} and {self.finals[1]:.5f}"
        )


def curve_config(*, is_small: bool) -> ModelConfig:
    """The nano, or a tiny model."""
    return replace(preset("nano"), **SMALL_SIZES) if is_small else preset("nano")


def make_batches(
    config: ModelConfig, steps: int, num_tokens: int, num_mtp_steps: int, device: torch.device
) -> list[MicroBatch]:
    """Walks whose next word follows from the last word or from the last two, packed unevenly.

    The last word alone is learnt at once, two need more than one layer. With two alone the loss
    stands still before it falls, and rounding decides when. Bit for bit the same on every machine.
    """
    num_words = min(MOST_WORDS, config.vocab_size // 4)
    generator = torch.Generator().manual_seed(0)
    after_one = torch.randint(num_words, (num_words,), generator=generator)
    after_two = torch.randint(num_words, (num_words, num_words), generator=generator)
    batches = []
    for _ in range(steps):
        cuts = torch.randperm(num_tokens - 1, generator=generator)[:7].sort().values + 1
        bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([num_tokens])]).int()
        # Eight walks at once, of which the row holds a part each.
        before, words = torch.randint(num_words, (2, len(bounds) - 1), generator=generator)
        choices = torch.randint(2, (num_tokens, len(words)), generator=generator)
        walks = []
        for choice in choices:
            walks.append(words)
            next_words = torch.where(choice == 0, after_one[words], after_two[before, words])
            before, words = words, next_words
        lengths = bounds.diff().tolist()
        paths = torch.stack(walks, dim=1)
        ids = torch.cat([path[:n] for path, n in zip(paths, lengths, strict=True)])
        mask = torch.ones(num_tokens, dtype=torch.uint8)
        packed = PackedBatch(ids, mask, bounds, num_tokens, 0, ())
        batches.append(micro_batch(packed, num_mtp_steps).to(device))
    return batches


def losses_of(
    config: ModelConfig,
    batches: Sequence[MicroBatch],
    backend: str,
    dtype: str,
    device: torch.device,
    *,
    nudge: float = 0.0,
) -> list[float]:
    """Train from the same weights on each batch once; the losses, fetched at the end.

    Args:
        nudge: relative size of a random change of all weights.
    """
    model = Qwen3Next(config)
    init_weights(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1 + nudge * torch.randn(param.shape, generator=generator))
    model = model.to(device)
    optimizer = TrainOptimizer(dict(model.named_parameters()), config, OptimConfig())
    runtime = RuntimeConfig(dtype="float32" if dtype == "float32" else "bfloat16")
    step = TrainStep(model, optimizer, LossConfig(balance_weight=1e-3), runtime)
    losses = []
    with nullcontext() if backend == FASTEST else use_backend(backend):
        for idx, batch in enumerate(batches):
            lr = LEARNING_RATE * min(1.0, (idx + 1) / WARM_UP_STEPS)
            optimizer.set_lr(lr, lr)
            losses.append(step.run([batch]).loss)
    return [float(loss) for loss in torch.stack(losses).cpu()]


def compare(args: argparse.Namespace) -> list[Difference]:
    """Train every curve and hold them against one another; prints as they are made."""
    device = resolve_device(args.device)
    config = curve_config(is_small=args.small)
    num_tokens = args.tokens or (64 if args.small else 4096)
    batches = make_batches(config, args.steps, num_tokens, 1, device)
    first, *others = args.backends
    curves: dict[tuple[str, str], list[float]] = {}
    for dtype in args.dtypes:
        for name in (*args.backends, NUDGED):
            backend, nudge = (first, NUDGE) if name == NUDGED else (name, 0.0)
            curve = losses_of(config, batches, backend, dtype, device, nudge=nudge)
            curves[name, dtype] = curve
            shown = ", ".join(f"{loss:.4f}" for loss in curve[:: args.every])
            print(f"{name}, {dtype}: {shown}", flush=True)
    found = []
    for dtype in args.dtypes:
        for other in (*others, NUDGED):
            name = f"{first} and {other}, {dtype}"
            found.append(Difference.between(name, curves[first, dtype], curves[other, dtype]))
    for backend in args.backends if len(args.dtypes) > 1 else ():
        name = f"{backend}: bfloat16 and float32"
        pair = (curves[backend, dtype] for dtype in reversed(DTYPES))
        found.append(Difference.between(name, *pair))
    for difference in found:
        print(difference.line())
    rows = [vars(difference) for difference in found]
    record = {"steps": args.steps, "tokens": num_tokens, "device": str(device), "rows": rows}
    named = {f"{name}, {dtype}": curve for (name, dtype), curve in curves.items()}
    print(json.dumps(record | {"torch": torch.__version__, "losses": named}))
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="loss curves of two sets of kernels")
    add = parser.add_argument
    add("--steps", type=int, default=200)
    add("--tokens", type=int, help="of a step (4096, or 64 with --small)")
    add(
        "--backends",
        nargs="+",
        default=[FASTEST, "torch"],
        choices=(FASTEST, "reference", "torch", "triton"),
        help="the first is held against each of the others",
    )
    add("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    add("--device", default="auto")
    add("--every", type=int, default=20, help="of the losses shown")
    add("--small", action="store_true", help="a tiny model, for a CPU")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; want at least 1")
    return args


if __name__ == "__main__":
    compare(parse())
