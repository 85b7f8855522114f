"""The safetensors header: read by ourselves, so that a file that lies is refused before any read.

A file is the header's length in 8 bytes, little-endian; the header, JSON; the tensors' bytes. The
header maps each name to dtype, shape and [begin, end) within those bytes, which must be covered
without gap or overlap.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """The format's own code, such as BF16."""
    shape: tuple[int, ...]
    start_bytes: int
    """From the beginning of the file."""
    end_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.end_bytes - self.start_bytes


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Returns the bytes of a tensor of this dtype code and shape."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Reads and checks one file's header; no tensor's bytes are touched.

    Raises:
        ValueError: the file is missing, truncated or longer than its header says, or the header is
            no valid one; the text names the file, and the tensor where one is at fault.
    """
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = _read_length(path, file.read(_LENGTH_BYTES), file_bytes)
            text = file.read(header_bytes)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    table = _parse(path, text)
    table.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + header_bytes
    entries = {name: _entry(path, name, item, data_start) for name, item in table.items()}
    _check_cover(path, entries, data_start, file_bytes)
    return entries


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Returns length and header for tensors that follow one another in the mapping's order.

    Args:
        tensors: dtype code and shape by name.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + tensor_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces up to a multiple of 8 keep the tensors aligned in a memory map.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_length(path: Path, prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise ValueError(f"{path}: truncated: {file_bytes} bytes hold no safetensors header")
    header_bytes: int = struct.unpack("<Q", prefix)[0]
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: no safetensors file: its header would take {header_bytes:,} bytes, "
            f"allowed are {MAX_HEADER_BYTES:,}"
        )
    if _LENGTH_BYTES + header_bytes > file_bytes:
        raise ValueError(
            f"{path}: truncated: the header takes {header_bytes:,} bytes, "
            f"the file has {file_bytes:,}"
        )
    return header_bytes


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: corrupt header: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: corrupt header: a JSON object is allowed here")
    return table


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {repeated!r} occurs twice")
    return table


def _entry(path: Path, name: str, item: Any, data_start: int) -> TensorEntry:
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name}: dtype, shape and data_offsets are needed, no more")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{path}: {name}: unknown dtype {dtype!r}")
    if not _is_counts(shape):
        raise ValueError(f"{path}: {name}: shape {shape!r} is no list of counts")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{path}: {name}: data_offsets {offsets!r} are no range")
    expected, found = tensor_bytes(dtype, shape), offsets[1] - offsets[0]
    if expected != found:
        raise ValueError(
            f"{path}: {name}: {dtype} of shape {shape} takes {expected:,} bytes, "
            f"data_offsets give {found:,}"
        )
    return TensorEntry(path, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(
    path: Path, entries: Mapping[str, TensorEntry], data_start: int, file_bytes: int
) -> None:
    position = data_start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].start_bytes, item[1].end_bytes)
    ):
        if entry.end_bytes > file_bytes:
            raise ValueError(
                f"{path}: truncated: {name} ends at byte {entry.end_bytes:,}, "
                f"the file has {file_bytes:,}"
            )
        if entry.start_bytes != position:
            kind = "overlaps another tensor" if entry.start_bytes < position else "follows a gap"
            raise ValueError(
                f"{path}: {name} {kind}: it begins at byte {entry.start_bytes:,}, "
                f"expected is {position:,}"
            )
        position = entry.end_bytes
    if position != file_bytes:
        raise ValueError(
            f"{path}: the header describes {position:,} bytes, the file has {file_bytes:,}"
        )
