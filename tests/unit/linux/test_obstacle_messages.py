"""Decoders of what the look for obstacles lists, given a kernel's own messages, and worse.

golden/netlink.json was recorded from Linux 6.18 on x86-64, and names the commands that made it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.linux.test_obstacles import SCENE
from tundp.errors import PlatformError
from tundp.finding import Verdict
from tundp.linux import links, policy_rules
from tundp.linux.obstacles import devices, ipsec, neighbours, programs
from tundp.linux.obstacles.devices import Device
from tundp.linux.obstacles.ipsec import Policies, Policy
from tundp.linux.policy_rules import MarkRule
from tundp.linux.rtnl import RtnlSocket

GOLDEN: Final = Path(__file__).parents[1] / "golden/netlink.json"
RECORDED: Final[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="ascii"))
DECODERS: Final[dict[str, Callable[[memoryview], Any]]] = {
    "rules": policy_rules.decode_mark_rule,
    "tables": policy_rules.decode_table,
    "policies": ipsec.decode,
    "links": devices.decode,
    "qdiscs": programs.decode_qdisc,
    "filters": programs.decode_filter,
    "neighbours": neighbours.decode,
}
KNOWN: Final = (struct.error, ValueError, IndexError)
"""What a dump makes an error of: rtnl.py."""


def recorded(name: str) -> list[memoryview]:
    listed = RECORDED["rules" if name == "tables" else name]["messages"]
    return [memoryview(bytes.fromhex(each)) for each in listed]


def decoded(name: str) -> list[Any]:
    return [made for each in recorded(name) if (made := DECODERS[name](each)) is not None]


def test_rules_for_a_mark_are_read_and_no_others() -> None:
    assert decoded("rules") == [MarkRule(100, 0x10, 0xFF), MarkRule(101, 0x20, 0xFFFFFFFF)]


def test_rules_for_every_packet_are_told_from_those_for_some() -> None:
    found = [policy_rules.decode_table(each) for each in recorded("rules")]
    assert [table for table in found if table is not None] == [255, 254, 253]
    (main,) = (each for each in recorded("rules") if policy_rules.decode_table(each) == 254)
    # suppress_prefixlength 0, as VPNs say: the default route does not count.
    at = bytes(main).index(struct.pack("=HH", 8, 14)) + 4
    narrowed = bytes(main[:at]) + bytes(4) + bytes(main[at + 4 :])
    assert policy_rules.decode_table(memoryview(narrowed)) is None
    by_device = bytes(main) + struct.pack("=HH", 9, 3) + b"eth0\0" + bytes(3)
    assert policy_rules.decode_table(memoryview(by_device)) is None


def test_policies_are_read_but_for_marks_and_ipv6() -> None:
    found = {each.destination: each for each in decoded("policies")}
    assert {str(each) for each in found.values()} == {
        "dir fwd src 10.5.0.0/16 dst 10.6.0.0/16 action block",
        "dir out src 0.0.0.0/0 dst 192.0.2.1/32 proto 17",
        "dir in src 10.0.0.0/8 dst 0.0.0.0/0 proto 17 action block",
    }
    fwd = found[IPv4Network("10.6.0.0/16")]
    assert (fwd.priority, fwd.blocks, fwd.transforms, fwd.has_ports) == (7, True, False, False)
    out = found[IPv4Network("192.0.2.1/32")]
    assert (out.blocks, out.transforms) == (False, True)
    assert found[IPv4Network("0.0.0.0/0")].has_ports


def test_default_policies_are_read() -> None:
    (before,), (after,) = recorded("defaults_before"), recorded("defaults")
    assert ipsec.decode_defaults(before) == ()
    assert ipsec.decode_defaults(after) == ("fwd",)
    with pytest.raises(PlatformError, match="cut off"):
        ipsec.decode_defaults(after[:2])


def test_devices_are_read_with_what_they_are_stacked_on() -> None:
    found = {each.name: each for each in decoded("links")}
    assert found["eth0"].master == found["br0"].index
    assert (found["eth0"].kind, found["eth0"].member_of) == ("veth", "bridge")
    assert found["far"].xdp == ("xdpgeneric",)
    assert found["eth0"].xdp == found["br0"].xdp == ()
    assert found["mv0"].carrier == found["far"].index
    # The other end of a veth carries nothing of its own.
    assert found["eth0"].carrier == 0
    assert devices.ports(list(found.values()), ("br0", "far")) == ("eth0",)
    assert devices.below(list(found.values()), "br0") == ("eth0",)
    assert devices.below(list(found.values()), "mv0") == ("far",)
    assert devices.below(list(found.values()), "none such") == ()


def test_devices_stacked_in_a_circle_end() -> None:
    """As a listing in two halves may show them."""
    one = Device(index=1, name="a", kind="bridge", master=2)
    two = Device(index=2, name="b", kind="bridge", master=1)
    assert set(devices.below([one, two], "a")) == {"b"}


def test_a_device_in_a_vrf_is_named() -> None:
    """Not seen from a kernel: ours has no VRFs."""
    red = Device(index=1, name="red", kind="vrf")
    uplink = Device(index=2, name="eth0", master=1, member_of="vrf")
    other = Device(index=3, name="eth1", master=1, member_of="vrf")
    (found,) = devices.vrfs([red, uplink, other], ("eth0", "flannel0"))
    assert found.evidence.startswith("eth0 belongs to the VRF red")
    assert found.facts["command"] == "ip link set dev eth0 nomaster"


@pytest.mark.parametrize(
    ("inside", "modes"),
    [
        ({2: b"\0"}, ()),
        ({2: b"\1"}, ("xdpdrv",)),
        ({2: b"\2"}, ("xdpgeneric",)),
        ({2: b"\3"}, ("xdpoffload",)),
        ({2: b"\4", 5: b"\7\0\0\0", 6: b"\x08\0\0\0"}, ("xdpdrv", "xdpgeneric")),
        ({2: b"\4"}, ("xdp",)),
        ({2: b""}, ()),
        ({}, ()),
    ],
)
def test_the_modes_of_xdp(inside: dict[int, bytes], modes: tuple[str, ...]) -> None:
    packed = b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
        for kind, value in inside.items()
    )
    body = struct.pack("=BxHiII", 0, 1, 7, 0, 0) + struct.pack("=HH", 4 + len(packed), 43) + packed
    device = devices.decode(memoryview(body))
    assert device is not None
    assert (device.index, device.xdp) == (7, modes)


def test_qdiscs_are_read_with_what_they_dropped() -> None:
    found = {each.kind: each for each in decoded("qdiscs")}
    assert (found["pfifo"].sent, found["pfifo"].is_hooked) == (0, False)
    assert found["pfifo"].dropped >= 2
    assert (found["clsact"].dropped, found["clsact"].is_hooked) == (0, True)
    assert found["pfifo"].index == found["clsact"].index
    assert set(decoded("filters")) == {"bpf"}


def test_neighbours_are_read_if_they_are_permanent() -> None:
    (found,) = decoded("neighbours")
    assert found.address == IPv4Address("192.0.2.9")
    assert found.link_address == "02:00:00:00:00:99"


def each_recorded() -> Iterator[tuple[str, memoryview]]:
    for name in DECODERS:
        for message in recorded(name):
            yield name, message


def test_messages_cut_off_anywhere_raise_only_what_a_dump_expects() -> None:
    for name, message in each_recorded():
        for length in range(len(message)):
            tolerate(name, message[:length])


@given(st.sampled_from(sorted(DECODERS)), st.binary(max_size=400))
def test_rubbish_raises_only_what_a_dump_expects(name: str, body: bytes) -> None:
    tolerate(name, memoryview(body))


@given(st.data())
def test_changed_messages_raise_only_what_a_dump_expects(data: st.DataObject) -> None:
    name, message = data.draw(st.sampled_from(list(each_recorded())))
    changed = bytearray(message)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    tolerate(name, memoryview(bytes(changed)))


def tolerate(name: str, body: memoryview) -> None:
    try:
        DECODERS[name](body)
    except KNOWN:
        return


def test_a_message_of_unknown_form_fails_its_dump_and_not_the_next() -> None:
    sock = RtnlSocket()
    try:
        with pytest.raises(PlatformError, match=r"cannot list links: .* unknown form .*requires"):
            sock.dump(
                "list links", links.links_request(), lambda body: struct.unpack("=Q", body[:1])
            )
        found, _ = sock.dump("list links", links.links_request(), links.decode_link)
    finally:
        sock.close()
    assert "lo" in [each.name for each in found]


def policy(**changes: Any) -> Policy:
    base: dict[str, Any] = {
        "source": IPv4Network("10.5.0.0/16"),
        "destination": IPv4Network("10.5.0.0/16"),
        "protocol": 0,
        "has_ports": False,
        "way": "fwd",
        "priority": 10,
        "index": 8,
        "blocks": True,
        "transforms": False,
    }
    return Policy(**base | changes)


PODS = ("cni0",)


def test_the_first_policy_that_matches_decides() -> None:
    block = policy()
    (found,) = ipsec.findings(Policies([block]), SCENE, PODS)
    assert found.verdict is Verdict.WARN
    assert "blocks packets from peers to pods here, from pods here to peers" in found.evidence
    assert found.facts["command"] == "ip xfrm policy delete dir fwd index 8"
    passes = policy(blocks=False, priority=9, index=16)
    assert ipsec.findings(Policies([block, passes]), SCENE, PODS) == []
    assert ipsec.findings(Policies([block, replace(passes, priority=11)]), SCENE, PODS) == [found]
    # One that lets a part pass leaves the rest to the next.
    part = replace(passes, destination=IPv4Network("10.5.2.0/25"))
    assert ipsec.findings(Policies([block, part]), SCENE, PODS) == [found]


@pytest.mark.parametrize(
    "changes",
    [
        {"source": IPv4Network("10.6.0.0/16")},
        {"destination": IPv4Network("10.4.0.0/16")},
        {"protocol": 132},
        {"way": "in", "source": IPv4Network("10.5.1.0/24")},
        {"blocks": False},
    ],
)
def test_a_policy_for_others_is_no_obstacle(changes: dict[str, Any]) -> None:
    assert ipsec.findings(Policies([policy(**changes)]), SCENE, PODS) == []


def test_encrypting_the_tunnel_may_be_wanted_and_its_packets_may_not() -> None:
    tunnel = policy(
        source=IPv4Network("0.0.0.0/0"),
        destination=IPv4Network("192.0.2.2/32"),
        protocol=17,
        way="out",
        blocks=False,
        transforms=True,
    )
    (note,) = ipsec.findings(Policies([tunnel]), SCENE, PODS)
    assert note.verdict is Verdict.NOTE
    inner = policy(blocks=False, transforms=True, way="out")
    (warning,) = ipsec.findings(Policies([inner]), SCENE, PODS)
    assert warning.verdict is Verdict.WARN


def test_a_default_that_blocks_spares_what_a_policy_lets_pass() -> None:
    (found,) = ipsec.findings(Policies((), ("fwd",)), SCENE, PODS)
    assert "dir fwd action block" in found.evidence
    assert found.facts["command"] == "ip xfrm policy setdefault fwd accept"
    passes = policy(blocks=False)
    assert ipsec.findings(Policies([passes], ("fwd",)), SCENE, PODS) == []
    half = policy(blocks=False, destination=IPv4Network("10.5.1.0/24"))
    (found,) = ipsec.findings(Policies([half], ("fwd",)), SCENE, PODS)
    assert "from pods here to peers that no policy is for" in found.evidence


def test_no_more_than_some_policies_are_named() -> None:
    many = [policy(source=IPv4Network((f"10.5.2.{n}", 32)), index=n) for n in range(40)]
    assert len(ipsec.findings(Policies(many), SCENE, PODS)) == ipsec.SHOWN
