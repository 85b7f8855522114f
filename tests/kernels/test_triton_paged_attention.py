import dataclasses

import pytest
import torch

# Before Triton: it turns the interpreter on where there is no GPU.
from tests.kernels.triton_env import DEVICE, HALF, IS_INTERPRETED, error, poisoned

pytest.importorskip("triton")

from qnext.kernels.paged_attention.reference import CachedRows, paged_attention_reference
from qnext.kernels.paged_attention_window import triton_fwd
from qnext.kernels.paged_attention_window.reference import (
    HeadWeights,
    Window,
    paged_attention_window_reference,
)
from qnext.kernels.paged_attention_window.triton_fwd import (
    SplitPlan,
    paged_attention_window_triton,
    supports,
)
from qnext.kernels.rms_norm.reference import rms_norm_reference
from qnext.kernels.rotary.reference import rotary_reference

LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
gpu_only = pytest.mark.skipif(IS_INTERPRETED, reason="needs a CUDA device")


@dataclasses.dataclass
class Case:
    """Everything the op takes, with NaN wherever it has no business."""

    fused: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    weights: HeadWeights
    window: Window
    scale: float

    def run(self, function=paged_attention_window_triton, **options):
        """Output and both caches after it; the case itself stays as it is."""
        caches = self.k_cache.clone(), self.v_cache.clone()
        inputs = (self.fused, *caches, self.weights, self.window)
        if function is paged_attention_window_triton:
            assert supports(*inputs, scale=self.scale, **options) is None
        return function(*inputs, scale=self.scale, **options), *caches

    def only(self, n, rows=slice(None)):
        """Sequence n alone, of its rows only some."""
        size = self.fused.shape[0] // self.window.query_lens.shape[0]
        first, last, _ = rows.indices(int(self.window.query_lens[n]))
        window = Window(
            self.window.page_table[n : n + 1].contiguous(),
            self.window.context_lens[n : n + 1] + first,
            torch.full_like(self.window.query_lens[n : n + 1], last - first),
            self.window.page_size,
        )
        fused = self.fused[n * size + first : n * size + last].contiguous()
        return dataclasses.replace(self, fused=fused, window=window)


def draw(
    contexts, query_lens, *, heads=(4, 1), d=16, rotary=8, page_size=16, max_window=None,
    dtype=torch.float32, cache_dtype=None, max_keys=0,
):  # fmt: skip
    """Sequences of these lengths on shuffled pages; whatever is not theirs is NaN."""
    hq, hkv = heads
    max_window = max_window or max(query_lens)
    num_seqs, width = len(contexts), 2 * (hq + hkv) * d
    lengths = [context + count for context, count in zip(contexts, query_lens, strict=True)]
    max_pages = -(-max(*lengths, max_keys, 1) // page_size)
    num_pages = num_seqs * max_pages + 1
    # Page 0 belongs to nobody, and table entries past the end name it.
    shuffled = (torch.randperm(num_pages - 1, device=DEVICE) + 1).int()
    table = torch.zeros(num_seqs, max_pages, dtype=torch.int32, device=DEVICE)
    caches = [poisoned(num_pages * page_size, hkv, d, dtype=cache_dtype or dtype) for _ in range(2)]
    fused = poisoned(num_seqs * max_window, width, dtype=dtype)
    for n, (context, count) in enumerate(zip(contexts, query_lens, strict=True)):
        if count == 0:
            continue
        used = -(-lengths[n] // page_size)
        table[n, :used] = shuffled[n * max_pages : n * max_pages + used]
        places = torch.arange(context, device=DEVICE)
        slots = table[n, places // page_size].long() * page_size + places % page_size
        for cache in caches:
            cache[slots] = torch.randn(context, hkv, d, device=DEVICE).to(cache.dtype)
        own = slice(n * max_window, n * max_window + count)
        fused[own] = torch.randn(count, width, device=DEVICE).to(dtype)
    positions = max_pages * page_size
    angles = torch.arange(positions, device=DEVICE)[:, None] * 0.9 ** torch.arange(
        rotary // 2, device=DEVICE
    )
    norms = (torch.randn(2, d, device=DEVICE) * 0.3).to(dtype).unbind()
    weights = HeadWeights(*norms, 1e-6, angles.float().cos(), angles.float().sin())
    lens = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (contexts, query_lens)]
    return Case(fused, *caches, weights, Window(table, *lens, page_size), d**-0.5)


def check(case, limit=None, **options):
    """Output and caches against the reference; slots that nobody wrote are still NaN."""
    ours = case.run(**options)
    expected = case.run(paged_attention_window_reference)
    limit = limit or LIMITS[case.fused.dtype]
    assert error(ours[0], expected[0]) < limit
    for cache, want in zip(ours[1:], expected[1:], strict=True):
        assert torch.equal(cache.isnan(), want.isnan())
        assert error(cache.nan_to_num(), want.nan_to_num()) < limit


@pytest.mark.parametrize("rotary", [0, 8, 16])
def test_the_reference_does_what_the_layers_functions_do(rotary):
    case = draw([20, 0], [3, 3], heads=(4, 2), rotary=rotary)
    out, k_cache, v_cache = case.run(paged_attention_window_reference)
    q, gate, k, v = case.fused.split([64, 64, 32, 32], dim=1)
    positions = torch.tensor([20, 21, 22, 0, 1, 2], device=DEVICE)
    angles = case.weights.cos[positions], case.weights.sin[positions]
    q = rms_norm_reference(q.reshape(6, 4, 16), case.weights.q_norm, case.weights.eps)
    k = rms_norm_reference(k.reshape(6, 2, 16), case.weights.k_norm, case.weights.eps)
    q, k = rotary_reference(q, *angles), rotary_reference(k, *angles)
    table = case.window.page_table.long()
    places = [torch.arange(23, device=DEVICE), torch.arange(3, device=DEVICE)]
    slots = [table[n, p // 16] * 16 + p % 16 for n, p in enumerate(places)]
    new = torch.cat([slots[0][20:], slots[1]])
    assert torch.equal(k_cache[new], k)
    assert torch.equal(v_cache[new], v.reshape(6, 2, 16))
    rows = CachedRows.of(slots, (3, 3))
    heads = paged_attention_reference(q, k_cache, v_cache, rows, case.scale)
    torch.testing.assert_close(out, heads.flatten(1) * torch.sigmoid(gate))


@pytest.mark.parametrize(
    "contexts, query_lens",
    [
        ([0], [1]),
        ([1], [1]),
        ([15, 16, 17], [1, 1, 1]),
        ([63, 64], [2, 1]),
        ([14, 0, 37], [4, 3, 1]),
        ([30], [8]),
        ([61, 5], [5, 7]),
    ],
)
def test_windows_over_any_context_equal_the_reference(contexts, query_lens):
    check(draw(contexts, query_lens))


@pytest.mark.parametrize("keys_per_split", [None, 64])
def test_long_contexts_are_split_and_combined(keys_per_split):
    case = draw([200, 3, 64], [2, 2, 1], page_size=64)
    check(case, keys_per_split=keys_per_split)


def test_a_window_may_lie_across_the_border_of_two_splits():
    case = draw([126], [4], page_size=16)
    check(case, keys_per_split=64)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_pages_of_any_power_of_two_hold_the_keys(page_size):
    check(draw([70, 15], [2, 2], page_size=page_size))


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1), (6, 2)])
def test_groups_of_any_size_share_their_keys(heads):
    check(draw([21, 34], [2, 1], heads=heads))


@pytest.mark.parametrize("d, rotary", [(16, 0), (16, 16), (24, 8), (64, 16)])
def test_heads_of_any_size_are_rotated_in_part_or_whole(d, rotary):
    check(draw([18], [2], d=d, rotary=rotary))


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float32])
def test_half_precision_rows_and_caches_are_taken(cache_dtype):
    check(draw([40, 7], [2, 1], dtype=torch.float16, cache_dtype=cache_dtype))


def test_full_precision_rows_over_half_precision_keys_multiply_in_full():
    check(draw([40, 7], [2, 1], cache_dtype=torch.float16), limit=1e-4)


def test_padding_sequences_touch_nothing_and_yield_zeros():
    case = draw([9, 0, 80, 0], [2, 0, 1, 0])
    case.window.context_lens[1] = 12345  # a stale length must not matter
    check(case)
    check(case, keys_per_split=64)
    out, _, _ = case.run()
    assert (out[2:4] == 0).all()
    assert (out[5:] == 0).all()


def test_a_batch_of_padding_alone_is_all_zeros():
    case = draw([0, 0], [0, 0], max_window=2)
    out, k_cache, _ = case.run()
    assert (out == 0).all()
    assert k_cache.isnan().all()


def test_more_sequences_than_are_read_at_once_are_found(monkeypatch):
    monkeypatch.setattr(triton_fwd, "CHUNK_SEQS", 4)
    case = draw([70, 3, 0, 9, 140, 0, 31, 1, 2], [1, 1, 0, 1, 1, 0, 1, 1, 1], heads=(1, 1))
    check(case)
    check(case, keys_per_split=64)


def test_fixed_splits_do_not_depend_on_company_or_place_in_the_window():
    case = draw([125, 40, 0, 300], [4, 2, 0, 3], max_window=4)
    together, *_ = case.run(keys_per_split=64)
    for n in (0, 1, 3):
        count = int(case.window.query_lens[n])
        rows = together[n * 4 : n * 4 + count]
        alone, k_cache, v_cache = case.only(n).run(keys_per_split=64)
        assert torch.equal(alone, rows)
        written = dataclasses.replace(case, k_cache=k_cache, v_cache=v_cache)
        for i in range(count):
            single, *_ = written.only(n, slice(i, i + 1)).run(keys_per_split=64)
            assert torch.equal(single[0], rows[i])


def test_fixed_splits_do_not_depend_on_how_long_a_context_may_become():
    case = draw([100], [2], page_size=16)
    rows, *_ = case.run(keys_per_split=64)
    table = torch.cat([case.window.page_table, torch.zeros_like(case.window.page_table)], dim=1)
    longer = dataclasses.replace(
        case, window=dataclasses.replace(case.window, page_table=table.contiguous())
    )
    assert torch.equal(longer.run(keys_per_split=64)[0], rows)


def test_a_plan_has_room_for_the_splits_of_any_batch():
    for num_seqs in (1, 8, 128):
        for max_keys in (16, 1024, 131072):
            plan = SplitPlan.of(num_seqs, 8, 2, 512, max_keys, None)
            lengths = torch.randint(1, max_keys + 1, (200, num_seqs))
            share = (lengths * plan.target // lengths.sum(1, keepdim=True)).clamp_min(1)
            keys = (lengths + share - 1) // share
            keys = ((keys + plan.BN - 1) // plan.BN * plan.BN).clamp_min(triton_fwd.MIN_KEYS)
            assert ((lengths + keys - 1) // keys).sum(1).max() <= plan.num_items
            assert plan.is_combined or max_keys <= triton_fwd.MIN_KEYS


def test_what_the_kernel_cannot_take_is_named():
    case = draw([5], [1])

    def objection(**changes):
        given = dataclasses.replace(case, **changes)
        inputs = (given.fused, given.k_cache, given.v_cache, given.weights, given.window)
        return supports(*inputs, scale=1.0)

    assert objection() is None
    assert "float64" in objection(fused=case.fused.double())
    assert "page_size = 12" in objection(window=dataclasses.replace(case.window, page_size=12))
    assert "int32" in objection(
        window=dataclasses.replace(case.window, query_lens=case.window.query_lens.long())
    )
    inputs = (case.fused, case.k_cache, case.v_cache, case.weights, case.window)
    assert "keys_per_split = 100" in supports(*inputs, scale=1.0, keys_per_split=100)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keys_per_split", [None, 512])
@pytest.mark.parametrize("max_window", [1, 2, 4, 8])
def test_flagship_shapes_equal_the_reference_on_a_gpu(dtype, keys_per_split, max_window):
    contexts = [1024, 0, 1, 255, 256, 3333, 511, 77]
    lens = [max_window, max_window, 1, max_window, 0, max(1, max_window - 1), max_window, 1]
    case = draw(contexts, lens, heads=(16, 2), d=256, rotary=64, page_size=64, dtype=dtype)
    check(case, keys_per_split=keys_per_split)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize(
    "d, heads, rotary", [(64, (8, 8), 0), (128, (16, 4), 128), (256, (8, 1), 64)]
)
@pytest.mark.parametrize("page_size", [16, 256])
def test_other_shapes_equal_the_reference_on_a_gpu(d, heads, rotary, page_size):
    case = draw([700, 31, 0, 2000], [3, 3, 1, 2], heads=heads, d=d, rotary=rotary,
                page_size=page_size, dtype=HALF, max_keys=4096)  # fmt: skip
    check(case)


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("max_window", [1, 2, 4, 8])
def test_fixed_splits_do_not_depend_on_company_at_real_sizes(max_window):
    contexts = [1020, 510, 2047, 5000, 64, 511]
    case = draw(contexts, [max_window] * 6, heads=(16, 2), d=256, rotary=64, dtype=HALF)
    together, k_cache, v_cache = case.run(keys_per_split=512)
    written = dataclasses.replace(case, k_cache=k_cache, v_cache=v_cache)
    for n in range(6):
        rows = together[n * max_window : (n + 1) * max_window]
        assert torch.equal(case.only(n).run(keys_per_split=512)[0], rows)
        for i in range(max_window):
            single, *_ = written.only(n, slice(i, i + 1)).run(keys_per_split=512)
            assert torch.equal(single[0], rows[i])


@pytest.mark.gpu
@gpu_only
def test_overlapping_launches_and_graph_replays_give_the_same_bits():
    case = draw([1000, 37, 0], [2, 1, 0], heads=(16, 2), d=256, rotary=64, dtype=HALF)
    plain, *_ = case.run()
    assert torch.equal(case.run(use_pdl=True)[0], plain)
    caches = case.k_cache.clone(), case.v_cache.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention_window_triton(
            case.fused, *caches, case.weights, case.window, scale=case.scale
        )
    for context in (1000, 999, 3):
        # A captured launch reads lengths when it is replayed.
        case.window.context_lens[0] = context
        case.window.context_lens[1] = 37
        graph.replay()
        assert torch.equal(out, case.run()[0])
