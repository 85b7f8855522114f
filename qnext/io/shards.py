"""Which file holds which tensor: the index of a sharded checkpoint, or its single file."""

import re
from pathlib import Path
from typing import Any

from qnext.io.header import TensorEntry, read_header
from qnext.io.json_file import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"model(-v\d+)?-\d{5}-of-\d{5}\.safetensors(\.tmp)?")


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Reads and checks the headers of all files of a checkpoint.

    Where an index and a single file lie side by side, the index counts: it is written last.

    Returns:
        Each tensor's place, by name.

    Raises:
        ValueError: no weights, a file that the index names is missing or invalid, or index and
            files disagree; the text names the file.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _read_indexed(index)
    single = folder / SINGLE_NAME
    if single.is_file():
        return read_header(single)
    raise ValueError(f"{folder}: no weights: neither {INDEX_NAME} nor {SINGLE_NAME} is there")


def has_weights(folder: Path) -> bool:
    """Says whether the folder holds an index or a single file of weights."""
    return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()


def read_weight_map(index: Path) -> dict[str, str]:
    """Returns the file name of each tensor that an index lists.

    Raises:
        ValueError: the index is no valid one, or leads out of its folder.
    """
    table = read_json(index)
    weight_map: Any = table.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map is missing, or no table")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[^/\\]+", file_name):
            raise ValueError(f"{index}: {name} lies in {file_name!r}: a plain file name is allowed")
    return weight_map


def saved_files(folder: Path) -> set[Path]:
    """Returns the weight files of the checkpoint in a folder and those of interrupted saves."""
    index = folder / INDEX_NAME
    names = set(read_weight_map(index).values()) if index.is_file() else set()
    names.add(SINGLE_NAME)
    return {
        path
        for path in folder.iterdir()
        if path.is_file() and (path.name in names or _SHARD_NAME.fullmatch(path.name))
    }


def _read_indexed(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_weight_map(index)
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file_name in sorted(set(weight_map.values())):
        path = index.parent / file_name
        if not path.is_file():
            raise ValueError(f"{path}: missing, but {index.name} names it")
        headers[file_name] = read_header(path)
    entries: dict[str, TensorEntry] = {}
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise ValueError(
                f"{index.parent / file_name}: holds no tensor {name}, but {index.name} says so"
            )
        entries[name] = headers[file_name][name]
    for file_name, header in headers.items():
        for name in header:
            if weight_map.get(name) != file_name:
                raise ValueError(
                    f"{index.parent / file_name}: holds tensor {name}, but {index.name} does not "
                    "say so"
                )
    return entries
