"""Device time of a captured round and of the drafts in it, without the host's part."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qnext.engine.llm import LLM

if TYPE_CHECKING:  # Triton, which a CPU may lack
    from qnext.kernels.decode_step.captured_round import CapturedRounds

NUM_REPLAYS = 20


@dataclass(frozen=True)
class RoundSeconds:
    """Medians over replays.

    Attributes:
        whole: drafts, the window through the trunk, decisions.
        drafts: all drafts of a round, the head and their sampling included.
    """

    whole: float
    drafts: float

    @property
    def verification(self) -> float:
        """The window through the trunk and the head, and what is decided of it."""
        return self.whole - self.drafts


def round_seconds(llm: LLM, num_seqs: int, num_drafts: int) -> RoundSeconds | None:
    """Time the round that the engine captured last for these sizes; None if there is none.

    It goes on from where the engine stopped, always from the same place.
    """
    captured: CapturedRounds | None = None
    for each in llm.engine.runner.captured_rounds():
        if each.num_seqs >= num_seqs and each.num_drafts == num_drafts:
            captured = each
    if captured is None or captured.graph is None:
        return None
    whole = _median_seconds(captured, captured.graph.replay)
    if captured.draft is None:
        return RoundSeconds(whole, 0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        captured.draft_all(captured.draft)
    return RoundSeconds(whole, _median_seconds(captured, graph.replay))


def _median_seconds(captured: "CapturedRounds", replay: Callable[[], None]) -> float:
    buffers = captured.buffers
    places = (buffers.contexts, buffers.fields.position, buffers.draft_contexts)
    with torch.inference_mode():
        before = [place.clone() for place in places]
        times = []
        for _ in range(NUM_REPLAYS + 2):
            for place, value in zip(places, before, strict=True):
                place.copy_(value)
            buffers.round.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        for place, value in zip(places, before, strict=True):
            place.copy_(value)
    return statistics.median(times[2:])  # the first ones find nothing in the caches
