"""What we believe of pcap-filter(7): tcpdump takes the same text, and chooses the same packets.

tcpdump reads one file of sound packets for each filter; which of them it writes is the oracle. If
another libpcap disagrees, the language changed, or ours is wrong.
"""

from __future__ import annotations

import itertools
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import packets
from tundp.wire.facts import Direction
from tundp.wire.filter import FilterError, facts_of, parse

LINKTYPE_IPV4 = 228
ADDRESSES = ["10.5.1.2", "10.5.1.3", "10.5.2.3", "10.6.0.1", "192.0.2.7"]
PORTS = [53, 80, 443, 8080]


def sample() -> list[bytes]:
    """Packets of every kind the filters below tell apart."""
    rng = random.Random(7)
    found = []
    for source, destination in itertools.permutations(ADDRESSES, 2):
        where: Any = {"source": source, "destination": destination}
        ports: Any = {"sport": rng.choice(PORTS), "dport": rng.choice(PORTS)}
        payload = bytes(rng.randrange(120))
        frag = rng.choice([0, packets.DF, packets.MF, packets.MF | 3, 9])
        options = rng.choice([b"", packets.ROUTER_ALERT])
        flags = rng.randrange(64)
        fields: Any = where | {"frag": frag, "ip_options": options}
        web = packets.tcp(payload, 1, flags, **ports, **fields)
        name = packets.udp(payload, **ports, **fields)
        quote = bytes([3, 3, 0, 0, 0, 0, 0, 0]) + rng.choice([web, name])[:48]
        found += [
            web,
            name,
            packets.icmp_echo(payload, **where),
            packets.ipv4(payload, rng.choice([2, 47, 50, 132]), **fields),
            packets.ipv4(quote, 1, **where),
        ]
    return found


PACKETS = sample()


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packets as a capture file; the time of each is its number."""
    assert shutil.which("tcpdump"), "tcpdump is missing: setup/apt.sh test"
    path = tmp_path_factory.mktemp("pcap") / "sample.pcap"
    head = struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, LINKTYPE_IPV4)
    records = (
        struct.pack("<IIII", number, 0, len(packet), len(packet)) + packet
        for number, packet in enumerate(PACKETS)
    )
    path.write_bytes(head + b"".join(records))
    return path


def tcpdumps(capture: Path, text: str) -> set[int] | None:
    """The numbers of the packets tcpdump chooses; None if it takes no such filter."""
    command = ["tcpdump", "-Z", "root", "-n", "-r", str(capture), "-w", "-", text]
    done = subprocess.run(command, capture_output=True, timeout=60)
    if done.returncode:
        # libpcap proves some filters to choose nothing.
        return set() if b"rejects all packets" in done.stderr else None
    found, at = set(), 24
    while at < len(done.stdout):
        number, _, length, _ = struct.unpack_from("<IIII", done.stdout, at)
        found.add(number)
        at += 16 + length
    return found


def ours(text: str) -> set[int]:
    made = parse(text)
    return {
        number
        for number, packet in enumerate(PACKETS)
        if made.matches(facts_of(packet, direction=Direction.ENCAP))
    }


SAME = [
    "host 10.5.1.2",
    "src 10.5.1.2",
    "src host 10.5.1.2 or 10.5.1.3",
    "src or dst host 10.5.1.2",
    "src and dst net 10.5",
    "net 10.5.0.0/16",
    "net 10.5",
    "net 10.5.1",
    "net 10.5.1.2",
    "dst net 10",
    "net 10.5/16",
    "not src net 10.5.0.0/16",
    "port 53",
    "src port 53",
    "dst port 53 or 443",
    "tcp port 53",
    "udp dst port 53 or 80",
    "portrange 53-80",
    "tcp src portrange 80-443",
    "port (53 or 443)",
    "host (10.5.1.2 or 10.5.1.3)",
    "port 53 and not 80",
    "not port 53 and 80",
    "icmp",
    "tcp",
    "udp",
    "sctp",
    "ip",
    "ip proto 47",
    "ip proto 47 or 50",
    r"ip proto \tcp",
    "proto 6",
    "less 60",
    "greater 100",
    "less 60 or greater 100 and udp",
    "icmp or udp and dst 10.5.1.2",
    "icmp or (udp and dst 10.5.1.2)",
    "tcp and port 80 or icmp",
    "not tcp and not udp",
    "not (tcp or udp)",
    "!(tcp||udp)&&!icmp",
    "not not icmp",
    "not icmp or host 10.5.1.2",
    "host 10.5.1.2 and host 10.5.1.3 or port 53",
    "tcp or udp or icmp and less 40",
    "ip host 10.5.1.2",
    "ip src 10.5.1.2 and ip dst 10.5.2.3",
]
"""Taken by both, as they are."""

TRANSLATED = {
    "fragment": "ip[6:2] & 0x3fff != 0",
    "tcp-syn": "tcp[tcpflags] & tcp-syn != 0",
    "tcp-ack and not tcp-push": "tcp[tcpflags] & (tcp-ack|tcp-push) = tcp-ack",
    "tcp-fin or tcp-rst or tcp-urg": "tcp[tcpflags] & (tcp-fin|tcp-rst|tcp-urg) != 0",
    "quoted ip": "icmp[icmptype] = icmp-unreach and icmp[8] & 0xf0 = 0x40",
    "quoted src host 10.5.1.2": "icmp[icmptype] = icmp-unreach and icmp[20:4] = 0x0a050102",
    "quoted udp": "icmp[icmptype] = icmp-unreach and icmp[17] = 17",
}
"""Ours, and what says the same in bytes."""

WRONG = [
    "host",
    "port 65536",
    "net 10.5.1.2/16",
    "tcp or",
    "(tcp",
    "tcp)",
    "tcp udp",
    "port 80 or 10.5.1.2",
    "host 10.5.1.2 port 80",
    "and tcp",
    "less",
]
"""Taken by neither."""


def test_the_sample_tells_filters_apart() -> None:
    chosen = [frozenset(ours(text)) for text in (*SAME, *TRANSLATED)]
    everything = set(range(len(PACKETS)))
    assert [text for text in (*SAME, *TRANSLATED) if not ours(text)] == []
    assert sum(each == everything for each in chosen) <= 2  # `ip`, and what is true of all
    assert len(set(chosen)) > 40


@pytest.mark.parametrize("text", SAME)
def test_the_same_text_chooses_the_same_packets(capture: Path, text: str) -> None:
    assert ours(text) == tcpdumps(capture, text)


@pytest.mark.parametrize("text", TRANSLATED)
def test_what_pcap_says_in_bytes(capture: Path, text: str) -> None:
    assert ours(text) == tcpdumps(capture, TRANSLATED[text])


@pytest.mark.parametrize("text", WRONG)
def test_what_neither_takes(capture: Path, text: str) -> None:
    assert tcpdumps(capture, text) is None
    with pytest.raises(FilterError):
        parse(text)


@pytest.mark.parametrize("seed", range(4))
def test_random_chains(capture: Path, seed: int) -> None:
    """and, or, not and parentheses, as both bind them."""
    rng = random.Random(seed)
    for _ in range(25):
        text = rng.choice(SAME)
        for _ in range(rng.randrange(1, 4)):
            more = rng.choice(SAME)
            more = f"({more})" if rng.random() < 0.5 else more
            text += (
                f" {rng.choice(['and', 'or', '&&', '||'])} {rng.choice(['', 'not ', '! '])}{more}"
            )
        assert ours(text) == tcpdumps(capture, text), text
