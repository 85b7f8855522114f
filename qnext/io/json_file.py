"""JSON files whose errors name the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnext.io.atomic import write_atomic


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        ValueError: the file is missing or no such JSON; the text names it.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: a JSON object is allowed here")
    return table


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a JSON object; a reader finds the old file or the new one, never a part."""
    text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode())
