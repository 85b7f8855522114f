"""Kernels inside torch.compile: as the eager call, whole graphs, one graph for any length."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from qnext.kernels import dispatch
from qnext.kernels.attention_inputs.reference import AttentionSizes
from qnext.kernels.delta_inputs.reference import DeltaSizes
from qnext.kernels.grad_sums import adding_to_grads
from qnext.kernels.graph_ops import graph_op
from qnext.model.batch import ForwardBatch
from tests.kernels.triton_env import DEVICE, error
from tests.model.tiny import tiny_model

DELTA = DeltaSizes(1, 2, 8, 4)
ATTENTION = AttentionSizes(2, 1, 8)
EPS = 1e-6


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_()


def plain(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def chosen(num_tokens: int) -> torch.Tensor:
    return torch.rand(num_tokens, 4, device=DEVICE).topk(2).indices


def mixture(num_tokens: int) -> tuple[torch.Tensor, ...]:
    return (
        leaf(num_tokens, 16),
        leaf(4, 16, 16),
        leaf(4, 16, 8),
        leaf(num_tokens, 2),
        chosen(num_tokens),
    )


def delta_rule(num_tokens: int) -> tuple[torch.Tensor, ...]:
    bounds = torch.tensor([0, 3, num_tokens], dtype=torch.int32, device=DEVICE)
    g = (-torch.rand(num_tokens, 2, device=DEVICE)).requires_grad_()
    beta = torch.rand(num_tokens, 2, device=DEVICE).requires_grad_()
    return *(leaf(num_tokens, 1, 8) for _ in range(2)), leaf(num_tokens, 2, 4), g, beta, bounds


def run_delta_rule(*inputs: torch.Tensor) -> Any:
    *tensors, bounds = inputs
    return dispatch.gated_delta_rule(*tensors, cu_seqlens=bounds)


def run_delta_rule_from(state: torch.Tensor, *inputs: torch.Tensor) -> Any:
    *tensors, bounds = inputs
    return dispatch.gated_delta_rule(*tensors, cu_seqlens=bounds, initial_state=state)


# Name of a case: the op's call, and its inputs for T tokens. An op's name is what comes before "/".
CASES: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "rms_norm": (lambda *x: dispatch.rms_norm(*x, EPS), lambda t: (leaf(t, 16), leaf(16))),
    "gated_rms_norm": (
        lambda *x: dispatch.gated_rms_norm(*x, EPS),
        lambda t: (leaf(t, 2, 16), leaf(t, 2, 16), leaf(16)),
    ),
    "add_rms_norm": (
        lambda *x: dispatch.add_rms_norm(*x, EPS),
        lambda t: (leaf(t, 16), leaf(t, 16), leaf(16)),
    ),
    "add_rms_norm/sum alone": (
        lambda *x: dispatch.add_rms_norm(*x, EPS)[1],
        lambda t: (leaf(t, 16), leaf(t, 16), plain(16)),
    ),
    "sigmoid_gate": (dispatch.sigmoid_gate, lambda t: (leaf(t, 2, 8), leaf(t, 16))),
    "silu_mul": (dispatch.silu_mul, lambda t: (leaf(t, 16),)),
    "delta_inputs": (
        lambda *x: dispatch.delta_inputs(*x, sizes=DELTA),
        lambda t: (
            leaf(t, sum(DELTA.columns)),
            leaf(DELTA.conv_dim, 4),
            leaf(2),
            leaf(2),
            torch.arange(t, device=DEVICE) % 7,
        ),
    ),
    "attention_inputs": (
        lambda *x: dispatch.attention_inputs(*x, eps=EPS, sizes=ATTENTION),
        lambda t: (leaf(t, sum(ATTENTION.columns)), leaf(8), leaf(8), plain(t, 2), plain(t, 2)),
    ),
    "linear_cross_entropy": (
        lambda *x: dispatch.linear_cross_entropy(*x, 1e-3),
        lambda t: (leaf(t, 16), leaf(33, 16), torch.randint(33, (t,), device=DEVICE)),
    ),
    "linear_cross_entropy/frozen head": (
        lambda *x: dispatch.linear_cross_entropy(*x, 0.0),
        lambda t: (leaf(t, 16), plain(33, 16), torch.randint(33, (t,), device=DEVICE)),
    ),
    "router": (
        lambda *x: dispatch.router(*x, 2, True, row_stable=False),
        lambda t: (leaf(t, 16), leaf(8, 16)),
    ),
    "router/not normalised": (
        lambda *x: dispatch.router(*x, 2, False, row_stable=False),
        lambda t: (leaf(t, 16), leaf(8, 16)),
    ),
    "router_stats": (dispatch.router_stats, lambda t: (leaf(t, 4), chosen(t))),
    "gated_delta_rule": (run_delta_rule, delta_rule),
    "gated_delta_rule/from a state": (
        run_delta_rule_from,
        lambda t: (leaf(2, 2, 8, 4), *delta_rule(t)),
    ),
    "experts": (dispatch.experts, mixture),
    "experts_shared": (
        dispatch.experts_shared,
        lambda t: (*mixture(t), leaf(t, 16), leaf(t, 1)),
    ),
}
OP_IN_GRAPH = {"experts": "experts_grouped", "experts_shared": "experts_grouped"}


class CheckedGraph(torch.fx.Interpreter):
    """Runs a graph; at its first run each of our ops is held against its stand-in."""

    def __init__(self, module: torch.fx.GraphModule, seen: set[str], *, is_checked: bool) -> None:
        super().__init__(module)
        self.seen = seen
        self.is_checked = is_checked

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "qnext":
            name = target._schema.name.removeprefix("qnext::")
            self.seen.add(name)
            if self.is_checked:
                tests = ("test_schema", "test_faketensor")
                torch.library.opcheck(target, args, kwargs, test_utils=tests)
        return super().call_function(target, args, kwargs)


def graph_backend(seen: set[str], *, is_checked: bool = False) -> Any:
    """Runs graphs of AOTAutograd node by node and notes the names of our ops in them."""

    def compiler(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph = CheckedGraph(module, seen, is_checked=is_checked)

        def run(args: list[Any]) -> Any:
            result = graph.run(*args)
            args.clear()
            graph.is_checked = False
            return result

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return aot_autograd(fw_compiler=compiler)


@contextmanager
def one_graph() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def gradients(
    run: Callable[..., Any], inputs: tuple[Any, ...], leaves: list[torch.Tensor]
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Results, and gradients of a sum in which every element weighs differently."""
    out = run(*inputs)
    results = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    total = sum(
        (x.float() * torch.linspace(0.5, 2.0, x.numel(), device=x.device).view(x.shape)).sum()
        for x in results
        if x.requires_grad
    )
    return results, torch.autograd.grad(total, leaves)


def compare(run: Any, compiled: Any, inputs: tuple[Any, ...], leaves: list[torch.Tensor]) -> None:
    results, grads = gradients(run, inputs, leaves)
    ours, our_grads = gradients(compiled, inputs, leaves)
    assert [x.requires_grad for x in ours] == [x.requires_grad for x in results]
    for got, want in zip([*ours, *our_grads], [*results, *grads], strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert error(got, want) < 1e-5


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_a_graph_holds_the_op_and_equals_the_eager_call(case):
    run, draw = CASES[case]
    name = case.split("/")[0]
    seen: set[str] = set()
    backend = graph_backend(seen, is_checked=True)
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    with dispatch.use_backend("triton"):
        inputs = draw(6)
        leaves = [x for x in inputs if x.requires_grad]
        compare(run, compiled, inputs, leaves)
        assert OP_IN_GRAPH.get(name, name) in seen
        with one_graph():
            for num_tokens in (9, 70):
                inputs = draw(num_tokens)
                compare(run, compiled, inputs, [x for x in inputs if x.requires_grad])


def test_without_gradients_a_graph_keeps_no_states():
    kept = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [n for n in module.graph.nodes if "gated_delta_rule" in str(n.target)]
        kept.extend(node.args[-1] for node in calls)
        return module

    compiled = torch.compile(run_delta_rule, backend=backend, fullgraph=True)
    inputs = delta_rule(6)
    with dispatch.use_backend("triton"):
        with torch.no_grad():
            out, _ = compiled(*inputs)
            want, _ = run_delta_rule(*inputs)
        compiled(*inputs)
    assert torch.equal(out, want)
    assert kept == [False, True]


def layer_case(layer_idx: int, num_tokens: int, **of_model: Any) -> tuple[Any, tuple[Any, ...]]:
    layer = tiny_model(**of_model).to(DEVICE).layers[layer_idx]
    return layer, layer_inputs(layer, num_tokens)


def layer_inputs(layer: Any, num_tokens: int) -> tuple[Any, ...]:
    """Two packed documents as a training step has them: without lengths on the host."""
    token_ids = torch.arange(num_tokens, device=DEVICE) % 97
    packed = ForwardBatch.packed(token_ids, (7, num_tokens - 7))
    batch = ForwardBatch(
        packed.token_ids, packed.position_ids, packed.cu_seqlens, row_tokens=num_tokens
    )
    _ = batch.local_positions
    angles = torch.randn(num_tokens, 4, device=DEVICE)
    dtype = layer.input_layernorm.weight.dtype
    x = torch.randn(num_tokens, 32, device=DEVICE, dtype=dtype).requires_grad_()
    return x, (angles.cos(), angles.sin()), batch, None


def run_layer(forward: Callable[..., Any], *inputs: Any) -> tuple[torch.Tensor, ...]:
    out, stats = forward(*inputs)
    return out, stats.prob_mean, stats.z_mean


@pytest.mark.parametrize("layer_idx, mixer", [(0, "gated_delta_rule"), (3, "rms_norm")])
def test_a_layer_is_one_graph_for_any_length(layer_idx, mixer):
    layer, inputs = layer_case(layer_idx, 20)
    seen: set[str] = set()
    forward = torch.compile(
        layer.forward, backend=graph_backend(seen), fullgraph=True, dynamic=True
    )
    plain_run, run = partial(run_layer, layer.forward), partial(run_layer, forward)
    with dispatch.use_backend("triton"):
        compare(plain_run, run, inputs, [inputs[0], *layer.parameters()])
        assert {mixer, f"{mixer}_backward", "router", "experts_grouped"} <= seen
        with one_graph():
            inputs = layer_inputs(layer, 33)
            compare(plain_run, run, inputs, [inputs[0], *layer.parameters()])


@pytest.mark.parametrize("case", ["experts", "linear_cross_entropy"])
def test_gradients_of_a_graph_add_up_where_eager_kernels_add_them(case):
    run, draw = CASES[case]
    inputs = draw(6)
    leaves = [x for x in inputs if x.requires_grad]
    sums = []
    with dispatch.use_backend("triton"):
        for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
            for x in leaves:
                x.grad = torch.ones_like(x)  # there before the graph is traced
            for _ in range(2):
                out = call(*inputs)
                with adding_to_grads():
                    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
            sums.append([x.grad for x in leaves])
    for got, want in zip(*sums, strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's rows go to Triton unless told otherwise")
def test_rows_on_a_cpu_take_no_triton_kernel_unless_it_is_named():
    run, draw = CASES["rms_norm"]
    seen: set[str] = set()
    torch.compile(run, backend=graph_backend(seen), fullgraph=True)(*draw(6))
    assert not seen


def test_a_mark_without_shapes_is_refused():
    with pytest.raises(ValueError, match="one of like"):
        graph_op("nameless")


@pytest.mark.gpu
@pytest.mark.parametrize("layer_idx", [0, 3])
def test_a_layer_in_bfloat16_is_compiled_by_default_means(layer_idx):
    layer, inputs = layer_case(layer_idx, 96, dtype=torch.bfloat16)
    forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)
    for num_tokens in (96, 200):
        inputs = layer_inputs(layer, num_tokens)
        leaves = [inputs[0], *layer.parameters()]
        results, grads = gradients(partial(run_layer, layer.forward), inputs, leaves)
        ours, our_grads = gradients(partial(run_layer, forward), inputs, leaves)
        # Ops between the kernels are fused, so that they round less often than in eager code.
        for got, want in zip([*ours, *our_grads], [*results, *grads], strict=True):
            assert error(got, want) < 3e-2
