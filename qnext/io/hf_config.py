"""`config.json`, `generation_config.json` and the tokenizer's files of a checkpoint folder."""

import shutil
from dataclasses import replace
from pathlib import Path

from qnext.config.generation import GenerationConfig
from qnext.config.model import ModelConfig
from qnext.io.atomic import write_atomic
from qnext.io.json_file import read_json, write_json

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint folder.

    Raises:
        ValueError: the file is missing or not a configuration we can run; the text names it.
    """
    path = folder / CONFIG_NAME
    table = read_json(path)
    try:
        return ModelConfig.from_hf(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_generation_config(folder: Path) -> GenerationConfig:
    """Reads `generation_config.json`; the stop ids come from `config.json` where it has none.

    Raises:
        ValueError: a file that is there cannot be used; the text names it.
    """
    path = folder / GENERATION_CONFIG_NAME
    config = GenerationConfig()
    if path.is_file():
        try:
            config = GenerationConfig.from_hf(read_json(path))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    if not config.eos_token_id and (folder / CONFIG_NAME).is_file():
        config = replace(config, eos_token_id=read_model_config(folder).eos_token_id)
    return config


def write_model_config(folder: Path, config: ModelConfig) -> None:
    """Writes `config.json` atomically."""
    write_json(folder / CONFIG_NAME, config.to_hf())


def write_generation_config(folder: Path, config: GenerationConfig) -> None:
    """Writes `generation_config.json` atomically."""
    write_json(folder / GENERATION_CONFIG_NAME, config.to_hf())


def copy_companions(source: Path, target: Path) -> None:
    """Copies generation config, tokenizer and chat template files that lie in `source`.

    Files are copied atomically; without any in `source`, or into `source` itself, nothing happens.
    """
    if not source.is_dir() or (target.exists() and source.samefile(target)):
        return
    for name in (GENERATION_CONFIG_NAME, *TOKENIZER_NAMES):
        path = source / name
        if path.is_file():
            write_atomic(target / name, path.read_bytes())
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name, dirs_exist_ok=True)
