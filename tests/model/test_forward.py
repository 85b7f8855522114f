"""The model against itself: packing, caching and drafting change nothing."""

import pytest
import torch

from qnext.cache.hybrid import HybridCache
from qnext.kernels.dispatch import use_backend
from qnext.model.batch import CacheInputs, ForwardBatch
from tests.model.tiny import tiny_model

PAGE = 8


def _error(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def _limit(dtype):
    return 1e-5 if dtype == torch.float32 else 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", ["paper", "hf"])
def test_packed_equals_separate_forward_and_backward(dtype, decay):
    model = tiny_model(dtype=dtype, decay=decay)
    lengths = (1, 70, 5, 64, 3)
    ids = torch.randint(0, 97, (sum(lengths),))
    batch = ForwardBatch.packed(ids, lengths)
    weights = torch.randn(sum(lengths), 32, dtype=dtype)

    def run(part, weight):
        hidden = model(part)
        drafts = model.mtp_hidden(hidden, part, 2)
        keep = [torch.arange(n) < n - 1 - step for step in range(2) for n in part.seq_lens]
        half = len(keep) // 2
        masks = (torch.cat(keep[:half]), torch.cat(keep[half:]))
        loss = (hidden * weight).sum()
        for mask, draft in zip(masks, drafts, strict=True):
            loss = loss + (draft * weight)[mask].sum()
        return hidden, loss

    hidden, loss = run(batch, weights)
    packed_grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    states, total = [], 0.0
    for part, weight in zip(ids.split(lengths), weights.split(lengths), strict=True):
        state, part_loss = run(ForwardBatch.packed(part), weight)
        states.append(state)
        total = total + part_loss
    separate_grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    assert _error(hidden, torch.cat(states)) < _limit(dtype)
    names = [name for name, _ in model.named_parameters()]
    for name, ours, expected in zip(names, packed_grads, separate_grads, strict=True):
        if expected is not None and expected.norm() > 0:
            # Gradients of A_log and dt_bias sum terms of both signs over all tokens.
            assert _error(ours, expected) < 50 * _limit(dtype), name


def _cached(model, ids, splits, *, commit=True, max_window=8):
    """Hidden states of a sequence run in the given parts: (length, is_window, accepted)."""
    cache = HybridCache(
        model.config,
        has_mtp=model.has_mtp,
        num_pages=32,
        page_size=PAGE,
        num_state_slots=3,
        max_window=max_window,
        dtype=model.dtype,
    )
    cache.reset_state([2])
    pages = torch.arange(31, -1, -1, dtype=torch.int32)[None]
    states, start = [], 0
    for length, is_window, accepted in splits:
        index = torch.arange(start, start + length)
        slots = pages[0].long()[index // PAGE] * PAGE + index % PAGE
        places = CacheInputs(pages, slots, (start,), (2,), is_window)
        batch = ForwardBatch(
            token_ids=ids[start : start + length],
            position_ids=index,
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            seq_lens=(length,),
            cache_inputs=places,
        )
        with torch.no_grad():
            hidden = model(batch, cache)
        if is_window and commit:
            cache.commit((2,), (accepted,))
        states.append(hidden[:accepted])
        start += accepted
    return torch.cat(states), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "splits",
    [
        [(90, False, 90)],
        [(1, False, 1), (89, False, 89)],
        [(64, False, 64), (26, False, 26)],
        [(37, False, 37)] + [(1, True, 1)] * 53,
        [(1, True, 1)] * 90,
        [(50, False, 50), (4, True, 2), (3, True, 3), (5, True, 0), (5, True, 1), (34, False, 34)],
    ],
    ids=["whole", "one-rest", "chunks", "decode", "all-decode", "windows"],
)
def test_prefill_then_decode_equals_one_pass(splits, dtype):
    model = tiny_model(dtype=dtype, scale=3.0)
    ids = torch.randint(0, 97, (90,))
    with torch.no_grad():
        whole = model(ForwardBatch.packed(ids))
    states, _ = _cached(model, ids, splits)
    assert states.shape == whole.shape
    assert _error(states, whole) < _limit(dtype)


def test_a_rejected_window_leaves_the_states_of_the_last_accepted_token_bit_for_bit():
    model = tiny_model()
    ids = torch.randint(0, 97, (40,))
    plain = [(20, False, 20)] + [(1, True, 1)] * 10
    drafted = [
        (20, False, 20),
        (5, True, 1),
        (5, True, 4),
        (8, True, 0),
        (3, True, 3),
        (4, True, 2),
    ]
    _, expected = _cached(model, ids, plain)
    _, ours = _cached(model, ids, drafted)
    for name in ("recurrent_state", "conv_state"):
        a, b = getattr(ours.state_pool, name), getattr(expected.state_pool, name)
        assert torch.equal(a[:, 2], b[:, 2]), name
    rows = torch.arange(30)
    pages = torch.arange(31, -1, -1)
    slots = pages[rows // PAGE] * PAGE + rows % PAGE
    for ours_kv, expected_kv in (
        (ours.kv_pool.k, expected.kv_pool.k),
        (ours.kv_pool.v, expected.kv_pool.v),
    ):
        assert torch.equal(ours_kv[:-1, slots], expected_kv[:-1, slots])


@pytest.mark.parametrize("k", [1, 3])
def test_cached_drafting_gives_what_mtp_logits_gives(k):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(0, 97, (30,))
    expected = model.mtp_logits(ids, k)
    hidden, cache = _cached(model, ids, [(30, False, 30)])
    pages = torch.arange(31, -1, -1, dtype=torch.int32)[None]

    def step(start, next_ids, states, is_window):
        index = torch.arange(start, start + len(next_ids))
        slots = pages[0].long()[index // PAGE] * PAGE + index % PAGE
        places = CacheInputs(pages, slots, (start,), (2,), is_window)
        batch = ForwardBatch(
            token_ids=next_ids,
            position_ids=index,
            cu_seqlens=torch.tensor([0, len(next_ids)], dtype=torch.int32),
            seq_lens=(len(next_ids),),
            cache_inputs=places,
        )
        with torch.no_grad():
            return model.mtp_step(next_ids, states, batch, cache)

    for last in (0, 1, 11, 29 - k):
        states = step(0, ids[1 : last + 2], hidden[: last + 1], False)
        logits = [model.compute_logits(states[-1:])]
        for depth in range(1, k):
            states = step(last + depth, ids[last + 1 + depth :][:1], states[-1:], True)
            logits.append(model.compute_logits(states))
        ours = torch.cat(logits).detach()
        torch.testing.assert_close(ours, expected[last], rtol=1e-10, atol=1e-10)


def test_mtp_logits_are_nan_where_the_tokens_they_read_are_missing():
    model = tiny_model()
    logits = model.mtp_logits(torch.randint(0, 97, (6,)), 3)
    missing = logits.isnan().all(-1)
    assert logits.isnan().any(-1).equal(missing)
    expected = [[t + 1 + j > 5 for j in range(3)] for t in range(6)]
    assert missing.tolist() == expected


@pytest.mark.parametrize(
    "token_ids, message",
    [
        ([1, 2], "token_ids is a list"),
        (torch.tensor([[1, 2]]), "shape"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([], dtype=torch.int64), "token_ids is empty"),
        (torch.tensor([3, -1]), "token_ids holds -1; ids go from 0 to"),
        (torch.tensor([3, 10**6]), "token_ids holds 1000000; ids go from 0 to"),
    ],
)
def test_what_is_no_sequence_of_token_ids_is_refused(token_ids, message):
    model = tiny_model()
    for score in (model.logits, model.mtp_logits):
        with pytest.raises(ValueError, match=message):
            score(token_ids)


@pytest.mark.parametrize("k", [0, -1, 1.5, None])
def test_a_number_of_mtp_steps_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match=f"num_steps = {k}: must be an integer, at least 1"):
        tiny_model().mtp_logits(torch.tensor([1, 2, 3]), k)


def test_mtp_sees_no_later_token():
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(0, 97, (20,))
    changed = ids.clone()
    changed[12:] = (changed[12:] + 1) % 97
    a, b = model.mtp_logits(ids, 3), model.mtp_logits(changed, 3)
    for j in range(3):
        last = 11 - 1 - j  # reads tokens up to t + 1 + j
        torch.testing.assert_close(a[: last + 1, j], b[: last + 1, j], rtol=1e-11, atol=1e-12)
        assert _error(a[last + 1, j], b[last + 1, j]) > 1e-6


def test_backends_agree():
    model = tiny_model()
    ids = torch.randint(0, 97, (150,))
    fast = model.logits(ids)
    with use_backend("reference"):
        plain = model.logits(ids)
    assert _error(fast, plain) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_window_rows_do_not_depend_on_their_company(threads):
    """The promise that greedy text rests on: the same row, alone and among others."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny_model(hidden_size=48, linear_num_value_heads=6, linear_num_key_heads=3)
        cache = HybridCache(
            model.config,
            has_mtp=True,
            num_pages=64,
            page_size=PAGE,
            num_state_slots=9,
            max_window=5,
            dtype=torch.float32,
        )
        torch.manual_seed(0)
        cache.state_pool.recurrent_state.normal_()
        cache.state_pool.conv_state.normal_()
        cache.kv_pool.k.normal_()
        cache.kv_pool.v.normal_()
        lengths = (5, 1, 4, 2, 3, 5, 5, 1)
        contexts = (3, 17, 30, 0, 9, 41, 11, 26)
        tokens = [torch.randint(0, 97, (length,)) for length in lengths]
        tables = torch.randperm(64).view(8, 8).to(torch.int32)

        def run(members, cut=None):
            index = [torch.arange(contexts[m], contexts[m] + (cut or lengths[m])) for m in members]
            slots = [
                tables[m].long()[at // PAGE] * PAGE + at % PAGE
                for m, at in zip(members, index, strict=True)
            ]
            counts = tuple(len(at) for at in index)
            places = CacheInputs(
                tables[list(members)],
                torch.cat(slots),
                tuple(contexts[m] for m in members),
                tuple(members),
                True,
            )
            batch = ForwardBatch(
                token_ids=torch.cat([tokens[m][:n] for m, n in zip(members, counts, strict=True)]),
                position_ids=torch.cat(index),
                cu_seqlens=torch.tensor((0, *counts)).cumsum(0).to(torch.int32),
                seq_lens=counts,
                cache_inputs=places,
            )
            with torch.no_grad():
                hidden = model(batch, cache)
                return model.compute_logits(hidden, row_stable=True).split(counts)

        together = run(range(8))
        for member in range(8):
            assert torch.equal(run([member])[0], together[member])
            assert torch.equal(run([member], cut=1)[0], together[member][:1])
        for pair in ((6, 2), (1, 7), (0, 5)):
            for ours, member in zip(run(pair), pair, strict=True):
                assert torch.equal(ours, together[member])
    finally:
        torch.set_num_threads(before)
