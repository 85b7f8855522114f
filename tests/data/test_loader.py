import json
from collections import Counter
from itertools import islice

import pytest
import torch

from qnext import tokenizer as tokenizer_package
from qnext.data.loader import PackedLoader
from qnext.data.shards import open_shards
from tests.data.corpus import NANO, prepare_corpus

ALL = {"short": 1.0, "long": 2.0, "chat": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return open_shards(prepare_corpus(tmp_path_factory.mktemp("corpus"))[0])


def loader_of(shards, mixture=ALL, context=128, rows=3, seed=0, **options):
    return PackedLoader(shards, mixture, context=context, rows=rows, seed=seed, **options)


def assert_equal(left, right):
    for name in ("token_ids", "loss_mask", "cu_seqlens"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.segments == right.segments


def test_a_batch_is_full_rows_with_a_border_at_each_row(shards):
    for batch in islice(loader_of(shards), 20):
        assert batch.token_ids.shape == batch.loss_mask.shape == (3 * 128,)
        assert batch.token_ids.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        bounds = batch.cu_seqlens.tolist()
        assert bounds == sorted(set(bounds))
        assert {0, 128, 256, 384} <= set(bounds)


def test_every_segment_is_what_its_address_says(shards):
    for batch in islice(loader_of(shards), 20):
        bounds = batch.cu_seqlens.tolist()
        for start, segment in zip(bounds, batch.segments, strict=False):
            shard = shards.sources[segment.source].shards[segment.shard_idx]
            base = int(shard.borders[segment.document_idx]) + segment.start
            piece = slice(base, base + segment.length)
            span = slice(start, start + segment.length)
            assert batch.token_ids[span].tolist() == shard.tokens[piece].tolist()
            expected = [1] * segment.length
            if shard.loss_mask is not None:
                expected = shard.loss_mask[piece].tolist()
            assert batch.loss_mask[span].tolist() == expected
        assert batch.segments[0].source in batch.address
        assert sum(batch.tokens_of_source.values()) == 384


def test_an_epoch_of_text_holds_every_token_once(shards):
    source = shards.sources["long"]
    batches = loader_of(shards, {"long": 1.0}, context=100, rows=1)
    seen = Counter()
    total = 0
    while total + 100 <= source.num_tokens:
        for segment in next(batches).segments:
            key = (segment.shard_idx, segment.document_idx)
            for token in range(segment.start, segment.start + segment.length):
                seen[(*key, token)] += 1
                total += 1
    assert set(seen.values()) == {1}


def test_conversations_start_again_instead_of_being_cut_off(shards):
    for batch in islice(loader_of(shards, {"chat": 1.0}, context=50), 20):
        assert all(segment.start == 0 for segment in batch.segments)


def test_shares_follow_the_weights(shards):
    counts = Counter()
    for batch in islice(loader_of(shards, {"short": 3.0, "chat": 1.0}), 40):
        counts.update(batch.tokens_of_source)
    assert counts["short"] / sum(counts.values()) == pytest.approx(0.75, abs=0.02)


def test_long_pieces_open_their_rows_whole(shards):
    context = 128
    counts = Counter()
    for batch in islice(loader_of(shards, {"pieces": 0.6, "short": 0.4}, context=context), 40):
        bounds = batch.cu_seqlens.tolist()
        for start, segment in zip(bounds, batch.segments, strict=False):
            counts[segment.source] += segment.length
            if segment.source == "long":
                assert start % context == 0
                assert context / 2 <= segment.length <= context
    assert counts["long"] / sum(counts.values()) == pytest.approx(0.6, abs=0.05)


def test_the_seed_and_the_stage_decide_the_order(shards):
    first = next(loader_of(shards))
    assert_equal(first, next(loader_of(shards)))
    assert_equal(first, next(loader_of(shards, dict(reversed(ALL.items())))))
    for other in ({"seed": 1}, {"stage": "two"}):
        assert not torch.equal(first.token_ids, next(loader_of(shards, **other)).token_ids)


@pytest.mark.parametrize("mixture", [ALL, {"pieces": 0.7, "chat": 0.3}])
def test_resume_goes_on_at_the_exact_token(shards, mixture):
    whole = loader_of(shards, mixture)
    batches = list(islice(whole, 30))
    for stop in (0, 1, 7, 29):
        first = loader_of(shards, mixture)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        resumed = loader_of(shards, mixture)
        resumed.load_state_dict(state)
        for expected in batches[stop:]:
            got = next(resumed)
            assert_equal(got, expected)
            assert got.first_row == expected.first_row


def test_rows_in_a_batch_do_not_change_the_stream(shards):
    wide = next(loader_of(shards, rows=6))
    narrow = loader_of(shards, rows=3)
    parts = torch.cat([next(narrow).token_ids, next(narrow).token_ids])
    assert torch.equal(wide.token_ids, parts)


def test_a_state_of_another_mixture_is_refused(shards):
    state = loader_of(shards).state_dict()
    for other in ({"mixture": {"short": 1.0}}, {"context": 64}, {"seed": 1}, {"stage": "two"}):
        with pytest.raises(ValueError, match="saved with other shards, mixture"):
            loader_of(shards, **other).load_state_dict(state)


def test_bounds_are_padded_to_a_fixed_length(shards):
    loose = next(loader_of(shards))
    padded = next(loader_of(shards, num_segments=100))
    num_bounds = len(loose.cu_seqlens)
    assert padded.cu_seqlens.shape == (101,)
    assert torch.equal(padded.cu_seqlens[:num_bounds], loose.cu_seqlens)
    assert (padded.cu_seqlens[num_bounds:] == 384).all()
    with pytest.raises(ValueError, match="num_segments 2: a batch holds"):
        next(loader_of(shards, num_segments=2))


def test_wrong_mixtures_are_refused(shards):
    with pytest.raises(ValueError, match="source 'nothing' is not in .*known: short, long, chat"):
        loader_of(shards, {"nothing": 1.0})
    with pytest.raises(ValueError, match="weight 0 must be above 0"):
        loader_of(shards, {"short": 0})
    with pytest.raises(ValueError, match="at least one source"):
        loader_of(shards, {})
    with pytest.raises(ValueError, match="context 0"):
        loader_of(shards, context=0)


def test_a_document_reads_as_its_text(shards):
    nano = tokenizer_package.load(NANO)
    batch = next(loader_of(shards, {"short": 1.0}))
    end = batch.cu_seqlens[1]
    assert nano.decode(batch.token_ids[:end].tolist()).endswith("<|endoftext|>")
