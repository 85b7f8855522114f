"""The whole step as one Numba function against the model's layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qnext.cache.hybrid import HybridCache
from qnext.engine.fused import FusedSteps
from qnext.kernels.decode_step.numba import decode_step_numba, supports
from qnext.kernels.dispatch import use_backend
from qnext.model.batch import CacheInputs, ForwardBatch
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


def _batch(members, lengths=LENGTHS):
    torch.manual_seed(4)
    tables = torch.randperm(64)[:48].view(4, 12).to(torch.int32)
    tokens = [torch.randint(0, 97, (5,)) for _ in LENGTHS]
    index = [torch.arange(CONTEXTS[m], CONTEXTS[m] + lengths[m]) for m in members]
    slots = [
        tables[m].long()[at // PAGE] * PAGE + at % PAGE
        for m, at in zip(members, index, strict=True)
    ]
    counts = tuple(len(at) for at in index)
    return ForwardBatch(
        token_ids=torch.cat([tokens[m][:n] for m, n in zip(members, counts, strict=True)]),
        position_ids=torch.cat(index),
        cu_seqlens=torch.tensor((0, *counts)).cumsum(0).to(torch.int32),
        seq_lens=counts,
        cache_inputs=CacheInputs(
            tables[list(members)],
            torch.cat(slots),
            tuple(CONTEXTS[m] for m in members),
            tuple(SLOTS[m] for m in members),
            True,
        ),
    )


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
    batch = _batch(range(4))
    with torch.inference_mode():
        expected = model(batch, cache)
        rows = _snapshot(cache)
        hidden = fused.window(batch)
        assert fused.trunk.prepared is not None, "the Numba kernel ran"
        assert _close(hidden, expected)
        for ours, theirs in zip(_snapshot(cache), rows, strict=True):
            assert _close(ours, theirs)
        draft = model.mtp_step(batch.token_ids, expected, batch, cache)
        assert _close(fused.mtp_step(batch.token_ids, expected, batch), draft)


def test_bfloat16_weights_are_widened_and_nothing_else_is_rounded():
    model = tiny_model(dtype=torch.bfloat16)
    model.compute_dtype = torch.float32
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    batch = _batch(range(4))
    with torch.inference_mode():
        assert _close(fused.window(batch), model(batch, cache))
    assert fused.trunk.prepared is not None


def test_a_rows_bits_do_not_depend_on_its_company():
    model = tiny_model(hidden_size=40)
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    with torch.inference_mode():
        together = fused.window(_batch(range(4))).split(LENGTHS)
        for member in range(4):
            assert torch.equal(fused.window(_batch([member])), together[member])
            first = fused.window(_batch([member], (1, 1, 1, 1)))
            assert torch.equal(first, together[member][:1])
        for ours, member in zip(fused.window(_batch([2, 1])).split((5, 1)), (2, 1), strict=True):
            assert torch.equal(ours, together[member])


def test_committing_replays_the_same_bits_as_the_cache():
    model = tiny_model()
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    batch = _batch(range(4))
    with torch.inference_mode():
        fused.window(batch)
        before = _snapshot(cache)
        fused.commit(SLOTS, (2, 1, 5, 0))
        ours = _snapshot(cache)
        for tensor, value in zip((*cache.state_pool.tensors(),), before, strict=False):
            tensor.copy_(value)
        cache.commit(SLOTS, (2, 1, 5, 0))
    for mine, theirs in zip(ours, _snapshot(cache), strict=True):
        assert torch.equal(mine, theirs)


def test_drafting_ahead_commits_what_single_steps_commit():
    """Five rows in one window leave the state that five windows of one row leave."""
    model = tiny_model()
    states = []
    for is_whole in (True, False):
        cache = _cache(model)
        fused = FusedSteps(model, cache, 64)
        whole = _batch([2])
        with torch.inference_mode():
            if is_whole:
                fused.window(whole)
                fused.commit((SLOTS[2],), (5,))
            else:
                for step in range(5):
                    places = whole.cache_inputs
                    part = ForwardBatch(
                        token_ids=whole.token_ids[step : step + 1],
                        position_ids=whole.position_ids[step : step + 1],
                        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
                        seq_lens=(1,),
                        cache_inputs=CacheInputs(
                            places.page_table,
                            places.slot_mapping[step : step + 1],
                            (CONTEXTS[2] + step,),
                            places.state_slots,
                            True,
                        ),
                    )
                    fused.window(part)
                    fused.commit((SLOTS[2],), (1,))
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
    batch = _batch(range(4))
    with torch.inference_mode():
        expected = model(batch, cache)
        torch.testing.assert_close(fused.window(batch), expected, rtol=0, atol=0)
        assert fused.trunk.prepared is None
        with (
            use_backend("numba", "decode_step"),
            pytest.raises(ValueError, match="decode_step: backend numba cannot run: .*float64"),
        ):
            fused.window(batch)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_named_backend_without_this_step_runs_the_layers(backend):
    model = tiny_model()
    cache = _cache(model)
    fused = FusedSteps(model, cache, 64)
    with use_backend(backend), torch.inference_mode():
        fused.window(_batch(range(4)))
    assert fused.trunk.prepared is None


def test_the_kernel_is_the_default_on_a_cpu():
    model = tiny_model()
    fused = FusedSteps(model, _cache(model), 64)
    assert decode_step_numba.__module__ == supports.__module__
    with torch.inference_mode():
        fused.window(_batch(range(4)))
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
    run(blocked)  # a place that cannot be a folder: compiled all the same
