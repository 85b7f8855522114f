"""Norms, gates and projections' epilogues on a GPU, beside their limit and plain PyTorch.

    python -m benchmarks.ops.elementwise --tokens 8192 32768
    python -m benchmarks.ops.elementwise --tokens 1 16 128 --graph

Flagship sizes, bf16. Outputs and gradients are first checked against the reference in float64, on
fewer tokens; nothing is timed if one is wrong. The limit is the bytes that the op must read and
write, each once, at 3.0 TB/s; partial sums and whatever else a kernel adds count as loss. With
--graph each call is replayed from a CUDA graph, forward only, as in decode.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.ops.checks import require_right
from qnext.kernels.add_rms_norm.reference import add_rms_norm_reference
from qnext.kernels.add_rms_norm.triton_fwd import add_rms_norm_triton
from qnext.kernels.attention_inputs.reference import AttentionSizes, attention_inputs_reference
from qnext.kernels.attention_inputs.triton_fwd import attention_inputs_triton
from qnext.kernels.delta_inputs.reference import DeltaSizes, delta_inputs_reference
from qnext.kernels.delta_inputs.triton_fwd import delta_inputs_triton
from qnext.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qnext.kernels.gated_rms_norm.triton_fwd import gated_rms_norm_triton
from qnext.kernels.merge_attention.reference import merge_attention_reference
from qnext.kernels.merge_attention.triton_fwd import merge_attention_triton
from qnext.kernels.rms_norm.reference import rms_norm_reference
from qnext.kernels.rms_norm.triton_fwd import rms_norm_triton
from qnext.kernels.router_stats.reference import router_stats_reference
from qnext.kernels.router_stats.triton_fwd import router_stats_triton
from qnext.kernels.sigmoid_gate.reference import sigmoid_gate_reference
from qnext.kernels.sigmoid_gate.triton_fwd import sigmoid_gate_triton
from qnext.kernels.silu_mul.reference import silu_mul_reference
from qnext.kernels.silu_mul.triton_fwd import silu_mul_triton

BYTES_PER_MS = 3.0e9  # a device-to-device copy on an H100 80GB HBM3
EPS = 1e-6
DECODE_CALLS = 50
DELTA = DeltaSizes(16, 32, 128, 128)
ATTENTION = AttentionSizes(16, 2, 256)
HIDDEN, WIDTH, ROTARY = 2048, 512, 64
EXPERTS, ACTIVE = 512, 10
# As in the ops' tests: of results in bf16, of a result in bf16 without sums, and of fp32 sums.
HALF_LIMIT, MERGED_LIMIT, STATS_LIMIT = 1e-2, 4e-3, 1e-5
CHECKED_TOKENS = 127
DEVICE = "cuda"
MIN_SET_BYTES = 256 << 20  # several times the L2 cache, so that no run finds its inputs in it


@dataclass(frozen=True)
class Work:
    """One op at one size.

    Args:
        name: of the op.
        function: our kernel.
        reference: the same in plain PyTorch.
        inputs: what it takes; those that require gradients get them, and without any there is no
            backward.
        forward_values: values of the rows' dtype that the forward must read and write.
        backward_values: as many of the backward.
        options: keyword arguments.
        error_limit: largest relative error of an output or gradient that is timed.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...]
    forward_values: int
    backward_values: int
    options: dict[str, Any] = field(default_factory=dict)
    error_limit: float = HALF_LIMIT


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def _delta_work(num_tokens: int) -> Work:
    heads, row = DELTA.num_value_heads, sum(DELTA.columns)
    parameters = [_draw(heads, dtype=torch.float32) for _ in range(2)]
    positions = torch.arange(num_tokens, device=DEVICE) % 4096
    weight = _draw(DELTA.conv_dim, 4)
    inputs = (_draw(num_tokens, row), weight, *parameters, positions)
    # Two fp32 values per head, g and beta, are four of the rows' dtype; z is a view.
    forward = 2 * DELTA.conv_dim + 2 * heads + 4 * heads
    read = 2 * DELTA.conv_dim + DELTA.value_dim + 2 * heads + 4 * heads
    sizes = (num_tokens * forward, num_tokens * (read + row))
    functions = (delta_inputs_triton, delta_inputs_reference)
    return Work("delta_inputs", *functions, inputs, *sizes, {"sizes": DELTA})


def _attention_work(num_tokens: int) -> Work:
    row = sum(ATTENTION.columns)
    heads = (ATTENTION.num_heads + ATTENTION.num_kv_heads) * ATTENTION.head_dim
    angles = torch.randn(num_tokens, ROTARY // 2, device=DEVICE)
    weights = (_draw(ATTENTION.head_dim), _draw(ATTENTION.head_dim))
    inputs = (_draw(num_tokens, row), *weights, angles.cos(), angles.sin())
    # cos and sin are R / 2 fp32 values each.
    sizes = (num_tokens * (2 * heads + 2 * ROTARY), num_tokens * (heads + 2 * row + 2 * ROTARY))
    functions = (attention_inputs_triton, attention_inputs_reference)
    options = {"eps": EPS, "sizes": ATTENTION}
    return Work("attention_inputs", *functions, inputs, *sizes, options)


def _merge_work(num_tokens: int) -> Work:
    heads, head_dim = ATTENTION.num_heads, ATTENTION.head_dim
    values = [_draw(num_tokens, heads, head_dim).detach() for _ in range(2)]
    sums = [torch.randn(heads, num_tokens, device=DEVICE) for _ in range(2)]
    # An fp32 logarithm is two values of the rows' dtype.
    size = num_tokens * heads * (3 * head_dim + 4)
    functions = (merge_attention_triton, merge_attention_reference)
    inputs = (values[0], sums[0], values[1], sums[1])
    return Work("merge_attention", *functions, inputs, size, 0, error_limit=MERGED_LIMIT)


def _stats_work(num_tokens: int) -> Work:
    logits = _draw(num_tokens, EXPERTS, dtype=torch.float32)
    ids = logits.detach().topk(ACTIVE, dim=-1).indices
    # An int64 id is two values of the logits' dtype.
    sizes = (num_tokens * (EXPERTS + 2 * ACTIVE), 2 * num_tokens * EXPERTS)
    functions = (router_stats_triton, router_stats_reference)
    return Work("router_stats", *functions, (logits, ids), *sizes, error_limit=STATS_LIMIT)


def all_work(num_tokens: int) -> list[Callable[[], Work]]:
    """Every op at flagship sizes; a call draws its inputs, so that one op's are held at a time."""
    eps = {"eps": EPS}
    wide, heads = num_tokens * HIDDEN, num_tokens * DELTA.value_dim
    query, gated = num_tokens * ATTENTION.num_heads * ATTENTION.head_dim, num_tokens * WIDTH
    head_shape = (num_tokens, DELTA.num_value_heads, DELTA.value_head_dim)

    def rms() -> Work:
        inputs = (_draw(num_tokens, HIDDEN), _draw(HIDDEN))
        functions = (rms_norm_triton, rms_norm_reference)
        return Work("rms_norm", *functions, inputs, 2 * wide, 3 * wide, eps)

    def add_rms() -> Work:
        inputs = (_draw(num_tokens, HIDDEN), _draw(num_tokens, HIDDEN), _draw(HIDDEN))
        functions = (add_rms_norm_triton, add_rms_norm_reference)
        return Work("add_rms_norm", *functions, inputs, 4 * wide, 4 * wide, eps)

    def gated_rms() -> Work:
        fused = torch.randn(num_tokens, sum(DELTA.columns), device=DEVICE, dtype=torch.bfloat16)
        z = fused.split(DELTA.columns, dim=-1)[3].unflatten(-1, head_shape[1:]).requires_grad_()
        inputs = (_draw(*head_shape), z, _draw(DELTA.value_head_dim))
        functions = (gated_rms_norm_triton, gated_rms_norm_reference)
        return Work("gated_rms_norm", *functions, inputs, 3 * heads, 5 * heads, eps)

    def sigmoid() -> Work:
        fused = torch.randn(num_tokens, sum(ATTENTION.columns), device=DEVICE, dtype=torch.bfloat16)
        gate = fused.split(ATTENTION.columns, dim=-1)[1].requires_grad_()
        shape = (num_tokens, ATTENTION.num_heads, ATTENTION.head_dim)
        functions = (sigmoid_gate_triton, sigmoid_gate_reference)
        return Work("sigmoid_gate", *functions, (_draw(*shape), gate), 3 * query, 5 * query)

    def silu() -> Work:
        functions = (silu_mul_triton, silu_mul_reference)
        inputs = (_draw(num_tokens, 2 * WIDTH),)
        return Work("silu_mul", *functions, inputs, 3 * gated, 5 * gated)

    return [
        rms,
        add_rms,
        gated_rms,
        lambda: _delta_work(num_tokens),
        lambda: _attention_work(num_tokens),
        sigmoid,
        silu,
        lambda: _merge_work(num_tokens),
        lambda: _stats_work(num_tokens),
    ]


def results(
    function: Callable[..., Any], work: Work, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs, and gradients of their sum with fixed weights."""
    leaves = [
        x.detach().requires_grad_(own.requires_grad)
        for x, own in zip(inputs, work.inputs, strict=True)
    ]
    out = function(*leaves, **work.options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    learned = [x for x in leaves if x.requires_grad]
    if not learned:
        return outputs
    generator = torch.Generator().manual_seed(1)
    ends = [x for x in outputs if x.requires_grad]
    goals = [torch.randn(x.shape, generator=generator).to(x) for x in ends]
    return [*outputs, *torch.autograd.grad(ends, learned, goals)]


def check(work: Work) -> None:
    """Refuse to time a kernel that is wrong: against the reference in float64 on the same rows.

    Raises:
        ValueError: by how much.
    """
    wide = [x.detach().double() if x.is_floating_point() else x for x in work.inputs]
    expected = results(work.reference, work, wide)
    require_right(work.name, results(work.function, work, work.inputs), expected, work.error_limit)


def milliseconds(call: Callable[[], object], num_runs: int = 20) -> float:
    """Median over runs after three to warm up; the cache is emptied before each."""
    flush = torch.empty(MIN_SET_BYTES, dtype=torch.int8, device=DEVICE)
    times = []
    for run in range(num_runs + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if run >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def kernel_milliseconds(
    call: Callable[[], object], stream: torch.cuda.Stream, num_calls: int = 1
) -> float:
    """Time on the GPU alone: the calls are replayed from a graph, without Python between them."""
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(num_calls):
            call()
    return milliseconds(graph.replay) / num_calls


def times(function: Callable[..., Any], work: Work, in_graph: bool) -> tuple[float, float]:
    """Forward and backward of one implementation, in ms; with in_graph the forward alone."""
    stream = torch.cuda.Stream()
    with torch.no_grad():
        # Of small work, many calls in one graph, whose start would hide one.
        num_calls = DECODE_CALLS if in_graph else 1
        forward = kernel_milliseconds(
            lambda: function(*work.inputs, **work.options), stream, num_calls
        )
    learned = [x for x in work.inputs if x.requires_grad]
    if in_graph or not learned:
        return forward, 0.0
    # Gradients run on the stream of the forward, which must be the one that is captured.
    with torch.cuda.stream(stream):
        out = function(*work.inputs, **work.options)
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        gradients = [torch.randn_like(x) for x in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, learned, gradients, retain_graph=True)

    return forward, kernel_milliseconds(backward, stream)


def measure(work: Work, in_graph: bool) -> dict[str, Any]:
    """One row of the table: times of ours and of plain PyTorch, and the limit."""
    item = work.inputs[0].element_size()
    limits = [count * item / BYTES_PER_MS for count in (work.forward_values, work.backward_values)]
    row: dict[str, Any] = {"op": work.name, "tokens": work.inputs[0].shape[0]}
    ours = times(work.function, work, in_graph)
    theirs = times(work.reference, work, in_graph)
    for part, mine, other, limit in zip(("forward", "backward"), ours, theirs, limits, strict=True):
        if mine:
            row[part] = {
                "us": 1e3 * mine,
                "limit_us": 1e3 * limit,
                "share": limit / mine,
                "reference_us": 1e3 * other,
            }
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for people and one line of JSON for programs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.elementwise")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--ops", nargs="+", default=None, help="names; default all")
    parser.add_argument("--graph", action="store_true", help="forward only, 50 calls in a graph")
    args = parser.parse_args(argv)
    for draw in all_work(CHECKED_TOKENS):
        work = draw()
        if args.ops is None or work.name in args.ops:
            check(work)
    rows = []
    print(f"{'op':18}{'tokens':>8}  {'pass':9}{'us':>9}{'limit':>9}{'share':>8}{'torch us':>10}")
    for num_tokens in args.tokens:
        for draw in all_work(num_tokens):
            work = draw()
            if args.ops is not None and work.name not in args.ops:
                continue
            row = measure(work, args.graph)
            rows.append(row)
            for part in ("forward", "backward"):
                if part in row:
                    cell = row[part]
                    print(
                        f"{work.name:18}{num_tokens:8}  {part:9}{cell['us']:9.1f}"
                        f"{cell['limit_us']:9.1f}{cell['share']:8.0%}{cell['reference_us']:10.1f}"
                    )
            del work
            torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
