"""Whether a JSON document fits a JSON Schema, by the text of draft 2020-12."""

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


def validate(value: Any, schema: dict[str, Any]) -> None:
    """Misfit if a document does not fit a schema. The part of draft 2020-12 that is used."""
    _fit(value, schema, "$", schema.get("$defs", {}))


def _fit(value: Any, rule: dict[str, Any], where: str, known_rules: dict[str, Any]) -> None:
    if "$ref" in rule:
        _fit(value, known_rules[rule["$ref"].removeprefix("#/$defs/")], where, known_rules)
    if "anyOf" in rule:
        misfits = []
        for each in rule["anyOf"]:
            try:
                _fit(value, each, where, known_rules)
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
            _fit(each, rule["items"], f"{where}[{number}]", known_rules)
    if isinstance(value, dict):
        for name in rule.get("required", ()):
            if name not in value:
                raise Misfit(f"{where}.{name} is missing")
        known = rule.get("properties", {})
        for name, each in value.items():
            other = rule.get("additionalProperties", {})
            _fit(each, known.get(name, other), f"{where}.{name}", known_rules)
