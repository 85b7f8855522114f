"""Numba kernels on torch's own threads, and the products that they are made of."""

import os
import threading

import numpy as np
import pytest
import torch

from qnext.kernels.cpu_lanes import floats_at, ints_at, offset
from qnext.kernels.cpu_math import exp, silu, softplus
from qnext.kernels.cpu_products import LAYOUTS, PRODUCTS, arrange, dual_objection, products
from qnext.kernels.cpu_team import TeamKernel, TeamPace, meet, share, team_size, thread_idx
from qnext.kernels.int8_rows import quantize_rows

ROUNDS = 300


@TeamKernel
def _pass_on(t):
    """Each round a number is what its right neighbour was a round ago. t: counter, n, two rows"""
    team = ints_at(t[0])
    start, end = share(t[1], 1)
    for turn in range(ROUNDS):
        source, target = ints_at(t[2 + turn % 2]), ints_at(t[3 - turn % 2])
        for i in range(start, end):
            target[i] = source[(i + 1) % t[1]] + 1
        meet(team)


def pass_on(num_threads, n=7):
    counter = np.zeros(8, dtype=np.int64)
    rows = np.arange(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    table = np.array([counter.ctypes.data, n, *(row.ctypes.data for row in rows)], dtype=np.int64)
    _pass_on(table, num_threads)
    return rows[ROUNDS % 2]


def expected_rows(n=7):
    return (np.arange(n) + ROUNDS) % n + ROUNDS


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_nobody_goes_on_before_all_have_met(num_threads):
    for _ in range(10):
        np.testing.assert_array_equal(pass_on(num_threads), expected_rows())


def test_teams_of_two_python_threads_do_not_disturb_each_other_nor_torch():
    torch.set_num_threads(2)
    matrix = torch.randn(200, 200)
    product = matrix @ matrix
    faults = []

    def work():
        try:
            for _ in range(15):
                np.testing.assert_array_equal(pass_on(2), expected_rows())
                torch.testing.assert_close(matrix @ matrix, product)
        except AssertionError as fault:
            faults.append(fault)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not faults


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_process_runs_alone_instead_of_waiting_for_threads_it_does_not_have():
    pass_on(2)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(pass_on(2), expected_rows()) else 1)
    assert os.waitpid(child, 0)[1] == 0


@TeamKernel
def _who(t):
    """t: size of the team, then a mark for each thread"""
    t[0] = team_size()
    t[1 + thread_idx()] += 1


def test_every_thread_runs_once():
    for num_threads in (1, 2, 3):
        table = np.zeros(8, dtype=np.int64)
        _who(table, num_threads)
        size = int(table[0])
        assert 1 <= size <= num_threads
        assert table[1:].tolist() == [1] * size + [0] * (7 - size)


def test_pace_leaves_a_team_that_is_slow_and_comes_back_when_it_is_not():
    pace = TeamPace()
    seconds = {2: 1.0, 1: 2.0}

    def run(count):
        chosen = []
        for _ in range(count):
            chosen.append(pace.choose(3, 2))
            pace.record(3, chosen[-1], seconds[chosen[-1]])
        return chosen

    chosen = run(200)
    assert 0 < chosen.count(1) < 20, "alone is tried, and not taken"
    seconds[2] = 50.0
    assert run(20)[-10:] == [1] * 10
    seconds[2] = 1.0
    assert run(8000)[-1000:].count(2) > 900
    assert pace.choose(3, 1) == 1


KINDS = [
    "float32",
    "bfloat16",
    "int8",
    pytest.param(
        "bfloat16 dual",
        marks=pytest.mark.skipif(dual_objection() is not None, reason="no AVX512-BF16 here"),
    ),
]


def held(weight, kind):
    """A weight as a kernel takes it, and what it stands for."""
    if kind.startswith("bfloat16"):
        weight = weight.bfloat16()
        return weight, weight.double()
    if kind == "int8":
        weight, _ = quantize_rows(weight)
        return weight, weight.double()
    return weight, weight.double()


@TeamKernel
def _arrange(t):
    """t: x, rows, columns, layout, out"""
    for i in range(t[1]):
        source, target = offset(floats_at(t[0]), i * t[2]), offset(floats_at(t[4]), i * t[2])
        arrange(source, t[2], t[3], target)


def arranged(x, kind):
    """Rows as a kind of weight takes them."""
    out = torch.full_like(x, torch.nan)
    table = np.array([x.data_ptr(), *x.shape, LAYOUTS[kind], out.data_ptr()], dtype=np.int64)
    _arrange(table, 1)
    return out


def test_rows_are_rounded_to_bfloat16_as_torch_rounds_them():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000) * 10.0**e for e in (-30, -3, 0, 5, 30)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])[None]
    found = arranged(x, "bfloat16 dual").view(torch.bfloat16)[:, : x.shape[1]]
    assert torch.equal(found.nan_to_num(7), x.bfloat16().nan_to_num(7))


@TeamKernel
def _multiply(t):
    """t: function, weight, outputs, columns, x, which rows, where to, rows, out, x's stride"""
    start, end = share(t[2], 8)
    products(
        t[0], t[1], t[3], start, end, t[1], floats_at(t[4]), t[9], ints_at(t[5]), t[3],
        floats_at(t[8]), t[2], ints_at(t[6]), t[7],
    )  # fmt: skip


def multiply(weight, kind, x, order, num_threads=1):
    """Rows `order` of x times the weight, into rows of the same number."""
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan)
    rows = np.array(order, dtype=np.int64)
    table = np.array(
        [
            PRODUCTS[kind].address,
            weight.data_ptr(),
            *weight.shape,
            x.data_ptr(),
            rows.ctypes.data,
            rows.ctypes.data,
            len(order),
            out.data_ptr(),
            x.stride(0),
        ],
        dtype=np.int64,
    )
    _multiply(table, num_threads)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 32), (13, 37), (24, 64), (9, 31), (40, 100)])
def test_products_are_exact_to_rounding_and_the_same_bits_in_any_company(kind, shape):
    torch.manual_seed(sum(shape))
    weight, exact = held(torch.randn(shape), kind)
    x = torch.randn(9, shape[1])
    rows = arranged(x, kind)
    together = multiply(weight, kind, rows, list(range(9)))
    taken = x.bfloat16() if kind == "bfloat16 dual" else x
    expected = taken.double() @ exact.t()
    assert (together - expected).norm() <= 1e-6 * expected.norm()
    for order in ([4], [8, 1], [2, 0, 7], [5, 3, 6, 1, 0]):
        for num_threads in (1, 2):
            found = multiply(weight, kind, rows, order, num_threads)
            assert torch.equal(found[order], together[order])
            rest = [row for row in range(9) if row not in order]
            assert found[rest].isnan().all(), "no other row is written"


@TeamKernel
def _functions(t):
    """t: x, how many, room for three functions of it"""
    x, out = floats_at(t[0]), floats_at(t[2])
    for i in range(t[1]):
        out[i] = exp(x[i])
    for i in range(t[1]):
        out[t[1] + i] = silu(x[i])
    for i in range(t[1]):
        out[2 * t[1] + i] = softplus(x[i])


def test_elementary_functions_are_within_rounding_and_do_not_overflow():
    x = np.concatenate(
        [np.linspace(-86, 87, 20001), np.linspace(-1, 1, 5001), [0.0, -1e-9, 88.0]]
    ).astype(np.float32)
    out = np.empty((3, x.size), dtype=np.float32)
    table = np.array([x.ctypes.data, x.size, out.ctypes.data], dtype=np.int64)
    _functions(table, 1)
    wide = x.astype(np.float64)
    expected = np.exp(wide), wide / (1 + np.exp(-wide)), np.logaddexp(0, wide)
    for ours, theirs in zip(out, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=5e-7, atol=1e-37)
    far = np.array([-1e30, -200.0, 1000.0, 1e30], dtype=np.float32)
    table = np.array([far.ctypes.data, 4, out.ctypes.data], dtype=np.int64)
    _functions(table, 1)
    results = out.reshape(-1)[:4]
    assert np.isfinite(results).all()
    assert (results[:2] < 1e-37).all()
