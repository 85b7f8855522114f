"""Who is measured: an engine at one width of weights, and the same model in each engine's files."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.gguf_export import export_gguf
from benchmarks.peers.process import PeerError, WorkerProcess
from qnext.config.model import ModelConfig
from qnext.config.presets import PRESETS, preset
from qnext.io.hf_config import read_model_config
from qnext.io.hub import resolve_checkpoint
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next
from qnext.tokenizer import load as load_tokenizer

SHIPPED = "nano"
WIDTHS = ("float32", "bfloat16", "int8", "q4")
ENGINES = ("qnext", "transformers", "llama_cpp")
# What each engine calls a width. transformers has no quantised experts on a CPU.
WIDTH_NAMES: dict[str, dict[str, str]] = {
    "qnext": {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"},
    "transformers": {"float32": "float32", "bfloat16": "bfloat16"},
    "llama_cpp": {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "q4": "Q4_K_M"},
}
ENGINE_NAMES = {"qnext": "qnext", "transformers": "transformers", "llama_cpp": "llama.cpp"}

Variant = Mapping[str, Any]


@dataclass(frozen=True)
class Machine:
    """What every worker is given.

    Args:
        threads: CPU threads.
        pythons: interpreter of an engine, where it is not this one.
    """

    threads: int
    pythons: Mapping[str, str] = field(default_factory=dict)


class ModelFiles:
    """One model as the engines open it; files are made when first asked for.

    Args:
        name: nano, a checkpoint folder, or a preset, which gets random weights and no MTP head.
        folder: where files are made.
    """

    def __init__(self, name: str, folder: Path, machine: Machine) -> None:
        self.name = Path(name).name
        self._given, self._folder, self._machine = name, folder, machine

    @cached_property
    def checkpoint(self) -> Path:
        """Folder with config.json and safetensors, weights in bfloat16 if random."""
        if self._given == SHIPPED or self._given not in PRESETS:
            return resolve_checkpoint(self._given)
        target = self._folder / self.name
        if not (target / "config.json").is_file():
            in_own_process(make_random_checkpoint, self._given, target)
        return target

    @cached_property
    def config(self) -> ModelConfig:
        """Sizes of the model."""
        return read_model_config(self.checkpoint)

    @cached_property
    def encode(self) -> Callable[[str], list[int]] | None:
        """The tokenizer's function from text to ids; None without a tokenizer."""
        if not (self.checkpoint / "tokenizer.json").is_file():
            return None
        return load_tokenizer(self.checkpoint).encode

    def path(self, engine: str, width: str) -> Path:
        """What the engine opens at this width.

        Raises:
            PeerError: the file cannot be made, with the reason.
        """
        return self.gguf(width) if engine == "llama_cpp" else self.checkpoint

    def gguf(self, width: str) -> Path:
        """The GGUF file of a width: ours if wide, else made of it by llama.cpp's quantiser.

        Raises:
            PeerError: as for `path`.
        """
        target = self._folder / f"{self.name}-{width}.gguf"
        if target.is_file():
            return target
        unfinished = target.with_suffix(".part")
        if width in ("float32", "bfloat16"):
            try:
                in_own_process(export_gguf, self.checkpoint, unfinished, width)
            except (ImportError, ValueError) as error:
                raise PeerError(f"no GGUF file of {self.name}: {error}") from error
        else:
            job = {"threads": self._machine.threads}
            python = self._machine.pythons.get("llama_cpp")
            with WorkerProcess("llama_cpp", job, python=python) as worker:
                files = {"source": str(self.gguf("float32")), "target": str(unfinished)}
                worker.ask("quantize", width=width, **files)
        return unfinished.replace(target)


def make_random_checkpoint(name: str, target: Path) -> None:
    """Save a preset with random weights, the same every time."""
    config = preset(name)
    # Without the head, which the other engines would not hold in memory.
    model = Qwen3Next(config, has_mtp=False, dtype=torch.bfloat16)
    init_weights(model, config, seed=0)
    model.save_pretrained(target)


def in_own_process(function: Callable[..., None], *args: Any) -> None:
    """Call a function where the memory that it takes is given back; its errors come through."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(function, *args).result()


@dataclass(frozen=True)
class Contender:
    """An engine at a width."""

    engine: str
    width: str

    @property
    def name(self) -> str:
        """As the report calls it: "llama.cpp Q8_0"."""
        return f"{ENGINE_NAMES[self.engine]} {WIDTH_NAMES[self.engine][self.width]}"

    def labels(self, model: str, cell: str) -> dict[str, str]:
        """The parts of a measurement's name."""
        return {"model": model, "cell": cell, "engine": self.engine, "width": self.width}

    def start(
        self,
        files: ModelFiles,
        machine: Machine,
        *,
        environment: Mapping[str, str] | None = None,
        **job: Any,
    ) -> WorkerProcess:
        """Open the model in a fresh process.

        Raises:
            PeerError: the engine is missing or cannot; the text says why.
        """
        return WorkerProcess(
            self.engine,
            {
                "model": str(files.path(self.engine, self.width)),
                "width": self.width,
                "threads": machine.threads,
                **job,
            },
            python=machine.pythons.get(self.engine),
            environment=environment,
        )

    def variants(self, cell: "Cell") -> list[Variant]:
        """Ways in which the engine can run a cell; the fastest is measured."""
        if self.engine == "transformers":
            # batched_mm copies the experts' weights for every token: too much for a prompt.
            names = ["eager", "grouped_mm", *(["batched_mm"] if cell.kind == "decode" else [])]
            return [{"experts": name} for name in names]
        if self.engine == "llama_cpp":
            is_long = cell.kind == "prefill" and cell.size > 512
            sizes = [512, 2048] if is_long else [512]
            return [{"flash": flash, "ubatch": size} for flash in (True, False) for size in sizes]
        return [{}]


@dataclass(frozen=True)
class Cell:
    """One piece of work: a prompt of `size` tokens, or decoding of `size` sequences."""

    kind: str  # "prefill" or "decode"
    size: int

    @property
    def name(self) -> str:
        """As the report calls it: "prefill 512"."""
        return f"{self.kind} {self.size:,}"

    @classmethod
    def parse(cls, text: str) -> "Cell | None":
        """The cell that "prefill-512" or "decode-8" names; None for any other text."""
        kind, dash, size = text.partition("-")
        if kind not in ("prefill", "decode") or not dash or not size.isdecimal() or not int(size):
            return None
        return cls(kind, int(size))


def contenders(engines: Sequence[str], widths: Sequence[str]) -> list[Contender]:
    """All engines at all widths that they have."""
    return [
        Contender(engine, width)
        for engine in engines
        for width in widths
        if width in WIDTH_NAMES[engine]
    ]
