"""`python -m bench.micro`: rounds interleaved, medians, ratios to the first row of each table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv4Network

import numpy as np

from tundp.choices import SourceCheck
from tundp.engine.native import twins
from tundp.engine.native.fib import NativeFib
from tundp.engine.native.filter import matching, native_filter
from tundp.lease.fib import FIRST_HOP_ID, Fib, build_fib
from tundp.lease.model import Endpoint, Peer
from tundp.wire import checksum, ip
from tundp.wire.encap import decapsulate, encapsulate
from tundp.wire.filter import parse
from tundp.wire.policy import Policy

ROUNDS = 9
TARGET_S = 0.05

Case = tuple[str, Callable[[], object], int]


def main() -> None:
    lookups = [(count, fib_of(count)) for count in (10, 1_000, 65_000)]
    compare(
        "FIB lookup in Python: flat in the number of leases",
        [(f"{count:>6} leases", lookup_case(fib), 256) for count, fib in lookups],
    )
    compare(
        "FIB lookup in C",
        [(f"{count:>6} leases", native_lookup_case(fib), 65536) for count, fib in lookups],
    )
    compare(
        "FIB build: cost per lease",
        [(f"{count:>6} leases", partial(fib_of, count), count) for count in (10, 1_000, 65_000)],
    )
    compare("one packet of 1472 bytes, Python", packet_cases())
    compare("one packet of 1472 bytes through a filter, C", filter_cases())
    data = bytes(range(256)) * 6
    compare(
        "checksum of 1448 bytes",
        [
            ("native", lambda: twins.ones_complement_sum(memoryview(data)[:1448]), 1),
            ("Python", lambda: checksum.ones_complement_sum(memoryview(data)[:1448]), 1),
        ],
    )
    whole = bytes(range(256)) * 250
    compare(
        "sum of 64,000 bytes, the payload of a super-packet",
        [
            (name, partial(twins.variant_sum, number, whole), 1)
            for number, name in enumerate(twins.sums_variants())
        ],
    )


def fib_of(count: int) -> Fib:
    peers = [
        Peer(
            subnet=IPv4Network((0x0A000000 + number * 256, 24)),
            endpoint=Endpoint(IPv4Address(0xC6120000 + number), 8285),
            hop_id=FIRST_HOP_ID + number,
        )
        for number in range(count)
    ]
    return build_fib(peers, own_subnet=None, generation=1)


def lookup_case(fib: Fib) -> Callable[[], object]:
    routes = int(np.count_nonzero(fib.table))
    addresses = [0x0A000000 + number * 7919 % routes * 256 + 5 for number in range(256)]
    assert all(fib.lookup(address) for address in addresses)

    def run() -> None:
        lookup = fib.lookup
        for address in addresses:
            lookup(address)

    return run


def native_lookup_case(fib: Fib) -> Callable[[], object]:
    routes = int(np.count_nonzero(fib.table))
    addresses = (0x0A000005 + np.arange(65536) * 7919 % routes * 256).astype(np.uint32)
    reader = NativeFib(fib)
    assert reader.indexes(addresses).all()
    return lambda: reader.indexes(addresses)


def packet_cases() -> list[Case]:
    fib = fib_of(1000)
    header = ip.build_header(
        payload_len=1452, source=0x0A000105, destination=0x0A000205, ip_proto=6, ttl=64
    )
    fresh = header + bytes(1452)
    packet = memoryview(bytearray(fresh))
    policy = Policy(tun_address=0x0A000900, source_check=SourceCheck.COUNT, port=8285)

    def encap() -> object:
        packet[:20] = header
        return encapsulate(
            packet, lookup=fib.lookup, path_mtu=lambda hop: 65535, tun_address=0x0A000900
        )

    def decap() -> object:
        packet[:20] = header
        return decapsulate(packet, sender=(0xC6120001, 8285), table=fib, policy=policy)

    def parse() -> object:
        return ip.parse(packet)

    return [("parse", parse, 1), ("encapsulate", encap, 1), ("decapsulate", decap, 1)]


FILTERS = (
    "tcp",
    "tcp port 443",
    "host 10.5.1.2 and port 443 and not peer 192.0.2.7",
    " or ".join(["tcp"] * 32),
)


def filter_cases() -> list[Case]:
    """The facts of packets alone, then with a filter each."""
    header = ip.build_header(
        payload_len=1452, source=0x0A050102, destination=0x0A050203, ip_proto=6, ttl=64
    )
    packets = (header + b"\x9c\x40\x01\xbb" + bytes(1448)) * 256
    cases: list[Case] = [("facts alone", partial(matching, None, packets, 1472), 256)]
    for text in FILTERS:
        ops = parse(text).ops
        name = f"and {len(ops)} ops"
        cases.append((name, partial(matching, native_filter(ops), packets, 1472), 256))
    return cases


def compare(title: str, cases: list[Case]) -> None:
    """Median ns per item of each case, rounds interleaved, and the ratio to the first."""
    repeats = [calibrate(run) for _, run, _ in cases]
    samples: list[list[float]] = [[] for _ in cases]
    for _ in range(ROUNDS):
        for number, (_, run, items) in enumerate(cases):
            samples[number].append(measure(run, repeats[number]) / items)
    print(f"\n{title}")
    first = statistics.median(samples[0])
    for (name, _, _), values in zip(cases, samples, strict=True):
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        print(f"  {name:<14} {median:>10.1f} ns  {median / first:>6.2f}x  spread {spread:.0%}")


def calibrate(run: Callable[[], object]) -> int:
    run()
    return max(1, round(TARGET_S / max(1e-9, measure(run, 1) / 1e9)))


def measure(run: Callable[[], object], repeats: int) -> float:
    """Ns per call."""
    started = time.perf_counter_ns()
    for _ in range(repeats):
        run()
    return (time.perf_counter_ns() - started) / repeats


if __name__ == "__main__":
    main()
