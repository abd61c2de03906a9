"""Whose lease it is: node ids in fields of the value that flannel ignores."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from typing import Any

import pytest

from tundp.lease import codec
from tundp.lease.codec import parse_key
from tundp.lease.identity import (
    CHALLENGE,
    HOST,
    NODE,
    Holder,
    Identity,
    Other,
    Ours,
    challenge_in,
    challenged,
    holder_of,
    identity_of,
    signed,
    whose,
)
from tundp.lease.model import UNSPECIFIED, Lease, LeaseAttributes

US = Identity("7c1f", "kube1")
PLAIN = LeaseAttributes(public_ip=IPv4Address("192.0.2.1"))


def lease(attributes: LeaseAttributes) -> Lease:
    return Lease(key=parse_key("10.5.1.0-24"), attributes=attributes, revision=1, lease_ttl_s=60.0)


def with_extra(**extra: Any) -> LeaseAttributes:
    return LeaseAttributes(public_ip=IPv4Address("192.0.2.1"), extra=extra)


def test_signed_attributes_yield_the_identity() -> None:
    assert identity_of(lease(signed(PLAIN, US, PLAIN))) == US
    assert identity_of(lease(signed(PLAIN, Identity("7c1f"), PLAIN))) == Identity("7c1f", "")


def test_field_names_are_a_contract() -> None:
    """Nodes of other versions read them."""
    value = json.loads(codec.encode_value(challenged(signed(PLAIN, US, PLAIN), "ab")))
    assert value == {
        "PublicIP": "192.0.2.1",
        "PublicIPv6": None,
        "TundpNode": "7c1f",
        "TundpHost": "kube1",
        "TundpChallenge": "ab",
    }


def test_a_stock_flannel_reads_a_signed_lease() -> None:
    """It decodes the fields it knows, in this order, and ignores the rest."""
    text = codec.encode_value(signed(PLAIN, US, PLAIN))
    assert text.startswith('{"PublicIP":"192.0.2.1","PublicIPv6":null,')


@pytest.mark.parametrize(
    ("extra", "identity", "breaks"),
    [
        ({}, None, "a stock flanneld"),
        ({HOST: "kube1"}, None, "a host alone is no node"),
        ({NODE: ""}, None, "empty"),
        ({NODE: None}, None, "written by hand"),
        ({NODE: 5}, None, "written by hand"),
        ({NODE: ["7c1f"]}, None, "written by hand"),
        ({NODE: "7c1f"}, Identity("7c1f"), "no host"),
        ({NODE: "7c1f", HOST: 5}, Identity("7c1f"), "a host of another kind"),
        ({NODE.lower(): "7c1f"}, None, "extra fields are spelled exactly"),
    ],
)
def test_identity_of_any_value(extra: Any, identity: Identity | None, breaks: str) -> None:
    assert identity_of(lease(with_extra(**extra))) == identity, breaks


@pytest.mark.parametrize(
    ("extra", "challenge"),
    [({}, None), ({CHALLENGE: "ab"}, "ab"), ({CHALLENGE: ""}, ""), ({CHALLENGE: 5}, None)],
)
def test_challenge_in_any_value(extra: dict[str, Any], challenge: str | None) -> None:
    assert challenge_in(lease(with_extra(**extra))) == challenge


def test_signing_keeps_foreign_fields_and_removes_a_challenge() -> None:
    kept = with_extra(**{"Rack": "b7", NODE: "old", HOST: "old", CHALLENGE: "ab", "Deep": [{}]})
    now = signed(PLAIN, US, kept)
    assert now.extra == {"Rack": "b7", "Deep": [{}], NODE: "7c1f", HOST: "kube1"}
    assert challenge_in(lease(now)) is None


def test_signing_takes_the_rest_from_the_new_attributes() -> None:
    new = LeaseAttributes(public_ip=IPv4Address("192.0.2.9"), extra={"Lost": 1})
    now = signed(new, US, with_extra(Rack="b7"))
    assert now.public_ip == IPv4Address("192.0.2.9")
    assert now.extra == {"Rack": "b7", NODE: "7c1f", HOST: "kube1"}


def test_signing_without_an_identity_removes_another_nodes() -> None:
    kept = with_extra(**{"Rack": "b7", NODE: "old", HOST: "old", CHALLENGE: "ab"})
    assert signed(PLAIN, None, kept).extra == {"Rack": "b7"}


def test_a_node_without_a_host_name_leaves_no_old_one() -> None:
    kept = with_extra(**{NODE: "old", HOST: "old"})
    assert signed(PLAIN, Identity("7c1f"), kept).extra == {NODE: "7c1f"}


def test_a_challenge_changes_nothing_else() -> None:
    before = with_extra(**{"Rack": "b7", NODE: "7c1f", CHALLENGE: "ab"})
    after = challenged(before, "cd")
    assert after.extra == {"Rack": "b7", NODE: "7c1f", CHALLENGE: "cd"}
    assert after.public_ip == before.public_ip
    assert before.extra[CHALLENGE] == "ab", "the old value is somebody else's"
    assert identity_of(lease(after)) == Identity("7c1f")


def test_answering_a_challenge_is_a_change() -> None:
    """Otherwise a store might not count the answer as a write."""
    asked = challenged(signed(PLAIN, US, PLAIN), "cd")
    assert signed(PLAIN, US, asked) != asked
    assert signed(PLAIN, US, asked) == signed(PLAIN, US, PLAIN)


@pytest.mark.parametrize(
    ("identity", "text"),
    [(US, "7c1f (host kube1)"), (Identity("7c1f"), "7c1f")],
)
def test_identity_as_text(identity: Identity, text: str) -> None:
    assert str(identity) == text


OUR_IP, FORMER_IP, THEIR_IP = (IPv4Address(f"192.0.2.{n}") for n in (1, 2, 9))
CLONE = {NODE: "7c1f", HOST: "clone"}
THEM = {NODE: "beef", HOST: "kube9"}


@pytest.mark.parametrize(
    ("ip", "extra", "identity", "expected"),
    [
        (OUR_IP, CLONE, US, Holder.OURS),
        (FORMER_IP, CLONE, US, Holder.OURS),
        (OUR_IP, {}, US, Holder.LEFTOVER),
        (OUR_IP, {}, None, Holder.LEFTOVER),
        (OUR_IP, THEM, US, Holder.DUPLICATE),
        (OUR_IP, CLONE, None, Holder.DUPLICATE),
        (THEIR_IP, CLONE, US, Holder.CLONE),
        (THEIR_IP, THEM, US, Holder.OTHER),
        (FORMER_IP, THEM, US, Holder.OTHER),
        (FORMER_IP, {}, US, Holder.OTHER),
        (UNSPECIFIED, {}, US, Holder.OTHER),
        (UNSPECIFIED, CLONE, US, Holder.CLONE),
    ],
)
@pytest.mark.parametrize("public_ip", [OUR_IP, UNSPECIFIED])
def test_whose_lease(
    ip: IPv4Address,
    extra: dict[str, Any],
    identity: Identity | None,
    expected: Holder,
    public_ip: IPv4Address,
) -> None:
    found = whose(
        lease(LeaseAttributes(public_ip=ip, extra=extra)),
        public_ip=public_ip,
        identity=identity,
        former_ips={FORMER_IP},
    )
    if public_ip == UNSPECIFIED and ip in (OUR_IP, UNSPECIFIED):
        # Without an address of ours none is ours: 0.0.0.0 is nobody's.
        assert found in (Holder.CLONE, Holder.OTHER)
    else:
        assert found is expected


@pytest.mark.parametrize(
    ("ip", "extra", "identity", "expected", "breaks"),
    [
        (OUR_IP, {NODE: "7c1f", HOST: "kube1"}, US, Ours(is_signed=True), "the usual one"),
        (OUR_IP, {}, US, Ours(is_signed=False), "by hand, or a stock flanneld of this host"),
        (OUR_IP, CLONE, US, Ours(is_signed=True), "a clone with another name, or ours renamed"),
        (FORMER_IP, {NODE: "7c1f", HOST: "kube1"}, US, Ours(is_signed=True), "we have moved"),
        (FORMER_IP, {}, US, Other("192.0.2.2"), "the address is somebody else's by now"),
        (FORMER_IP, THEM, US, Other("node beef (host kube9) at 192.0.2.2"), "signed by it"),
        (OUR_IP, THEM, US, Other("node beef (host kube9) at 192.0.2.1"), "a duplicate"),
        (THEIR_IP, CLONE, US, Other("192.0.2.9"), "a clone"),
        (THEIR_IP, THEM, US, Other("node beef (host kube9) at 192.0.2.9"), "another node"),
        (THEIR_IP, {}, US, Other("192.0.2.9"), "a stock flanneld"),
        (OUR_IP, THEM, None, Ours(is_signed=True), "without identity the address decides"),
        (FORMER_IP, {}, None, Other("192.0.2.2"), "without identity a former one does not"),
        (THEIR_IP, {}, None, Other("192.0.2.9"), "a stock flanneld"),
    ],
)
def test_holder_of(
    ip: IPv4Address,
    extra: dict[str, Any],
    identity: Identity | None,
    expected: Other | Ours,
    breaks: str,
) -> None:
    found = holder_of(
        lease(LeaseAttributes(public_ip=ip, extra=extra)),
        public_ip=OUR_IP,
        identity=identity,
        former_ips={FORMER_IP},
    )
    assert found == expected, breaks
