"""What a run of `qnext bench` was asked for. No torch."""

from dataclasses import dataclass
from pathlib import Path

SERVE_DTYPES = ("bfloat16", "fp8", "fp8-head")
PARTS = ("kernels", "serve", "train")
SERVE_CELLS = (
    "start",
    "decode-1x1024",
    "decode-8x1024",
    "decode-32x1024",
    "decode-128x1024",
    "decode-1x32768",
    "decode-8x32768",
    "prefill-4096",
    "prefill-32768",
    "prefill-131072",
    "steps-1",
    "steps-8",
)
SMALL_SERVE_CELLS = ("start", "decode-1x24", "decode-2x24", "prefill-40", "steps-2")
# Tokens of a step, and of each of its documents.
TRAIN_CELLS = ("4096", "32768x4096", "32768")
SMALL_TRAIN_CELLS = ("64", "64x32")


@dataclass(frozen=True)
class BenchOptions:
    """One run.

    Args:
        parts: of PARTS, in their order; empty means all.
        seconds: for the whole run. What is left when a cell starts is shared among the cells to
            come, and a cell's rounds end when its share is spent.
        repeats: rounds of a cell, where time allows.
        is_small: a tiny model and tiny sizes, for a CPU.
        device: as `resolve_device` reads it.
        json_path: file that gets the last line too.
        peer: "transformers" or None.
        ops: modules of benchmarks/ops to run; empty means all.
        is_untested: measure kernels without running their tests first.
        cells: of the serving part; empty means all.
        layers: of the served model.
        dtype: of its weights on a GPU, one of SERVE_DTYPES; "fp8-head" has the head in fp8 too.
        decode_tokens: n of a decode cell; None is 128, or 16 where is_small.
        max_drafts: verification steps of 1 to this many drafts.
        chunk_tokens: rows in which prompts are fed; None is the engine's own.
        is_cold: serve with an empty folder of compiled kernels.
        train_cells: as TRAIN_CELLS; empty means these.
        train_layers: of the trained model.
        moments: of AdamW: "8bit" or "bf16".
        checkpointing: what the backward pass recomputes: "off" nothing, "cheap" norms and gates,
            "on" layers; "auto" takes the first of these for which memory is enough.
        accumulate: micro-batches, each of a cell's tokens, in one optimiser step.
        compile: torch.compile of the trained layers.
    """

    parts: tuple[str, ...] = ()
    seconds: float = 540.0
    repeats: int = 3
    is_small: bool = False
    device: str = "auto"
    json_path: Path | None = None
    peer: str | None = None
    ops: tuple[str, ...] = ()
    is_untested: bool = False
    cells: tuple[str, ...] = ()
    layers: int = 12
    dtype: str = "bfloat16"
    decode_tokens: int | None = None
    max_drafts: int = 4
    chunk_tokens: int | None = None
    is_cold: bool = False
    train_cells: tuple[str, ...] = ()
    train_layers: int = 4
    moments: str = "8bit"
    checkpointing: str = "auto"
    accumulate: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"part {part!r} does not exist; there are {', '.join(PARTS)}")
        if self.dtype not in SERVE_DTYPES:
            raise ValueError(f"--dtype is {self.dtype}; want one of {', '.join(SERVE_DTYPES)}")
        counts = {
            "--repeats": self.repeats,
            "--layers": self.layers,
            "--train-layers": self.train_layers,
            "--max-drafts": self.max_drafts,
            "--accumulate": self.accumulate,
            "--tokens": 1 if self.decode_tokens is None else self.decode_tokens,
            "--chunk-tokens": 1 if self.chunk_tokens is None else self.chunk_tokens,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; want at least 1")
        if not self.seconds > 0:
            raise ValueError(f"--seconds is {self.seconds}; want more than 0")
