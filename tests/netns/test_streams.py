"""The instrument that says what a restart loses: it counts what is planted, and 0 where nothing is.

[a] eth0 ── left [relay] right ── eth0 [b]

The relay is this test's own: it copies frames between its two devices, and does to the datagrams
of one direction exactly what a test wants, so that the figures are known beforehand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.nodes import MakeLab, MakeOverlay, must_run
from tests.stopped import stopped
from tests.wait import until
from tundp.errors import LabError
from tundp.lab.decoy import Decoy, add_decoy
from tundp.lab.offload import set_checksum_offload
from tundp.lab.overlay import OverlayLab
from tundp.lab.streams import End, Streams
from tundp.linux import uapi

RATE = 1000
_UDP = 17

Plan = Callable[[int, bytes], Iterator[bytes]]
"""Number of a datagram and its frame to the frames that shall leave instead."""


class Relay:
    """Threads that carry frames between two packet sockets; `plan` is for one direction."""

    def __init__(self, left: socket.socket, right: socket.socket) -> None:
        self.plan: Plan = lambda _, frame: iter((frame,))
        self._socks = (left, right)
        self._is_ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._carry, args=(left, right, True)),
            threading.Thread(target=self._carry, args=(right, left, False)),
        ]

    def __enter__(self) -> Relay:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_ended.set()
        for thread in self._threads:
            thread.join()
        for sock in self._socks:
            sock.close()

    def _carry(self, source: socket.socket, sink: socket.socket, is_planned: bool) -> None:
        number = 0
        while not self._is_ended.is_set():
            try:
                frame, address = source.recvfrom(2048)
            except TimeoutError:
                continue
            if address[2] == socket.PACKET_OUTGOING:
                continue
            is_datagram = frame[12:14] == b"\x08\x00" and frame[23] == _UDP
            if not (is_planned and is_datagram):
                sink.send(frame)
                continue
            for each in self.plan(number, frame):
                sink.send(each)
            number += 1


@contextlib.asynccontextmanager
async def relayed(make_lab: MakeLab) -> AsyncIterator[tuple[End, End, Relay]]:
    """Two ends, and the relay between them."""
    async with make_lab() as lab:
        a, b, middle = [await lab.host(name) for name in ("a", "b", "relay")]
        socks = []
        for number, (host, port) in enumerate(((a, "left"), (b, "right")), 1):
            await lab.cable(host, "eth0", middle, port)
            await middle.configure(port)
            await host.configure("eth0", f"192.0.2.{number}/24")
            # A copied frame has the checksum it was captured with.
            await set_checksum_offload(host, "eth0", is_on=False)
            await middle.sysctl(f"ipv6/conf/{port}/disable_ipv6", 1)
            sock = await middle.socket(
                socket.SOCK_RAW, socket.htons(uapi.ETH_P_ALL), family=socket.AF_PACKET
            )
            sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 16 << 20)
            sock.settimeout(0.1)
            sock.bind((port, uapi.ETH_P_ALL))
            socks.append(sock)
        with Relay(*socks) as relay:
            yield End(a, "192.0.2.1", "a"), End(b, "192.0.2.2", "b"), relay


async def decoy_of(overlay: OverlayLab) -> Decoy:
    """A decoy as the default gateway of all nodes."""
    return await add_decoy(overlay.lab, overlay.nodes.values())


async def test_every_planted_fault_is_counted_and_no_other(make_lab: MakeLab) -> None:
    """Of 1,000 datagrams: each 100th dropped, each 50th doubled, each 40th behind the next."""
    kept: list[bytes] = []

    def plan(number: int, frame: bytes) -> Iterator[bytes]:
        if number < 1000 and number % 100 == 10:
            return
        if number < 1000 and number % 40 == 20:
            kept.append(frame)
            return
        yield frame
        yield from kept
        kept.clear()
        if number < 1000 and number % 50 == 35:
            yield frame

    async with relayed(make_lab) as (a, b, relay):
        relay.plan = plan
        async with Streams(a, b, rate=RATE) as streams:
            await streams.flow(1200)
        result = streams.result
    there, back = result.directions
    print(result)
    assert there.name == "a > b"
    assert [loss.first for loss in there.losses] == list(range(10, 1000, 100))
    assert {loss.count for loss in there.losses} == {1}
    assert (there.lost, there.duplicates, there.reordered) == (10, 20, 25)
    assert (there.corrupt, there.missed, there.refused) == (0, 0, 0)
    assert (back.lost, back.duplicates, back.reordered) == (0, 0, 0)
    assert not result.is_whole
    assert json.loads(json.dumps(result.as_dict()))["directions"][0]["lost"] == 10


async def test_a_gap_is_as_long_as_it_was_and_where_it_was(make_lab: MakeLab) -> None:
    """300 ms in which datagrams are dropped, then 300 ms in which they are held back."""
    until_ns = 0
    dropped: list[int] = []

    def drop(number: int, frame: bytes) -> Iterator[bytes]:
        if time.monotonic_ns() < until_ns:
            dropped.append(number)
        else:
            yield frame

    def hold(_: int, frame: bytes) -> Iterator[bytes]:
        nonlocal until_ns
        if until_ns:
            time.sleep(0.3)
            until_ns = 0
        yield frame

    async with relayed(make_lab) as (a, b, relay):
        async with Streams(a, b, rate=RATE) as streams:
            await streams.flow()
            until_ns = time.monotonic_ns() + 300_000_000
            relay.plan = drop
            await streams.flow(500)
        lossy = streams.result.directions[0]
        async with Streams(a, b, rate=RATE) as streams:
            await streams.flow()
            until_ns = 1
            relay.plan = hold
            await streams.flow(500)
        late = streams.result.directions[0]
    (loss,) = lossy.losses
    assert (loss.count, lossy.lost) == (len(dropped), len(dropped))
    assert lossy.longest_silence_s >= 0.25
    assert loss.first == dropped[0]
    assert loss.for_s <= lossy.longest_silence_s
    assert (late.lost, late.duplicates, late.reordered) == (0, 0, 0)
    assert late.longest_silence_s >= 0.3
    assert late.longest_delay_s >= 0.3


async def test_it_agrees_with_the_counter_of_a_firewall(make_lab: MakeLab) -> None:
    """nftables drops each 100th datagram at 10,000/s, and counts them."""
    rules = """table ip planted {
        counter dropped {}
        chain in {
            type filter hook prerouting priority -300;
            udp dport 9100 numgen inc mod 100 == 7 counter name dropped drop
        }
    }"""
    async with make_lab() as lab:
        a, b = await lab.host("a"), await lab.host("b")
        await lab.cable(a, "eth0", b, "eth0")
        await a.configure("eth0", "192.0.2.1/24")
        await b.configure("eth0", "192.0.2.2/24")
        await must_run(b, "nft", rules)
        ends = (End(a, "192.0.2.1", "a"), End(b, "192.0.2.2", "b"))
        async with Streams(*ends, rate=10 * RATE) as streams:
            await streams.flow(10_000)
        told = json.loads(
            await must_run(b, "nft", "-j", "list", "counters", "table", "ip", "planted")
        )
    counted = next(each["counter"]["packets"] for each in told["nftables"] if "counter" in each)
    there, back = streams.result.directions
    assert there.lost == counted >= 100
    assert len(there.losses) == there.lost
    assert back.lost == 0


async def test_a_stream_that_is_reset_says_so(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        a, b = await lab.host("a"), await lab.host("b")
        await lab.cable(a, "eth0", b, "eth0")
        await a.configure("eth0", "192.0.2.1/24")
        await b.configure("eth0", "192.0.2.2/24")
        ends = (End(a, "192.0.2.1", "a"), End(b, "192.0.2.2", "b"))
        async with Streams(*ends, tcp=True) as streams:
            await streams.flow()
        assert streams.result.stream is not None
        assert streams.result.is_whole
        assert streams.result.stream.received > 0
        async with Streams(*ends, tcp=True) as streams:
            await streams.flow()
            rule = "meta l4proto tcp reject with tcp reset"
            await must_run(b, "nft", "add", "table", "ip", "planted")
            await must_run(
                *(b, "nft", "add chain ip planted in { type filter hook input priority 0; }")
            )
            await must_run(b, "nft", f"add rule ip planted in {rule}")
            await streams.flow()
        stream = streams.result.stream
        assert stream is not None
        assert stream.error == "Connection reset by peer"
        assert not streams.result.is_whole


async def test_a_quiet_overlay_loses_and_leaks_nothing(make_overlay: MakeOverlay) -> None:
    """A stopped daemon makes what it held late, and nothing else of it."""
    async with make_overlay(pods=True) as overlay, await decoy_of(overlay) as decoy:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with Streams(one, two, rate=RATE, tcp=True, tcp_pace=1_000_000) as streams:
            await streams.flow(1000)
        print(streams.result)
        assert streams.result.is_whole
        assert (decoy.leaked, decoy.seen) == (0, "")
        async with Streams(one, two, rate=RATE) as streams:
            await streams.flow()
            with stopped(one.daemon.pid):
                await asyncio.sleep(0.3)
            await streams.flow()
        there, back = streams.result.directions
        assert streams.result.is_whole
        assert min(there.longest_silence_s, back.longest_silence_s) >= 0.3
        assert min(there.longest_delay_s, back.longest_delay_s) >= 0.25


async def test_a_leak_to_the_default_gateway_is_counted(make_overlay: MakeOverlay) -> None:
    """With the unreachable route a dead daemon's packets go nowhere; without it, to a stranger."""
    async with make_overlay(pods=True) as overlay, await decoy_of(overlay) as decoy:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with Streams(one, two, rate=RATE) as streams:
            await streams.flow()
            one.daemon.kill()
            await asyncio.to_thread(one.daemon.wait)
            await asyncio.sleep(0.3)
            kept = decoy.leaked
            await must_run(one.host, "ip", "route", "del", "unreachable", "10.5.0.0/16")
            await until(lambda: decoy.leaked >= 300)
        there, back = streams.result.directions
        print(streams.result, decoy.seen)
        assert kept == 0
        assert f" of {one.pod_address} > {two.pod_address} (UDP)" in decoy.seen
        # Of those of its pod; what the other node sends goes into the dead node's socket.
        assert decoy.leaked <= there.lost
        assert there.losses[-1].first + there.losses[-1].count == there.sent
        assert back.lost > 0


async def test_more_leaks_than_its_queue_has_room_for_are_counted_whole(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=1, start=False) as overlay, await decoy_of(overlay) as decoy:
        host = overlay.nodes[1].host
        with await host.socket(socket.SOCK_DGRAM) as sock:
            for number in range(3000):
                sock.sendto(b"x" * 1000, ("10.5.9.9", 9))
                sock.sendto(b"x", ("10.6.9.9", 9))  # not the overlay's
                if number % 100 == 0:
                    await asyncio.sleep(0)
        await until(lambda: decoy.leaked >= 3000)
        assert decoy.leaked == 3000


async def test_a_blind_decoy_is_refused(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1, start=False) as overlay, await decoy_of(overlay) as decoy:
        node = overlay.nodes[1]
        await node.host.netlink.set_link(await node.host.index("eth1"), state="down")
        with pytest.raises(LabError, match="does not see what"):
            await decoy.prove(node, patience_s=0.2)


async def test_a_path_that_does_not_answer_is_named(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tundp.lab.streams.PATH_S", 0.2)
    async with make_lab() as lab:
        host = await lab.host("a")
        ends = End(host, "127.0.0.1", "here"), End(host, "192.0.2.9", "there")
        with pytest.raises(LabError, match=r"here has no path to 192\.0\.2\.9"):
            async with Streams(*ends):
                pass
