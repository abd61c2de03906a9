"""subnet.env, written byte for byte and read back in whatever state it is."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import pytest

from tundp.lease.codec import parse_key
from tundp.lease.subnet_env import SubnetEnv, previous_key, render

V4 = SubnetEnv(
    network=IPv4Network("10.1.0.0/16"),
    key=parse_key("10.1.67.0-24"),
    network6=None,
    mtu=1472,
    ip_masq=True,
)
V4_TEXT = (
    "FLANNEL_NETWORK=10.1.0.0/16\n"
    "FLANNEL_SUBNET=10.1.67.1/24\n"
    "FLANNEL_MTU=1472\n"
    "FLANNEL_IPMASQ=true\n"
)
DUAL = SubnetEnv(
    network=IPv4Network("10.5.0.0/16"),
    key=parse_key("10.5.67.0-24&fd00:5:67::-64"),
    network6=IPv6Network("fd00:5::/32"),
    mtu=8973,
    ip_masq=False,
)
DUAL_TEXT = (
    "FLANNEL_NETWORK=10.5.0.0/16\n"
    "FLANNEL_SUBNET=10.5.67.1/24\n"
    "FLANNEL_IPV6_NETWORK=fd00:5::/32\n"
    "FLANNEL_IPV6_SUBNET=fd00:5:67::1/64\n"
    "FLANNEL_MTU=8973\n"
    "FLANNEL_IPMASQ=false\n"
)


@pytest.mark.parametrize(("env", "text"), [(V4, V4_TEXT), (DUAL, DUAL_TEXT)])
def test_rendered_bytes(env: SubnetEnv, text: str) -> None:
    assert render(env) == text


@pytest.mark.parametrize("env", [V4, DUAL])
def test_rendered_text_is_parsed_back(env: SubnetEnv) -> None:
    assert previous_key(render(env)) == env.key


@pytest.mark.parametrize(
    ("text", "key", "breaks"),
    [
        ("FLANNEL_SUBNET=10.5.7.1/24", "10.5.7.0-24", "no newline at the end"),
        ("FLANNEL_SUBNET=10.5.7.0/24\n", "10.5.7.0-24", "the base itself"),
        ("FLANNEL_SUBNET=10.5.7.99/24\n", "10.5.7.0-24", "any address of it"),
        ("export FLANNEL_SUBNET=10.5.7.1/24\n", "10.5.7.0-24", "export"),
        ("FLANNEL_SUBNET='10.5.7.1/24'\n", "10.5.7.0-24", "single quotes"),
        ('FLANNEL_SUBNET="10.5.7.1/24"\n', "10.5.7.0-24", "double quotes"),
        ('FLANNEL_SUBNET="10.5.7.1/24" # ours\n', "10.5.7.0-24", "a comment behind quotes"),
        ("FLANNEL_SUBNET: 10.5.7.1/24\n", "10.5.7.0-24", "a colon"),
        ("  FLANNEL_SUBNET = 10.5.7.1/24  \n", "10.5.7.0-24", "blanks all around"),
        ("FLANNEL_SUBNET=10.5.7.1/24 # ours\n", "10.5.7.0-24", "a comment behind the value"),
        ("# hello\n\nFLANNEL_SUBNET=10.5.7.1/24\n", "10.5.7.0-24", "comments and blank lines"),
        ("FLANNEL_SUBNET=10.5.7.1/24\r\nFLANNEL_MTU=1\r\n", "10.5.7.0-24", "DOS line ends"),
        ("rubbish\n=\nFLANNEL_SUBNET=10.5.7.1/24\n", "10.5.7.0-24", "lines that mean nothing"),
        ("FLANNEL_SUBNET=bad,10.5.7.1/24\n", "10.5.7.0-24", "bad items of a list are skipped"),
        ("FLANNEL_SUBNET=10.5.7.1/24,\n", "10.5.7.0-24", "an empty item too"),
        ("FLANNEL_SUBNET=10.5.7.1/24, 10.5.8.1/33\n", "10.5.7.0-24", "a bad length too"),
        (
            "FLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_IPV6_SUBNET=bad\n",
            "10.5.7.0-24",
            "a bad IPv6 half is none",
        ),
        (
            "FLANNEL_IPV6_SUBNET=fd00:5:7::1/64\nFLANNEL_SUBNET=10.5.7.1/24\n",
            "10.5.7.0-24&fd00:5:7::-64",
            "any order",
        ),
        ("FLANNEL_SUBNET=10.5.7.1/24,10.5.8.1/24\n", None, "two valid items are none"),
        ("FLANNEL_SUBNET=10.5.7.1/24,10.5.7.1/24\n", None, "even twice the same"),
        ("FLANNEL_SUBNET=\n", None, "an empty value"),
        ("FLANNEL_SUBNET=10.5.7.1\n", None, "no length"),
        ("FLANNEL_SUBNET=10.5.7.1/33\n", None, "a length there cannot be"),
        ("FLANNEL_SUBNET=10.5.7/24\n", None, "half an address"),
        ("FLANNEL_SUBNET=fd00::1/64\n", None, "the other family"),
        ("FLANNEL_SUBNET=10.5.7.1/255.255.255.0\n", None, "a mask: not a CIDR"),
        ("#FLANNEL_SUBNET=10.5.7.1/24\n", None, "commented out"),
        ("  # FLANNEL_SUBNET=10.5.7.1/24\n", None, "commented out further right"),
        ("XFLANNEL_SUBNET=10.5.7.1/24\n", None, "another name"),
        ("FLANNEL_MTU=1472\n", None, "the line is missing"),
        ("FLANNEL_IPV6_SUBNET=fd00:5:7::1/64\n", None, "IPv6 alone is no lease of ours"),
        ("", None, "an empty file"),
        ("\x00\x01\udcff", None, "not text at all"),
    ],
)
def test_previous_key(text: str, key: str | None, breaks: str) -> None:
    found = previous_key(text)
    assert (None if found is None else str(found)) == key, breaks


def test_previous_key_needs_a_single_ipv6_subnet() -> None:
    text = "FLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_IPV6_SUBNET=fd00::1/64,fd01::1/64\n"
    assert previous_key(text) == parse_key("10.5.7.0-24")
