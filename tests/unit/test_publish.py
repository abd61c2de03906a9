"""From the ledger to its consumers: one publication a change, complete deltas, not too often."""

from __future__ import annotations

import asyncio
import gc
import logging
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from tests.wait import until
from tundp.backend.udp.config import udp_config
from tundp.daemon import publish
from tundp.daemon.publish import LINES_NAMED, DeltaLog, Publisher
from tundp.lease import routing
from tundp.lease.codec import parse_key
from tundp.lease.fib import Fib
from tundp.lease.model import (
    BadEntry,
    Endpoint,
    Events,
    Gone,
    Lease,
    LeaseAttributes,
    Peer,
    Put,
    Snapshot,
)
from tundp.lease.routing import Refusal, RefusedLease, Routing, RoutingDelta

OWN = parse_key("10.5.1.0-24")
OURS = IPv4Address("192.0.2.1")


def lease(number: int, address: str, key: str = "") -> Lease:
    return Lease(
        key=parse_key(key or f"10.5.{number}.0-24"),
        attributes=LeaseAttributes(public_ip=IPv4Address(address)),
        revision=1,
        lease_ttl_s=None,
    )


class Sink:
    """A consumer that keeps what it was given, and by differences what that adds up to."""

    def __init__(self) -> None:
        self.fibs: list[Fib] = []
        self.deltas: list[RoutingDelta] = []
        self.peers: dict[IPv4Network, Peer] = {}
        self.seen_generation = 0

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        self.fibs.append(fib)
        self.deltas.append(delta)
        for peer in delta.gone:
            assert self.peers.pop(peer.subnet) == peer
        for old, new in delta.moved:
            assert self.peers[old.subnet] == old
            self.peers[new.subnet] = new
        for peer in delta.come:
            assert peer.subnet not in self.peers
            self.peers[peer.subnet] = peer

    def seen(self) -> int:
        return self.seen_generation


class Bench:
    """A ledger, its publisher and two consumers."""

    def __init__(self, *known: Lease) -> None:
        self.routing = Routing(
            network=IPv4Network("10.5.0.0/16"),
            backend=udp_config(),
            own_key=OWN,
            own_addresses=[OURS],
            public_ip=OURS,
        )
        self.publisher = Publisher(self.routing)
        self.publisher.apply(self.routing.apply(Snapshot(known, 1)))
        self.first = self.publisher.first_fib()
        self.sinks = [Sink(), Sink()]
        for sink in self.sinks:
            sink.peers = dict(self.routing.peers)

    def start(self) -> None:
        self.publisher.start(self.sinks)

    def apply(self, *events: Put | Gone | BadEntry) -> None:
        self.publisher.apply(self.routing.apply(Events(events, self.routing.revision + 1)))

    async def settle(self) -> None:
        """Until every consumer has what the ledger has."""
        await until(
            lambda: all(sink.peers == dict(self.routing.peers) for sink in self.sinks), poll_s=0.001
        )


async def test_the_first_table_is_full_and_nobody_is_told_of_it_again() -> None:
    bench = Bench(lease(2, "192.0.2.2"), lease(3, "192.0.2.3"))
    assert bench.first.index(int(IPv4Address("10.5.2.9"))) != 0
    bench.start()
    assert [sink.fibs for sink in bench.sinks] == [[], []]


async def test_a_change_is_published_once_to_every_consumer() -> None:
    bench = Bench(lease(2, "192.0.2.2"))
    bench.start()
    bench.apply(Put(lease(3, "192.0.2.3")))
    await bench.settle()
    for sink in bench.sinks:
        assert len(sink.fibs) == 1
        assert sink.fibs[0].generation == bench.routing.generation == 2
        assert [str(peer.subnet) for peer in sink.deltas[0].come] == ["10.5.3.0/24"]


async def test_our_addresses_changed_is_one_publication_though_peers_move_with_them() -> None:
    bench = Bench(lease(2, "192.0.2.2"), lease(3, "192.0.2.3"))
    bench.start()
    delta = bench.routing.set_own_addresses([OURS, IPv4Address("192.0.2.2")], OURS)
    assert delta.moves_packets
    bench.publisher.apply(delta, is_own_changed=True)
    await bench.settle()
    await asyncio.sleep(0.05)
    for sink in bench.sinks:
        assert len(sink.fibs) == 1
        assert int(IPv4Address("192.0.2.2")) in sink.fibs[0].own_addresses
        assert sink.fibs[0].index(int(IPv4Address("10.5.2.1"))) == 0


async def test_own_addresses_alone_make_a_table_though_no_peer_moves() -> None:
    bench = Bench(lease(2, "192.0.2.2"))
    bench.start()
    delta = bench.routing.set_own_addresses([OURS, IPv4Address("198.51.100.1")], OURS)
    bench.publisher.apply(delta, is_own_changed=True)
    assert [len(sink.fibs) for sink in bench.sinks] == [1, 1]
    assert int(IPv4Address("198.51.100.1")) in bench.sinks[0].fibs[0].own_addresses


async def test_what_moves_no_packet_makes_no_table() -> None:
    bench = Bench(lease(2, "192.0.2.2"))
    bench.start()
    bench.apply(Put(lease(2, "192.0.2.2")), BadEntry("rubbish", "no subnet"))
    bench.apply(Put(lease(4, "0.0.0.0")))
    await asyncio.sleep(0.02)
    assert [len(sink.fibs) for sink in bench.sinks] == [0, 0]
    assert bench.routing.generation == 1


async def test_changes_between_the_first_table_and_the_start_are_not_lost() -> None:
    bench = Bench(lease(2, "192.0.2.2"))
    bench.apply(Put(lease(3, "192.0.2.3")))
    bench.apply(Gone(parse_key("10.5.2.0-24")))
    bench.start()
    await bench.settle()
    for sink in bench.sinks:
        assert len(sink.deltas) == 1
        assert [str(peer.subnet) for peer in sink.deltas[0].gone] == ["10.5.2.0/24"]
        assert [str(peer.subnet) for peer in sink.deltas[0].come] == ["10.5.3.0/24"]


async def test_dear_tables_are_made_less_often_and_their_deltas_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    bench.start()
    made = bench.routing.fib
    monkeypatch.setattr(publish, "PUBLISH_SHARE", 100.0)

    def dear() -> Fib:
        end = asyncio.get_running_loop().time() + 0.002
        while asyncio.get_running_loop().time() < end:
            pass
        return made()

    monkeypatch.setattr(bench.routing, "fib", dear)
    for number in range(2, 60):
        bench.apply(Put(lease(number, f"192.0.2.{number}")))
        bench.apply(Put(lease(number, f"192.0.2.{number + 100}")))
        if number % 3 == 0:
            bench.apply(Gone(parse_key(f"10.5.{number}.0-24")))
        await asyncio.sleep(0)
    await bench.settle()
    assert 2 <= len(bench.sinks[0].fibs) == len(bench.sinks[1].fibs) < 20, "58 changes"
    assert len(bench.routing.peers) == 39


async def test_changes_that_wait_are_merged_once_and_not_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(lease(2, "192.0.2.2"))
    count = 200
    merges: list[int] = []

    def counted(*deltas: RoutingDelta) -> RoutingDelta:
        merges.append(len(deltas))
        return routing.merged(*deltas)

    monkeypatch.setattr(publish, "merged", counted)
    for number in range(count):
        bench.apply(Put(lease(2, f"192.0.2.{3 + number}")))
    bench.start()
    await bench.settle()
    # The cost of n changes in a row would be n squared.
    assert merges == [count]
    assert len(bench.sinks[0].fibs) == 1


async def test_packets_do_not_wait_for_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    bench.start()
    monkeypatch.setattr(publish, "LASTING_LEASES", 1)
    published: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: published.append(len(bench.sinks[0].fibs)))
    bench.apply(Put(lease(2, "192.0.2.2")), Put(lease(3, "192.0.2.3")))
    assert published == [1]


async def test_the_ledger_learns_what_the_slowest_consumer_has_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    bench.start()
    seen: list[int] = []
    monkeypatch.setattr(bench.routing, "note_seen", seen.append)
    bench.sinks[0].seen_generation, bench.sinks[1].seen_generation = 7, 4
    bench.apply(Put(lease(2, "192.0.2.2")))
    assert seen == [4]


async def test_after_close_nothing_is_published() -> None:
    bench = Bench()
    bench.start()
    bench.apply(Put(lease(2, "192.0.2.2")))
    bench.apply(Put(lease(3, "192.0.2.3")))
    count = len(bench.sinks[0].fibs)
    bench.publisher.close()
    await asyncio.sleep(0.05)
    assert len(bench.sinks[0].fibs) == count


@pytest.mark.parametrize("count", [3, publish.PEERS_NAMED + 1])
async def test_the_log_names_peers_or_counts_them(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bench = Bench()
    bench.apply(*(Put(lease(number, f"192.0.2.{number}")) for number in range(2, 2 + count)))
    named = [line for line in caplog.messages if line.startswith("peer 10.5.")]
    counted = [line for line in caplog.messages if line.startswith("peers: 0 gone,")]
    assert (len(named), len(counted)) == ((count, 0) if count == 3 else (0, 1))


class Lines:
    """The log's lines about updates, on a clock of our own."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        self.now = 100.0
        self.log = DeltaLog(clock=lambda: self.now)
        self._caplog = caplog

    def write(self, **delta: Any) -> list[str]:
        self._caplog.clear()
        self.log.write(RoutingDelta(**delta))
        return list(self._caplog.messages)


def refused(count: int) -> tuple[RefusedLease, ...]:
    return tuple(
        RefusedLease(lease(n % 250, "192.0.2.9"), Refusal.OUTSIDE_NETWORK) for n in range(count)
    )


def test_of_many_refused_leases_some_are_named_and_the_rest_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = Lines(caplog)
    told = lines.write(newly_refused=refused(20_000))
    assert len(told) == LINES_NAMED + 1
    assert told[-1] == "and 19980 more leases are no peers; see tundp status"
    told = lines.write(newly_bad=tuple(BadEntry(f"bad-{n}", "no subnet") for n in range(100_000)))
    assert len(told) == LINES_NAMED + 1, "another kind has its own ration"
    assert told[-1] == "and 99980 more entries are ignored; see tundp status"


def test_a_lease_that_flaps_costs_two_lines_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(caplog)
    peer = Peer(
        subnet=IPv4Network("10.5.2.0/24"),
        endpoint=Endpoint(IPv4Address("192.0.2.2"), 8285),
        hop_id=1,
        backend_type="",
        backend_data=None,
    )
    told = []
    for second in range(600):
        lines.now = 100.0 + second
        told += lines.write(come=(peer,)) + lines.write(gone=(peer,))
    # Twenty at once, then one a minute, and one that counts the rest.
    assert len(told) <= LINES_NAMED + 10 + 10, told
    assert any("more changes of peers" in line for line in told)


def test_names_and_reasons_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(caplog)
    (line,) = lines.write(newly_bad=(BadEntry("k" * 1_000_000, f"'{'k' * 1_000_000}' is no"),))
    assert len(line) < 350
    assert f"{'k' * 79}…" in line


class BuggySink(Sink):
    """A consumer with a bug in it, until `left` is 0."""

    left = 1

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        if self.left:
            self.left -= 1
            raise RuntimeError("bug")
        if delta.is_whole:
            self.peers.clear()
        super().install(fib, delta)


async def test_what_a_sink_did_not_take_is_in_the_next_publication() -> None:
    bench = Bench(lease(2, "192.0.2.2"))
    bench.sinks = [BuggySink()]
    bench.sinks[0].peers = dict(bench.routing.peers)
    bench.start()
    with pytest.raises(RuntimeError):
        bench.apply(Put(lease(3, "192.0.2.3")))
    bench.apply(Put(lease(4, "192.0.2.4")))
    await bench.settle()
    (fib,) = bench.sinks[0].fibs
    assert fib.index(int(IPv4Address("10.5.3.1")))


async def test_a_late_publication_that_fails_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publish, "RETRY_S", 0.01)
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, each: failures.append(each))
    bench = Bench(lease(2, "192.0.2.2"))
    bench.sinks = [BuggySink()]
    bench.sinks[0].peers = dict(bench.routing.peers)
    bench.start()
    bench.publisher._published_at = asyncio.get_running_loop().time()
    bench.publisher._cost_s = 0.005
    bench.apply(Put(lease(3, "192.0.2.3")))
    await bench.settle()
    assert len(failures) == 1


async def test_another_ledger_replaces_all_that_sinks_have() -> None:
    bench = Bench(lease(2, "192.0.2.2"), lease(3, "192.0.2.3"))
    bench.sinks = [BuggySink()]
    bench.sinks[0].left = 0  # type: ignore[attr-defined]
    bench.sinks[0].peers = dict(bench.routing.peers)
    bench.start()
    fresh = Bench(lease(3, "192.0.2.33"), lease(4, "192.0.2.4")).routing
    fresh.generation = bench.routing.generation
    bench.publisher.start_over(fresh)
    bench.routing = fresh
    await bench.settle()
    assert bench.sinks[0].fibs[0].index(int(IPv4Address("10.5.2.1"))) == 0
    assert set(bench.sinks[0].deltas[0].hops_assigned) == {
        peer.hop_id for peer in fresh.peers.values()
    }


async def test_unreadable_entries_are_kept_from_the_garbage_collector_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred thousand of them were walked in each full collection."""
    bench = Bench()
    bench.start()
    monkeypatch.setattr(publish, "LASTING_LEASES", 1)
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    bench.apply(BadEntry("rubbish", "no subnet"), BadEntry("more of it", "no subnet"))
    assert frozen == [1]


def test_names_are_shown_on_one_line_and_escaped(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines(caplog)
    (line,) = lines.write(newly_bad=(BadEntry("bad\n\x1b[2J", "'\u202e' is no key\n"),))
    assert line == r"entry 'bad\n\x1b[2J' ignored: '\u202e' is no key\n"
