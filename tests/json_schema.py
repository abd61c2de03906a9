"""JSON Schema, as far as the documents of tundp use it: a judge that is not the writer."""

from __future__ import annotations

from typing import Any


class Misfit(Exception):  # noqa: N818
    """A document is not what a schema says."""


TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def validate(
    value: Any, rule: dict[str, Any], where: str = "$", root: dict[str, Any] | None = None
) -> None:
    """The part of JSON Schema draft 2020-12 that is used, by the text of the draft.

    root: the schema whose definitions are meant; by default `rule` itself.
    """
    root = rule if root is None else root
    if "$ref" in rule:
        validate(value, root["$defs"][rule["$ref"].removeprefix("#/$defs/")], where, root)
    if "anyOf" in rule:
        misfits = []
        for each in rule["anyOf"]:
            try:
                validate(value, each, where, root)
                break
            except Misfit as error:
                misfits.append(str(error))
        else:
            raise Misfit("; ".join(misfits))
    if "enum" in rule and value not in rule["enum"]:
        raise Misfit(f"{where}: {value!r} is none of {rule['enum']}")
    if "type" in rule:
        is_bool = isinstance(value, bool)
        if not isinstance(value, TYPES[rule["type"]]) or (is_bool and rule["type"] != "boolean"):
            raise Misfit(f"{where}: {value!r} is no {rule['type']}")
    if isinstance(value, list) and "items" in rule:
        for number, each in enumerate(value):
            validate(each, rule["items"], f"{where}[{number}]", root)
    if isinstance(value, dict):
        for name in rule.get("required", ()):
            if name not in value:
                raise Misfit(f"{where}.{name} is missing")
        known = rule.get("properties", {})
        for name, each in value.items():
            other = rule.get("additionalProperties", {})
            validate(each, known.get(name, other), f"{where}.{name}", root)
