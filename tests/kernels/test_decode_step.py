"""The whole step as one Numba function against the model's layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qnext.cache.hybrid import HybridCache
from qnext.engine.fused import FusedSteps
from qnext.engine.inputs import SequenceRows, build_batch
from qnext.engine.request import Request, SamplingParams
from qnext.engine.text import OutputText
from qnext.kernels import cpu_products
from qnext.kernels.decode_step.numba import decode_step_numba, supports
from qnext.kernels.dispatch import use_backend
from qnext.kernels.int8_rows import quantize_rows
from tests.model.tiny import tiny_model

PAGE = 8
LENGTHS = (3, 1, 5, 2)
CONTEXTS = (3, 17, 30, 0)
SLOTS = (2, 0, 3, 1)
SHAPES = {
    "tiny": {},
    "odd heads": {"linear_num_key_heads": 3, "linear_num_value_heads": 9, "hidden_size": 36},
    "odd sizes": {
        "hidden_size": 20,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 10,
    },
    "dense": {"num_experts": 0},
    "dense layer, weights not renormalised": {"mlp_only_layers": (1,), "norm_topk_prob": False},
    "no shared expert": {"shared_expert_intermediate_size": 0},
    "attention alone": {"layer_types": ("full_attention",) * 4},
    "DeltaNet alone": {"layer_types": ("linear_attention",) * 4},
}


def _cache(model):
    cache = HybridCache(
        model.config,
        has_mtp=True,
        num_pages=64,
        page_size=PAGE,
        num_state_slots=4,
        max_window=5,
        dtype=torch.float32,
    )
    torch.manual_seed(3)
    cache.state_pool.recurrent_state.normal_(std=0.5)
    cache.state_pool.conv_state.normal_()
    cache.kv_pool.k.normal_()
    cache.kv_pool.v.normal_()
    return cache


def _windows(members, lengths=LENGTHS, first=0):
    """Rows of some of four sequences, from their `first` row on."""
    torch.manual_seed(4)
    tables = torch.randperm(64)[:48].view(4, 12).tolist()
    tokens = [torch.randint(0, 97, (5,)).tolist() for _ in LENGTHS]
    windows = []
    for m in members:
        request = Request(
            request_id=str(m),
            prompt_token_ids=tokens[m],
            params=SamplingParams(),
            seed=0,
            max_total_tokens=90,
            output_text=OutputText(None),
            page_ids=tables[m],
            state_slot=SLOTS[m],
        )
        ids = tokens[m][first : first + lengths[m]]
        windows.append(SequenceRows(request, ids, CONTEXTS[m] + first))
    return windows


def _batch(windows):
    return build_batch(windows, PAGE, torch.device("cpu"), is_window=True)


def _snapshot(cache):
    return [t.clone() for t in (*cache.state_pool.tensors(), cache.kv_pool.k, cache.kv_pool.v)]


def _close(ours, expected):
    return float((ours - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-6


@pytest.mark.parametrize("decay", ["paper", "hf"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_step_gives_states_and_window_rows_of_the_layers(shape, decay):
    model = tiny_model(decay=decay, **SHAPES[shape])
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    windows = _windows(range(4))
    batch = _batch(windows)
    with torch.inference_mode():
        expected = model(batch, cache)
        rows = _snapshot(cache)
        out = fused.window(windows)
        assert fused.trunk.prepared is not None, "the Numba kernel ran"
        assert _close(out.hidden, expected)
        logits = model.compute_logits(expected)
        assert _close(out.logits, logits)
        assert out.best == out.logits.argmax(-1).tolist()
        for ours, theirs in zip(_snapshot(cache), rows, strict=True):
            assert _close(ours, theirs)
        draft = model.mtp_step(batch.token_ids, expected, batch, cache)
        assert _close(fused.mtp_step(windows, expected).hidden, draft)


def _model_of(dtype, **changes):
    """A tiny model whose matrices are of this dtype and whose activations are fp32."""
    model = tiny_model(dtype=torch.float32 if dtype == torch.int8 else dtype, **changes)
    model.compute_dtype = torch.float32
    if dtype == torch.int8:
        for name in model.matrix_names():
            module_name, _, own_name = name.rpartition(".")
            module = model.get_submodule(module_name)
            held, scale = quantize_rows(getattr(module, own_name).detach())
            parameter = torch.nn.Parameter(held, requires_grad=False)
            parameter.row_scale = scale
            setattr(module, own_name, parameter)
    return model


@pytest.mark.parametrize("shape", ["tiny", "odd sizes", "dense", "no shared expert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrow_weights_are_widened_and_nothing_else_is_rounded(monkeypatch, dtype, shape):
    monkeypatch.setattr(cpu_products, "dual_objection", lambda: "a machine without")
    model = _model_of(dtype, **SHAPES[shape])
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    windows = _windows(range(4))
    with torch.inference_mode():
        assert _close(fused.window(windows).hidden, model(_batch(windows), cache))
    assert fused.trunk.prepared is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_rows_bits_do_not_depend_on_its_company(dtype):
    model = _model_of(dtype, hidden_size=40)
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    with torch.inference_mode():
        together = _rows_of(fused.window(_windows(range(4))), LENGTHS)
        for member in range(4):
            (own,) = _rows_of(fused.window(_windows([member])), LENGTHS[member : member + 1])
            assert torch.equal(own, together[member])
            (first,) = _rows_of(fused.window(_windows([member], (1, 1, 1, 1))), (1,))
            assert torch.equal(first, together[member][:1])
        pair = _rows_of(fused.window(_windows([2, 1])), (5, 1))
        for ours, member in zip(pair, (2, 1), strict=True):
            assert torch.equal(ours, together[member])


@pytest.mark.skipif(cpu_products.dual_objection() is not None, reason="no AVX512-BF16 here")
@pytest.mark.parametrize("shape", ["tiny", "odd sizes", "dense", "no shared expert"])
def test_with_products_of_bfloat16_pairs_rows_are_rounded_before_each_product(shape):
    """What products take is rounded to 8 bits: relative errors near 2^-9, and no more."""
    model = _model_of(torch.bfloat16, **SHAPES[shape])
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    windows = _windows(range(4))
    with torch.inference_mode(), use_backend("reference"):
        expected = model(_batch(windows), cache)
    with torch.inference_mode():
        out = fused.window(windows).hidden
    error = float((out - expected).norm() / expected.norm())
    assert 1e-5 < error < 2e-2


def _rows_of(out, lengths):
    """States and logits side by side, sequence by sequence."""
    return torch.cat([out.hidden, out.logits], dim=1).split(list(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    model = _model_of(dtype, hidden_size=68)
    found = []
    for num_threads in (1, 2, 3):
        cache = _cache(model)
        fused = FusedSteps(model, cache, 64)
        torch.set_num_threads(num_threads)
        with torch.inference_mode():
            for _ in range(3):
                out = fused.window(_windows(range(4)))
                fused.commit(SLOTS, LENGTHS)
        fused.settle()
        found.append([*_rows_of(out, LENGTHS), *_snapshot(cache)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_committing_replays_the_same_bits_as_the_cache():
    model = tiny_model()
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    with torch.inference_mode():
        fused.window(_windows(range(4)))
        before = _snapshot(cache)
        fused.commit(SLOTS, (2, 1, 5, 0))
        # The next step takes the accepted rows in; its own are recorded and not committed.
        fused.window(_windows(range(4)))
        ours = _snapshot(cache)[:2]
        for tensor, value in zip((*cache.state_pool.tensors(),), before, strict=False):
            tensor.copy_(value)
        cache.commit(SLOTS, (2, 1, 5, 0))
    for mine, theirs in zip(ours, _snapshot(cache)[:2], strict=True):
        assert torch.equal(mine, theirs)


def test_drafting_ahead_commits_what_single_steps_commit():
    """Five rows in one window leave the state that five windows of one row leave."""
    model = tiny_model()
    states = []
    for is_whole in (True, False):
        cache = _cache(model)
        fused = FusedSteps(model, cache, 64)
        with torch.inference_mode():
            if is_whole:
                fused.window(_windows([2]))
                fused.commit((SLOTS[2],), (5,))
            else:
                for step in range(5):
                    fused.window(_windows([2], (1, 1, 1, 1), first=step))
                    fused.commit((SLOTS[2],), (1,))
            fused.settle()
        states.append(
            (cache.state_pool.recurrent_state.clone(), cache.state_pool.conv_state.clone())
        )
    for ours, expected in zip(*states, strict=True):
        assert torch.equal(ours, expected)


def test_what_the_kernel_cannot_run_it_says_and_the_layers_run_instead():
    model = tiny_model(dtype=torch.float64)
    cache = HybridCache(
        model.config,
        has_mtp=True,
        num_pages=64,
        page_size=PAGE,
        num_state_slots=4,
        max_window=5,
        dtype=torch.float64,
    )
    fused = FusedSteps(model, cache, 64)
    windows = _windows(range(4))
    with torch.inference_mode():
        expected = model(_batch(windows), cache)
        torch.testing.assert_close(fused.window(windows).hidden, expected, rtol=0, atol=0)
        assert fused.trunk.prepared is None
        with (
            use_backend("numba", "decode_step"),
            pytest.raises(ValueError, match="decode_step: backend numba cannot run: .*float64"),
        ):
            fused.window(windows)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_named_backend_without_this_step_runs_the_layers(backend):
    model = tiny_model()
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    with use_backend(backend), torch.inference_mode():
        fused.window(_windows(range(4)))
    assert fused.trunk.prepared is None


def test_the_kernel_is_the_default_on_a_cpu():
    model = tiny_model()
    fused = FusedSteps(model, _cache(model), 64)
    assert decode_step_numba.__module__ == supports.__module__
    with torch.inference_mode():
        fused.window(_windows(range(4)))
    assert fused.trunk.prepared is not None


def test_compiled_code_is_kept_in_a_folder_of_its_own_for_these_sources(tmp_path):
    program = (
        "import torch\n"
        "from qnext.kernels.cpu_lanes import cache_folder\n"
        "from qnext.kernels.linear.numba import linear_numba\n"
        "x, w = torch.ones(2, 3), torch.ones(4, 3)\n"
        "assert linear_numba(x, w, True).tolist() == [[3.0] * 4] * 2\n"
        "print(cache_folder())\n"
    )

    def run(folder):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    folder = run(tmp_path)
    assert folder.parent == tmp_path / "qnext"
    assert list(folder.rglob("*.nbi")), "an index of compiled code"
    blocked = tmp_path / "file"
    blocked.write_text("")
    run(blocked)  # a place that cannot be a folder: compiled all the same, and kept nowhere
    beside = list(Path(cpu_products.__file__).parent.rglob("*.nbi"))
    assert not beside, "beside the sources it could outlive them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_no_numbers_are_an_error(dtype):
    model = _model_of(dtype)
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    fused = FusedSteps(model, _cache(model), 64)
    with torch.inference_mode(), pytest.raises(ValueError, match="NaN or infinities"):
        fused.window(_windows([1]))


def test_weights_that_have_changed_are_read_anew_when_asked():
    model = tiny_model()
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    with torch.inference_mode():
        before = fused.window(_windows([1])).hidden
    with torch.no_grad():
        model.norm.weight += 1.0
    fused.read_weights()
    with torch.inference_mode():
        after = fused.window(_windows([1])).hidden
        assert _close(after, model(_batch(_windows([1])), cache))
    assert not _close(after, before)


def test_the_number_of_threads_may_change_from_step_to_step():
    """A team that counts its meetings must not go on from what a team of another size counted."""
    model = tiny_model()
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    expected = {}
    with torch.inference_mode():
        for turn in range(60):
            members = range(1 + turn % 4)
            torch.set_num_threads(1 + (turn * 7) % 4)
            found = fused.window(_windows(members)).hidden
            assert torch.equal(found, expected.setdefault(len(members), found))
