"""Pages, slots and pools: nothing is lost, taken twice, or taken from memory too early."""

import pytest
import torch

from qnext.cache.allocator import Allocator, OutOfMemory
from qnext.cache.hybrid import HybridCache
from qnext.cache.kv_pool import KVPool
from tests.engine.tiny import tiny_config


def cache_of(**changes) -> HybridCache:
    sizes = {"has_mtp": True, "num_pages": 4, "page_size": 8, "num_state_slots": 3}
    sizes |= {"max_window": 4, "dtype": torch.float32}
    return HybridCache(tiny_config(), **{**sizes, **changes})


def test_units_are_handed_out_once_and_come_back():
    pages = Allocator(5, "page")
    first, second = pages.allocate(2), pages.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pages.num_free == 0
    pages.free(second)
    assert sorted(pages.allocate(3)) == sorted(second)


def test_asking_for_too_much_takes_nothing():
    pages = Allocator(3, "page")
    with pytest.raises(OutOfMemory, match="4 pages asked for, 3 of 3 are free"):
        pages.allocate(4)
    assert pages.num_free == 3


def test_freeing_twice_is_an_error():
    slots = Allocator(2, "state slot")
    taken = slots.allocate(1)
    slots.free(taken)
    with pytest.raises(ValueError, match="state slot 0 is not in use"):
        slots.free(taken)


def test_keys_and_values_have_a_layer_for_mtp_only_when_asked():
    assert cache_of().kv_pool.k.shape == (2, 32, 2, 16)
    assert cache_of(has_mtp=False).kv_pool.k.shape == (1, 32, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_cache_is_zero_in_the_dtype_asked_for(dtype):
    cache = cache_of(dtype=dtype)
    assert cache.kv_pool.k.dtype == cache.state_pool.conv_state.dtype == dtype
    assert cache.state_pool.recurrent_state.dtype == torch.promote_types(dtype, torch.float32)
    assert not cache.kv_pool.k.any()
    assert cache.num_bytes > 2 * cache.kv_pool.k.nbytes


def test_a_large_pool_takes_memory_only_as_it_is_written():
    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    try:
        before = resident_bytes()
    except OSError:
        pytest.skip("no /proc on this system")
    cache = cache_of(num_pages=100_000)
    assert cache.kv_pool.k.nbytes > 200e6
    assert resident_bytes() - before < 50e6


def test_a_reset_clears_one_slot_and_no_other():
    cache = cache_of()
    pool = cache.state_pool
    pool.recurrent_state.fill_(1.0)
    pool.conv_state.fill_(1.0)
    cache.reset_state([1])
    assert not pool.recurrent_state[:, 1].any()
    assert not pool.conv_state[:, 1].any()
    assert pool.recurrent_state[:, [0, 2]].all()
    assert pool.conv_state[:, [0, 2]].all()


def test_a_commit_of_more_rows_than_a_window_is_refused():
    with pytest.raises(ValueError, match="a window holds 4"):
        cache_of().commit((0,), (5,))


def test_a_pool_without_attention_layers_is_empty():
    pool = KVPool(0, 3, 8, (2, 4), dtype=torch.float32, device="cpu")
    assert pool.k.shape == (0, 24, 2, 4)
