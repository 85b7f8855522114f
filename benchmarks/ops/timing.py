"""Times of calls that are too short to be timed one by one."""

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_time(
    calls: Sequence[Callable[[], object]], num_replays: int = 9, *, min_calls: int = 48
) -> float:
    """Median microseconds per call, all of them captured in one CUDA graph.

    Args:
        calls: go round until the graph holds at least min_calls.
        num_replays: that the median is taken of.
    """
    for call in calls[:2]:
        call()
    calls = [*calls] * -(-min_calls // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(num_replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[2:])
