"""Times of calls on a GPU, one by one or many in a graph."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile


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


def time_us(run: Callable[[], object], num_repeats: int, captures: bool) -> tuple[float, ...]:
    """Microseconds of each of several runs, replayed from a CUDA graph where `captures`."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    if captures:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    return tuple(1e3 * before.elapsed_time(after) for before, after in pairs)


def kernel_times(run: Callable[[], object], num_runs: int = 10) -> list[tuple[str, float, float]]:
    """Where a run's time goes: each kernel's name, launches and microseconds, longest first.

    Kernels that run side by side count in full, so the sum may exceed the run's time. Without a
    GPU, the operators of PyTorch.
    """
    on_gpu = torch.cuda.is_available()
    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        for _ in range(num_runs):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in trace.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            found.append((event.key, event.count / num_runs, spent / num_runs))
    return sorted(found, key=lambda each: -each[2])
