"""Prefill on a CPU with bfloat16 or int8 weights: near fp32, the same bits on any threads."""

import pytest
import torch

from qnext.cache.hybrid import HybridCache
from qnext.kernels import cpu_products, dispatch
from qnext.model.batch import CacheInputs, ForwardBatch
from tests.model.tiny import tiny_model

needs_tiles = pytest.mark.skipif(
    cpu_products.dual_objection() is not None, reason=str(cpu_products.dual_objection())
)


def _prefill(model, ids, splits, num_threads=1):
    """Hidden states and DeltaNet states of a prompt fed in these chunks."""
    cache = HybridCache(
        model.config,
        has_mtp=model.has_mtp,
        num_pages=16,
        page_size=16,
        num_state_slots=1,
        max_window=1,
        dtype=torch.float32,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    states, start = [], 0
    for length in splits:
        index = torch.arange(start, start + length)
        places = CacheInputs(torch.arange(16)[None], index, (start,), (0,), is_window=False)
        bounds = torch.tensor([0, length], dtype=torch.int32)
        batch = ForwardBatch(ids[index], index, bounds, (length,), cache_inputs=places)
        with torch.inference_mode():
            states.append(model(batch, cache))
        start += length
    torch.set_num_threads(before)
    return torch.cat(states), cache.state_pool.recurrent_state


def _model():
    model = tiny_model(dtype=torch.bfloat16, linear_value_head_dim=16)
    model.compute_dtype = torch.float32
    return model.requires_grad_(False)


@needs_tiles
def test_products_in_bfloat16_stay_near_those_in_fp32():
    model, ids = _model(), torch.randint(0, 97, (150,))
    ours, ours_state = _prefill(model, ids, (150,))
    with dispatch.use_backend("reference"):
        exact, exact_state = _prefill(model, ids, (150,))
    # A router between two nearly equal experts may choose the other: hence the median row.
    errors = (ours - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-5 < errors.median() < 2e-2
    assert (ours_state - exact_state).norm() / exact_state.norm() < 5e-2


@needs_tiles
@pytest.mark.parametrize("splits", [(150,), (64, 86), (1, 149)])
def test_a_prompt_gives_the_same_bits_on_any_number_of_threads(splits):
    model, ids = _model(), torch.randint(0, 97, (150,))
    ours, state = _prefill(model, ids, splits)
    again, state_again = _prefill(model, ids, splits, num_threads=2)
    assert torch.equal(ours, again)
    assert torch.equal(state, state_again)


def test_fp32_weights_leave_all_products_in_fp32():
    model, ids = tiny_model().requires_grad_(False), torch.randint(0, 97, (150,))
    ours, _ = _prefill(model, ids, (150,))
    with dispatch.use_backend("reference"):
        exact, _ = _prefill(model, ids, (150,))
    assert (ours - exact).norm() / exact.norm() < 1e-5
