"""Names and shapes of a checkpoint against a list of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qnext.io.names import Shape

MAX_LISTED = 20


@dataclass(frozen=True)
class Comparison:
    """How two sets of tensors differ; false in a boolean context when they do not."""

    num_expected: int
    num_parameters: int
    """Of the expected tensors."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    """Each as `name: shape found, shape expected`."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def lines(self) -> Iterator[str]:
        """Yields the differences, at most MAX_LISTED of each kind and the number of the rest."""
        for kind in ("missing", "unexpected", "misshapen"):
            names: tuple[str, ...] = getattr(self, kind)
            for name in names[:MAX_LISTED]:
                yield f"{kind}: {name}"
            if len(names) > MAX_LISTED:
                yield f"{kind}: and {len(names) - MAX_LISTED:,} more"


def compare_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> Comparison:
    """Compares names and shapes."""
    return Comparison(
        num_expected=len(expected),
        num_parameters=sum(math.prod(shape) for shape in expected.values()),
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(name for name in found if name not in expected),
        misshapen=tuple(
            f"{name}: {list(found[name])} found, {list(shape)} expected"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
    )


def read_names(path: Path) -> dict[str, Shape]:
    """Reads a list of tensors: tab-separated `name` and `shape` first, a head line, maybe zstd.

    Raises:
        ValueError: the file is missing, or a line is no such record; the text names it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix == ".zst":
        import zstandard

        try:
            content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
        except zstandard.ZstdError as error:
            raise ValueError(f"{path}: no valid zstd file: {error}") from error
    lines = content.decode("utf-8", errors="replace").splitlines()
    if not lines or lines[0].split("\t")[:2] != ["name", "shape"]:
        raise ValueError(f"{path}: line 1: the columns name and shape must come first")
    shapes: dict[str, Shape] = {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        try:
            inner = fields[1].removeprefix("[").removesuffix("]")
            shapes[fields[0]] = tuple(int(size) for size in inner.split(",") if size)
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path}: line {number}: no name and shape: {line!r}") from error
    return shapes
