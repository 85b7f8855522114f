"""Typed reads from parsed JSON: a wrong type names the key, the value and what is allowed."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def read_int(source: Mapping[str, Any], key: str, default: int) -> int:
    """Returns `source[key]` as an int, `default` where the key is absent or null.

    Raises:
        ValueError: the value is not a whole number (booleans are not).
    """
    value = source.get(key)
    if value is None:
        return default
    return as_int(key, value)


def as_int(key: str, value: Any) -> int:
    """Returns a whole number as int; a float that is whole, as JSON writers produce, is accepted.

    Raises:
        ValueError: the value is not a whole number.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{key} = {value!r}: an integer is allowed here")
    return int(value)


def read_optional_int(source: Mapping[str, Any], key: str) -> int | None:
    """Returns `source[key]` as an int, None where the key is absent or null.

    Raises:
        ValueError: the value is not a whole number.
    """
    return None if source.get(key) is None else as_int(key, source[key])


def read_float(source: Mapping[str, Any], key: str, default: float) -> float:
    """Returns `source[key]` as a finite float, `default` where the key is absent or null.

    Raises:
        ValueError: the value is not a finite number.
    """
    value = source.get(key)
    return default if value is None else as_float(key, value)


def as_float(key: str, value: Any) -> float:
    """Returns a finite number as float.

    Raises:
        ValueError: the value is not a finite number.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        # An integer may be too large for a float.
        if abs(value) <= sys.float_info.max:
            return float(value)
    raise ValueError(f"{key} = {value!r}: a finite number is allowed here")


def read_optional_float(source: Mapping[str, Any], key: str) -> float | None:
    """Returns `source[key]` as a finite float, None where the key is absent or null.

    Raises:
        ValueError: the value is not a finite number.
    """
    return None if source.get(key) is None else as_float(key, source[key])


def read_bool(source: Mapping[str, Any], key: str, default: bool) -> bool:
    """Returns `source[key]` as a bool, `default` where the key is absent or null.

    Raises:
        ValueError: the value is not true or false.
    """
    value = source.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{key} = {value!r}: true or false is allowed here")
    return value


def read_token_ids(source: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Returns token ids written as one integer, a list of integers or null.

    Raises:
        ValueError: anything else.
    """
    value = source.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(as_int(key, item) for item in ids)
