"""What a run starts from and leaves behind: model, tokenizer, parameter counts, saved model."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from qnext.config.model import ModelConfig
from qnext.config.presets import PRESETS, preset
from qnext.config.train import ModelSource, TrainConfig
from qnext.data.shards import ShardSet
from qnext.data.sources import expand_path
from qnext.io.hf_config import copy_companions, read_model_config
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next
from qnext.model.rope import RotaryTable
from qnext.runtime.seed import derive_seed
from qnext.tokenizer.tokenizer import Tokenizer, load_tokenizer


def build_model(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> Qwen3Next:
    """Make the model that a run starts from, in float32.

    Raises:
        ValueError: the source is unknown or damaged, or its vocabulary is smaller than the
            tokenizer's.
    """
    source = config.model
    if source.path is not None:
        model = Qwen3Next.from_pretrained(
            expand_path(source.path), dtype=torch.float32, device=device
        )
    else:
        model_config = _named_config(source)
        ends = tokenizer.eos_token_ids
        model_config = replace(model_config, eos_token_id=ends, bos_token_id=None)
        # Drawn on the CPU, so that the seed means the same weights on every device.
        model = Qwen3Next(model_config, has_mtp=source.mtp)
        init_weights(model, model_config, seed=derive_seed(config.seed, "weights"))
        model = model.to(device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only "
            f"vocab_size = {model.config.vocab_size}"
        )
    for stage in config.stage:
        limit = model.config.max_position_embeddings
        if stage.context > limit:
            raise ValueError(
                f"stage {stage.name!r}: context = {stage.context} is over the model's "
                f"max_position_embeddings = {limit}"
            )
    return model


def _named_config(source: ModelSource) -> ModelConfig:
    assert source.preset is not None, source
    folder = Path(expand_path(source.preset))
    is_folder = source.preset not in PRESETS and folder.is_dir()
    config = read_model_config(folder) if is_folder else preset(source.preset)
    known = {entry.name for entry in fields(ModelConfig)} - {"rope", "layer_types"}
    for name, value in source.override.items():
        if name not in known:
            raise ValueError(
                f"model.override.{name} = {value!r}: not a size; known: {', '.join(sorted(known))}"
            )
    changes: dict[str, Any] = dict(source.override)
    if "num_hidden_layers" in changes:
        changes["layer_types"] = ()  # filled in again with the real 3:1 pattern
    return replace(config, **changes)


def tokenizer_folder(config: TrainConfig, shards: ShardSet) -> Path:
    """Return the folder of the run's tokenizer.

    Raises:
        ValueError: it is not the tokenizer that made the shards.
    """
    named = config.data.tokenizer
    folder = Path(expand_path(named)) if named is not None else shards.tokenizer_path
    if load_tokenizer(folder).sha256 != shards.tokenizer_sha256:
        raise ValueError(
            f"data.tokenizer {folder} is not the one that made the shards in {shards.folder}: "
            "vocabulary, merges or chat template differ"
        )
    return folder


def set_rope_theta(model: Qwen3Next, theta: float) -> None:
    """Give the model another base of its rotary frequencies; no weight changes."""
    model.config = replace(model.config, rope=replace(model.config.rope, theta=theta))
    model.rotary_table = RotaryTable(model.config)


def export_model(model: Qwen3Next, tokenizer_from: Path, folder: Path) -> None:
    """Save the model as a checkpoint others can open: bfloat16, A_log and dt_bias float32.

    Args:
        model: float32 masters.
        tokenizer_from: folder whose tokenizer files go along.
        folder: where to write.
    """
    config = replace(model.config, dtype="bfloat16")
    rounded = Qwen3Next(
        config, has_mtp=model.has_mtp, dtype=torch.bfloat16, device=model.embed_tokens.device
    )
    # Copies with a cast; the constructor keeps A_log and dt_bias in float32.
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    copy_companions(tokenizer_from, folder)
