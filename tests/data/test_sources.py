import gzip
import json

import pytest
import zstandard

from qnext.data.sources import RecordFormat, find_files, read_documents

RECORDS = [{"text": f"text {i} é", "license": "CC0", "lang": "en"} for i in range(2000)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def texts(file, record_format=None):
    return [document.text for document in read_documents(file, record_format or RecordFormat())]


@pytest.mark.parametrize("suffix", ["", ".zst", ".gz"])
def test_jsonl_is_read_plain_and_compressed(tmp_path, suffix):
    pack = {"": bytes, ".zst": zstandard.compress, ".gz": gzip.compress}[suffix]
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(LINES.encode()))
    assert texts(file) == [record["text"] for record in RECORDS]
    document = next(iter(read_documents(file, RecordFormat())))
    assert (document.license, document.language) == ("CC0", "en")
    assert document.origin == f"{file}, line 1"


def test_several_zstandard_frames_are_one_file(tmp_path):
    file = tmp_path / "a.jsonl.zst"
    half = LINES.index("\n") + 1
    frames = [zstandard.compress(part.encode()) for part in (LINES[:half], LINES[half:])]
    file.write_bytes(b"".join(frames))
    assert len(texts(file)) == len(RECORDS)


def test_parquet_and_text_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a", "b"], "license": ["MIT", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = list(read_documents(tmp_path / "a.parquet", RecordFormat(license="none")))
    assert [(item.text, item.license) for item in found] == [("a", "MIT"), ("b", "none")]
    (tmp_path / "b.txt").write_text("two\nlines")
    assert texts(tmp_path / "b.txt") == ["two\nlines"]
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="c.parquet.*corrupt parquet"):
        texts(tmp_path / "c.parquet")


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_truncated_and_corrupt_files_are_named_with_a_line(tmp_path, suffix):
    pack = {".zst": zstandard.compress, ".gz": gzip.compress}[suffix]
    packed = pack(LINES.encode())
    file = tmp_path / f"a.jsonl{suffix}"
    for size in (len(packed) // 2, len(packed) - 1, 3):
        file.write_bytes(packed[:size])
        with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}, after line \d+: truncated"):
            texts(file)
    damaged = bytearray(packed)
    damaged[len(packed) // 2 : len(packed) // 2 + 8] = b"\xff" * 8
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}"):
        texts(file)


def test_bad_lines_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"\n')
    with pytest.raises(ValueError, match="a.jsonl, line 3: not JSON"):
        texts(file)
    file.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2: key 'text' holds no text; .*\['body'\]"):
        texts(file)
    file.write_bytes(b'{"text": "a"}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: not UTF-8"):
        texts(file)
    file.write_text('{"messages": "a"}\n')
    with pytest.raises(ValueError, match="line 1: key 'messages' holds no list"):
        texts(file, RecordFormat(is_chat=True))


def test_text_is_made_of_several_keys_and_patterns_cut_out(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": "1+1?", "answer": "<<1+1=2>>2"}))
    record_format = RecordFormat(text_format="{question} {answer}", remove_pattern="<<[^>]*>>")
    assert texts(file, record_format) == ["1+1? 2"]
    with pytest.raises(ValueError, match="text_format .* wants the key 'reply'"):
        texts(file, RecordFormat(text_format="{reply}"))


def test_unknown_kinds_and_missing_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ValueError, match="unknown kind of file"):
        texts(tmp_path / "a.doc")
    with pytest.raises(ValueError, match="no file matches"):
        find_files(str(tmp_path / "*.parquet"))
    monkeypatch.delenv("QNEXT_NOWHERE", raising=False)
    with pytest.raises(ValueError, match="environment variable that is not set"):
        find_files("$QNEXT_NOWHERE/a.jsonl")
