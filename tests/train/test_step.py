import pytest
import torch
import torch.nn.functional as F

from qnext.config.train import OptimConfig, RuntimeConfig
from qnext.model.batch import ForwardBatch
from qnext.train.optim import DECAYED_KINDS, parameter_kind
from qnext.train.step import TrainStep, _wrapped_forwards, balance_loss, shifted_targets
from tests.train.tiny import random_micro, tiny_model, tiny_step


class Frozen(Exception):
    """Raised instead of an update, so that a test sees the gradients."""


def gradients_of(train_step, micro_batches, monkeypatch):
    def stop(loss):
        raise Frozen

    monkeypatch.setattr(train_step.optimizer, "step", stop)
    with pytest.raises(Frozen):
        train_step.run(micro_batches)
    return {n: p.grad.clone() for n, p in train_step.model.named_parameters()}


def test_targets_stop_at_document_ends_and_leave_out_masked_tokens():
    batch = ForwardBatch.packed(torch.arange(10, 17), (4, 3))
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1])
    targets = shifted_targets(batch, mask, 2)
    none = -100
    assert targets.tolist() == [
        [11, none, 13, none, 15, 16, none],
        [none, 13, none, none, 16, none, none],
        [13, none, none, none, none, none, none],
    ]


@pytest.mark.parametrize(
    "documents, room", [(1, 1), (2, 8), (8, 8), (9, 64), (400, 512), (513, 1024), (1024, 1024)]
)
def test_bounds_are_filled_up_with_empty_documents_to_one_of_few_sizes(documents, room):
    micro = random_micro(1, (2,) * documents, 2 * documents)
    bounds = micro.batch.cu_seqlens
    assert bounds.shape == (room + 1,)
    assert bounds[: documents + 1].tolist() == list(range(0, 2 * documents + 1, 2))
    assert (bounds[documents:] == 2 * documents).all()


def test_the_loss_and_gradients_are_those_written_out_plainly(monkeypatch):
    model = tiny_model()
    micro = random_micro(1, num_mtp_steps=2)
    settings = {"mtp_weight": 0.3, "mtp_steps": 2, "balance_weight": 0.01, "z_loss": 1e-3}
    train_step = tiny_step(model, **settings)
    grads = gradients_of(train_step, [micro], monkeypatch)
    model.zero_grad(set_to_none=True)

    stats = []
    hidden = model(micro.batch, router_stats=stats)
    drafts = model.mtp_hidden(hidden, micro.batch, 2, router_stats=stats)
    logits = hidden @ model.embed_tokens.t()
    loss = F.cross_entropy(logits, micro.targets[0], ignore_index=-100)
    is_counted = micro.targets[0] >= 0
    loss = loss + 1e-3 * logits.logsumexp(-1)[is_counted].square().mean()
    for draft, targets in zip(drafts, micro.targets[1:], strict=True):
        part = F.cross_entropy(draft @ model.embed_tokens.t(), targets, ignore_index=-100)
        loss = loss + 0.3 / 2 * part
    for layer in stats:
        share = layer.counts / layer.counts.sum()
        loss = loss + 0.01 * 4 * (share * layer.prob_mean).sum()
    assert len(stats) == 4 + 2
    loss.backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(grads[name], param.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("mtp_steps", [1, 2])
def test_accumulation_equals_one_large_batch_balance_loss_included(monkeypatch, mtp_steps):
    mask = (torch.rand(64) < 0.7).to(torch.uint8)
    masks = {"loss_mask": mask, "num_mtp_steps": mtp_steps}
    small = [random_micro(1, **masks), random_micro(2, (30, 2, 31, 1), num_mtp_steps=mtp_steps)]
    from tests.train.tiny import micro_batch, packed

    tokens = torch.cat([micro.batch.token_ids for micro in small])
    large_mask = torch.cat([mask, torch.ones(64, dtype=torch.uint8)])
    large = micro_batch(packed(tokens, (20, 12, 32, 30, 2, 31, 1), 32, large_mask), mtp_steps)
    settings = {"balance_counts": "exact", "balance_weight": 0.1, "mtp_steps": mtp_steps}
    apart = gradients_of(tiny_step(tiny_model(), **settings), small, monkeypatch)
    together = gradients_of(tiny_step(tiny_model(), **settings), [large], monkeypatch)
    for name, grad in together.items():
        torch.testing.assert_close(apart[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_running_counts_differ_from_exact_ones_only_in_the_balance_term(monkeypatch):
    micros = [random_micro(1), random_micro(2)]
    without = {"balance_weight": 0.0}
    runs = [
        gradients_of(tiny_step(tiny_model(), balance_counts=kind, **more), micros, monkeypatch)
        for kind in ("exact", "running")
        for more in (without, {"balance_weight": 1.0})
    ]
    gate = "layers.0.mlp.gate"
    assert torch.equal(runs[0][gate], runs[2][gate])
    assert not torch.allclose(runs[1][gate], runs[3][gate], rtol=1e-3)


def test_balance_is_one_when_even_and_sees_layers_that_collapse_apart():
    even = torch.full((2, 4), 0.25)
    torch.testing.assert_close(balance_loss(even, torch.full((2, 4), 8.0)), torch.ones(2))
    collapsed = torch.eye(4)[:2]
    torch.testing.assert_close(balance_loss(collapsed, collapsed * 8), torch.full((2,), 4.0))


def test_a_batch_with_nan_is_skipped_and_the_next_is_not():
    model = tiny_model(tie_word_embeddings=False)
    bad_token = 63
    with torch.no_grad():
        model.embed_tokens[bad_token] = float("nan")
    train_step = tiny_step(model)
    good, bad = random_micro(1, vocab=60), random_micro(2)
    assert (bad.batch.token_ids == bad_token).any()
    train_step.optimizer.set_lr(1e-2, 1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics = train_step.run([good, bad])
    assert metrics.is_applied == 0
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) or name == "embed_tokens", name
        torch.testing.assert_close(param, before[name], equal_nan=True, rtol=0, atol=0)
    metrics = train_step.run([good])
    assert metrics.is_applied == 1
    assert torch.isfinite(metrics.loss)
    assert not torch.equal(model.lm_head, before["lm_head"])


def test_decay_falls_on_matrices_router_and_zero_centred_norms_only():
    model = tiny_model()
    kinds = {name: parameter_kind(name) for name, _ in model.named_parameters()}
    decayed = {name for name, kind in kinds.items() if kind in DECAYED_KINDS}
    undecayed = {name.removeprefix("layers.0.") for name in kinds if name not in decayed}
    expected = {"embed_tokens"} | {
        f"layers.{idx}.mixer.{leaf}"
        for idx in (0, 1, 2)
        for leaf in ("A_log", "dt_bias", "conv1d", "norm.weight")
    }
    assert {name for name in kinds if name not in decayed} == expected, undecayed
    # With gradients of zero a step moves what is decayed, towards zero, and nothing else.
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    train_step = tiny_step(model, OptimConfig(weight_decay=0.5))
    train_step.optimizer.set_lr(0.1, 0.1)
    train_step.optimizer.step(torch.tensor(1.0))
    for name, param in model.named_parameters():
        value = 0.95 if name in decayed else 1.0
        torch.testing.assert_close(param, torch.full_like(param, value), msg=name)
    assert kinds["layers.0.mlp.gate"] == "router"
    assert kinds["mtp.norm.weight"] == "norm"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_tiny_corpus_is_learnt_by_heart(kind):
    model = tiny_model()
    train_step = tiny_step(model, OptimConfig(kind=kind, weight_decay=0.0))
    micro = random_micro(5)
    first = None
    for step in range(60):
        train_step.optimizer.set_lr(1e-2, 2e-2 * (1 - step / 60))
        metrics = train_step.run([micro])
        first = metrics.loss.item() if first is None else first
    assert first > 4.0
    assert metrics.loss < 0.2
    assert metrics.mtp_loss < 1.0
    assert metrics.is_applied == 1


@pytest.mark.parametrize("kind", ["cheap", "layers"])
def test_activation_checkpointing_changes_no_gradient(monkeypatch, kind):
    results = []
    for mode in ("off", kind):
        model = tiny_model()
        plain = tiny_step(model)
        runtime = RuntimeConfig(dtype="float32", activation_checkpointing=mode)
        train_step = TrainStep(model, plain.optimizer, plain.loss, runtime)
        results.append(gradients_of(train_step, [random_micro(1)], monkeypatch))
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.gpu
def test_cheap_checkpointing_keeps_less_memory_and_the_same_gradients_on_a_gpu():
    device = torch.device("cuda")
    kept, grads = {}, {}
    for mode in ("off", "cheap", "layers"):
        model = tiny_model(hidden_size=256).to(device).bfloat16()
        micro = random_micro(1, (4000, 96), row_tokens=4096).to(device)
        step = tiny_step(tiny_model())
        step.model, step.is_cheap_recomputed = model, mode == "cheap"
        if mode == "layers":
            runtime = RuntimeConfig(activation_checkpointing="layers")
            step._training_forwards = _wrapped_forwards(model, runtime)
        with step.training_mode():
            model.compute_dtype = None
            before = torch.cuda.memory_allocated()
            losses, _, _ = step._forward(micro, list(micro.num_targets))
            kept[mode] = torch.cuda.memory_allocated() - before
            losses[3].backward()
        grads[mode] = {name: param.grad for name, param in model.named_parameters()}
    assert kept["layers"] < kept["cheap"] < 0.85 * kept["off"], kept
    for name, grad in grads["off"].items():
        # Sums of bf16 gradients that a GPU adds in another order each time: an embedding's, say.
        difference = (grads["cheap"][name] - grad).float().norm()
        assert difference <= 1e-2 * grad.float().norm(), name


def test_bfloat16_runs_near_float32_and_keeps_float32_masters(monkeypatch):
    results = []
    for dtype in ("float32", "bfloat16"):
        model = tiny_model()
        plain = tiny_step(model)
        train_step = TrainStep(model, plain.optimizer, plain.loss, RuntimeConfig(dtype=dtype))
        results.append(gradients_of(train_step, [random_micro(1)], monkeypatch))
        assert model.compute_dtype is None
        assert all(p.dtype == torch.float32 for p in model.parameters())
    exact = torch.cat([grad.flatten() for grad in results[0].values()])
    rounded = torch.cat([grad.flatten() for grad in results[1].values()])
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.1
