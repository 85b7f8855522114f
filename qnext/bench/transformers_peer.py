"""Hugging Face transformers on the same work: its own forward, cache and loss, random weights."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qnext.bench.budget import Budget, repeated
from qnext.bench.cells import Cell
from qnext.bench.models import free_memory
from qnext.bench.report import Row, Table
from qnext.config.model import ModelConfig
from qnext.runtime.device import synchronize
from qnext.runtime.env import package_version

NAME = "transformers"
# Kernels that it uses where they are installed; without them its DeltaNet is plain PyTorch.
EXTRAS = ("flash-linear-attention", "causal-conv1d", "kernels")
# Ways to run the experts; batched_mm copies the weights of each token's experts.
PREFILL_EXPERTS = ("grouped_mm",)
DECODE_EXPERTS = ("grouped_mm", "batched_mm")
NUM_TOKENS = 32


def random_peer(config: ModelConfig, device: torch.device) -> Any:
    """Qwen3NextForCausalLM of the same sizes; bfloat16 on a GPU, drawn there.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    peer_config = transformers.Qwen3NextConfig.from_dict(config.to_hf())
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device):
        return transformers.Qwen3NextForCausalLM._from_config(peer_config, dtype=dtype)


def describe_peer(table: Table, model: Any) -> None:
    """Record the version, the kernels it found and its size."""
    found = {name: package_version(name) for name in EXTRAS}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    extras = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    version = package_version(NAME)
    text = f"{NAME} {version}: {num_parameters:,} parameters; {extras}"
    table.fact(NAME, {"version": version, "num_parameters": num_parameters, **found}, text)


def set_experts(model: Any, name: str) -> bool:
    """Choose how the experts are run; False where this version cannot be told."""
    if not hasattr(model, "set_experts_implementation"):
        return False
    try:
        model.set_experts_implementation(name)
    except ValueError:
        return False
    return True


def measure_serving(
    table: Table,
    config: ModelConfig,
    device: torch.device,
    cells: Sequence[Cell],
    repeats: int,
    budget: Budget,
) -> None:
    """Add the peer's rows to the table, each with how ours compares."""
    try:
        model = random_peer(config, device).eval()
    except (torch.OutOfMemoryError, ModuleNotFoundError) as problem:
        reason = str(problem).splitlines()[0]
        table.skip(NAME, reason)
        return
    describe_peer(table, model)
    for cell in cells:
        seconds = budget.next_seconds()
        name = f"{cell.name}, {NAME}"
        if seconds <= 0:
            table.skip(name, "the time given by --seconds is spent")
            continue
        try:
            experts, values = _fastest(model, cell, repeats, seconds)
        except torch.OutOfMemoryError as problem:
            table.skip(name, str(problem).splitlines()[0])
            free_memory(device)
            continue
        row = Row(cell.name, "tok/s", values, who=NAME)
        notes = (f"{experts} experts", table.ratio_note(cell.name, row.median, "tok/s"))
        note = ", ".join(part for part in notes if part)
        table.add(replace(row, note=note))
        free_memory(device)


def _fastest(model: Any, cell: Cell, repeats: int, seconds: float) -> tuple[str, tuple[float, ...]]:
    """Tokens per second with the way of running experts that was fastest in a first round."""
    start = time.monotonic()
    is_decode = cell.kind == "decode"
    first: dict[str, float] = {}
    failed = ""
    for name in DECODE_EXPERTS if is_decode else PREFILL_EXPERTS:
        if set_experts(model, name):
            try:
                _rate(model, cell)  # warms up
                first[name] = _rate(model, cell)
            except torch.OutOfMemoryError as problem:
                failed = f"{name} experts: {str(problem).splitlines()[0]}"
            free_memory(model.device)  # not before: the error holds what the call had
    if failed and not first:
        raise torch.OutOfMemoryError(failed)
    best = max(first, key=lambda name: first[name], default="default")
    if first:
        set_experts(model, best)
    else:
        _rate(model, cell)
    left = seconds - (time.monotonic() - start)
    return best, repeated(partial(_rate, model, cell), repeats, left)


def _rate(model: Any, cell: Cell) -> float:
    """Tokens per second of one round, by the rules that hold for our engine."""
    vocab_size, device = model.config.vocab_size, model.device
    ids = torch.randint(vocab_size, (cell.num_seqs, cell.context), device=device)
    num_tokens = NUM_TOKENS if cell.kind == "decode" else 0
    synchronize(device)
    start = time.perf_counter()
    ids, cache = _next_ids(model, ids, None)
    first = time.perf_counter()
    for _ in range(num_tokens):
        ids, cache = _next_ids(model, ids, cache)
    end = time.perf_counter()
    if num_tokens:
        return cell.num_seqs * num_tokens / (end - first)
    return cell.context / (first - start)


@torch.inference_mode()
def _next_ids(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The likeliest token after each row [B, 1], known to the host, and the model's own cache."""
    # By position in, by either name out: it differs between versions.
    output = model(ids, None, None, cache, use_cache=True, logits_to_keep=1)
    best: Tensor = output.logits[:, -1:].argmax(-1)
    best.cpu()
    return best, output["cache"] if "cache" in output else output["past_key_values"]


def training_pass(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward with the peer's own loss, documents as rows of a batch. ids: [B, T]"""

    def run() -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return run
