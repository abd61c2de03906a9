"""The network config, row by row of flannel's tables."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest

from tundp.backend.choose import BACKENDS, FLANNEL_BACKENDS, parse_network_config
from tundp.backend.hostgw import host_gw_config
from tundp.backend.udp.config import udp_config
from tundp.errors import ConfigError
from tundp.lease.network import NetworkConfig, SubnetPool

ORIGIN = "/coreos.com/network/config"


def parse(config: object) -> NetworkConfig:
    text = config if isinstance(config, str) else json.dumps(config)
    return parse_network_config(text, ORIGIN)


def refusal(config: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(config)
    message = str(caught.value)
    assert message.endswith(f"(network config in {ORIGIN})")
    return message


def v4(**keys: object) -> dict[str, object]:
    return {"Network": "10.5.0.0/16"} | keys


def v6(**keys: object) -> dict[str, object]:
    return v4(EnableIPv6=True, IPv6Network="2001:db8::/48") | keys


def test_minimal_config() -> None:
    config = parse(v4())
    assert config == NetworkConfig(
        pool=SubnetPool(
            network=IPv4Network("10.5.0.0/16"),
            subnet_len=24,
            subnet_min=IPv4Address("10.5.1.0"),
            subnet_max=IPv4Address("10.5.255.0"),
        ),
        pool6=None,
        backend=udp_config(8285),
        enable_nftables=False,
    )
    assert config.network == IPv4Network("10.5.0.0/16")


@pytest.mark.parametrize(
    ("network", "length", "first", "last", "breaks"),
    [
        ("10.0.0.0/8", 24, "10.0.1.0", "10.255.255.0", "a /8"),
        ("10.5.0.0/21", 24, "10.5.1.0", "10.5.7.0", "a /21"),
        ("10.5.0.0/22", 24, "10.5.1.0", "10.5.3.0", "the last that gets /24"),
        ("10.5.0.0/23", 25, "10.5.0.128", "10.5.1.128", "the first that is split in four"),
        ("10.5.0.0/24", 26, "10.5.0.64", "10.5.0.192", "prefix + 2"),
        ("10.5.0.0/28", 30, "10.5.0.4", "10.5.0.12", "the smallest useful network"),
        ("10.5.7.9/16", 24, "10.5.1.0", "10.5.255.0", "host bits are masked off"),
        ("128.0.0.0/1", 24, "128.0.1.0", "255.255.255.0", "half of all addresses"),
    ],
)
def test_subnet_len_default(network: str, length: int, first: str, last: str, breaks: str) -> None:
    pool = parse({"Network": network}).pool
    assert (pool.subnet_len, str(pool.subnet_min), str(pool.subnet_max)) == (
        length,
        first,
        last,
    ), breaks


@pytest.mark.parametrize(
    ("network", "length", "first", "last", "breaks"),
    [
        ("2001:db8::/32", 64, "2001:db8:0:1::", "2001:db8:ffff:ffff::", "a /32"),
        ("2001:db8::/62", 64, "2001:db8:0:1::", "2001:db8:0:3::", "the last that gets /64"),
        ("2001:db8::/63", 65, "2001:db8:0:0:8000::", "2001:db8:0:1:8000::", "prefix + 2"),
        ("2001:db8::/124", 126, "2001:db8::4", "2001:db8::c", "the smallest useful network"),
    ],
)
def test_ipv6_subnet_len_default(
    network: str, length: int, first: str, last: str, breaks: str
) -> None:
    pool = parse(v6(IPv6Network=network)).pool6
    assert pool is not None
    assert (pool.subnet_len, str(pool.subnet_min), str(pool.subnet_max)) == (
        length,
        first,
        last,
    ), breaks


@pytest.mark.parametrize(
    ("config", "length", "first", "last", "breaks"),
    [
        (v4(SubnetLen=0), 24, "10.5.1.0", "10.5.255.0", "0 is the default"),
        (v4(SubnetLen=None), 24, "10.5.1.0", "10.5.255.0", "null leaves a number alone in Go"),
        (v4(SubnetLen=18), 18, "10.5.64.0", "10.5.192.0", "exactly four subnets"),
        (v4(SubnetLen=30), 30, "10.5.0.4", "10.5.255.252", "the longest"),
        (v4(SubnetMin="10.5.16.0"), 24, "10.5.16.0", "10.5.255.0", "min alone"),
        (v4(SubnetMax="10.5.16.0"), 24, "10.5.1.0", "10.5.16.0", "max alone"),
        (v4(SubnetMin="10.5.0.0"), 24, "10.5.0.0", "10.5.255.0", "the first subnet, on request"),
        (v4(SubnetMin="0.0.0.0"), 24, "10.5.1.0", "10.5.255.0", "0.0.0.0 is the default"),
        (v4(SubnetMax="0.0.0.0"), 24, "10.5.1.0", "10.5.255.0", "0.0.0.0 is the default"),
        (
            v4(SubnetMin="10.5.9.0", SubnetMax="10.5.9.0"),
            24,
            "10.5.9.0",
            "10.5.9.0",
            "max is inclusive, so one subnet is left",
        ),
        (
            v4(SubnetMin="10.5.20.0", SubnetMax="10.5.10.0"),
            24,
            "10.5.20.0",
            "10.5.10.0",
            "reversed is not an error here, it is out of subnets later",
        ),
        (v4(SubnetLen=28, SubnetMin="10.5.0.16"), 28, "10.5.0.16", "10.5.255.240", "aligned"),
    ],
)
def test_subnet_keys(
    config: dict[str, Any], length: int, first: str, last: str, breaks: str
) -> None:
    pool = parse(config).pool
    assert (pool.subnet_len, str(pool.subnet_min), str(pool.subnet_max)) == (
        length,
        first,
        last,
    ), breaks


def test_ipv6_subnet_keys() -> None:
    pool = parse(
        v6(
            IPv6SubnetLen=56,
            IPv6SubnetMin="2001:db8:0:100::",
            IPv6SubnetMax="2001:db8:0:300::",
        )
    ).pool6
    assert pool == SubnetPool(
        network=IPv6Network("2001:db8::/48"),
        subnet_len=56,
        subnet_min=IPv6Address("2001:db8:0:100::"),
        subnet_max=IPv6Address("2001:db8:0:300::"),
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"network": "10.5.0.0/16", "subnetlen": 26, "subnetMIN": "10.5.1.0",'
        ' "backend": {"tYpE": "udp", "pOrT": 9000}}',
        '{"NETWORK": "10.6.0.0/16", "network": "10.5.0.0/16", "SubnetLen": 30, "SUBNETLEN": 26,'
        ' "Subnetmin": "10.5.1.0", "Backend": 5, "BACKEND": {"PORT": 1, "Port": 9000,'
        ' "Type": "vxlan", "TYPE": "udp"}}',
        '{"Network": "10.5.0.0/16", "SubnetLen": 26, "SubnetMin": "10.5.1.0", "Unknown": [1],'
        ' "Backend": {"Type": "UDP", "Port": 9000, "VNI": 3}}',
    ],
)
def test_keys_in_any_case_last_duplicate_wins_unknown_ignored(text: str) -> None:
    config = parse(text)
    assert config.network == IPv4Network("10.5.0.0/16")
    assert config.pool.subnet_len == 26
    assert config.pool.subnet_min == IPv4Address("10.5.1.0")
    assert config.backend == udp_config(9000)


TOO_MANY = "must be able to accommodate at least four subnets"


@pytest.mark.parametrize(
    ("config", "text", "key", "value"),
    [
        # The seven rules, in flannel's order.
        (
            {},
            "please define a correct Network parameter in the flannel config",
            "Network",
            "absent",
        ),
        (
            {"Network": "0.0.0.0/0"},
            "please define a correct Network parameter in the flannel config",
            "Network",
            "0.0.0.0/0",
        ),
        (
            {"Network": "10.5.0.0/0"},
            "please define a correct Network parameter in the flannel config",
            "Network",
            "0.0.0.0/0",
        ),
        (v4(SubnetLen=31), "SubnetLen must be less than /31", "SubnetLen", "31"),
        (v4(SubnetLen=32), "SubnetLen must be less than /31", "SubnetLen", "32"),
        (v4(SubnetLen=2**64 - 1), "SubnetLen must be less than /31", "SubnetLen", str(2**64 - 1)),
        (v4(SubnetLen=17), f"network {TOO_MANY}", "SubnetLen", "17"),
        (v4(SubnetLen=16), f"network {TOO_MANY}", "SubnetLen", "16"),
        (v4(SubnetLen=1), f"network {TOO_MANY}", "SubnetLen", "1"),
        (
            {"Network": "10.5.0.0/29", "SubnetLen": 30},
            f"network {TOO_MANY}",
            "SubnetLen",
            "10.5.0.0/29",
        ),
        (
            {"Network": "10.5.0.0/29"},
            "network is too small. Minimum useful network prefix is /28",
            "Network",
            "10.5.0.0/29",
        ),
        (
            {"Network": "10.5.0.1/32"},
            "network is too small. Minimum useful network prefix is /28",
            "Network",
            "10.5.0.1/32",
        ),
        (
            v4(SubnetMin="10.6.0.0"),
            "SubnetMin is not in the range of the Network",
            "SubnetMin",
            "10.6.0.0",
        ),
        (
            v4(SubnetMin="10.4.255.0"),
            "SubnetMin is not in the range of the Network",
            "SubnetMin",
            "10.4.255.0",
        ),
        (
            v4(SubnetMax="10.6.0.0"),
            "SubnetMax is not in the range of the Network",
            "SubnetMax",
            "10.6.0.0",
        ),
        (
            v4(SubnetMin="10.5.1.16"),
            "SubnetMin is not on a SubnetLen boundary: 10.5.1.16",
            "SubnetMin",
            "10.5.1.16",
        ),
        (
            v4(SubnetMax="10.5.9.1"),
            "SubnetMax is not on a SubnetLen boundary: 10.5.9.1",
            "SubnetMax",
            "10.5.9.1",
        ),
        (
            v4(SubnetLen=20, SubnetMin="10.5.8.0"),
            "SubnetMin is not on a SubnetLen boundary: 10.5.8.0",
            "SubnetMin",
            "10.5.8.0",
        ),
        # The same seven for IPv6.
        (
            v4(EnableIPv6=True),
            "please define a correct IPv6Network parameter in the flannel config",
            "IPv6Network",
            "absent",
        ),
        (
            v6(IPv6Network="::/0"),
            "please define a correct IPv6Network parameter in the flannel config",
            "IPv6Network",
            "::/0",
        ),
        (
            v6(IPv6Network=None),
            "please define a correct IPv6Network parameter in the flannel config",
            "IPv6Network",
            "absent",
        ),
        (v6(IPv6SubnetLen=127), "SubnetLen must be less than /127", "IPv6SubnetLen", "127"),
        (v6(IPv6SubnetLen=49), TOO_MANY, "IPv6SubnetLen", "49"),
        (
            v6(IPv6Network="2001:db8::/125"),
            "IPv6Network is too small. Minimum useful network prefix is /124",
            "IPv6Network",
            "2001:db8::/125",
        ),
        (
            v6(IPv6SubnetMin="2001:db9::"),
            "IPv6SubnetMin is not in the range of the IPv6Network",
            "IPv6SubnetMin",
            "2001:db9::",
        ),
        (
            v6(IPv6SubnetMax="2001:db9::"),
            "IPv6SubnetMax is not in the range of the IPv6Network",
            "IPv6SubnetMax",
            "2001:db9::",
        ),
        (
            v6(IPv6SubnetMin="2001:db8::1"),
            "IPv6SubnetMin is not on a SubnetLen boundary: 2001:db8::1",
            "IPv6SubnetMin",
            "2001:db8::1",
        ),
        (
            v6(IPv6SubnetMax="2001:db8:0:5::1"),
            "IPv6SubnetMax is not on a SubnetLen boundary: 2001:db8:0:5::1",
            "IPv6SubnetMax",
            "2001:db8:0:5::1",
        ),
        # Values Go cannot put into the field.
        ({"Network": None}, "not a string", "Network", "null"),
        ({"Network": 5}, "not a string", "Network", "5"),
        ({"Network": "10.5.0.0"}, "not a CIDR", "Network", "10.5.0.0"),
        ({"Network": "10.5.0.0/33"}, "not a CIDR", "Network", "10.5.0.0/33"),
        ({"Network": "10.5.0.0/"}, "not a CIDR", "Network", "10.5.0.0/"),
        ({"Network": "10.5.0/16"}, "not a CIDR", "Network", "10.5.0/16"),
        ({"Network": "2001:db8::/48"}, "not a CIDR", "Network", "2001:db8::/48"),
        ({"Network": "10.5.0.0/255.255.0.0"}, "not a CIDR", "Network", "10.5.0.0/255.255.0.0"),
        ({"Network": ""}, "not a CIDR", "Network", "''"),
        (v4(SubnetLen="24"), "not a whole number", "SubnetLen", '"24"'),
        (v4(SubnetLen=-1), "not a whole number", "SubnetLen", "-1"),
        (v4(SubnetLen=24.5), "not a whole number", "SubnetLen", "24.5"),
        (v4(SubnetLen=True), "not a whole number", "SubnetLen", "true"),
        (v4(SubnetMin=None), "not a string", "SubnetMin", "null"),
        (v4(SubnetMin="10.5.1"), "not an IPv4 address", "SubnetMin", "10.5.1"),
        (v4(SubnetMax="2001:db8::"), "not an IPv4 address", "SubnetMax", "2001:db8::"),
        (v4(SubnetMax=""), "not an IPv4 address", "SubnetMax", "''"),
        (v6(IPv6Network="10.5.0.0/16"), "not a CIDR", "IPv6Network", "10.5.0.0/16"),
        (v6(IPv6SubnetMin="10.5.1.0"), "not an IPv6 address", "IPv6SubnetMin", "10.5.1.0"),
        (v6(IPv6SubnetLen="64"), "not a whole number", "IPv6SubnetLen", '"64"'),
        (v4(IPv6SubnetLen="64"), "not a whole number", "IPv6SubnetLen", '"64"'),
        (v4(EnableIPv4="true"), "not true or false", "EnableIPv4", '"true"'),
        (v4(EnableIPv6=1), "not true or false", "EnableIPv6", "1"),
        (v4(EnableNFTables="no"), "not true or false", "EnableNFTables", '"no"'),
        (v4(EnableIPv4=False), "carries IPv4 only", "EnableIPv4", "false"),
        (
            {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "2001:db8::/48"},
            "carries IPv4 only",
            "EnableIPv4",
            "false",
        ),
    ],
)
def test_refused_with_flannels_words_the_key_and_its_value(
    config: Any, text: str, key: str, value: str
) -> None:
    message = refusal(config)
    assert text in message
    assert key in message
    assert value in message


@pytest.mark.parametrize(
    ("config", "text", "breaks"),
    [
        (
            {"SubnetLen": 31},
            "please define a correct Network parameter",
            "rule 1 before rule 2",
        ),
        (
            {"Network": "10.5.0.0/30", "SubnetLen": 31},
            "SubnetLen must be less than /31",
            "rule 2 before rule 3",
        ),
        (
            v4(SubnetLen=17, SubnetMin="10.6.0.0"),
            TOO_MANY,
            "rule 3 before rule 5",
        ),
        (
            {"Network": "10.5.0.0/29", "SubnetMin": "10.6.0.0"},
            "network is too small",
            "rule 4 before rule 5",
        ),
        (
            v4(SubnetMin="10.6.0.0", SubnetMax="10.7.0.0"),
            "SubnetMin is not in the range",
            "rule 5 before rule 6",
        ),
        (
            v4(SubnetMin="10.5.1.1", SubnetMax="10.7.0.0"),
            "SubnetMax is not in the range",
            "rule 6 before rule 7",
        ),
        (
            v4(SubnetMin="10.5.1.1", SubnetMax="10.5.2.1"),
            "SubnetMin is not on a SubnetLen boundary",
            "min before max in rule 7",
        ),
        (
            v6(SubnetMax="10.5.2.1", IPv6Network="::/0"),
            "SubnetMax is not on a SubnetLen boundary",
            "IPv4 before IPv6",
        ),
    ],
)
def test_first_broken_rule_is_reported(config: dict[str, Any], text: str, breaks: str) -> None:
    assert text in refusal(config), breaks


@pytest.mark.parametrize("backend", ["udp", "host-gw"])
def test_an_overlay_without_ipv4_is_refused_whatever_the_backend(backend: str) -> None:
    told = refusal(v6(EnableIPv4=False, Backend={"Type": backend}))
    assert "EnableIPv4" in told
    assert "backend" not in told.partition("(network config")[0], "no other one would do it"


@pytest.mark.parametrize(
    ("config", "has_ipv6", "breaks"),
    [
        (v4(), False, "off by default"),
        (v4(EnableIPv6=False), False, "off when said so"),
        (v4(EnableIPv6=None), False, "null leaves a bool alone"),
        (v4(EnableIPv4=None), False, "and IPv4 on"),
        (v4(EnableIPv4=True), False, "said aloud"),
        (v4(IPv6Network="2001:db8::/48"), False, "a network alone switches nothing on"),
        (v4(IPv6Network="::/0", IPv6SubnetLen=1), False, "and is not validated while off"),
        (v6(), True, "on"),
        (v6(IPv6SubnetMin=None, IPv6SubnetMax="::"), True, "null and :: are the defaults"),
    ],
)
def test_enabled_families(config: Any, has_ipv6: bool, breaks: str) -> None:
    parsed = parse(config)
    assert (parsed.pool6 is not None) is has_ipv6, breaks


@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), (None, False)])
def test_enable_nftables(value: bool | None, expected: bool) -> None:
    assert parse(v4(EnableNFTables=value)).enable_nftables is expected


# Backend


@pytest.mark.parametrize(
    ("backend", "port", "breaks"),
    [
        ({"Type": "udp"}, 8285, "flannel's default port"),
        ({"Type": "UDP"}, 8285, "the type is lower-cased before it is looked up"),
        ({"Type": "Udp", "Port": 8472}, 8472, "a port"),
        ({"Type": "udp", "Port": 1}, 1, "the lowest"),
        ({"Type": "udp", "Port": 65535}, 65535, "the highest"),
        ({"Type": "udp", "Port": None}, 8285, "null leaves a number alone"),
        ({"Type": "udp", "VNI": 1, "Port": 9}, 9, "other backends' keys are ignored"),
    ],
)
def test_backend(backend: dict[str, Any], port: int, breaks: str) -> None:
    assert parse(v4(Backend=backend)).backend == udp_config(port), breaks


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        (None, "unknown backend type: "),
        ({}, "unknown backend type: "),
        ({"Port": 8285}, "unknown backend type: "),
        ({"Type": ""}, "unknown backend type: "),
        ({"Type": None}, "unknown backend type: "),
        ({"Type": "udpp"}, "unknown backend type: udpp"),
        ({"Type": "aws-vpc"}, "unknown backend type: aws-vpc"),
        ("udp", "error decoding Backend property of config: "),
        (["udp"], "error decoding Backend property of config: "),
        (5, "error decoding Backend property of config: "),
        (True, "error decoding Backend property of config: "),
        ({"Type": 5}, "Backend.Type is 5"),
        (
            {"Type": "udp", "Port": "8285"},
            'error decoding UDP backend config: Backend.Port is "8285"',
        ),
        (
            {"Type": "udp", "Port": 8285.0},
            "error decoding UDP backend config: Backend.Port is 8285.0",
        ),
        ({"Type": "udp", "Port": True}, "error decoding UDP backend config: Backend.Port is true"),
        ({"Type": "udp", "Port": [1]}, "error decoding UDP backend config: Backend.Port is [1]"),
        ({"Type": "udp", "Port": 0}, "Backend.Port is 0"),
        ({"Type": "udp", "Port": -1}, "Backend.Port is -1"),
        ({"Type": "udp", "Port": 65536}, "Backend.Port is 65536"),
        ({"Type": "udp", "Port": 10**30}, f"Backend.Port is {10**30}"),
    ],
)
def test_backend_refused(backend: Any, text: str) -> None:
    assert text in refusal(v4(Backend=backend))


@pytest.mark.parametrize("name", ["host-gw", "Host-GW", "HOST-GW"])
def test_host_gw_is_a_backend_without_parameters(name: str) -> None:
    backend = parse(v4(Backend={"Type": name, "Port": "none of its business"})).backend
    assert backend == host_gw_config()
    assert (backend.name, backend.lease_type) == ("host-gw", "host-gw")


@pytest.mark.parametrize("name", [*sorted(FLANNEL_BACKENDS - BACKENDS.keys()), "VXLAN"])
def test_flannels_other_backends_are_refused_as_such(name: str) -> None:
    message = refusal(v4(Backend={"Type": name}))
    assert repr(name) in message
    assert "tundp does not have it" in message


def test_flannels_backends_are_the_registered_ones() -> None:
    assert sorted(FLANNEL_BACKENDS) == sorted(
        [
            "udp",
            "vxlan",
            "host-gw",
            "alloc",
            "extension",
            "ipip",
            "ipsec",
            "wireguard",
            "tencent-vpc",
        ]
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"10.5.0.0/16"',
        "Network=10.5.0.0/16",
        '{"Network": "10.5.0.0/16"} trailing',
        '{"Network": "10.5.0.0/16", "SubnetLen": NaN}',
        '{"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "Port": Infinity}}',
        '{"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "Port": 1e999}}',
        '{"Network":' * 5000,
        '{"Network":' + "[" * 600 + "]" * 600 + "}",
        '{"Network": "10.5.0.0/16", "SubnetLen":' + "[" * 900 + "]" * 900 + "}",
        '{"Network": "\\ud800"}',
        '{"Network": "10.5.0.0/16", "SubnetLen": ' + "9" * 5000 + "}",
    ],
)
def test_garbage_is_a_config_error_with_its_origin(text: str) -> None:
    refusal(text)


@pytest.mark.parametrize(
    ("subnet", "admitted"),
    [
        ("10.5.1.0/24", True),
        ("10.5.255.0/24", True),
        ("10.5.0.0/24", False),
        ("10.6.0.0/24", False),
        ("10.5.1.0/25", False),
        ("10.5.0.0/23", False),
    ],
)
def test_pool_admits(subnet: str, admitted: bool) -> None:
    assert parse(v4()).pool.admits(IPv4Network(subnet)) is admitted


def test_pool6_admits() -> None:
    pool = parse(v6()).pool6
    assert pool is not None
    assert pool.admits(IPv6Network("2001:db8:0:1::/64"))
    assert not pool.admits(IPv6Network("2001:db8::/64"))
    assert not pool.admits(IPv6Network("2001:db8:0:1::/65"))
