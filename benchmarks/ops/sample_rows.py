"""Time of sampling and of acceptance on a GPU, in a CUDA graph.

    python -m benchmarks.ops.sample_rows --rows 1 8 128

The flagship's vocabulary. Distributions and decided tokens are compared with the reference's first,
and nothing is timed if they differ. The logits fall off like those of a trained model: a few large
ones over a broad floor; "flat" rows are the worst case of top_p, where most of the vocabulary is
kept. The limit is one read of the logits at 3.0 TB/s; up to 80 rows fit into the L2 cache and may
be faster, as they are after the head's product, which has just written them.
"""

import argparse
from collections.abc import Callable, Sequence

import torch

from benchmarks.report import Measurement, environment, print_report
from qnext.kernels.sample_rows.fields import (
    SampledRows,
    SampleWorkspace,
    SamplingFields,
    Window,
)
from qnext.kernels.sample_rows.reference import (
    accept_drafts_reference,
    cut_probs,
    sample_rows_reference,
)
from qnext.kernels.sample_rows.triton_accept import accept_drafts_triton
from qnext.kernels.sample_rows.triton_fwd import sample_rows_triton

BYTES_PER_S = 3.0e12
VOCAB_SIZE = 151936
CALLS_PER_GRAPH = 20
# name: temperature, top_k, top_p, min_p, flat rows
SETTINGS: dict[str, tuple[float, int, float, float, bool]] = {
    "greedy": (0.0, 0, 1.0, 0.0, False),
    "temperature": (0.8, 0, 1.0, 0.0, False),
    "top_k 50": (0.8, 50, 1.0, 0.0, False),
    "top_k 20, top_p 0.8": (0.7, 20, 0.8, 0.0, False),
    "top_p 0.95": (1.0, 0, 0.95, 0.0, False),
    "top_p 0.95, min_p 0.05": (1.0, 0, 0.95, 0.05, False),
    "top_p 0.95, flat": (1.0, 0, 0.95, 0.0, True),
}

# Of these drafts are verified too.
ACCEPTED_SETTINGS = ("greedy", "temperature", "top_k 50")
CHECKED_SEQS = 4


def draw_logits(num_rows: int, is_flat: bool = False) -> torch.Tensor:
    """Rows of random logits: normal ones, and unless flat some 300 that stand out."""
    logits = torch.randn(num_rows, VOCAB_SIZE, device="cuda")
    if not is_flat:
        ids = torch.randint(0, VOCAB_SIZE, (num_rows, 300), device="cuda")
        logits.scatter_add_(1, ids, 6.0 + 4.0 * torch.rand(num_rows, 300, device="cuda"))
        logits.scatter_add_(1, ids[:, :5], torch.full((num_rows, 5), 4.0, device="cuda"))
    return logits


def fields_of(setting: tuple[float, int, float, float, bool], count: int) -> SamplingFields:
    """The same setting for every sequence, with a seed of its own each."""

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device="cuda")

    temperature, top_k, top_p, min_p, _ = setting
    return SamplingFields(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        seed=torch.arange(count, device="cuda"),
        position=column(100, torch.int32),
    )


def graph_times_us(run: Callable[[], object], repeats: int) -> tuple[float, ...]:
    """Microseconds of a call, from replays of a graph that holds several."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            run()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS_PER_GRAPH)
    return tuple(times[3:])


def check(logits: torch.Tensor, fields: SamplingFields) -> None:
    """Refuse to time kernels whose cut differs from the reference's.

    Raises:
        ValueError: by how much.
    """
    head = logits[:4]
    ours = sample_rows_triton(head, fields, purpose=0)
    expected = sample_rows_reference(head, fields, purpose=0)
    for row_idx in range(head.shape[0]):
        temperature = float(fields.temperature[row_idx])
        pair = (cut_probs(head[row_idx], temperature, r.cuts[row_idx]) for r in (ours, expected))
        probs, right = pair
        error = float((probs - right).abs().sum())
        if not error < 2e-5:
            raise ValueError(f"row {row_idx}: the distribution is off by {error}")


def limit_note(num_bytes: int) -> str:
    """How long the bytes take."""
    return f"limit {num_bytes / BYTES_PER_S * 1e6:.1f} us"


def time_sampling(num_rows: int, repeats: int) -> list[Measurement]:
    """One measurement for each setting."""
    device = torch.device("cuda")
    workspace = SampleWorkspace.allocate(num_rows, VOCAB_SIZE, device)
    out = SampledRows.empty(num_rows, device)
    found = []
    for name, setting in SETTINGS.items():
        logits, fields = draw_logits(num_rows, setting[4]), fields_of(setting, num_rows)
        check(logits, fields)
        has_filters = setting[1:4] != (0, 1.0, 0.0)

        def run(
            logits: torch.Tensor = logits,
            fields: SamplingFields = fields,
            has_filters: bool = has_filters,
        ) -> None:
            sample_rows_triton(
                logits,
                fields,
                purpose=0,
                has_filters=has_filters,
                out=out,
                workspace=workspace,
            )

        times = graph_times_us(run, repeats)
        note = limit_note(logits.numel() * 4)
        found.append(Measurement(f"{name}, {num_rows} rows", "us", times, note=note))
    return found


def draw_window(
    setting: tuple[float, int, float, float, bool], num_seqs: int, depth: int
) -> tuple[torch.Tensor, SamplingFields, Window]:
    """Target logits, how tokens are chosen, and depth - 1 drafts from logits near the target's."""
    device = torch.device("cuda")
    fields = fields_of(setting, num_seqs)
    logits = draw_logits(num_seqs * depth)
    draft_logits = logits.view(num_seqs, depth, VOCAB_SIZE)[:, :-1].clone()
    draft_logits += 0.3 * torch.randn_like(draft_logits)
    tokens = torch.empty(num_seqs, depth - 1, dtype=torch.int64, device=device)
    cuts = torch.empty(num_seqs, depth - 1, 4, dtype=torch.int64, device=device)
    for j in range(depth - 1):
        rows = sample_rows_triton(draft_logits[:, j], fields, purpose=1, position_offset=j)
        tokens[:, j], cuts[:, j] = rows.tokens, rows.cuts
    lens = torch.full((num_seqs,), depth, dtype=torch.int32, device=device)
    return logits, fields, Window(tokens, lens, draft_logits, cuts)


def check_acceptance(name: str, depth: int) -> None:
    """Refuse to time a verification that decides other tokens than the reference.

    Raises:
        ValueError: for which setting.
    """
    setting = SETTINGS[name]
    logits, fields, window = draw_window(setting, CHECKED_SEQS, depth)
    has_filters = setting[1:4] != (0, 1.0, 0.0)
    ours = accept_drafts_triton(logits, fields, window, has_filters=has_filters)
    expected = accept_drafts_reference(logits, fields, window, has_filters=has_filters)
    if not all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True)):
        raise ValueError(f"accept, {name}, Q = {depth}: tokens are not the reference's")


def time_acceptance(num_seqs: int, depth: int, repeats: int) -> list[Measurement]:
    """Verification of depth - 1 drafts: everything from the target logits to the tokens."""
    workspace = SampleWorkspace.allocate(num_seqs * depth, VOCAB_SIZE, torch.device("cuda"))
    found = []
    for name in ACCEPTED_SETTINGS:
        setting = SETTINGS[name]
        logits, fields, window = draw_window(setting, num_seqs, depth)
        has_filters = setting[1:4] != (0, 1.0, 0.0)

        def run(
            logits: torch.Tensor = logits,
            fields: SamplingFields = fields,
            window: Window = window,
            has_filters: bool = has_filters,
        ) -> None:
            accept_drafts_triton(
                logits, fields, window, has_filters=has_filters, workspace=workspace
            )

        rate = float(accept_drafts_triton(logits, fields, window)[1].float().mean()) / (depth - 1)
        times = graph_times_us(run, repeats)
        note = f"{limit_note(logits.numel() * 4)}, accepted {rate:.0%}"
        title = f"accept, {name}, Q = {depth}, {num_seqs} sequences"
        found.append(Measurement(title, "us", times, note=note))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    found: list[Measurement] = []
    for num_rows in options.rows:
        found += time_sampling(num_rows, options.repeats)
    for depth in options.depths:
        for name in ACCEPTED_SETTINGS:
            check_acceptance(name, depth)
        for num_seqs in options.rows:
            found += time_acceptance(num_seqs, depth, options.repeats)
    print_report(found, environment(torch.get_num_threads()))


if __name__ == "__main__":
    main()
