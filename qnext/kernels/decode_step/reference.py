"""A whole decode, verification or draft step: all layers and the head on the rows of a window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qnext.config.model import ModelConfig
from qnext.kernels.decide_token.reference import Cuts

MAX_ROUNDS = 16  # that a backend takes in one call
NOT_NUMBERS = "the logits are not numbers: the model's weights hold NaN or infinities"


@dataclass(frozen=True)
class WindowRows:
    """Rows of running sequences, each going on where its cache ends.

    Args:
        token_ids: the rows' tokens, sequence after sequence; in a draft step those after them. T
        query_lens: rows of each sequence.
        context_lens: tokens of each sequence that the cache holds.
        state_slots: DeltaNet slot of each sequence.
        pages: pages of each sequence, in order, its new rows' included.
        hidden: in a draft step the trunk's states of the rows, or the step's before. [T, C]
        scores_last: logits of each sequence's last row alone are wanted.
        make_batch: the same as the model's own batch, for the reference.
    """

    token_ids: Sequence[int]
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    state_slots: Sequence[int]
    pages: Sequence[Sequence[int]]
    hidden: torch.Tensor | None
    scores_last: bool
    make_batch: Callable[[], Any]


@dataclass(frozen=True)
class StepOutput:
    """What a step worked out for its rows.

    Args:
        hidden: states after the final norm. [T, C]
        logits: raw logits of all rows or of each sequence's last one; a backend may write the
            next step's into the same memory. [T or N, W], fp32
        best: the lowest id of the largest logit of each of those rows; None if not worked out.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    best: Sequence[int] | None = None


@dataclass(frozen=True)
class Penalties:
    """What a sequence's tokens lose for having been seen, and what was seen.

    Args:
        repetition: divides positive logits of tokens in prompt or answer, multiplies negative
            ones; 1: off.
        presence: taken off the logit of each token in the answer; 0: off.
        frequency: the same, times how often it is there; 0: off.
        prompt_ids, output_ids: tokens of the prompt and of the answer so far.
    """

    repetition: float
    presence: float
    frequency: float
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


@dataclass(frozen=True)
class Rounds:
    """What is to be decided by whom.

    Args:
        rows: each sequence's last token, which is not in the cache yet.
        draft_rows: rows that the draft layer has not seen; None where there are no drafts.
        cuts: how each sequence's tokens are drawn; None takes the best.
        seeds: of each sequence's random numbers, 0 to 2^64 - 1.
        num_drafts: of each sequence in a round.
        max_rounds: rounds to take at most; there are pages for all of them.
        end_token_ids: no round is taken after one that decided one of these.
        wants_hidden: whether the states that decided the tokens are asked for.
        penalties: of each sequence, None for those without; empty if there are none at all. Only
            the GPU's rounds take them.
    """

    rows: WindowRows
    draft_rows: WindowRows | None
    cuts: Sequence[Cuts | None]
    seeds: Sequence[int]
    num_drafts: int
    max_rounds: int
    end_token_ids: Sequence[int]
    wants_hidden: bool = True
    penalties: Sequence[Penalties | None] = ()


@dataclass(frozen=True)
class RoundsOutput:
    """What was decided.

    Args:
        token_ids: of each round and sequence, the drafts that stand and one token more.
        hidden: states after the final norm. Without drafts of all rounds [rounds, N, C]; with
            drafts of the last round's windows [N, D + 1, C], of which the rows that decided a
            token are the sequence's. None where a backend was told that nobody wants them.
        setup_seconds: spent on what the next call of this shape will find ready.
        device_seconds: of all rounds, where the device measured them; the host's clock would count
            what its caller does while they run.
    """

    token_ids: list[list[list[int]]]
    hidden: torch.Tensor | None
    setup_seconds: float = 0.0
    device_seconds: float | None = None


class LaunchedRounds:
    """Rounds on their way; those of this class were over when their launch came back.

    Args:
        output: what they decided; None in a class that reads it later.
    """

    def __init__(self, output: RoundsOutput | None) -> None:
        self._output = output

    @property
    def num_rounds(self) -> int:
        """Rounds of this call."""
        return len(self.read().token_ids)

    @property
    def can_go_on(self) -> bool:
        """Whether further rounds may be launched behind these."""
        return False

    def read(self) -> RoundsOutput:
        """Wait for the rounds and commit them; further calls return the same.

        Raises:
            ValueError: logits are not numbers.
        """
        assert self._output is not None, "nothing was decided"
        return self._output

    def drop(self) -> None:
        """Wait for rounds whose sequences have all ended; nobody will read them."""

    def go_on(self, pages: Sequence[Sequence[int]], max_rounds: int) -> "LaunchedRounds":
        """Launch further rounds of the same sequences behind these.

        Args:
            pages: of each sequence, those that it had at the launch and newer ones.
            max_rounds: rounds to take at most; there are pages for all of them, however many
                tokens these here decide.

        Raises:
            RuntimeError: not `can_go_on`.
        """
        raise RuntimeError("these rounds are over: those that follow start with a launch")


@dataclass
class DecodeStep:
    """What a step reads and writes, the same from step to step.

    Args:
        config: sizes.
        parameters: by their name in the model; an int8 matrix has its rows' scales as `row_scale`.
        layer_names: prefixes of the layers that run, such as "layers.0.".
        mixer_idx: each layer's index among those of its mixer, in the memory below.
        keys, values: the cache's pools, one row per token. [L, S, Hkv, D]
        page_size: rows that follow one another in a page.
        states: DeltaNet's memory: convolution and recurrent states; window keys, changes, decays
            and inputs, which are written.
        rotation: cos and sin of every position, two of [positions, R / 2], fp32.
        prefix: "" for the trunk, "mtp." for a draft step, which joins embeddings and states.
        head: name of the output matrix.
        run_layers: the model's own layers and head, on the same rows.
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
    prefix: str
    head: str
    run_layers: Callable[[WindowRows], StepOutput]
    prepared: Any = field(default=None, repr=False)


def best_ids(logits: torch.Tensor) -> list[int]:
    """Lowest id of the largest logit of each row, -1 where one is not a number. [T, W]"""
    ids = logits.argmax(-1)  # that of a NaN, where there is one
    is_number = ~logits.gather(-1, ids[:, None])[:, 0].isnan()
    found: list[int] = torch.where(is_number, ids, -1).tolist()
    return found


def decode_step_reference(step: DecodeStep, rows: WindowRows) -> StepOutput:
    """Run the layers and the head on the rows of a window.

    Committed DeltaNet states stay as they are, but for rows that were accepted before: a backend
    may take those in as late as here.

    Args:
        step: weights, cache and layers.
        rows: the window.

    Returns:
        States after the final norm and logits.
    """
    return step.run_layers(rows)
