"""Writes that a crash cannot tear: temporary file, fsync, rename."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` with `.tmp` added for writing, and renames it to `path` once on disk.

    An exception removes the temporary file and leaves what was at `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a whole file; a reader finds the old content or the new, never a part."""
    with atomic_file(path) as file:
        file.write(content)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk, to survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
