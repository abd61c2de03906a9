"""IPsec policies (xfrm) that block the overlay's packets, or take them into transformations.

Of the policies of one direction the first that matches decides, in the order of their priority
(net/xfrm/xfrm_policy.c: xfrm_policy_lookup). Policies of single sockets, of xfrm interfaces and
for marks are left out.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from typing import Final

from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.obstacles.firewall import FROM_HOST, FROM_PODS, TO_PODS, TUNNEL_OUT, trips
from tundp.linux.obstacles.packet import Match, Packet, Range, cover, range_of, worst
from tundp.linux.obstacles.scene import NOT_JUDGED, Scene
from tundp.linux.rtnl import Request, RtnlSocket, attributes, decode_error

ID: Final = "obstacle.ipsec"
SHOWN: Final = 6
_SELECTOR: Final = struct.Struct("=16s16s2s2s2s2sHBBB3xiI")
"""struct xfrm_selector: addresses of destination and source, ports with masks in network byte
order, family, prefix lengths, protocol, device, user (linux/xfrm.h)."""
_INFO: Final = struct.Struct("=56s64s32sIIBBBB4x")
"""struct xfrm_userpolicy_info: selector, limits, use so far, priority, index, direction, action,
flags, share."""
_DEFAULTS: Final = struct.Struct("=BBB")
"""struct xfrm_userpolicy_default: of `in`, `fwd` and `out`."""
_WAYS: Final = ("in", "out", "fwd")
_PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One policy, as far as it decides about packets of ours."""

    source: IPv4Network
    destination: IPv4Network
    protocol: int
    has_ports: bool
    """Whether it is for single ports, which are not looked at."""
    way: str
    """`in`, `out` or `fwd`."""
    priority: int
    index: int
    blocks: bool
    transforms: bool

    def match(self, packet: Packet) -> Match:
        """For which of the packets it is."""
        if self.protocol not in (0, _PROTOCOLS[packet.proto]):
            return Match.NO
        source, destination = (
            cover((range_of(each),), wanted) for each, wanted in self._ends(packet)
        )
        return worst(source, destination, Match.UNKNOWN if self.has_ports else Match.YES)

    def _ends(self, packet: Packet) -> tuple[tuple[IPv4Network, Sequence[Range]], ...]:
        return (self.source, packet.src), (self.destination, packet.dst)

    def __str__(self) -> str:
        protocol = f" proto {self.protocol}" if self.protocol else ""
        what = " action block" if self.blocks else ""
        return f"dir {self.way} src {self.source} dst {self.destination}{protocol}{what}"


@dataclass(frozen=True, slots=True)
class Policies:
    """What IPsec decides in this namespace."""

    listed: Sequence[Policy] = ()
    blocking: tuple[str, ...] = ()
    """The directions in which packets no policy is for are dropped."""


def read() -> Policies:
    """The IPv4 policies of this namespace. PlatformError if the kernel refuses to list them."""
    try:
        sock = RtnlSocket(uapi.NETLINK_XFRM)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:  # a kernel without IPsec
            return Policies()
        raise PlatformError(f"cannot list IPsec policies: {error}", error.errno) from None
    try:
        request = uapi.XFRM_MSG_GETPOLICY, bytes(_SELECTOR.size + 8)
        found, _ = sock.dump("list IPsec policies", request, decode)
        return Policies(found, _read_defaults(sock))
    finally:
        sock.close()


def _read_defaults(sock: RtnlSocket) -> tuple[str, ...]:
    what = "ask for IPsec's default policy"
    try:
        (answer,) = sock.exchange([Request(uapi.XFRM_MSG_GETDEFAULT, 0, bytes(_DEFAULTS.size))])
    except OSError as error:
        raise PlatformError(f"cannot {what}: {error.strerror or error}", error.errno) from None
    if answer.kind == uapi.NLMSG_ERROR:
        code, reason = decode_error(answer.flags, answer.body)
        if code == errno.EINVAL:  # before Linux 5.15: accept
            return ()
        raise PlatformError(f"cannot {what}: {reason}", code)
    return decode_defaults(answer.body)


def decode_defaults(body: memoryview) -> tuple[str, ...]:
    """The directions whose default is to block. PlatformError if it is too short to tell."""
    if len(body) < _DEFAULTS.size:
        raise PlatformError("the kernel's answer about IPsec's default policy is cut off")
    values = zip(("in", "fwd", "out"), _DEFAULTS.unpack_from(body), strict=True)
    return tuple(way for way, value in values if value == uapi.XFRM_USERPOLICY_BLOCK)


def decode(body: memoryview) -> Policy | None:
    """The policy of an XFRM_MSG_NEWPOLICY; None for one that is not of IPv4, or for a few only.

    struct.error or ValueError if it has no known form.
    """
    selector, _, _, priority, index, way, action, _, _ = _INFO.unpack_from(body)
    values = dict(attributes(body[_INFO.size :]))
    to, source, dport, _, sport, _, family, to_len, source_len, protocol, _, _ = _SELECTOR.unpack(
        selector
    )
    special = {uapi.XFRMA_MARK, uapi.XFRMA_IF_ID} & values.keys()
    if family != socket.AF_INET or way >= len(_WAYS) or special:
        return None
    return Policy(
        source=IPv4Network((source[:4], source_len), strict=False),
        destination=IPv4Network((to[:4], to_len), strict=False),
        protocol=protocol,
        has_ports=any(dport + sport),
        way=_WAYS[way],
        priority=priority,
        index=index,
        blocks=action == uapi.XFRM_POLICY_BLOCK,
        transforms=bool(values.get(uapi.XFRMA_TMPL)),
    )


def findings(policies: Policies, scene: Scene, pod_devices: Sequence[str]) -> list[Finding]:
    """Policies that block packets of the overlay, or do not let them pass as they are."""
    ordered = sorted(policies.listed, key=lambda each: each.priority)
    hits: dict[Policy, list[str]] = {}
    unmatched: dict[str, list[str]] = {}
    for name, ways, packet in _packets(scene, pod_devices):
        for way in ways:
            deciding, is_left = _deciding(ordered, way, packet)
            places = [hits.setdefault(policy, []) for policy in deciding]
            if is_left and way in policies.blocking:
                places.append(unmatched.setdefault(way, []))
            for names in places:
                if name not in names:
                    names.append(name)
    made = [_of_default(way, names) for way, names in unmatched.items()]
    for policy, names in list(hits.items())[:SHOWN]:
        command = f"ip xfrm policy delete dir {policy.way} index {policy.index}"
        # Encrypting the tunnel may be just what is wanted, and every peer has to do the same.
        is_wish = (
            policy.transforms and not policy.blocks and all("tunnel" in each for each in names)
        )
        verb = "blocks" if policy.blocks else "takes into IPsec the"
        made.append(
            Finding(
                id=ID,
                verdict=Verdict.NOTE if is_wish else Verdict.WARN,
                evidence=f"IPsec policy {policy}: {verb} packets {', '.join(names)}",
                meaning=NOT_JUDGED if is_wish else "",
                next_step=f"{command}  (as the program that made it is told to)",
                facts={"command": command},
            )
        )
    return made


def _of_default(way: str, names: Sequence[str]) -> Finding:
    command = f"ip xfrm policy setdefault {way} accept"
    return Finding(
        id=ID,
        verdict=Verdict.WARN,
        evidence=f"IPsec's default policy dir {way} action block: blocks packets"
        f" {', '.join(names)} that no policy is for",
        next_step=command,
        facts={"command": command},
    )


def _deciding(ordered: Sequence[Policy], way: str, packet: Packet) -> tuple[list[Policy], bool]:
    """The policies that do something to such packets, and whether any packet is left over."""
    found = []
    for policy in ordered:
        answer = policy.match(packet) if policy.way == way else Match.NO
        if answer is not Match.NO and (policy.blocks or policy.transforms):
            found.append(policy)
        if answer is Match.YES:
            return found, False
    return found, True


def _packets(
    scene: Scene, pod_devices: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...], Packet]]:
    """Name, directions and packet of each trip: what is forwarded meets two."""
    ways = {
        TO_PODS: ("fwd", "out"),
        FROM_PODS: ("fwd", "out"),
        FROM_HOST: ("out",),
        TUNNEL_OUT: ("out",),
    }
    for trip in trips(scene, pod_devices):
        for packet in trip.packets:
            if packet.state == "new" or trip.name not in ways:
                yield trip.name, ways.get(trip.name, ("in",)), replace(packet, state="new")
