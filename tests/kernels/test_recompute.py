"""Cheap ops computed again in the backward pass: same gradients, less kept."""

import pytest
import torch

from qnext.kernels import dispatch, recompute
from qnext.kernels.recompute import Note, recompute_cheap_ops


def layer(x, weights):
    """Norm, product, gate, product: what a model does between its mixers."""
    normed = dispatch.rms_norm(x, weights[0], 1e-6)
    fused = dispatch.linear(normed, weights[1])
    gated = dispatch.silu_mul(fused)
    mixed = dispatch.linear(gated.flatten(1), weights[2])
    normed, x = dispatch.add_rms_norm(mixed, x, weights[3], 1e-6)
    return x + dispatch.linear(normed, weights[4])


def drawn():
    torch.manual_seed(0)
    shapes = ((32,), (64, 32), (32, 32), (32,), (32, 32))
    return torch.randn(20, 32, requires_grad=True), [
        torch.randn(shape, requires_grad=True) for shape in shapes
    ]


def counting(monkeypatch, name):
    runs = []
    op = dispatch.OPS[name]
    reference = op.reference

    def counted(*args, **kwargs):
        runs.append(torch.is_grad_enabled())
        return reference(*args, **kwargs)

    monkeypatch.setattr(op, "reference", counted)
    return runs


def test_gradients_are_the_same_to_the_last_bit():
    results = []
    for is_cheap in (False, True):
        x, weights = drawn()
        with dispatch.use_backend("reference"):
            if is_cheap:
                with recompute_cheap_ops():
                    out = layer(layer(x, weights), weights)
            else:
                out = layer(layer(x, weights), weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *weights])])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_each_is_computed_once_more_and_products_are_not(monkeypatch):
    runs = {name: counting(monkeypatch, name) for name in ("rms_norm", "silu_mul", "linear")}
    x, weights = drawn()
    with dispatch.use_backend("reference"), recompute_cheap_ops():
        out = layer(x, weights)
    assert not recompute.is_active()
    out.sum().backward()
    assert runs == {"rms_norm": [True, False], "silu_mul": [True, False], "linear": [True] * 3}


def test_results_are_let_go_and_what_they_come_from_is_kept(monkeypatch):
    x, weights = drawn()
    with dispatch.use_backend("reference"), recompute_cheap_ops() as recorder:
        gated = dispatch.silu_mul(x)
        view = gated.view(10, 32)
        note = recorder.pack(view.detach())
        assert isinstance(note, Note)
        assert recorder.pack(x.detach()) is not None
        assert isinstance(recorder.pack(x.detach()), torch.Tensor)
        expected = view.clone()
        address = gated.untyped_storage().data_ptr()
        del gated, view
        assert recorder._known[address][0]() is None, "nothing keeps the result"
    assert torch.equal(recompute.read(note), expected)
    assert note.piece.results is None, "the last reader lets it go"


@pytest.mark.parametrize("num_readers", [1, 3])
def test_a_result_is_kept_until_its_last_reader(monkeypatch, num_readers):
    runs = counting(monkeypatch, "silu_mul")
    x, _ = drawn()
    with dispatch.use_backend("reference"), recompute_cheap_ops() as recorder:
        gated = dispatch.silu_mul(x)
        notes = [recorder.pack(gated) for _ in range(num_readers)]
    for note in notes:
        recompute.read(note)
    assert len(runs) == 2


def test_a_view_of_an_input_is_no_result():
    x = torch.randn(4, 2, 16, requires_grad=True)
    with recompute_cheap_ops() as recorder:
        out = recompute.run("silu_mul", lambda tensor: tensor.flatten(1), (x,), {})
        assert recorder.pack(out).shape == out.shape
