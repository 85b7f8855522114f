"""A whole decode or verification step: all layers on the rows of a window."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qnext.config.model import ModelConfig


@dataclass(frozen=True)
class WindowRows:
    """Rows of running sequences, each going on where its cache ends.

    Args:
        x: embedded rows, sequence after sequence. [T, C]
        query_lens: rows of each sequence.
        context_lens: tokens of each sequence that the cache holds.
        state_slots: DeltaNet slot of each sequence.
        page_table: pages of each sequence, in order. [N, P], int32
        batch: the same as the model's own batch, which the reference runs.
    """

    x: torch.Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    state_slots: tuple[int, ...]
    page_table: torch.Tensor
    batch: Any


@dataclass
class DecodeStep:
    """What a step reads and writes, the same from step to step.

    Args:
        config: sizes.
        parameters: by their name in the model.
        layer_names: prefixes of the layers that run, such as "layers.0.".
        mixer_idx: each layer's index among those of its mixer, in the memory below.
        keys, values: the cache's pools, one row per token. [L, S, Hkv, D]
        page_size: rows that follow one another in a page.
        states: DeltaNet's memory: convolution and recurrent states, which stay as they are; window
            keys, changes, decays and inputs, which are written.
        rotation: cos and sin of every position, two of [positions, R / 2], fp32.
        final_norm: name of the norm after the layers.
        run_layers: the model's own layers and that norm, on the same rows.
        prepared: what a backend keeps between steps.
    """

    config: ModelConfig
    parameters: Mapping[str, torch.Tensor]
    layer_names: tuple[str, ...]
    mixer_idx: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor
    page_size: int
    states: tuple[torch.Tensor, ...]
    rotation: tuple[torch.Tensor, torch.Tensor]
    final_norm: str
    run_layers: Callable[[WindowRows], torch.Tensor]
    prepared: Any = field(default=None, repr=False)


def decode_step_reference(step: DecodeStep, rows: WindowRows) -> torch.Tensor:
    """Run the layers on the rows of a window; committed DeltaNet states stay as they are.

    Args:
        step: weights, cache and layers.
        rows: the window.

    Returns:
        States after the final norm. [T, C]
    """
    return step.run_layers(rows)
