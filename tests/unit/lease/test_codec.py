"""Lease keys and values, as both flannels write and read them."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

import pytest

from tundp.errors import LeaseFormatError
from tundp.lease import codec
from tundp.lease.model import LeaseAttributes, LeaseKey


@pytest.mark.parametrize(
    ("text", "v4", "v6"),
    [
        ("10.5.52.0-24", "10.5.52.0/24", None),
        ("10.5.52.0-30", "10.5.52.0/30", None),
        ("10.5.52.7-24", "10.5.52.7/24", None),  # flannel asks for no alignment
        ("0.0.0.0-0", "0.0.0.0/0", None),
        ("10.5.52.2-31", "10.5.52.2/31", None),
        ("10.5.52.0-24&fd00:5:52::-56", "10.5.52.0/24", "fd00:5:52::/56"),
        ("10.5.52.0-24&2001:db8::-127", "10.5.52.0/24", "2001:db8::/127"),
        ("10.5.52.0-24&2001:db8::7-64", "10.5.52.0/24", "2001:db8::7/64"),
        ("10.5.52.0-24&::-0", "10.5.52.0/24", "::/0"),
    ],
)
def test_keys_are_parsed(text: str, v4: str, v6: str | None) -> None:
    key = codec.parse_key(text)
    assert key == LeaseKey(IPv4Interface(v4), None if v6 is None else IPv6Interface(v6))
    assert str(key) == text


def test_a_key_keeps_its_host_bits_but_covers_its_subnet() -> None:
    key = codec.parse_key("10.5.52.7-24")
    assert str(key.subnet) == "10.5.52.0/24"
    assert not key.is_aligned
    assert codec.parse_key("10.5.52.0-24").is_aligned
    assert key != codec.parse_key("10.5.52.0-24")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "10.12.13.0",
        "10.12.13-24",
        "10.12.13.300-24",
        "10.12.13.0-24hi",
        "hi10.12.13.0-24",
        "&2001::-56",
        "10.12.13.0-24&:12:13:-56",
        "10.12.13.0-24&20011::-56",
        "10.12.13.0-24&2001-56",
        "10.12.13.0-24&2001::",
        "10.12.13.0-24&2001::-56hi",
        "10.12.13.0-24&FD00::-56",
        "10.12.13.0-24&fd00::-128",
        "10.12.13.0-24&fd00::-999",
        "10.12.13.0-24&",
        "10.12.13.0-24&-56",
        "10.12.13.0-32",
        "10.12.13.0-99",
        "10.12.13.0-",
        "10.12.13.0-2 4",
        "10.12.13.0--1",
        "10.12.13.0/24",
        "010.12.13.0-24",
        # Other spellings of a key flannel writes: they would shadow the real one.
        "10.12.13.0-024",
        "10.12.13.0-24&fd00:0:0::-56",
        "10.12.13.0-24&fd00:0012::-56",
        "10.12.13.0-24&fd00::-056",
        "10.12.13.0-24\n",
        " 10.12.13.0-24",
        "10.12.13.0-24/x",
        "\u0661\u0660.12.13.0-24",
        "10.12.13.0-\u0662\u0664",
        "config",
    ],
)
def test_malformed_keys_are_refused(text: str) -> None:
    with pytest.raises(LeaseFormatError) as caught:
        codec.parse_key(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"PublicIP":"192.0.2.10"}',
            LeaseAttributes(public_ip=IPv4Address("192.0.2.10")),
        ),
        (
            '{"PublicIP":"1.2.3.4","PublicIPv6":null}',
            LeaseAttributes(public_ip=IPv4Address("1.2.3.4")),
        ),
        (
            '{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1"}',
            LeaseAttributes(
                public_ip=IPv4Address("192.0.2.1"), public_ipv6=IPv6Address("2001:db8::1")
            ),
        ),
        (
            '{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{"VtepMAC":"aa:bb"}}',
            LeaseAttributes(
                public_ip=IPv4Address("192.0.2.1"),
                backend_type="vxlan",
                backend_data={"VtepMAC": "aa:bb"},
            ),
        ),
        ('{"publicip":"192.0.2.1"}', LeaseAttributes(public_ip=IPv4Address("192.0.2.1"))),
        (
            '{"PUBLICIP":"192.0.2.2","publicIp":"192.0.2.1"}',
            LeaseAttributes(public_ip=IPv4Address("192.0.2.1")),
        ),
        ("{}", LeaseAttributes()),
        ('{"PublicIPv6":null,"BackendType":null}', LeaseAttributes()),
        ('{"PublicIP":"0.0.0.0"}', LeaseAttributes()),
        (
            ' { "PublicIP" : "192.0.2.1" } ',
            LeaseAttributes(public_ip=IPv4Address("192.0.2.1")),
        ),
        (
            '{"PublicIP":"192.0.2.1","x":{"Y":[1,2.5,null]},"Zone":"a"}',
            LeaseAttributes(
                public_ip=IPv4Address("192.0.2.1"),
                extra={"x": {"Y": [1, 2.5, None]}, "Zone": "a"},
            ),
        ),
    ],
)
def test_values_are_parsed(text: str, expected: LeaseAttributes) -> None:
    assert codec.parse_value(text) == expected


def test_missing_public_ip_is_unspecified() -> None:
    assert codec.parse_value("{}").public_ip == IPv4Address("0.0.0.0")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "lease value is not JSON"),
        ("null", "lease value is null"),
        ("[]", "lease value is []"),
        ('"192.0.2.1"', "not a JSON object"),
        ('{"PublicIP":null}', "PublicIP is null"),
        ('{"PublicIP":5}', "PublicIP is 5"),
        ('{"PublicIP":""}', 'PublicIP is ""'),
        ('{"PublicIP":"192.0.2"}', "PublicIP"),
        ('{"PublicIP":"2001:db8::1"}', 'PublicIP is "2001:db8::1", not an IPv4 address'),
        ('{"PublicIP":"192.0.2.1","PublicIPv6":"192.0.2.1"}', "PublicIPv6 is '192.0.2.1'"),
        ('{"PublicIP":"192.0.2.1","PublicIPv6":"fe80::1%eth0"}', "PublicIPv6"),
        ('{"PublicIP":"192.0.2.1","PublicIPv6":7}', "PublicIPv6 is 7"),
        ('{"PublicIP":"192.0.2.1","BackendType":7}', "BackendType is 7"),
        ('{"PublicIP":{"a":1}}', "PublicIP is an object"),
        ('{"PublicIP":' + "[" * 600 + "]" * 600 + "}", "lease value"),
        ('{"PublicIP":"192.0.2.1","x":' + "[" * 5000 + "]" * 5000 + "}", "not JSON"),
        ('{"PublicIP":"192.0.2.1","x":NaN}', "NaN"),
    ],
)
def test_malformed_values_are_refused(text: str, why: str) -> None:
    with pytest.raises(LeaseFormatError) as caught:
        codec.parse_value(text)
    assert why in str(caught.value)


@pytest.mark.parametrize("depth", [600, 700, 900])
@pytest.mark.parametrize("key", ["x", "BackendData"])
def test_a_deeply_nested_value_is_one_bad_entry_not_the_end_of_the_watch(
    key: str, depth: int
) -> None:
    # One such value by anybody with write access must not stop every node of the cluster.
    text = f'{{"PublicIP":"192.0.2.1","{key}":' + "[" * depth + "]" * depth + "}"
    try:
        attributes = codec.parse_value(text)
    except LeaseFormatError:
        return
    assert attributes.public_ip == IPv4Address("192.0.2.1")


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (
            LeaseAttributes(public_ip=IPv4Address("1.2.3.4")),
            '{"PublicIP":"1.2.3.4","PublicIPv6":null}',
        ),
        (LeaseAttributes(), '{"PublicIP":"0.0.0.0","PublicIPv6":null}'),
        (
            LeaseAttributes(
                public_ip=IPv4Address("192.0.2.1"), public_ipv6=IPv6Address("2001:DB8:0:0::1")
            ),
            '{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1"}',
        ),
        (
            LeaseAttributes(
                public_ip=IPv4Address("192.0.2.1"),
                backend_v6_data={"b": 2},
                backend_data={"a": "<&>"},
                backend_type="vxlan",
                extra={"zone": "a<b"},
            ),
            '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan",'
            '"BackendData":{"a":"\\u003c\\u0026\\u003e"},"BackendV6Data":{"b":2},'
            '"zone":"a\\u003cb"}',
        ),
    ],
)
def test_values_are_encoded(attributes: LeaseAttributes, text: str) -> None:
    assert codec.encode_value(attributes) == text
    assert codec.parse_value(text) == attributes


def test_old_value_form_is_parsed_and_encoded_as_the_new_one() -> None:
    attributes = codec.parse_value('{"PublicIP":"192.0.2.10"}')
    assert codec.encode_value(attributes) == '{"PublicIP":"192.0.2.10","PublicIPv6":null}'


def test_unknown_keys_survive_a_renewal() -> None:
    text = '{"PublicIP":"192.0.2.1","PublicIPv6":null,"Rack":{"Row":[1]},"note":"x"}'
    assert codec.encode_value(codec.parse_value(text)) == text


def test_go_escapes_are_parsed() -> None:
    text = '{"PublicIP":"192.0.2.1","note":"\\u003ca\\u0026b\\u003e"}'
    assert codec.parse_value(text).extra == {"note": "<a&b>"}


@pytest.mark.parametrize(
    "text",
    [
        '{"PublicIP":"192.0.2.1","BackendData":1e999}',
        '{"PublicIP":"192.0.2.1","note":-1e999}',
    ],
)
def test_encoded_values_are_json(text: str) -> None:
    # Python's json writes Infinity, which poisons every reader of the prefix.
    try:
        attributes = codec.parse_value(text)
    except LeaseFormatError:
        return
    assert "Infinity" not in codec.encode_value(attributes)


def test_encoded_values_are_utf8() -> None:
    try:
        attributes = codec.parse_value('{"PublicIP":"192.0.2.1","note":"\\ud800"}')
    except LeaseFormatError:
        return
    written = codec.encode_value(attributes).encode()
    assert json.loads(written)["PublicIP"] == "192.0.2.1"
