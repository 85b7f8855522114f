"""Training checkpoints: everything a run needs to go on bit by bit, complete or not there.

A checkpoint is a folder `step_00001000` with `model.safetensors` (float32 masters under the
model's own names), `optimizer.safetensors` and `state.json` (counters, loader position, random
state, configuration). It is written under another name, flushed to the disk and renamed, so that
a folder of the final name is always whole, whenever the process dies.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qnext.io.atomic import flush_to_disk

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds.

    Attributes:
        step: optimiser steps made since the run's start.
        model: float32 masters by parameter name.
        optimizer: moments and counters by name.
        counters: JSON values: stage, tokens, seconds, loader position.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    counters: dict[str, Any]


def save_checkpoint(folder: Path, state: TrainingState, *, keep: int) -> Path:
    """Write a checkpoint atomically and remove all but the newest `keep`.

    Args:
        folder: holds the run's checkpoints; made if missing.
        state: what to save; tensors may be on any device.
        keep: checkpoints that stay, this one included; at least 1.

    Returns:
        The folder of this checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{state.step:08d}"
    partial = folder / f".partial_{state.step:08d}"
    for leftover in folder.glob(".partial_*"):
        shutil.rmtree(leftover)
    partial.mkdir()
    save_file(_on_cpu(state.model), partial / _MODEL)
    save_file(_on_cpu(state.optimizer), partial / _OPTIMIZER)
    random_state = {"torch": torch.get_rng_state().tolist()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        random_state["cuda"] = torch.cuda.get_rng_state().tolist()
    document = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "counters": state.counters,
        "random_state": random_state,
    }
    (partial / _STATE).write_text(json.dumps(document, sort_keys=True), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        flush_to_disk(path)
    if final.exists():
        # Left by a run that went on from an older checkpoint; moved aside in one rename.
        final.rename(folder / f".partial_old_{state.step:08d}")
    partial.rename(final)
    flush_to_disk(folder)
    for _, old in _complete(folder)[:-keep]:
        # Renamed first: a folder of the final name is never half removed.
        doomed = folder / f".partial_{old.name}"
        old.rename(doomed)
        shutil.rmtree(doomed)
    return final


def find_latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None when it has none."""
    found = _complete(folder)
    return found[-1][1] if found else None


def load_checkpoint(path: Path, *, device: torch.device, restore_random: bool) -> TrainingState:
    """Read a checkpoint.

    Args:
        path: a folder that save_checkpoint returned.
        device: where the tensors go.
        restore_random: also set torch's random state.

    Raises:
        ValueError: a file is missing or corrupt, or of a format this version does not read.
    """
    try:
        document = json.loads((path / _STATE).read_text(encoding="utf-8"))
        model = load_file(path / _MODEL, device=str(device))
        optimizer = load_file(path / _OPTIMIZER, device=str(device))
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"training checkpoint {path} cannot be read: {error}") from error
    if document["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"training checkpoint {path} has format {document['format_version']}; "
            f"this version reads {FORMAT_VERSION}"
        )
    if restore_random:
        random_state = document["random_state"]
        torch.set_rng_state(torch.tensor(random_state["torch"], dtype=torch.uint8))
        if "cuda" in random_state and device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(random_state["cuda"], dtype=torch.uint8))
    return TrainingState(document["step"], model, optimizer, document["counters"])


def _complete(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
