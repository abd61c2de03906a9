"""Dataclasses as JSON, and as a JSON Schema: both follow from the fields' type annotations.

A field may be a str, int, float, bool, an IPv4Address or IPv4Network (their text), an Enum
(its value), a dataclass (an object), a Sequence[X] (an array), a Mapping[str, X] (an object),
or X | None. A str is written as `printable` shows it. A class with methods `to_json`,
`from_json` and `json_schema` of its own is left to them. Unknown members of an object are passed
over, so that an older reader takes a newer writer's document; a missing one is an error unless
its field has a default.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final, TypeVar

from tundp.printable import LINE_MAX, printable

RecordT = TypeVar("RecordT")

_TEXTS: Final = (IPv4Address, IPv4Network)
_PLAIN: Final[Mapping[type, str]] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
}
AS_IT_IS: Final = "as it is"
"""Metadata of a str field that is not made printable: programs read it back."""
_FORMATS: Final = {IPv4Address: "ipv4", IPv4Network: "ipv4-network"}


class Malformed(ValueError):  # noqa: N818
    """A document does not fit the class it is read into; the message names the member."""


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass in dict, list, str, int, float, bool and None."""
    return {
        name: value if write is None or value is None else write(value)
        for name, write in _writers(type(record))
        for value in (getattr(record, name),)
    }


def from_json(kind: type[RecordT], document: Any, where: str = "") -> RecordT:
    """An instance of the dataclass `kind`. Malformed names what does not fit."""
    if not isinstance(document, dict):
        raise Malformed(f"{where or kind.__name__} is no object")
    values = {}
    for field, annotation in _fields(kind):
        inside = f"{where}.{field.name}" if where else field.name
        if field.name in document:
            values[field.name] = _read(annotation, document[field.name], inside)
        elif not _has_default(field):
            raise Malformed(f"{inside} is missing")
    return kind(**values)


def json_schema(kind: type[Any], *, title: str) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the dataclass `kind`.

    The descriptions are the string literals below the fields: this reads the source.
    """
    definitions: dict[str, Any] = {}
    root = _object_schema(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


_Writer = Callable[[Any], Any]

_WRITERS: Final[dict[Any, tuple[tuple[str, _Writer | None], ...]]] = {}
"""How each field of a class is written, by class."""


def _writers(kind: Any) -> tuple[tuple[str, _Writer | None], ...]:
    if kind not in _WRITERS:
        _WRITERS[kind] = tuple(
            (field.name, None if field.metadata.get(AS_IT_IS) else _writer(annotation))
            for field, annotation in _fields(kind)
        )
    return _WRITERS[kind]


def _writer(annotation: Any) -> _Writer | None:
    """What makes JSON of a value; None if the value is JSON already.

    Found once for each field, because a document may hold 65,000 records of a kind.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (each for each in arguments if each is not type(None))
        return _writer(inner)
    if origin is Sequence:
        return _array_writer(_writer(arguments[0]))
    if origin is Mapping:
        return _object_writer(_writer(arguments[1]))
    if annotation is str:
        return _text
    if annotation in _PLAIN:
        return None
    if annotation in _TEXTS:
        return str
    if issubclass(annotation, Enum):
        return lambda each: each.value
    if hasattr(annotation, "to_json"):
        return lambda each: each.to_json()
    return to_json


def _text(value: str) -> str:
    """Nearly every text may hold a name that somebody else chose."""
    return printable(value, LINE_MAX)


def _array_writer(item: _Writer | None) -> _Writer:
    return list if item is None else lambda values: [item(each) for each in values]


def _object_writer(item: _Writer | None) -> _Writer:
    return dict if item is None else lambda values: {key: item(values[key]) for key in values}


def _read(annotation: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (annotation,) = (each for each in arguments if each is not type(None))
        return _read(annotation, value, where)
    if origin is Sequence:
        _require(isinstance(value, list), where, "an array")
        return tuple(_read(arguments[0], each, f"{where}[{n}]") for n, each in enumerate(value))
    if origin is Mapping:
        _require(isinstance(value, dict), where, "an object")
        return {key: _read(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if annotation in _PLAIN:
        return _read_plain(annotation, value, where)
    if annotation in _TEXTS or issubclass(annotation, Enum):
        try:
            return annotation(value)
        except ValueError as error:
            raise Malformed(f"{where}: {error}") from None
    if hasattr(annotation, "from_json"):
        return annotation.from_json(value, where)
    return from_json(annotation, value, where)


def _read_plain(kind: type, value: Any, where: str) -> Any:
    if kind is float:
        # JSON has one kind of number, and writers drop a fraction of zero.
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number")
        return float(value)
    _require(type(value) is kind, where, f"of type {_PLAIN[kind]}")
    return value


def _require(fits: bool, where: str, wanted: str) -> None:  # noqa: FBT001
    if not fits:
        raise Malformed(f"{where} is not {wanted}")


def _schema(annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (each for each in arguments if each is not type(None))
        return {"anyOf": [_schema(inner, definitions), {"type": "null"}]}
    if origin is Sequence:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if annotation in _PLAIN:
        return {"type": _PLAIN[annotation]}
    if annotation in _FORMATS:
        return {"type": "string", "format": _FORMATS[annotation]}
    if issubclass(annotation, Enum):
        return {"enum": [each.value for each in annotation]}
    name = annotation.__name__
    if name not in definitions:
        definitions[name] = {}  # a class that contains itself ends here
        if hasattr(annotation, "json_schema"):
            definitions[name] = annotation.json_schema(functools.partial(_of, definitions))
        else:
            definitions[name] = _object_schema(annotation, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _of(definitions: dict[str, Any], annotation: Any) -> dict[str, Any]:
    return _schema(annotation, definitions)


def _object_schema(kind: type[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    texts = _descriptions(kind)
    properties = {}
    required = []
    for field, annotation in _fields(kind):
        properties[field.name] = _schema(annotation, definitions)
        if field.name in texts:
            properties[field.name] |= {"description": texts[field.name]}
        if not _has_default(field):
            required.append(field.name)
    return {
        "type": "object",
        "description": " ".join((inspect.getdoc(kind) or "").split()),
        "properties": properties,
        "required": required,
    }


def _descriptions(kind: type[Any]) -> dict[str, str]:
    """Each field's own docstring: the string literal on the line after it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=value)):
                found[name] = " ".join(str(value).split())
    return found


_CACHE: Final[dict[Any, tuple[tuple[dataclasses.Field[Any], Any], ...]]] = {}
"""Fields and annotations by class; a class never changes."""


def _fields(kind: Any) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    if kind not in _CACHE:
        hints = typing.get_type_hints(kind, vars(sys.modules[kind.__module__]))
        _CACHE[kind] = tuple((field, hints[field.name]) for field in dataclasses.fields(kind))
    return _CACHE[kind]


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing
