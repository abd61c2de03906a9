"""JSON as Go's encoding/json decodes it into a struct, for both of flannel's documents.

Keys match without regard to case, unknown keys are ignored, and of several spellings of
one key the last in the text wins. Python's json would keep `network` and `Network` apart.
"""

from __future__ import annotations

import json
import math
from ipaddress import IPv4Address
from typing import Any, Final

from tundp.errors import LeaseFormatError
from tundp.printable import printable

MISSING: Final = object()
DEPTH_MAX: Final = 32
"""Deepest nesting accepted. flannel's documents have two levels; an attack has thousands."""
SHOWN_MAX: Final = 60
"""Characters of a value in an error."""
_UINT_MAX: Final = 2**64 - 1


class Fields:
    """One JSON object, looked up the way Go matches struct fields."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self._pairs = pairs
        self._folded = {name.lower(): value for name, value in pairs}

    def get(self, name: str) -> Any:
        """The value under `name` in any case, or MISSING."""
        return self._folded.get(name.lower(), MISSING)

    def unknown(self, known: frozenset[str]) -> dict[str, Any]:
        """Keys outside `known` (lower case) as the text spells them."""
        return {name: plain(value) for name, value in self._pairs if name.lower() not in known}

    def pairs(self) -> list[tuple[str, Any]]:
        """All key-value pairs in the order of the text, duplicates included."""
        return self._pairs


def parse_object(text: str, what: str) -> Fields:
    """`text` as one object; LeaseFormatError naming `what` if it is not."""
    value = parse_value(text, what)
    if not isinstance(value, Fields):
        raise LeaseFormatError(f"{what} is {describe(value)}, not a JSON object")
    return value


def parse_value(text: str, what: str) -> Any:
    """`text` as JSON, every object in it as Fields."""
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise LeaseFormatError(
            f"{what} is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise LeaseFormatError(f"{what} is not JSON: {error}") from None
    _check_plain(value, what)
    return value


def plain(value: Any) -> Any:
    """`value` with every Fields turned back into a dict, for writing out again.

    Recursion is bounded: `parse_value` lets nothing deeper than DEPTH_MAX through.
    """
    if isinstance(value, Fields):
        return {name: plain(inner) for name, inner in value.pairs()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def describe(value: Any) -> str:
    """A JSON value for an error message: its kind, and itself when short."""
    if isinstance(value, Fields):
        return "an object"
    return printable(json.dumps(plain(value)), SHOWN_MAX)


def expect_string(value: Any, name: str) -> str:
    """Go accepts only a JSON string for a string field."""
    if not isinstance(value, str):
        raise LeaseFormatError(f"{name} is {describe(value)}, not a string")
    return value


def expect_uint(value: Any, name: str) -> int:
    """Go accepts only a JSON number without sign, fraction or exponent for a uint field."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _UINT_MAX:
        raise LeaseFormatError(f"{name} is {describe(value)}, not a whole number from 0 up")
    return value


def expect_bool(value: Any, name: str) -> bool:
    """Go accepts only true and false for a bool field."""
    if not isinstance(value, bool):
        raise LeaseFormatError(f"{name} is {describe(value)}, not true or false")
    return value


def expect_ipv4(value: Any, name: str) -> IPv4Address:
    """A dotted quad in a JSON string; null is an error, as in flannel."""
    text = expect_string(value, name)
    try:
        return IPv4Address(text)
    except ValueError:
        raise LeaseFormatError(f"{name} is {describe(value)}, not an IPv4 address") from None


def dumps(value: Any) -> str:
    """Compact JSON with Go's escapes of <, > and &."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _check_plain(value: Any, what: str) -> None:
    """Refuse values that could not be encoded again: deep nesting, and lone surrogates."""
    level = [value]
    for _ in range(DEPTH_MAX):
        for inner in level:
            if isinstance(inner, str) and not inner.isprintable():
                _check_text(inner, what)
        level = [below for inner in level for below in _children(inner)]
        if not level:
            return
    raise LeaseFormatError(f"{what} is nested more than {DEPTH_MAX} levels deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, Fields):
        return [part for pair in value.pairs() for part in pair]
    return value if isinstance(value, list) else []


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LeaseFormatError(f"{what} has a lone surrogate in a string") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{printable(text, SHOWN_MAX)} is out of range")
    return value


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=Fields, parse_constant=_refuse_constant, parse_float=_finite_float
)
