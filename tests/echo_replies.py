"""What is an answer to the echo requests that measure paths, and what is not: a table.

Nothing here imports tundp; packets are built by tests/packets.py.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.packets import (
    DF,
    MF,
    PROTO_UDP,
    ROUTER_ALERT,
    header_len,
    icmp_echo,
    ipv4,
    with_header_checksum,
    with_ttl,
)

ECHO_ID = 0xBEEF
COOKIE = bytes(range(0x30, 0x40))
HEAD_LEN = 24
"""Bytes of an ICMP message up to the end of the cookie: RFC 792's header, and 16."""


class Case(NamedTuple):
    """A datagram to a node, and whether its head is to be handed over."""

    datagram: bytes
    is_handed_over: bool
    is_dropped: bool = False

    @property
    def head(self) -> bytes:
        """What is handed over: as it is delivered, the TTL one less."""
        packet = with_ttl(self.datagram, self.datagram[8] - 1)
        return packet[: header_len(packet) + HEAD_LEN]


def cases(tun_address: str, pod: str, peer: str) -> dict[str, Case]:
    """tun_address, pod: of the node the datagrams are for; peer: the source of the packets."""

    def reply(payload: bytes = COOKIE + bytes(84), *, to: str = tun_address, **how: int) -> bytes:
        given = {"kind": 0, "echo_id": ECHO_ID, "frag": 0} | how
        return icmp_echo(payload, source=peer, destination=to, **given)  # type: ignore[arg-type]

    def with_options(count: int, payload: bytes) -> bytes:
        plain = reply(payload)
        return ipv4(
            plain[20:], 1, source=peer, destination=tun_address, ip_options=ROUTER_ALERT * count
        )

    whole = reply()
    answers = {
        "of full size": reply(COOKIE + bytes(1472 - 44)),
        "the shortest": reply(COOKIE),
        "with DF": reply(frag=DF),
        "the first fragment": reply(frag=MF),
        "with options": with_options(2, COOKIE + bytes(50)),
        "with all the options there can be": with_options(10, COOKIE),
        "bytes behind its end": whole + bytes(30),
        "a wrong ICMP checksum": whole[:22] + b"\x12\x34" + whole[24:],
        "the least TTL": reply(ttl=2),
    }
    others = {
        "a request": reply(kind=8),
        "unreachable": reply(kind=3),
        "another code": whole[:21] + b"\x01" + whole[22:],
        "another identifier": reply(echo_id=ECHO_ID ^ 1),
        "to a pod": reply(to=pod),
        "a later fragment": reply(frag=MF | 1),
        "the last fragment": reply(frag=185),
        "a byte short of a cookie": reply(COOKIE[:-1]),
        "a byte short of it behind options": with_options(10, COOKIE[:-1]),
        "cut by its total length": _shortened(whole, 43),
        "UDP of the same bytes": ipv4(
            whole[20:], PROTO_UDP, frag=0, source=peer, destination=tun_address
        ),
    }
    dropped = {
        "a TTL of one": reply(ttl=1),
        "a wrong header checksum": whole[:10] + b"\x12\x34" + whole[12:],
        "longer than what came": whole[:-1],
        "cut inside its header": whole[:19],
    }
    return (
        {name: Case(data, is_handed_over=True) for name, data in answers.items()}
        | {name: Case(data, is_handed_over=False) for name, data in others.items()}
        | {
            name: Case(data, is_handed_over=False, is_dropped=True)
            for name, data in dropped.items()
        }
    )


def _shortened(packet: bytes, total_len: int) -> bytes:
    return with_header_checksum(packet[:2] + total_len.to_bytes(2, "big") + packet[4:])
