"""Grouped experts in Triton against the reference: outputs, all gradients, and odd routings."""

from dataclasses import replace

import pytest
import torch

from qnext.kernels.experts.reference import experts_reference
from qnext.kernels.experts.reference_fp8 import experts_fp8_reference
from qnext.kernels.fp8_blocks import quantize_blocks
from tests.kernels.triton_env import DEVICE, HALF, IS_INTERPRETED, error, poisoned

pytest.importorskip("triton")

from qnext.kernels.experts import triton_config, triton_fwd, triton_products, triton_sort
from qnext.kernels.experts.triton_config import ExpertsConfig, Tile, WeightTile
from qnext.kernels.experts.triton_fp8 import (
    experts_fp8_supports,
    experts_fp8_triton,
    quantize_rows,
)
from qnext.kernels.experts.triton_fwd import experts_shared_triton, experts_triton, supports
from qnext.kernels.experts.triton_products import HAS_GLUON
from qnext.kernels.experts.triton_sort import PairTable, max_tiles, sort_pairs

# Tiny tiles of half precision, so that small shapes have several of everything.
SMALL = ExpertsConfig(16, *(Tile(16, 16, 1, 2),) * 4, weight_grad=WeightTile(16, 32, 16, 1, 2))
PERSISTENT = replace(
    triton_config.HALF_CONFIGS[128], up=Tile(128, 64, 8, 4, True), down=Tile(256, 64, 8, 3, True)
)
HALF_LIMIT = 4e-3 if HALF == torch.float16 else 1e-2
ROUTINGS = ("random", "one expert", "few experts", "crowded")


def draw_ids(num_tokens: int, num_active: int, num_experts: int, routing: str) -> torch.Tensor:
    """Ids [T, A] without repeats within a token, except where one expert takes all."""
    if routing == "one expert":
        return torch.full((num_tokens, num_active), num_experts - 1)
    if routing == "few experts":
        return torch.arange(num_active).repeat(num_tokens, 1) * (num_experts // num_active)
    scores = torch.randn(num_tokens, num_experts)
    if routing == "crowded":
        scores[:, 0] += 100
    return scores.topk(num_active, dim=-1).indices


def draw(
    num_tokens: int,
    size: int,
    width: int,
    num_experts: int,
    num_active: int,
    dtype: torch.dtype,
    routing: str = "random",
    weight_dtype: torch.dtype | None = None,
):
    """Inputs of the op, with gradients."""
    shapes = (
        ((num_tokens, size), 1.0, dtype),
        ((num_experts, 2 * width, size), size**-0.5, weight_dtype or dtype),
        ((num_experts, size, width), width**-0.5, weight_dtype or dtype),
    )
    x, gate_up, down = (
        (torch.randn(shape, device=DEVICE) * scale).to(kind).requires_grad_()
        for shape, scale, kind in shapes
    )
    top_weights = torch.rand(num_tokens, num_active, device=DEVICE).requires_grad_()
    ids = draw_ids(num_tokens, num_active, num_experts, routing).to(DEVICE)
    return x, gate_up, down, top_weights, ids


def compare(inputs, limit: float, **options) -> None:
    """Output and all gradients are near those of the reference in float64."""
    assert supports(*inputs) is None
    wide = [t.detach().double().cpu().requires_grad_() for t in inputs[:4]]
    expected = experts_reference(*wide, inputs[4].cpu())
    out = experts_triton(*inputs, **options)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs[:4], grad)
    wanted = torch.autograd.grad(expected, wide, grad.double().cpu())
    assert out.dtype == inputs[0].dtype
    assert error(out, expected) < limit
    for ours, want, tensor in zip(grads, wanted, inputs[:4], strict=True):
        assert ours.dtype == tensor.dtype
        assert error(ours, want) < limit


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every fresh tensor of the op holds NaN, or integers that point far outside."""

    def spoil(fresh: torch.Tensor) -> torch.Tensor:
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 2**30)

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: spoil(new_empty(*a, **k)))


@pytest.mark.parametrize("one_launch_pairs, num_spans", [(0, 2), (0, 640), (4096, 640)])
@pytest.mark.parametrize(
    "num_tokens, num_active, num_experts, block_m",
    [(1, 1, 1, 16), (1, 10, 512, 16), (7, 3, 5, 16), (300, 4, 33, 32), (300, 3, 3, 64)],
)
def test_pairs_are_grouped_by_expert_in_ascending_order(
    num_tokens, num_active, num_experts, block_m, one_launch_pairs, num_spans, monkeypatch
):
    monkeypatch.setattr(triton_sort, "ONE_LAUNCH_PAIRS", one_launch_pairs)
    monkeypatch.setattr(triton_sort, "NUM_SPANS", num_spans)
    monkeypatch.setattr(triton_sort, "BLOCK_PAIRS", 32)
    monkeypatch.setattr(triton_sort, "SUMMED_SPANS", 16)
    ids = draw_ids(num_tokens, num_active, num_experts, "crowded").to(DEVICE)
    table = PairTable(*(t.cpu() for t in sort_pairs(ids, num_experts, block_m)))
    flat = ids.flatten().cpu()
    order = flat.argsort(stable=True)
    assert table.order.tolist() == order.tolist()
    assert table.inverse[order].tolist() == list(range(flat.numel()))
    ends = flat.bincount(minlength=num_experts).cumsum(0).tolist()
    starts = [0, *ends]
    assert table.starts.tolist() == starts
    expected = [
        [expert, first, min(first + block_m, ends[expert])]
        for expert in range(num_experts)
        for first in range(starts[expert], ends[expert], block_m)
    ]
    reached = table.tiles[: max_tiles(flat.numel(), num_experts, block_m)].tolist()
    assert reached[: len(expected)] == expected
    assert all(first >= last for _, first, last in reached[len(expected) :])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 400, 1024, 32768])
@pytest.mark.parametrize("routing", ["random", "crowded", "one expert"])
def test_many_pairs_are_sorted_as_a_stable_sort_does(num_tokens, routing):
    ids = draw_ids(num_tokens, 10, 512, routing).to(DEVICE)
    table = sort_pairs(ids, 512, 128)
    order = ids.flatten().argsort(stable=True).int()
    assert torch.equal(table.order, order)
    assert torch.equal(table.inverse[order.long()], torch.arange(order.numel(), device=DEVICE))
    assert torch.equal(table.starts[1:], ids.flatten().bincount(minlength=512).cumsum(0))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_tokens, size, width", [(1, 32, 16), (19, 40, 24), (37, 33, 9)])
def test_output_and_gradients_equal_the_reference(
    num_tokens, size, width, routing, poisoned_memory
):
    compare(draw(num_tokens, size, width, 6, 3, torch.float32, routing), 2e-6)


@pytest.mark.parametrize("num_tokens, size, width", [(23, 64, 32), (9, 40, 24)])
def test_half_precision_stays_near_the_reference(
    num_tokens, size, width, poisoned_memory, monkeypatch
):
    # The first shape is whole blocks, which the copy engine loads; the second is not.
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: SMALL)
    compare(draw(num_tokens, size, width, 5, 2, HALF, "crowded"), HALF_LIMIT)


def test_the_epilogue_in_halves_equals_the_whole(monkeypatch):
    config = ExpertsConfig(32, *(Tile(64, 16, 1, 2),) * 4, weight_grad=WeightTile(16, 16, 16, 1, 2))
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: config)
    compare(draw(20, 48, 72, 3, 2, torch.float16), 4e-3)


def test_fp32_masters_serve_half_rows_and_get_fp32_gradients(monkeypatch):
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: SMALL)
    compare(draw(11, 32, 16, 4, 2, HALF, weight_dtype=torch.float32), HALF_LIMIT)


def embedded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN in memory before and after them."""
    room = poisoned(tensor.shape[0] + 2, *tensor.shape[1:], dtype=tensor.dtype)
    room[1:-1] = tensor.detach()
    return room[1:-1].requires_grad_()


def test_what_lies_beside_the_inputs_in_memory_does_not_matter():
    x, gate_up, down, top_weights, ids = draw(19, 40, 24, 4, 2, torch.float32)
    x, gate_up, down = (embedded(tensor) for tensor in (x, gate_up, down))
    compare((x, gate_up, down, top_weights, ids), 2e-6)


def test_a_single_expert_per_token_works():
    compare(draw(13, 24, 20, 4, 1, torch.float32), 2e-6)


def test_experts_without_tokens_have_zero_gradients():
    inputs = draw(5, 24, 16, 8, 2, torch.float32, "few experts")
    out = experts_triton(*inputs)
    gate_up_grad, down_grad = torch.autograd.grad(out.square().sum(), inputs[1:3])
    idle = torch.tensor([e for e in range(8) if e not in (0, 4)], device=DEVICE)
    assert gate_up_grad[idle].abs().max() == down_grad[idle].abs().max() == 0
    assert gate_up_grad[0].abs().max() > 0


def test_no_tokens_give_no_rows():
    inputs = draw(0, 16, 16, 4, 2, torch.float32, "one expert")
    out = experts_triton(*inputs)
    assert out.shape == (0, 16)
    assert torch.autograd.grad(out.sum(), inputs[1])[0].abs().max() == 0


def test_only_the_wanted_gradients_are_made():
    x, gate_up, down, top_weights, ids = draw(6, 16, 16, 4, 2, torch.float32)
    out = experts_triton(x, gate_up.detach(), down.detach(), top_weights.detach(), ids)
    expected = experts_reference(x, gate_up, down, top_weights, ids)
    ours, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    assert error(ours, want) < 2e-6


def test_a_strided_input_gives_the_same_as_a_copy():
    x, gate_up, down, top_weights, ids = draw(6, 16, 16, 4, 2, torch.float32)
    wide = torch.cat([x, x], 1)[:, :16]
    ours = experts_triton(wide, gate_up, down, top_weights.t().contiguous().t(), ids)
    assert torch.equal(ours, experts_triton(x, gate_up, down, top_weights, ids))


def test_the_same_call_gives_the_same_bits_and_rows_keep_theirs_in_company():
    x, gate_up, down, top_weights, ids = draw(40, 32, 16, 4, 2, torch.float32)
    together = experts_triton(x, gate_up, down, top_weights, ids, row_stable=True)
    assert torch.equal(together, experts_triton(x, gate_up, down, top_weights, ids, True))
    for row in (0, 17, 39):
        part = slice(row, row + 1)
        alone = experts_triton(x[part], gate_up, down, top_weights[part], ids[part], True)
        assert torch.equal(alone, together[part])


def test_the_shared_expert_is_added_behind_its_gate(poisoned_memory):
    inputs = draw(9, 40, 24, 5, 2, torch.float32)
    shared = torch.randn(9, 40, device=DEVICE, requires_grad=True)
    gate = torch.randn(9, 1, device=DEVICE, requires_grad=True)
    leaves = (*inputs[:4], shared, gate)
    out = experts_shared_triton(*inputs, shared, gate)
    expected = experts_reference(*inputs) + torch.sigmoid(gate) * shared
    assert error(out, expected) < 2e-6
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for ours, want in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        assert error(ours, want) < 2e-6
    with pytest.raises(ValueError, match="come together"):
        experts_shared_triton(*inputs, shared, None)


def test_the_op_keeps_the_rules_of_registered_ops():
    inputs = draw(6, 16, 16, 4, 2, torch.float32)
    torch.library.opcheck(
        torch.ops.qnext.experts_grouped,
        (*inputs, None, None, True, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_supports_names_what_is_wrong():
    x, gate_up, down, top_weights, ids = draw(2, 16, 16, 4, 2, torch.float32)
    assert "float64" in supports(x.double(), gate_up, down, top_weights, ids)
    assert "int8" in supports(x, gate_up.to(torch.int8), down, top_weights, ids)
    assert "int64" in supports(x, gate_up, down, top_weights, ids.int())


def test_a_configuration_survives_the_table_and_the_rule_holds_an_experts_rows_in_one_tile():
    for config in (*triton_config.HALF_CONFIGS.values(), PERSISTENT):
        assert triton_config.from_data(triton_config.to_data(config)) == config
    sizes = [
        triton_config.default_config(tokens, 10, 512, True).block_m
        for tokens in (16, 256, 1024, 2048, 4096, 32768)
    ]
    assert sizes == [16, 16, 32, 64, 128, 128]
    key = triton_config.table_key("NVIDIA H100 80GB HBM3", 512, 512, 2048, torch.bfloat16)
    assert key == "H100 E512 I512 C2048 bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 17, 64, 1000, 1024, 3000, 4096])
def test_bfloat16_at_the_flagship_shape(num_tokens):
    inputs = draw(num_tokens, 2048, 512, 512, 10, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in inputs[:4]]
    expected = experts_reference(*wide, inputs[4])
    out = experts_triton(*inputs)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, wide, grad.float())
    grads = torch.autograd.grad(out, inputs[:4], grad)
    for ours, want in zip((out, *grads), (expected, *wanted), strict=True):
        # Here and not by `error`, which would move gigabytes to the host.
        assert (ours.float() - want).norm() < 1e-2 * want.norm()
    again = experts_triton(*inputs)
    assert torch.equal(out, again)
    for ours, other in zip(grads, torch.autograd.grad(again, inputs[:4], grad), strict=True):
        assert torch.equal(ours, other)


@pytest.fixture
def persistent_calls(monkeypatch):
    """Names of the persistent products, as they are called."""
    if not HAS_GLUON or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("persistent products are Hopper's")
    calls = []
    for name in ("multiply_up", "multiply_rows"):
        product = getattr(triton_products.gluon_products, name)

        def call(*args, name=name, product=product):
            calls.append(name)
            return product(*args)

        monkeypatch.setattr(triton_products.gluon_products, name, call)
    return calls


@pytest.mark.gpu
@pytest.mark.parametrize("num_stages", [3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens, routing", [(1, "random"), *((777, r) for r in ROUTINGS)])
def test_persistent_products_equal_the_reference(
    num_tokens, routing, dtype, num_stages, poisoned_memory, persistent_calls, monkeypatch
):
    config = replace(
        PERSISTENT,
        up=replace(PERSISTENT.up, num_stages=num_stages),
        down=replace(PERSISTENT.down, num_stages=num_stages),
    )
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: config)
    inputs = draw(num_tokens, 512, 256, 24, 5, dtype, routing)
    compare(inputs, 1e-2)
    with torch.no_grad():  # gate and up are not saved
        wide = [tensor.double() for tensor in inputs[:4]]
        assert error(experts_triton(*inputs), experts_reference(*wide, inputs[4])) < 1e-2
    assert persistent_calls == ["multiply_up", "multiply_rows"] * 2


@pytest.mark.gpu
def test_persistent_products_at_the_flagship_shape_equal_those_of_short_programs(
    persistent_calls, monkeypatch
):
    inputs = [t.detach() for t in draw(4096, 2048, 512, 512, 10, torch.bfloat16, "crowded")]
    plain = triton_config.HALF_CONFIGS[128]
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: plain)
    expected = experts_triton(*inputs)
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: PERSISTENT)
    ours = experts_triton(*inputs)
    assert (ours.float() - expected.float()).norm() < 4e-3 * expected.float().norm()
    for _ in range(5):
        assert torch.equal(ours, experts_triton(*inputs))


@pytest.mark.gpu
def test_a_persistent_tile_of_other_sizes_runs_as_a_short_program(persistent_calls, monkeypatch):
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: PERSISTENT)
    compare(draw(300, 200, 72, 8, 2, torch.bfloat16), 1e-2)
    assert not persistent_calls


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_on_a_gpu(dtype):
    compare(draw(333, 512, 256, 32, 4, dtype), 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
def test_odd_sizes_and_routings_on_a_gpu(routing):
    compare(draw(777, 200, 72, 24, 5, torch.bfloat16, routing), 1e-2)


@pytest.mark.gpu
def test_rows_keep_their_bits_in_any_company_on_a_gpu():
    x, gate_up, down, top_weights, ids = draw(600, 512, 256, 64, 4, torch.bfloat16, "crowded")
    together = experts_triton(x, gate_up, down, top_weights, ids, row_stable=True)
    for num_rows in (1, 5, 64, 333):
        alone = experts_triton(
            x[:num_rows], gate_up, down, top_weights[:num_rows], ids[:num_rows], row_stable=True
        )
        assert torch.equal(alone, together[:num_rows])


@pytest.mark.gpu
def test_a_captured_call_follows_new_routings():
    x, gate_up, down, top_weights, ids = (
        t.detach() for t in draw(256, 256, 128, 32, 4, torch.bfloat16)
    )
    experts_triton(x, gate_up, down, top_weights, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts_triton(x, gate_up, down, top_weights, ids)
    for routing in ROUTINGS:
        ids.copy_(draw_ids(256, 4, 32, routing))
        x.normal_()
        graph.replay()
        assert torch.equal(out, experts_triton(x, gate_up, down, top_weights, ids))


@pytest.mark.gpu
def test_a_compiled_graph_goes_around_the_op():
    inputs = draw(100, 256, 128, 16, 4, torch.bfloat16)
    compiled = torch.compile(lambda *args: experts_triton(*args).float().square().sum())
    plain = experts_triton(*inputs).float().square().sum()
    ours = torch.autograd.grad(compiled(*inputs), inputs[:4])
    for got, want in zip(ours, torch.autograd.grad(plain, inputs[:4]), strict=True):
        assert error(got, want) < 1e-2


@pytest.mark.parametrize("num_rows", [30, 64, 100, 200])
def test_the_last_half_tile_of_an_expert_equals_the_whole(num_rows, monkeypatch):
    """Tiles of 128 rows take half of the rows at a time where no more are left."""
    config = ExpertsConfig(
        128, *(Tile(16, 16, 4, 2),) * 4, weight_grad=WeightTile(16, 16, 16, 1, 2)
    )
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: config)
    for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 4e-3)):
        compare(draw(num_rows, 32, 16, 2, 1, dtype, "one expert"), limit)


def draw_fp8(num_tokens: int, size: int, width: int, num_experts: int, num_active: int):
    """Inputs of the 8-bit op; scales of neighbouring blocks differ by a factor of up to 8."""
    x, gate_up, down, top_weights, ids = draw(
        num_tokens, size, width, num_experts, num_active, HALF
    )
    quantized = []
    for weight in (gate_up, down):
        rows, scale = quantize_blocks(weight.detach())
        quantized += [rows, scale * 2 ** torch.randint(-2, 2, scale.shape, device=DEVICE)]
    return x.detach(), *quantized, top_weights.detach(), ids


# The interpreter's conversion to 8 bits loses the carry where rounding reaches a power of two.
FP8_LIMIT = 0.12 if IS_INTERPRETED else 0.06


def test_rows_in_8_bits_keep_three_binary_digits(poisoned_memory):
    sizes = torch.tensor([1e-3, 1, 1e3, 1, 0], device=DEVICE)
    x = torch.randn(5, 256, device=DEVICE) * sizes[:, None]
    rows, scale = quantize_rows(x)
    back = rows.float() * scale.repeat_interleave(128, 1)
    assert error(back, x) < FP8_LIMIT / 2
    assert back[4].abs().max() == 0
    if not IS_INTERPRETED:
        finest = scale.repeat_interleave(128, 1) * 2**-10  # half a step of the smallest numbers
        assert ((back - x).abs() <= torch.maximum(x.abs() / 16, finest) * 1.001).all()


def test_8_bit_weights_stay_near_their_reference(poisoned_memory):
    inputs = draw_fp8(9, 256, 256, 3, 2)
    assert experts_fp8_supports(*inputs) is None
    assert error(experts_fp8_triton(*inputs), experts_fp8_reference(*inputs)) < FP8_LIMIT


@pytest.mark.parametrize("num_tokens, block_m", [(600, None), (70, 128)])
def test_8_bit_weights_in_tall_tiles(num_tokens, block_m, poisoned_memory):
    inputs = draw_fp8(num_tokens, 256, 128, 2, 1)
    ours = experts_fp8_triton(*inputs, block_m=block_m)
    assert error(ours, experts_fp8_reference(*inputs)) < FP8_LIMIT


def test_8_bit_weights_in_whole_blocks_only():
    inputs = draw_fp8(2, 256, 128, 4, 2)
    assert "128" in experts_fp8_supports(inputs[0][:, :100], *inputs[1:])
    assert "fp32" in experts_fp8_supports(*inputs[:2], inputs[2].half(), *inputs[3:])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 1000, 4096])
def test_8_bit_weights_at_the_flagship_shape(num_tokens):
    inputs = draw_fp8(num_tokens, 2048, 512, 512, 10)
    out = experts_fp8_triton(*inputs)
    assert error(out, experts_fp8_reference(*inputs)) < FP8_LIMIT
    assert torch.equal(out, experts_fp8_triton(*inputs))
