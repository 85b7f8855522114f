import json

import numpy as np
import pytest

from qnext import tokenizer as tokenizer_package
from qnext.data.prepare import PrepareConfig, SourceConfig, prepare
from qnext.data.shards import ShardSet, open_shards
from tests.data.corpus import NANO, prepare_corpus, write_jsonl


@pytest.fixture(scope="module")
def nano():
    return tokenizer_package.load(NANO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))[0]


def documents(source):
    return [source.read(i, 0, int(n)) for i, n in enumerate(source.lengths)]


def test_every_document_comes_back_with_its_end_token(folder, nano):
    source = open_shards(folder).sources["short"]
    lines = (folder.parent / "short.jsonl").read_text().splitlines()
    found = documents(source)
    assert len(found) == source.num_documents == 40
    assert len(source.shards) > 1
    for line, (tokens, mask) in zip(lines, found, strict=True):
        assert tokens.dtype == np.uint16
        assert mask is None
        assert tokens[-1] == nano.end_of_text_id
        assert nano.decode(tokens[:-1].tolist()) == json.loads(line)["text"]


def test_chat_counts_the_loss_on_answers_only(folder, nano):
    source = open_shards(folder).sources["chat"]
    for idx, (tokens, mask) in enumerate(documents(source)):
        assert nano.decode(tokens[mask == 1].tolist()) == f"{idx + 1}<|im_end|>"
        assert mask[-1] == 0


def test_the_manifest_says_what_is_there(folder):
    shards = open_shards(folder)
    short, long, chat = shards.manifest["sources"]
    assert short["licenses"] == {"CC0": 40}
    assert short["languages"] == {"en": 40}
    assert long["licenses"] == {"MIT": 6}
    assert short["tokens"] == short["loss_tokens"] == sum(shards.sources["short"].lengths)
    assert chat["loss_tokens"] < chat["tokens"]
    assert shards.tokenizer_sha256 == tokenizer_package.load(NANO).sha256
    assert tokenizer_package.load(shards.tokenizer_path).sha256 == shards.tokenizer_sha256
    shards.verify()


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    again, _ = prepare_corpus(tmp_path)
    assert ShardSet(again).fingerprint == ShardSet(folder).fingerprint


def test_duplicates_are_dropped_across_sources_and_counted(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "One story."}, {"text": "one  STORY."}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "One story."}, {"text": "Two."}])
    config = PrepareConfig(
        tokenizer=str(NANO),
        output=str(tmp_path / "out"),
        source=(SourceConfig("a", (first,)), SourceConfig("b", (second,))),
    )
    shards = open_shards(prepare(config, lambda line: None))
    counts = [(entry["documents"], entry["dropped_exact"]) for entry in shards.manifest["sources"]]
    assert counts == [(1, 1), (1, 1)]


def test_near_duplicates_are_dropped_when_asked_for(tmp_path):
    pytest.importorskip("datasketch")
    text = " ".join(f"word{i}" for i in range(200))
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": f"{text} end"}])
    for is_near, expected in ((False, (2, 0)), (True, (1, 1))):
        config = PrepareConfig(
            tokenizer=str(NANO),
            output=str(tmp_path / f"near {is_near}"),
            source=(SourceConfig("a", (file,)),),
            near_dedup=is_near,
        )
        entry = open_shards(prepare(config, lambda line: None)).manifest["sources"][0]
        assert (entry["documents"], entry["dropped_near"]) == expected


def test_control_tokens_in_documents_stay_text(tmp_path, nano):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a<|endoftext|>b"}])
    source = SourceConfig("a", (file,))
    config = PrepareConfig(tokenizer=str(NANO), output=str(tmp_path / "out"), source=(source,))
    shards = open_shards(prepare(config, lambda line: None))
    tokens, _ = shards.sources["a"].read(0, 0, int(shards.sources["a"].lengths[0]))
    assert tokens.tolist().count(nano.end_of_text_id) == 1


def test_filters_keep_what_they_say(tmp_path):
    records = [
        {"text": "short", "lang": "en"},
        {"text": "long enough é", "lang": "en"},
        {"text": "long enough", "lang": "de"},
        {"text": "long enough", "lang": "en"},
    ]
    source = SourceConfig(
        "a",
        (write_jsonl(tmp_path / "a.jsonl", records),),
        languages=("en",),
        min_characters=6,
        ascii_only=True,
    )
    config = PrepareConfig(tokenizer=str(NANO), output=str(tmp_path / "out"), source=(source,))
    entry = open_shards(prepare(config, lambda line: None)).manifest["sources"][0]
    assert (entry["documents"], entry["dropped_filter"]) == (1, 3)


def test_generated_conversations_become_a_source(tmp_path):
    source = SourceConfig("sums", generator="arithmetic", generator_count=50, kind="chat")
    config = PrepareConfig(tokenizer=str(NANO), output=str(tmp_path / "out"), source=(source,))
    shards = open_shards(prepare(config, lambda line: None))
    assert 40 < shards.sources["sums"].num_documents <= 50


def test_an_error_leaves_nothing_behind(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}])
    (tmp_path / "b.jsonl").write_text('{"text": "fine too"}\n{"text": \n')
    sources = (SourceConfig("a", (good,)), SourceConfig("b", (str(tmp_path / "b.jsonl"),)))
    config = PrepareConfig(tokenizer=str(NANO), output=str(tmp_path / "out"), source=sources)
    with pytest.raises(ValueError, match="b.jsonl, line 2: not JSON"):
        prepare(config, lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_an_existing_output_is_refused(folder):
    with pytest.raises(ValueError, match="exists: remove it or name another"):
        prepare_corpus(folder.parent, folder.name)


def test_damaged_shards_are_named(tmp_path):
    folder, _ = prepare_corpus(tmp_path)
    tokens = folder / "long/shard-00000.tokens.npy"
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="shard-00000.tokens.npy is missing, truncated"):
        open_shards(folder)
    tokens.write_bytes(data[:-2] + b"\x01\x01")
    with pytest.raises(ValueError, match="shard-00000.tokens.npy differs from the manifest"):
        open_shards(folder).verify()
    tokens.unlink()
    with pytest.raises(ValueError, match="shard-00000.tokens.npy is missing"):
        open_shards(folder)
    (folder / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="format 'other'"):
        open_shards(folder)
    with pytest.raises(ValueError, match="has no manifest.json"):
        open_shards(tmp_path)


def test_contradicting_source_settings_are_refused():
    with pytest.raises(ValueError, match="either inputs or generator"):
        SourceConfig("a")
    with pytest.raises(ValueError, match="must do as the name of a folder"):
        SourceConfig("a/b", ("x",))
    with pytest.raises(ValueError, match="source name 'a' is given twice"):
        PrepareConfig("t", "o", (SourceConfig("a", ("x",)), SourceConfig("a", ("y",))))
