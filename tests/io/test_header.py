"""Safetensors headers: what the library writes is read, and every lie is refused by file name."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from qnext.io.header import encode_header, read_header
from qnext.io.reader import CheckpointReader


def write_raw(path, table, num_data_bytes):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_data_bytes))
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_file_of_the_library_is_read(tmp_path):
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16),
        "b": torch.randn(7),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.zeros(0, 4, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = CheckpointReader(tmp_path)
    assert set(reader.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def test_a_tensor_off_its_alignment_is_read(tmp_path):
    values = torch.randn(4)
    table = {"x": entry("U8", (3,), (0, 3)), "y": entry("F32", (4,), (3, 19))}
    path = write_raw(tmp_path / "model.safetensors", table, 0)
    with open(path, "ab") as file:
        file.write(bytes(3) + values.numpy().tobytes())
    assert torch.equal(CheckpointReader(tmp_path).read("y"), values)


def test_the_header_we_write_is_the_one_we_read(tmp_path):
    header = encode_header({"a": ("F32", (2, 3)), "b": ("BF16", ())})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(26))
    entries = read_header(path)
    assert entries["a"].shape == (2, 3)
    assert (entries["b"].shape, entries["b"].num_bytes) == ((), 2)


@pytest.mark.parametrize(
    "table,num_data_bytes,words",
    [
        ({"x": entry("F31")}, 8, ["x", "unknown dtype 'F31'"]),
        ({"x": entry(dtype=["F32"])}, 8, ["x", "unknown dtype"]),
        ({"x": entry(shape=(3,))}, 8, ["x", "takes 12 bytes", "give 8"]),
        ({"x": entry(shape=(-2,), offsets=(0, 8))}, 8, ["x", "shape [-2]"]),
        ({"x": entry(shape=(2.0,))}, 8, ["x", "shape [2.0]"]),
        ({"x": entry(offsets=(8, 0))}, 8, ["x", "no range"]),
        ({"x": entry(offsets=(-8, 0))}, 8, ["x", "no range"]),
        ({"x": entry(offsets=(0, 8, 9))}, 8, ["x", "no range"]),
        ({"x": entry()}, 7, ["truncated", "x", "ends at byte"]),
        ({"x": entry()}, 9, ["describes", "the file has"]),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, 12, ["y overlaps"]),
        ({"x": entry(), "y": entry(offsets=(0, 8))}, 8, ["overlaps"]),
        ({"x": entry(), "y": entry(offsets=(16, 24))}, 24, ["y follows a gap"]),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8, ["x", "data_offsets"]),
        ({"x": [1]}, 8, ["x", "dtype"]),
        (b'{"x": 1, "x": 2}', 0, ["'x' occurs twice"]),
        (b"[1]", 0, ["a JSON object"]),
        (b'{"x": ', 0, ["corrupt header"]),
        (b"\xff\xfe{}", 0, ["corrupt header"]),
        (b"[" * 200_000, 0, ["corrupt header"]),
    ],
)
def test_a_header_that_lies_is_refused_with_the_file_named(tmp_path, table, num_data_bytes, words):
    path = write_raw(tmp_path / "bad.safetensors", table, num_data_bytes)
    with pytest.raises(ValueError) as caught:
        read_header(path)
    for word in ["bad.safetensors", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "content,word",
    [
        (b"", "truncated"),
        (b"\x01\x00", "truncated"),
        (struct.pack("<Q", 50) + b"{}", "truncated"),
        (struct.pack("<Q", 2**63), "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1", "no safetensors file"),
    ],
)
def test_a_file_too_short_for_its_header_is_refused(tmp_path, content, word):
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"short.safetensors.*{word}"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone.safetensors: cannot be read"):
        read_header(tmp_path / "gone.safetensors")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    save_file({"a": torch.randn(9, 3), "b": torch.randn(2)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(0, len(content), 7):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut.safetensors"):
            read_header(path)
