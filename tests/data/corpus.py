"""A small corpus, prepared once per test session."""

import json
from pathlib import Path

from qnext.data.prepare import PrepareConfig, SourceConfig, prepare
from qnext.data.shards import View

NANO = Path(__file__).parents[2] / "qnext/assets/nano"


def write_jsonl(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def story(seed, length):
    return " ".join(f"{(seed * 7919 + i * i) % 997}" for i in range(length))


def prepare_corpus(folder, name="shards", **options):
    """Sources `short` (40 documents), `long` (6), `chat` (30); view `pieces` on `long`."""
    short = [{"text": story(i, 3 + i), "license": "CC0", "lang": "en"} for i in range(40)]
    long = [{"text": story(100 + i, 60 + 30 * i)} for i in range(6)]
    chat = [
        {
            "messages": [
                {"role": "user", "content": f"{i} + 1?"},
                {"role": "assistant", "content": str(i + 1)},
            ]
        }
        for i in range(30)
    ]
    sources = (
        SourceConfig("short", (write_jsonl(folder / "short.jsonl", short),)),
        SourceConfig("long", (write_jsonl(folder / "long.jsonl", long),), license="MIT"),
        SourceConfig("chat", (write_jsonl(folder / "chat.jsonl", chat),), kind="chat"),
    )
    config = PrepareConfig(
        tokenizer=str(NANO),
        output=str(folder / name),
        source=sources,
        view=(View("pieces", ("long",), min_document_tokens=64),),
        **{"shard_tokens": 1500, **options},
    )
    lines = []
    return prepare(config, lines.append), lines
