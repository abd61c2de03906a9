"""Which packets to a node are of the talk between nodes, and which are not: a table.

Nothing here imports tundp; packets are built by tests/packets.py from RFC 791, 792 and 3692.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tests.packets import DF, MF, PROTO_ICMP, PROTO_UDP, ROUTER_ALERT, ipv4, with_ttl

PROTO_TALK = 253
"""RFC 3692 section 2.1."""
NONCE = bytes(range(0x40, 0x48))
QUESTION = NONCE + b"tund\x01\x01\x00\x00" + bytes(84)
LONGEST = 1500


class Case(NamedTuple):
    """A datagram to a node, and how many bytes of it are to be handed over."""

    datagram: bytes
    length: int
    is_dropped: bool = False

    @property
    def copy(self) -> bytes:
        """What is handed over: as it is delivered, the TTL one less; empty for nothing."""
        return with_ttl(self.datagram, self.datagram[8] - 1)[: self.length] if self.length else b""


def cases(tun_address: str, pod: str, peer: str) -> dict[str, Case]:
    """tun_address, pod: of the node the datagrams are for; peer: the source of the packets."""

    def message(
        payload: bytes = QUESTION,
        *,
        to: str = tun_address,
        proto: int = PROTO_TALK,
        ttl: int = 64,
        frag: int = 0,
        options: bytes = b"",
    ) -> bytes:
        return ipv4(
            payload, proto, source=peer, destination=to, ttl=ttl, frag=frag, ip_options=options
        )

    def refusal(
        quoted: bytes = b"",
        *,
        kind: bytes = b"\x03\x02",
        to: str = tun_address,
        frag: int = 0,
        options: bytes = b"",
    ) -> bytes:
        body = kind + struct.pack("!HI", 0, 0) + (quoted or asked())
        return ipv4(body, PROTO_ICMP, source=peer, destination=to, frag=frag, ip_options=options)

    def asked(
        payload: bytes = QUESTION,
        *,
        source: str = tun_address,
        proto: int = PROTO_TALK,
        options: bytes = b"",
    ) -> bytes:
        """A message of the node's own, as an ICMP error about it quotes it."""
        return ipv4(payload, proto, source=source, destination=peer, frag=0, ip_options=options)

    plain = message()
    all_options = ROUTER_ALERT * 10
    handed_over = {
        "a message": (plain, 120),
        "with DF": (message(frag=DF), 120),
        "with all the options there can be": (message(options=all_options), 160),
        "of no payload": (message(b""), 20),
        "of other bytes": (message(b"\xff" * 9), 29),
        "the longest": (message(bytes(LONGEST - 20)), LONGEST),
        "bytes behind its end": (plain + bytes(30), 120),
        "the least TTL": (message(ttl=2), 120),
        "a refusal": (refusal(), 56),
        "a refusal that quotes just the nonce": (refusal(asked()[:28]), 56),
        "a refusal that quotes options": (refusal(asked(options=all_options)), 96),
        "a refusal with options": (refusal(options=all_options), 96),
        "a refusal with both": (refusal(asked(options=all_options), options=all_options), 136),
    }
    others = {
        "to a pod": message(to=pod),
        "a byte longer than the longest": message(bytes(LONGEST - 19)),
        "a first fragment": message(frag=MF),
        "a later fragment": message(frag=MF | 1),
        "the last fragment": message(frag=15),
        "of the other protocol for experiments": message(proto=254),
        "UDP of the same bytes": message(proto=PROTO_UDP),
        "port unreachable": refusal(kind=b"\x03\x03"),
        "time exceeded": refusal(kind=b"\x0b\x00"),
        "an echo reply": refusal(kind=b"\x00\x00"),
        "a refusal to a pod": refusal(to=pod),
        "a refusal in fragments": refusal(frag=MF),
        "a refusal of a message of another's": refusal(asked(source=pod)),
        "a refusal of another protocol": refusal(asked(proto=PROTO_UDP)),
        "a refusal a byte short of a nonce": refusal(asked()[:27]),
        "a refusal a byte short of it behind options": refusal(asked(options=all_options)[:67]),
        "a refusal that quotes a header": refusal(asked()[:20]),
        "a refusal that quotes IPv6": refusal(b"\x60" + asked()[1:]),
        "a refusal that quotes a short header": refusal(b"\x44" + asked()[1:]),
        "a refusal that quotes nothing": ipv4(
            b"\x03\x02" + bytes(6), PROTO_ICMP, frag=0, source=peer, destination=tun_address
        ),
    }
    dropped = {
        "a TTL of one": message(ttl=1),
        "a wrong header checksum": plain[:10] + b"\x12\x34" + plain[12:],
        "longer than what came": plain[:-1],
        "cut inside its header": plain[:19],
    }
    return (
        {name: Case(data, length) for name, (data, length) in handed_over.items()}
        | {name: Case(data, 0) for name, data in others.items()}
        | {name: Case(data, 0, is_dropped=True) for name, data in dropped.items()}
    )
