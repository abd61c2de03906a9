"""JSON read as Go reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tundp.errors import LeaseFormatError
from tundp.lease import gojson


@pytest.mark.parametrize("spelling", ["PublicIP", "publicip", "PUBLICIP", "pUbLiCiP"])
def test_keys_match_in_any_case(spelling: str) -> None:
    fields = gojson.parse_object(json.dumps({spelling: "192.0.2.1"}), "value")
    assert fields.get("PublicIP") == "192.0.2.1"
    assert fields.get("publicIP") == "192.0.2.1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 2}', 2),
        ('{"A": 1, "a": 2}', 2),
        ('{"a": 2, "A": 1}', 1),
        ('{"a": 1, "b": 0, "A": 2, "b": 5}', 2),
        ('{"a": 1, "a": null}', None),
    ],
)
def test_last_of_several_spellings_of_a_key_wins(text: str, expected: int | None) -> None:
    assert gojson.parse_object(text, "value").get("a") == expected


def test_null_and_missing_differ() -> None:
    fields = gojson.parse_object('{"a": null}', "value")
    assert fields.get("a") is None
    assert fields.get("b") is gojson.MISSING


def test_unknown_keys_keep_their_spelling_and_become_plain() -> None:
    fields = gojson.parse_object('{"Known": 1, "xY": {"Q": [{"r": 1}]}, "KNOWN": 2}', "value")
    assert fields.unknown(frozenset({"known"})) == {"xY": {"Q": [{"r": 1}]}}
    assert [name for name, _ in fields.pairs()] == ["Known", "xY", "KNOWN"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("{", "line 1 column 2"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 1} x', "not JSON"),
        ("\ufeff{}", "not JSON"),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ('{"a": Infinity}', "Infinity is not a JSON value"),
        ('{"a": -Infinity}', "-Infinity is not a JSON value"),
        ('{"a": "\n"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("9" * 10_000, "not JSON"),
        ("null", "null, not a JSON object"),
        ("[]", "[], not a JSON object"),
        ('"x"', '"x", not a JSON object'),
        ("true", "true, not a JSON object"),
        ("3", "3, not a JSON object"),
    ],
)
def test_documents_other_than_an_object_are_refused(text: str, why: str) -> None:
    with pytest.raises(LeaseFormatError) as caught:
        gojson.parse_object(text, "lease value")
    assert why in str(caught.value)
    assert "lease value" in str(caught.value)


@pytest.mark.parametrize("depth", [1, 10, 100, 400, 600, 900, 2000])
def test_nesting_is_accepted_or_refused_with_a_format_error(depth: int) -> None:
    # Lists deep enough to be read, but too deep to be walked, are refused like the rest.
    text = '{"x":' + "[" * depth + "]" * depth + "}"
    try:
        fields = gojson.parse_object(text, "value")
        gojson.dumps(fields.unknown(frozenset()))
    except LeaseFormatError as error:
        assert depth > 10, error


@pytest.mark.parametrize("depth", [100, 400, 600, 900])
def test_a_deep_value_can_be_described(depth: int) -> None:
    value = gojson.parse_value("[" * 10 + "]" * 10, "value")
    assert gojson.describe(value) == "[" * 10 + "]" * 10
    with pytest.raises(LeaseFormatError):
        gojson.expect_string(gojson.parse_value("[" * depth + "]" * depth, "value"), "PublicIP")


@pytest.mark.parametrize(
    ("expect", "value", "accepted"),
    [
        (gojson.expect_string, "x", True),
        (gojson.expect_string, "", True),
        (gojson.expect_string, 1, False),
        (gojson.expect_string, None, False),
        (gojson.expect_string, ["x"], False),
        (gojson.expect_uint, 0, True),
        (gojson.expect_uint, 24, True),
        (gojson.expect_uint, 2**64 - 1, True),
        (gojson.expect_uint, 2**64, False),
        (gojson.expect_uint, -1, False),
        (gojson.expect_uint, 24.0, False),
        (gojson.expect_uint, 2.5, False),
        (gojson.expect_uint, "24", False),
        (gojson.expect_uint, True, False),
        (gojson.expect_uint, None, False),
        (gojson.expect_bool, True, True),
        (gojson.expect_bool, False, True),
        (gojson.expect_bool, 1, False),
        (gojson.expect_bool, "true", False),
        (gojson.expect_bool, None, False),
    ],
)
def test_expected_types_are_as_strict_as_go(
    expect: Callable[..., Any], value: Any, accepted: bool
) -> None:
    if accepted:
        assert expect(value, "SomeKey") is value
        return
    with pytest.raises(LeaseFormatError) as caught:
        expect(value, "SomeKey")
    assert "SomeKey is " in str(caught.value)
    assert json.dumps(value)[:50] in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "192.0.2", "192.0.2.1/24", "192.0.2.256", "192.0.2.01", " 192.0.2.1", "2001:db8::1"],
)
def test_malformed_ipv4_addresses_are_refused(text: str) -> None:
    with pytest.raises(LeaseFormatError) as caught:
        gojson.expect_ipv4(text, "PublicIP")
    assert str(caught.value) == f'PublicIP is "{text}", not an IPv4 address'


def test_ipv4_null_is_an_error() -> None:
    with pytest.raises(LeaseFormatError, match="PublicIP is null"):
        gojson.expect_ipv4(None, "PublicIP")


def test_describe_is_short() -> None:
    assert gojson.describe(gojson.parse_value('{"a": 1}', "x")) == "an object"
    assert gojson.describe("x" * 58) == '"' + "x" * 58 + '"'
    long = gojson.describe("x" * 59)
    assert (len(long), long[-2:]) == (60, "x…")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": 1, "b": None}, '{"a":1,"b":null}'),
        ("<&>", '"\\u003c\\u0026\\u003e"'),
        ({"<": ["&"]}, '{"\\u003c":["\\u0026"]}'),
        ("é", '"é"'),
        ('"\\', '"\\"\\\\"'),
    ],
)
def test_dumps_as_go_marshals(value: str | dict[str, Any], text: str) -> None:
    assert gojson.dumps(value) == text
    assert json.loads(text) == value


def test_plain_undoes_the_field_wrapping() -> None:
    value = gojson.parse_value('{"a": [{"b": {"c": 1}}, 2], "d": {}}', "x")
    assert gojson.plain(value) == {"a": [{"b": {"c": 1}}, 2], "d": {}}
