"""The kernel's drop of a packet as a step of its story: which inner packet, whose, what it means.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final, Self

from tundp.linux.skb_drops import Place as Namespace
from tundp.linux.skb_drops import SkbDrop
from tundp.observe.events import Hello
from tundp.observe.skb_words import Words, words_of
from tundp.observe.status import Status
from tundp.printable import printable
from tundp.wire import describe
from tundp.wire.facts import Direction, Field, facts_of
from tundp.wire.filter import Filter
from tundp.wire.filter_program import OpKind

_MIN_HEADER: Final = 20
_UDP: Final = 17
_UDP_LEN: Final = 8
_IN_POD: Final = "in the pod's own network namespace: commands on this host do not reach it"
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.@][A-Za-z0-9_.@-]*", re.ASCII)
"""Names of devices that a shell takes as one word. The kernel allows all but blanks, `/` and `:`
(net/core/dev.c, dev_valid_name), and pods choose their own."""
_OF_OUTER: Final = frozenset({Field.OUTER, Field.DIRECTION})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What tells a node's packets apart."""

    network: IPv4Network
    subnet: IPv4Network
    node: IPv4Address | None
    """Its PublicIP."""
    port: int

    def has(self, address: IPv4Address) -> bool:
        """Whether an address is this node's, or its pods'."""
        return address == self.node or address in self.subnet

    @classmethod
    def of_status(cls, status: Status) -> Self | None:
        """Of a running daemon; None if it has no TUN, or not yet."""
        backend = status.backend
        port = None if backend is None else backend.port
        if status.network is None or status.subnet is None or not port:
            return None
        return cls(network=status.network, subnet=status.subnet, node=status.public_ip, port=port)

    @classmethod
    def of(cls, hello: Hello) -> Self:
        """Of the node whose events they are."""
        try:
            node = IPv4Address(hello.node)
        except ValueError:
            node = None
        return cls(
            network=IPv4Network(hello.network),
            subnet=IPv4Network(hello.subnet, strict=False),
            node=node,
            port=hello.port,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SkbStep:
    """One drop of the kernel."""

    drop: SkbDrop
    direction: Direction
    inner: bytes
    """The inner packet's first bytes; empty if the datagram's payload could not be read."""
    peer: IPv4Address | None
    """The other node, if it was a datagram between two that was dropped."""
    port: int
    """The overlay's."""

    @property
    def is_copy(self) -> bool:
        """Whether the packet itself went on."""
        return self._words.is_copy

    @property
    def is_netfilter(self) -> bool:
        """Whether a rule or a policy of netfilter did it."""
        return self.drop.reason == "NETFILTER_DROP"

    @property
    def length(self) -> int:
        """Bytes of the inner packet, as its header says; of what was dropped, if there is none."""
        packet = self.inner or self.drop.packet
        return int.from_bytes(packet[2:4], "big")

    @property
    def means(self) -> str:
        """The reason in words."""
        device = printable(self.drop.device) if self.drop.device else "the device"
        return self._filled(self._words.means, device)

    @property
    def next_step(self) -> str:
        """What to look at next, as commands for this host; may be empty.

        None is made for what happened in a pod: the host may have a device of that name, too.
        """
        text = self._words.next_step
        if text and self.drop.place is Namespace.POD:
            return _IN_POD
        is_plain = _PLAIN_NAME.fullmatch(self.drop.device)
        return self._filled(text, self.drop.device if is_plain else "DEVICE")

    @property
    def words(self) -> str:
        """The packet in one line."""
        return describe.packet(self.inner or self.drop.packet, self.length)

    @property
    def text(self) -> str:
        """The step in one line, without its time."""
        reason = self.drop.reason if self.is_copy else f"DROP {self.drop.reason}"
        return f"{reason}{self.where}: {self.means}"

    @property
    def where(self) -> str:
        """Function, device and peer, as far as they are known: the rest of a sentence."""
        found = f" in {self.drop.function}" if self.drop.function else ""
        if self.drop.device:
            found += f", {printable(self.drop.device)}"
        if self.drop.place is Namespace.POD:
            found += " of the pod"
        if self.peer is not None:
            way = "to" if self.direction is Direction.ENCAP else "from"
            found += f", the datagram {way} {self.peer}"
        return found

    @property
    def _words(self) -> Words:
        return words_of(self.drop.reason, self.drop.function)

    def _filled(self, text: str, device: str) -> str:
        packet = self.drop.packet
        return text.format(
            device=device,
            source=IPv4Address(packet[12:16]),
            destination=IPv4Address(packet[16:20]),
            port=self.port,
        )


def step_of(drop: SkbDrop, place: Place) -> SkbStep | None:
    """What a drop means for the overlay; None if it is no packet of it.

    Datagrams without payload, which ask whether a peer's port is open, are none. Where no network
    namespace is known, the addresses decide whether it is this node's.
    """
    packet = drop.packet
    header_len = (packet[0] & 0x0F) * 4 if packet else 0
    if not _MIN_HEADER <= header_len <= len(packet):
        return None
    source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    if drop.place is Namespace.UNKNOWN and not place.has(source) and not place.has(destination):
        return None
    if source in place.network or destination in place.network:
        direction = Direction.DECAP if destination in place.subnet else Direction.ENCAP
        return SkbStep(drop=drop, direction=direction, inner=packet, peer=None, port=place.port)
    # The other end of a veth that datagrams between nodes cross is no pod: it is the host of a node
    # that is a container.
    if drop.place is Namespace.POD:
        return None
    if packet[9] != _UDP or int.from_bytes(packet[6:8], "big") & 0x1FFF:
        return None
    total_len = int.from_bytes(packet[2:4], "big")
    if total_len == header_len + _UDP_LEN:
        return None
    inner = packet[header_len + _UDP_LEN :]
    if len(inner) < _MIN_HEADER or inner[0] >> 4 != 4:
        inner = b""
    if source == place.node:
        is_encap = True
    elif destination == place.node:
        is_encap = False
    else:
        is_encap = bool(inner) and IPv4Address(inner[12:16]) in place.subnet
    return SkbStep(
        drop=drop,
        direction=Direction.ENCAP if is_encap else Direction.DECAP,
        inner=inner,
        peer=destination if is_encap else source,
        port=place.port,
    )


def is_wanted(step: SkbStep, packets: Filter) -> bool | None:
    """Whether a filter lets a step's packet through; None if nobody can know."""
    if not step.inner:
        fields = {op.field for op in packets.ops if op.kind is OpKind.TEST}
        if not fields <= _OF_OUTER:
            return None
    facts = facts_of(
        step.inner,
        direction=step.direction,
        outer=None if step.peer is None else int(step.peer),
        length=step.length,
    )
    return packets.matches(facts)


def step_document(step: SkbStep) -> Mapping[str, Any]:
    """One step for programs; packet bytes in hex."""
    drop = step.drop
    return {
        "unix_ns": drop.time_ns,
        "reason": drop.reason,
        "function": drop.function,
        "device": drop.device,
        "is_in_pod": drop.place is Namespace.POD,
        "direction": step.direction.name.lower(),
        "peer": None if step.peer is None else str(step.peer),
        "is_copy": step.is_copy,
        "means": step.means,
        "next_step": step.next_step,
        "packet": drop.packet.hex(),
    }
