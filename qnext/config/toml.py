"""TOML to nested frozen dataclasses: every key is checked against a field and its annotation."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def load_toml(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Reads a TOML file into a dataclass.

    Args:
        path: the file.
        cls: a dataclass whose fields are bool, int, float, str, Path, Literal, other dataclasses,
            tuples, lists, string-keyed dicts of these, and unions of these with None.
        overrides: settings laid over the file's, each `table.key=value`, or `list.0.key=value` for
            a table in a list; the value is read as TOML, and as a plain string where that fails.

    Raises:
        ValueError: an unreadable file, an unknown or missing key, or a wrong type; the text names
            file, key, value and what is allowed.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    for override in overrides:
        _apply_override(table, override)
    try:
        return from_table(cls, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_table(cls: type[T], table: Mapping[str, Any], prefix: str = "") -> T:
    """Builds a dataclass from a parsed table.

    Args:
        cls: the dataclass.
        table: keys are its field names.
        prefix: where the table lies in the whole file, for error messages.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    items = {item.name: item for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]
    for key, value in table.items():
        if key not in items:
            raise ValueError(
                f"{prefix}{key} = {value!r}: the key is unknown; allowed are {', '.join(items)}"
            )
    missing = [
        name
        for name, item in items.items()
        if name not in table
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing: it has no default")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def to_table(config: Any) -> dict[str, Any]:
    """Returns nested plain dicts and lists, as JSON and TOML writers take; None is left out."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is not None:
            result[item.name] = _to_plain(value)
    return result


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value


def _apply_override(table: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ValueError(f"override {override!r}: the form table.key=value is allowed")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target: Any = table
    for depth, key in enumerate(keys[:-1]):
        if isinstance(target, list) and key.isdigit() and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
        if not isinstance(target, dict | list):
            raise ValueError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is no table")
    if not isinstance(target, dict):
        raise ValueError(f"override {override!r}: {'.'.join(keys[:-1])} is no table")
    target[keys[-1]] = value


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, key, hint)
    if origin is Literal:
        if not any(value == item and type(value) is type(item) for item in args):
            raise _wrong(key, value, " | ".join(map(repr, args)))
        return value
    if origin in (tuple, list, Sequence):
        return _convert_sequence(origin, args, value, key, hint)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(key, value, _describe(hint))
        return {name: _convert(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(key, value, _describe(hint))
        return from_table(hint, value, f"{key}.")
    return _convert_scalar(hint, value, key)


def _convert_scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    raise _wrong(key, value, _describe(hint))


def _convert_union(args: tuple[Any, ...], value: Any, key: str, hint: Any) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [item for item in args if item is not type(None)]
    # A table has one reading in a union of dataclasses only where one is left; say its own error.
    if len(choices) == 1:
        return _convert(choices[0], value, key)
    for choice in choices:
        try:
            return _convert(choice, value, key)
        except ValueError:
            continue
    raise _wrong(key, value, _describe(hint))


def _convert_sequence(
    origin: Any, args: tuple[Any, ...], value: Any, key: str, hint: Any
) -> tuple[Any, ...] | list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, _describe(hint))
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(value) != len(args):
            raise _wrong(key, value, _describe(hint))
        return tuple(
            _convert(item_hint, item, f"{key}[{i}]")
            for i, (item_hint, item) in enumerate(zip(args, value, strict=True))
        )
    converted = [_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    return converted if origin is list else tuple(converted)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(_describe(item) for item in args if item is not type(None))
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in (list, Sequence) or (origin is tuple and args[-1] is Ellipsis):
        return f"a list of {_describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(map(_describe, args))}"
    if origin in (dict, Mapping):
        return f"a table of {_describe(args[1])}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"a table of {', '.join(item.name for item in dataclasses.fields(hint))}"
    names: dict[Any, str] = {
        bool: "true or false",
        int: "an integer",
        float: "a finite number",
        str: "a string",
        Path: "a path as string",
    }
    return names.get(hint, str(hint))


def _wrong(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key} = {value!r}: allowed is {allowed}")
