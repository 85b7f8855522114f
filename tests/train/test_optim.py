import pytest
import torch
from torch import nn

from qnext.config.presets import preset
from qnext.config.train import OptimConfig
from qnext.train.muon import Muon, orthogonalize
from qnext.train.optim import SpikeGuard, TrainOptimizer, logical_rows, parameter_kind
from tests.train.tiny import random_micro, tiny_model, tiny_step

NANO = preset("nano")


def small_params(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return nn.Parameter(torch.randn(*shape, generator=generator))

    config = NANO
    rows = 2 * config.key_dim + 2 * config.value_dim + 2 * config.linear_num_value_heads
    return {
        "embed_tokens": draw(32, 16),
        "layers.0.input_layernorm.weight": draw(16),
        "layers.0.mixer.in_proj": draw(rows, 16),
        "layers.0.mixer.A_log": draw(config.linear_num_value_heads),
        "layers.0.mlp.gate": draw(4, 16),
        "layers.0.mlp.experts_gate_up": draw(4, 24, 16),
        "layers.0.mlp.experts_down": draw(4, 16, 12),
    }


def fill_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad.copy_(torch.randn(param.shape, generator=generator))


def snapshot(optimizer):
    return {n: p.detach().clone() for n, p in zip(optimizer.names, optimizer.params, strict=True)}


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 64), (40, 32, 256), (1, 4, 256)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.max() < 1.15
    assert values.min() > 0.6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    exact = left @ right
    error = (orthogonalize(matrices) - exact).norm() / exact.norm()
    assert error < 0.15


def test_an_update_of_zeros_stays_zero():
    assert orthogonalize(torch.zeros(2, 4, 8)).abs().max() == 0


def test_muon_moves_each_logical_part_by_an_orthogonal_matrix():
    params = {n: p for n, p in small_params().items() if parameter_kind(n) == "matrix"}
    for param in params.values():
        param.grad = torch.randn_like(param)
    before = {name: param.detach().clone() for name, param in params.items()}
    muon = Muon(params, lambda n, p: logical_rows(n, p, NANO), momentum=0.9, weight_decay=0.0)
    muon.step(torch.tensor(0.01), torch.tensor(1.0))
    for name, param in params.items():
        moved = (param.detach() - before[name]) / -0.01
        for part in moved.split(logical_rows(name, param, NANO), dim=-2):
            scale = 0.2 * max(part.shape[-2:]) ** 0.5
            values = torch.linalg.svdvals(part / scale)
            assert values.max() < 1.2, name
            assert values.min() > 0.5, name


def test_the_parts_of_fused_parameters_are_those_of_the_checkpoint():
    config = NANO
    key, value, heads = config.key_dim, config.value_dim, config.linear_num_value_heads
    in_proj = torch.empty(2 * key + 2 * value + 2 * heads, 3)
    rows = logical_rows("layers.0.mixer.in_proj.weight", in_proj, config)
    assert rows == [key, key, value, value, heads, heads]
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    qkv = torch.empty(2 * query + 2 * kv, 3)
    assert logical_rows("mtp.layer.mixer.qkv_proj", qkv, config) == [query, query, kv, kv]
    assert logical_rows("layers.1.mlp.experts_gate_up", torch.empty(5, 8, 3), config) == [4, 4]
    assert logical_rows("layers.1.mlp.experts_down", torch.empty(5, 8, 3), config) == [8]


def test_muon_refuses_parts_that_do_not_add_up():
    param = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="must sum to 4"):
        Muon({"w": param}, lambda n, p: [2, 1], momentum=0.9, weight_decay=0.0)


def test_an_unknown_parameter_has_no_silent_rule():
    with pytest.raises(ValueError, match="layers.3.mixer.new_weight"):
        parameter_kind("layers.3.mixer.new_weight")


def test_adamw_equals_the_textbook_update_with_decay_only_where_it_belongs():
    params = small_params()
    config = OptimConfig(weight_decay=0.1, grad_clip=0.0, eps=1e-8, spike_factor=0.0)
    optimizer = TrainOptimizer(params, NANO, config)
    expected = {n: p.detach().double() for n, p in params.items()}
    first = {n: torch.zeros_like(p) for n, p in expected.items()}
    second = {n: torch.zeros_like(p) for n, p in expected.items()}
    lr = 0.01
    for step in range(1, 4):
        fill_gradients(params, step)
        for name, param in params.items():
            grad = param.grad.double()
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * grad
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * grad**2
            is_decayed = parameter_kind(name) in ("matrix", "router", "norm", "head")
            decay = config.weight_decay if is_decayed else 0.0
            unbiased = first[name] / (1 - config.beta1**step)
            scale = (second[name] / (1 - config.beta2**step)).sqrt() + config.eps
            expected[name] = expected[name] * (1 - lr * decay) - lr * unbiased / scale
        optimizer.set_lr(lr, lr)
        optimizer.step(torch.tensor(1.0))
    for name, param in params.items():
        torch.testing.assert_close(param.detach().double(), expected[name], rtol=1e-4, atol=1e-6)


def test_clipping_scales_the_gradient_to_the_limit():
    big, small = small_params(), small_params()
    config = OptimConfig(grad_clip=1.0, weight_decay=0.0, eps=0.1)
    optimizers = [TrainOptimizer(params, NANO, config) for params in (big, small)]
    fill_gradients(big, 1)
    norm = optimizers[0].gradients.norm()
    fill_gradients(small, 1)
    optimizers[1].gradients.flat.div_(norm)
    for optimizer in optimizers:
        optimizer.set_lr(0.1, 0.1)
    outcome = optimizers[0].step(torch.tensor(1.0))
    optimizers[1].step(torch.tensor(1.0))
    torch.testing.assert_close(outcome.grad_norm, norm)
    for name in big:
        torch.testing.assert_close(big[name], small[name])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_with_nan_changes_no_weight_and_no_moment(kind, what):
    params = small_params()
    optimizer = TrainOptimizer(params, NANO, OptimConfig(kind=kind))
    optimizer.set_lr(0.01, 0.01)
    fill_gradients(params, 1)
    assert optimizer.step(torch.tensor(1.0)).is_applied == 1
    weights = snapshot(optimizer)
    state = {n: t.clone() for n, t in optimizer.state_tensors().items() if n != "guard"}
    fill_gradients(params, 2)
    if what == "gradient":
        params["embed_tokens"].grad[0, 0] = float("nan")
        params["layers.0.mixer.in_proj"].grad[0, 0] = float("inf")
    outcome = optimizer.step(torch.tensor(float("nan") if what == "loss" else 1.0))
    assert outcome.is_applied == 0
    for name, param in params.items():
        assert torch.equal(param, weights[name]), name
        assert param.grad.abs().max() == 0
    for name, tensor in state.items():
        assert torch.equal(optimizer.state_tensors()[name], tensor), name
    fill_gradients(params, 3)
    assert optimizer.step(torch.tensor(1.0)).is_applied == 1
    assert not torch.equal(params["embed_tokens"], weights["embed_tokens"])


def test_a_spike_is_skipped_and_a_lasting_change_gets_through():
    config = OptimConfig(spike_factor=4.0, spike_warmup_steps=5)
    guard = SpikeGuard(config, torch.device("cpu"))
    loss = torch.tensor(1.0)
    assert all(guard.judge(torch.tensor(1.0), loss) == 1 for _ in range(10))
    assert guard.judge(torch.tensor(5.0), loss) == 0
    assert guard.judge(torch.tensor(3.0), loss) == 1
    assert guard.state[2] == 0
    verdicts = [guard.judge(torch.tensor(8.0), loss).item() for _ in range(40)]
    assert verdicts[0] == 0
    assert verdicts[-1] == 1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_saved_optimizer_goes_on_bit_by_bit(kind):
    params, copies = small_params(), small_params()
    optimizer = TrainOptimizer(params, NANO, OptimConfig(kind=kind))
    for step in range(2):
        fill_gradients(params, step)
        optimizer.set_lr(0.01, 0.02)
        optimizer.step(torch.tensor(1.0))
    with torch.no_grad():
        for name, param in params.items():
            copies[name].copy_(param)
    resumed = TrainOptimizer(copies, NANO, OptimConfig(kind=kind))
    resumed.load_state_tensors({n: t.clone() for n, t in optimizer.state_tensors().items()})
    for own in (optimizer, resumed):
        fill_gradients(dict(zip(own.names, own.params, strict=True)), 9)
        own.set_lr(0.01, 0.02)
        own.step(torch.tensor(1.0))
    for name in params:
        assert torch.equal(params[name], copies[name]), name


def test_a_state_of_another_optimizer_is_refused():
    adamw = TrainOptimizer(small_params(), NANO, OptimConfig(kind="adamw"))
    muon = TrainOptimizer(small_params(), NANO, OptimConfig(kind="muon"))
    with pytest.raises(ValueError, match=r"optimizer\.kind"):
        muon.load_state_tensors(adamw.state_tensors())


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_narrow_moments_move_weights_nearly_as_wide_ones_and_survive_a_checkpoint(moments):
    ends = {}
    for kind in ("float32", moments):
        model = tiny_model()
        step = tiny_step(model, OptimConfig(moments=kind))
        step.optimizer.set_lr(1e-2, 1e-2)
        losses = [float(step.run([random_micro(1)]).loss) for _ in range(12)]
        ends[kind] = losses[-1]
    assert losses[-1] < losses[0] - 0.5
    assert abs(ends[moments] - ends["float32"]) < 0.1
    other = tiny_step(tiny_model(), OptimConfig(moments=moments)).optimizer
    saved = {name: value.clone() for name, value in step.optimizer.state_tensors().items()}
    other.load_state_tensors(saved)
    for name, value in other.state_tensors().items():
        assert torch.equal(value, saved[name]), name
