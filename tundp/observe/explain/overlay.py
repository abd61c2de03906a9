"""Steps of the overlay: leases, sizes, source check; by the rules packets are judged by.

The packet is made up (`synthetic`) and given to wire/encap.py, which is the specification of
every engine's verdicts. Facts in, steps out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from shlex import quote
from typing import Final

from tundp.choices import Measuring, SourceCheck
from tundp.lease.fib import NextHop
from tundp.observe.explain.facts import Direction, Facts, Kind
from tundp.observe.explain.host import masqueraded
from tundp.observe.explain.model import Question, Ruling, Step
from tundp.observe.ledger import REFUSED, LedgerRow
from tundp.observe.status import Status
from tundp.wire import encap, icmp, ip
from tundp.wire.drop import DropReason

TTL: Final = 64
"""What most senders begin with."""
_PROTOS: Final = {"tcp": 6, "udp": 17, "icmp": 1}
_ICMP_ECHO: Final = struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0)
_SOURCE_PORT: Final = 49152
"""The first of those clients choose from (RFC 6335)."""
_LEASE_COMMAND: Final = "tundp status"


def synthetic(
    question: Question,
    *,
    source: IPv4Address | None = None,
    ttl: int = TTL,
    size: int | None = None,
) -> bytearray:
    """The packet in question, as it would be read from the TUN. source: another one."""
    size = question.size if size is None else size
    proto = _PROTOS.get(question.proto, 1)
    header = ip.build_header(
        payload_len=size - ip.MIN_HEADER_LEN,
        source=int(source or question.source),
        destination=int(question.destination),
        ip_proto=proto,
        ttl=ttl,
        flags_offset=ip.FLAG_DF if question.dont_fragment else 0,
    )
    ports = struct.pack("!HH", _SOURCE_PORT, question.port or 0)
    payload = _ICMP_ECHO if proto == ip.PROTO_ICMP else ports
    room = size - ip.MIN_HEADER_LEN
    return bytearray(header + payload[:room].ljust(room, b"\0"))


def lease(facts: Facts) -> Iterator[Step]:
    """The lease that covers the destination, or why there is none."""
    if facts.direction is not Direction.ENCAP:
        return
    row, status = facts.destination.row, facts.status
    leases = facts.leases
    known = f"{leases.count} leases at revision {leases.revision}"
    if row is None:
        yield _no_lease(facts, known)
        return
    if row.state == REFUSED:
        says = _REFUSALS.get(row.reason, "")
        yield Step(
            id="lease",
            title="lease",
            ruling=Ruling.DROP,
            evidence=f"{row.key} ({row.public_ip}, revision {row.revision}) is refused"
            f" ({row.reason}): it {row.means}{_answer(facts)}",
            command=_LEASE_COMMAND if says else f"ip route get {row.public_ip}",
            words=says.format(key=row.key),
            reason=DropReason.NO_ROUTE.label,
        )
        return
    is_old = status is not None and status.store is not None and not status.store.is_answering
    evidence = f"{row.subnet} at {row.endpoint}, lease {row.key}, revision {row.revision}; {known}"
    yield Step(
        id="lease",
        title="lease",
        ruling=Ruling.WARN if is_old else Ruling.OK,
        evidence=f"{evidence}{_age(status)}",
        command=_LEASE_COMMAND if is_old else "",
    )


_REFUSALS: Final = {
    "no_public_ip": "the node of {key} has to register again",
    "outside_network": "see the network config, and who made {key}",
    "other_backend": "the node of {key} runs another backend",
}


def _age(status: Status | None) -> str:
    if status is None or status.store is None or status.store.is_answering:
        return ""
    return f"; the store does not answer, they are {status.store.age_s} s old"


def _no_lease(facts: Facts, known: str) -> Step:
    near = facts.leases.nearest(facts.question.destination)
    names = ", ".join(f"{each.subnet} ({each.state})" for each in near)
    bad = facts.leases.bad_entries
    evidence = f"no lease covers {facts.question.destination}: {known}"
    evidence += f", the nearest {names}" if near else ""
    evidence += f"; {bad} entries of the store cannot be read" if bad else ""
    return Step(
        id="lease",
        title="lease",
        ruling=Ruling.DROP,
        evidence=f"{evidence}{_age(facts.status)}{_answer(facts)}",
        command=_LEASE_COMMAND,
        reason=DropReason.NO_ROUTE.label,
    )


def _verdict(facts: Facts, *, size: int) -> encap.Forward[NextHop] | encap.Reply | encap.Drop:
    """What the rules do with the packet, read from the TUN."""
    mtu = path_mtu(facts) or 0xFFFF
    kind = facts.source.kind
    return encap.encapsulate(
        memoryview(
            synthetic(
                facts.question,
                source=masqueraded(facts),
                # This host has forwarded what a pod sends.
                ttl=TTL if kind is Kind.HOST else TTL - 1,
                size=size,
            )
        ),
        lookup=facts.leases.fib().lookup,
        path_mtu=lambda _: mtu,
        tun_address=int(facts.leases.tun_address or 0),
    )


def _answer(facts: Facts) -> str:
    """The ICMP error the sender gets, in words; empty where the kernel answers for itself."""
    if not facts.is_tunnel:
        return ""
    found = _verdict(facts, size=facts.question.size)
    if not isinstance(found, encap.Reply):
        return "; no ICMP error"
    return f"; the sender gets ICMP {icmp.described(found.packet)} from {facts.leases.tun_address}"


def path_mtu(facts: Facts) -> int | None:
    """Bytes of the largest inner packet the path carries, as far as is known."""
    peer = facts.peer_status
    path = None if peer is None else peer.path
    if path is not None and path.inner_mtu is not None:
        return path.inner_mtu
    return facts.device_mtu


def size(facts: Facts) -> Iterator[Step]:
    """Whether the packet fits: the device first, then the path to the peer."""
    row = facts.destination.row
    if facts.direction is not Direction.ENCAP or row is None or row.state == REFUSED:
        return
    title, length = "size", facts.question.size
    full, narrow = facts.device_mtu, path_mtu(facts)
    route = None if facts.inner is None else facts.inner.route
    if route is not None and route.mtu is not None and full is not None:
        full = min(full, route.mtu)
    if full is None or narrow is None:
        yield Step(
            id="size",
            title=title,
            ruling=Ruling.UNKNOWN,
            evidence=f"{length} bytes; no daemon runs, so the MTU of its device is not known",
        )
        return
    if length > full:
        yield _over_device(facts, full)
        return
    origin = _origin(facts)
    if not facts.is_tunnel:
        yield Step(
            id="size", title=title, ruling=Ruling.OK, evidence=f"{length} of at most {full} bytes"
        )
        return
    found = _verdict(facts, size=length)
    if isinstance(found, encap.Forward):
        many = len(found.packets)
        yield Step(
            id="size",
            title=title,
            ruling=Ruling.OK if many == 1 else Ruling.WARN,
            evidence=f"{length} of at most {narrow} bytes ({origin})"
            if many == 1
            else f"{length} bytes, more than the {narrow} of the path ({origin}): {many} fragments",
        )
        return
    yield Step(
        id="size",
        title=title,
        ruling=Ruling.DROP,
        evidence=f"{length} bytes with DF, more than the {narrow} of the path"
        f" ({origin}): {found.reason.means}{_answer(facts)}",
        command=_lower(facts, narrow),
        words=_lower_in_pod(facts, narrow),
        reason=found.reason.label,
    )


def _over_device(facts: Facts, full: int) -> Step:
    """Larger than the device: the kernel judges before tundp sees it."""
    length, device = facts.question.size, facts.device
    if facts.question.dont_fragment:
        return Step(
            id="size",
            title="size",
            ruling=Ruling.DROP,
            evidence=f"{length} bytes with DF, more than the MTU {full} of {device}: the kernel"
            f" drops it and answers ICMP fragmentation needed, MTU {full}",
            command=_lower(facts, full),
            words=_lower_in_pod(facts, full),
        )
    return Step(
        id="size",
        title="size",
        ruling=Ruling.WARN,
        evidence=f"{length} bytes, more than the MTU {full} of {device}: the kernel fragments it",
    )


def _lower(facts: Facts, mtu: int) -> str:
    """What makes the sender send less. One that measures its paths does so by itself."""
    if facts.source.kind is Kind.POD:
        return ""
    return f"ip route change {facts.leases.network} dev {quote(facts.device)} mtu {mtu}"


def _lower_in_pod(facts: Facts, mtu: int) -> str:
    """The same of a pod, whose devices are not this host's."""
    return f"in the pod: ip link set eth0 mtu {mtu}" if facts.source.kind is Kind.POD else ""


def _origin(facts: Facts) -> str:
    peer = facts.peer_status
    path = None if peer is None else peer.path
    if path is None or path.inner_mtu is None:
        return f"the MTU of {facts.device}; the path itself is {measured(facts)}"
    origin = "" if path.mtu_origin is None else f"{path.mtu_origin.value}: "
    return f"{origin}{path.origin or 'the path to the peer'}"


def measured(facts: Facts) -> str:
    """What measuring the path to the peer has come to, in words."""
    peer = facts.peer_status
    if peer is None or peer.measuring is None:
        return "not measured, as no large packets take it"
    return {
        Measuring.MEASURED: "measured, and no narrower",
        Measuring.PENDING: "not measured yet",
        Measuring.NO_ANSWER: "not measured: nothing there answers echo requests",
    }[peer.measuring.state]


def traffic(facts: Facts) -> Iterator[Step]:
    """What was exchanged with the peer so far."""
    peer, status = facts.peer_status, facts.status
    if peer is None or status is None or peer.traffic is None:
        return
    counted = peer.traffic
    now = status.started_at + status.uptime_s
    heard = (
        "never heard from"
        if counted.last_heard is None
        else f"heard {max(0.0, now - counted.last_heard):.0f} s ago"
    )
    text = f"{counted.packets_out} packets sent to it, {counted.packets_in} from it, {heard}"
    if counted.drops:
        text += f", {counted.drops} for it dropped"
    if counted.last_errno:
        text += f", last error {counted.last_errno}"
    yield Step(
        id="peer",
        title=f"peer {peer.endpoint}",
        ruling=Ruling.WARN if peer.is_silent else Ruling.NOTE,
        evidence=text + (": is its daemon running, is its port open?" if peer.is_silent else ""),
        words=f"on {peer.public_ip}: tundp status" if peer.is_silent else "",
    )


def chaos(facts: Facts) -> Iterator[Step]:
    """What `tundp chaos` of this node does to packets to the peer, if anything."""
    row, status = facts.peer, facts.status
    if row is None or status is None or (found := status.chaos_to(row.public_ip, row.port)) is None:
        return
    yield Step(
        id="chaos",
        title="chaos",
        ruling=Ruling.UNKNOWN,
        evidence=f"{found.on_purpose}: what becomes of this one is chance",
        command=found.stop,
    )


def receiver(facts: Facts) -> Iterator[Step]:
    """What the peer's source check says of the packet, by the leases known here."""
    row = facts.peer
    if facts.direction is not Direction.ENCAP or row is None or not facts.is_tunnel:
        return
    if facts.leases.subnet is None or facts.leases.public_ip is None:
        yield Step(
            id="receiver",
            title="at the peer",
            ruling=Ruling.UNKNOWN,
            evidence="this node has no lease: what its packets are to the peer is not known",
        )
        return
    source = masqueraded(facts) or facts.question.source
    size_ = min(facts.question.size, path_mtu(facts) or facts.question.size)
    view = facts.leases.seen_from(row, source)
    found = encap.decapsulate(
        memoryview(synthetic(facts.question, source=source, ttl=TTL - 2, size=size_)),
        sender=(int(facts.leases.public_ip), facts.leases.port or 0),
        table=view.fib(),
        policy=replace(view.policy(), source_check=SourceCheck.ENFORCE),
    )
    yield _at_receiver(found, source, row)


_CHECKED: Final = (
    DropReason.SOURCE_MISMATCH,
    DropReason.SOURCE_PORT_MISMATCH,
    DropReason.DESTINATION_MISMATCH,
)
"""What a source check that counts lets pass."""


def _at_receiver(
    found: encap.Deliver | encap.Reply | encap.Drop, source: IPv4Address, row: LedgerRow
) -> Step:
    title = f"at {row.public_ip}"
    if isinstance(found, encap.Deliver):
        return Step(
            id="receiver",
            title=title,
            ruling=Ruling.OK,
            evidence=f"its source check takes {source} from this node, whatever its mode",
        )
    is_checked = found.reason in _CHECKED
    text = f"{source} from this node is {found.reason.label} there: {found.reason.means}"
    if is_checked:
        text += "; dropped with --source-check=enforce, counted and delivered with count"
    return Step(
        id="receiver",
        title=title,
        ruling=Ruling.WARN if is_checked else Ruling.DROP,
        evidence=text,
        words=f"on {row.public_ip}: tundp status",
        reason=found.reason.label,
    )


def decapsulated(facts: Facts) -> Iterator[Step]:
    """What this node's rules say of the datagram from the peer."""
    if facts.direction is not Direction.DECAP or not facts.is_tunnel:
        return
    leases = facts.leases
    row = facts.source.row or next(iter(leases.peers), None)
    sender = (0, 0) if row is None else (int(row.public_ip), row.port or leases.port or 0)
    policy = leases.policy()
    found = encap.decapsulate(
        memoryview(synthetic(facts.question, ttl=TTL - 1)),
        sender=sender,
        table=leases.fib(),
        policy=policy,
    )
    mode = f"source check {policy.source_check.value}"
    who = "any node" if row is None else row.endpoint
    if isinstance(found, encap.Deliver):
        is_right = found.source_matches and found.destination_matches
        wrong = "source" if not found.source_matches else "destination"
        yield Step(
            id="source-check",
            title="decapsulation",
            ruling=Ruling.OK if is_right else Ruling.WARN,
            evidence=f"{who} may send from {facts.question.source} ({mode})"
            if is_right
            else f"the {wrong} does not fit the leases of {who}: counted, and delivered ({mode})",
        )
        return
    yield Step(
        id="source-check",
        title="decapsulation",
        ruling=Ruling.DROP,
        evidence=f"{found.reason.label}: {found.reason.means} (from {who}, {mode})",
        command=_LEASE_COMMAND,
        # No command: `tundp run` would start a second daemon, which takes a lease.
        words=f"to let it in: the daemon's flag --source-admit={facts.question.source}/32"
        if found.reason is DropReason.SOURCE_MISMATCH and facts.source.row is None
        else "",
        reason=found.reason.label,
    )
