"""Measurements of ops: what is wrong is refused before anything is timed."""

from dataclasses import replace

import pytest
import torch

# Before Triton: it turns the interpreter on where there is no GPU.
from tests.kernels.triton_env import DEVICE, HALF, IS_INTERPRETED

pytest.importorskip("triton")

from benchmarks.ops import adamw, elementwise, experts, rows_cases, rows_checks
from benchmarks.ops.checks import largest_error, relative_error, require_right
from benchmarks.ops.rows_checks import check_mixture, check_product
from benchmarks.ops.timing import kernel_times
from benchmarks.ops.tune_experts import compared, fastest
from qnext.config.presets import preset
from qnext.kernels.experts.torch import experts_torch

NUM_WORKS = 9


@pytest.fixture
def on_this_device(monkeypatch):
    monkeypatch.setattr(elementwise, "DEVICE", DEVICE)
    monkeypatch.setattr(adamw, "DEVICE", DEVICE)
    monkeypatch.setattr(rows_cases, "DEVICE", DEVICE)
    if IS_INTERPRETED:
        # The interpreter cuts fp32 off where a GPU rounds it to bf16.
        monkeypatch.setattr(adamw, "HALF_LIMIT", 3e-2)


def test_an_error_is_relative_and_nan_is_the_largest():
    ones = torch.ones(4)
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(ones.bfloat16(), ones) == 0
    assert largest_error([ones, ones * 2], [ones, ones]) == pytest.approx(1)
    assert not largest_error([ones, ones * float("nan")], [ones, ones]) < 1e9
    with pytest.raises(ValueError, match="shape"):
        relative_error(ones[:3], ones)
    require_right("same", ones, ones, 1e-9)
    for wrong in (ones * 1.1, ones * float("nan")):
        with pytest.raises(ValueError, match="name: error"):
            require_right("name", wrong, ones, 0.05)


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("place", range(NUM_WORKS))
def test_each_elementwise_op_passes_its_own_check_and_a_wrong_one_does_not(place):
    works = elementwise.all_work(3)
    assert len(works) == NUM_WORKS
    work = works[place]()
    elementwise.check(work)

    def wrong(*inputs, **options):
        out = work.reference(*inputs, **options)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    with pytest.raises(ValueError, match=f"{work.name}: error"):
        elementwise.check(replace(work, function=wrong))


def test_elementwise_measures_the_flagship():
    config = preset("next-80b-a3b")
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (16, 32)
    assert config.hidden_size == elementwise.HIDDEN
    assert config.num_experts == elementwise.EXPERTS == adamw.SHAPE[0]
    assert config.num_experts_per_tok == elementwise.ACTIVE
    assert (2 * config.moe_intermediate_size, config.hidden_size) == adamw.SHAPE[1:]


@pytest.mark.usefixtures("on_this_device")
@pytest.mark.parametrize("kind", adamw.KINDS)
def test_adamw_passes_its_check_and_a_wrong_step_does_not(kind, monkeypatch):
    adamw.check(kind)
    right = adamw.adamw_triton

    def with_twice_the_gradient(param, grad, moments, rates, rule, salt):
        right(param, grad * 2, moments, rates, rule, salt)

    monkeypatch.setattr(adamw, "adamw_triton", with_twice_the_gradient)
    with pytest.raises(ValueError, match=kind):
        adamw.check(kind)


def test_adamw_counts_ten_bytes_with_narrow_moments_and_fourteen_with_half_ones():
    param = torch.zeros(256, dtype=torch.bfloat16)
    found = [adamw.num_bytes(param, adamw.Moments.zeros(param, kind)) for kind in adamw.KINDS]
    assert found == [256 * 10 + 16, 256 * 14]


@pytest.mark.parametrize("trains", [False, True])
def test_wrong_experts_are_refused(trains, monkeypatch):
    shape = experts.Shape(8, 2, 32, 64)
    inputs = experts.draw_inputs(40, shape, experts.draw_weights(shape, DEVICE))
    monkeypatch.setattr(experts, "BACKENDS", {"torch": experts_torch})
    experts.check(inputs, trains)
    monkeypatch.setattr(experts, "BACKENDS", {"torch": lambda *x: experts_torch(*x) * 1.02})
    with pytest.raises(ValueError, match="torch, 40 tokens"):
        experts.check(inputs, trains)


def test_each_way_of_a_product_is_checked():
    weight = torch.randn(8, 4)
    calls = rows_cases.ProductCalls([(weight,)], lambda w, by=1.0: w * by, lambda w: w, 0)
    check_product("name", calls, {"ours": {}})
    with pytest.raises(ValueError, match="name, doubled"):
        check_product("name", calls, {"ours": {}, "doubled": {"by": 2.0}})


@pytest.fixture
def small_mixture(on_this_device, monkeypatch):
    for name, size in {"C": 64, "E": 12, "I": 32, "A": 3}.items():
        for module in (rows_cases, rows_checks):
            monkeypatch.setattr(module, name, size, raising=False)
    monkeypatch.setattr(rows_cases, "BF16", HALF)
    monkeypatch.setattr(rows_cases, "num_copies", lambda num_bytes, least=4: 2)
    # `random` took the dtype at its definition.
    monkeypatch.setattr(rows_cases.random, "__kwdefaults__", {"dtype": HALF, "scale": 1.0})
    return rows_cases.Mixture()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_mixture_passes_its_check_and_a_wrong_part_of_it_does_not(
    small_mixture, num_rows, monkeypatch
):
    ways = {"one launch": {}, "two": {"fuses": False}}
    check_mixture(small_mixture, num_rows, ways)
    right = small_mixture.mix
    monkeypatch.setattr(small_mixture, "mix", lambda x, *rest, **how: right(x, *rest, **how) * 1.1)
    with pytest.raises(ValueError, match="experts"):
        check_mixture(small_mixture, num_rows, ways)
    route = small_mixture.route

    def to_others(*rest, **how):
        normed, weights, ids, shared = route(*rest, **how)
        return normed, weights, (ids + 1) % 12, shared

    monkeypatch.setattr(small_mixture, "route", to_others)
    with pytest.raises(ValueError, match="router .* logits"):
        check_mixture(small_mixture, num_rows, ways)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_product_passes_its_check(small_mixture, num_rows, is_fp8, monkeypatch):
    products = {"in_proj": (48, 64, True, False), "out_proj": (64, 128, False, True)}
    monkeypatch.setattr(rows_cases, "PRODUCTS", products)
    for name in products:
        calls = rows_cases.product_calls(name, num_rows, is_fp8=is_fp8)
        check_product(name, calls, {"ours": {}, "as dots": {"use_dot": True}})


def test_a_tuner_leaves_out_tiles_with_another_result(monkeypatch, capsys):
    monkeypatch.setattr(
        "benchmarks.ops.tune_experts.time_us", lambda run, *_: (run()[0, 0].item(),)
    )
    ones = torch.ones(2, 2)
    results = {1: ones, 2: ones * 0.999, 3: ones * 0.5}
    assert fastest(results.__getitem__, [1, 2, 3], 1, 1, False)[1] == 2
    assert "not timed: 3" in capsys.readouterr().out
    parts = compared((ones, ones, torch.ones(3, 4)))
    assert parts[2].tolist() == [4, 4, 4]


def test_a_profile_names_what_takes_the_time():
    x = torch.randn(500, 500, device=DEVICE)
    (name, launches, spent), *others = kernel_times(lambda: (x @ x).sum(), num_runs=4)
    assert launches == 1
    assert spent > 0
    assert [each[2] for each in others] == sorted((each[2] for each in others), reverse=True)
    assert any("sum" in key or "reduce" in key for key, _, _ in [(name, 0, 0), *others])
