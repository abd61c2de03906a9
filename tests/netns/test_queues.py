"""How long nobody may read before packets are lost: what is said of it, and what is true.

    node1 eth0 ── switch ── eth0 node2: its daemon stands still (SIGSTOP) while both send

Every packet bears its number, and both ways are counted to the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.nodes import MakeOverlay, counters, link_of, log_contains, must_run, until_logged
from tests.stopped import stopped
from tests.wait import until
from tundp.lab.lab import Host
from tundp.lab.overlay import LabNode
from tundp.linux import uapi
from tundp.linux.device import QUEUE_LEN
from tundp.linux.udp import RECEIVE_BUFFER_LEN

TUNDP: Final = (sys.executable, "-m", "tundp")
PORT: Final = 9000
HEADERS_LEN: Final = 28
"""IPv4 and UDP header of an inner packet."""
NUMBER_LEN: Final = 4
AT_ONCE: Final = 50
"""Packets between two pauses of a sender: few enough for every queue on the way."""
OWN: Final = 50
"""Datagrams that daemons may send beside: echo requests that measure, questions."""
MORE: Final = 400
"""Packets beyond the bound."""


@contextlib.contextmanager
def numbers_at(sock: socket.socket) -> Iterator[list[int]]:
    """The numbers of what a socket receives meanwhile, in order of arrival; closes it."""
    found: list[int] = []
    is_over = threading.Event()
    # All that waited for the daemon comes at once: nothing of it must be lost here.
    sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 128 << 20)
    sock.settimeout(0.1)

    def receive() -> None:
        while not is_over.is_set():
            with contextlib.suppress(TimeoutError):
                if packet := sock.recv(2048):
                    found.append(int.from_bytes(packet[:NUMBER_LEN], "big"))

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()
        sock.close()


async def send(host: Host, address: str, count: int, *, packet_len: int) -> None:
    """Numbered packets of `packet_len` bytes, headers included, no faster than an engine is."""
    padding = bytes(packet_len - HEADERS_LEN - NUMBER_LEN)
    with await host.socket(socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        for number in range(count):
            sock.send(number.to_bytes(NUMBER_LEN, "big") + padding)
            if number % AT_ONCE == 0:
                await asyncio.sleep(0.002)


async def said(node: LabNode, *, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """The finding `queues` of `tundp config check`. before: what the command is run by."""
    done = await node.host.run(
        *(*before, *TUNDP, "config", "check", "--json", "--iface=eth0"),
        f"--store=file:{node.directory / 'leases.json'}",
        f"--subnet-file={node.subnet_file}",
        f"--admin-socket={node.admin_socket}",
        f"--state-dir={node.state_dir}",
    )
    (found,) = [each for each in json.loads(done.stdout) if each["id"] == "queues"]
    return dict(found)


@dataclass(frozen=True, slots=True)
class Bridged:
    """What came of packets sent both ways while the daemon of node 2 stood still."""

    from_peer: list[int]
    from_pods: list[int]
    queue_drops: int
    socket_overflows: int


async def stand_still(one: LabNode, two: LabNode, *, from_peer: int, from_pods: int) -> Bridged:
    """Stop node 2's daemon, send so many packets to it and from its host, let it go on."""
    before = await two.status_document()
    there = await two.host.socket(socket.SOCK_DGRAM)
    there.bind((two.tunnel_address, PORT))
    back = await one.host.socket(socket.SOCK_DGRAM)
    back.bind((one.tunnel_address, PORT))
    with numbers_at(there) as arrived, numbers_at(back) as returned:
        sent_before = (await counters(one))["encap"]["packets_out"]
        with stopped(two.daemon.pid):
            async with asyncio.TaskGroup() as group:
                group.create_task(send(one.host, two.tunnel_address, from_peer, packet_len=1472))
                group.create_task(send(two.host, one.tunnel_address, from_pods, packet_len=64))

            async def is_out() -> bool:
                """Whether all of node 1's packets are in node 2's socket, or lost there."""
                sent = (await counters(one))["encap"]["packets_out"] - sent_before
                return bool(sent >= from_peer)

            await until(is_out, "node 1 has sent all")

        # What a socket lost is told with the next datagram it takes (SO_RXQ_OVFL, socket(7)).
        nudge = await one.host.socket(socket.SOCK_DGRAM)
        with nudge:

            async def is_counted() -> bool:
                """Whether what arrived and what was lost is all; one is read after the other."""
                nudge.sendto(b"", (two.tunnel_address, PORT))
                drops, overflows = await lost_since(two, before)
                missing = from_peer - len(arrived) - overflows, from_pods - len(returned) - drops
                return max(missing) <= 0

            await until(is_counted, "each packet arrived, or was counted as lost", deadline_s=20)
        drops, overflows = await lost_since(two, before)
    for found in (arrived, returned):
        assert found == sorted(set(found)), "no packet twice, and none before another"
    assert (await one.status_document())["kernel"]["tun_queue_drops"] == 0
    return Bridged(arrived, returned, drops, overflows)


async def lost_since(node: LabNode, before: dict[str, Any]) -> tuple[int, int]:
    """Packets lost at the TUN's queue, and datagrams at the socket, since that status."""
    now = await node.status_document()
    return (
        now["kernel"]["tun_queue_drops"] - before["kernel"]["tun_queue_drops"],
        now["counters"]["socket_overflows"] - before["counters"]["socket_overflows"],
    )


@pytest.mark.parametrize("engine", ["mmsg", "gso"])
async def test_a_gap_is_bridged_as_long_as_is_said_and_no_longer(
    make_overlay: MakeOverlay, engine: str
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for node in (one, two):
            await node.host.sysctl("ipv6/conf/flannel0/disable_ipv6", 1)
        found = await said(two)
        facts = {name: float(value) for name, value in found["facts"].items()}
        assert found["verdict"] == "ok", found
        assert f"a gap is bridged of {facts['from_pods_s']:.2f} s" in found["evidence"]
        from_pods = round(facts["from_pods_s"] * facts["rate"])
        from_peer = int(facts["receive_buffer"] // facts["charge_full"])
        assert from_peer == round(facts["from_peers_s"] * facts["rate"])
        # A second of 10,000 packets/s each way, where there is memory for it.
        assert from_peer >= 10_000
        assert from_pods == QUEUE_LEN
        link = await link_of(two.host, "flannel0")
        assert link is not None
        assert link.queue_len == from_pods

        within = await stand_still(one, two, from_peer=from_peer - OWN, from_pods=from_pods - OWN)
        assert (within.queue_drops, within.socket_overflows) == (0, 0)
        assert len(within.from_peer) == from_peer - OWN
        assert len(within.from_pods) == from_pods - OWN

        if engine == "gso":
            # Trains share what a datagram is charged, so more of them fit; and the kernel counts a
            # train that does not as one drop, so that what is lost is not told in packets.
            return
        to_socket, to_tun = from_peer + MORE, from_pods + MORE
        beyond = await stand_still(one, two, from_peer=to_socket, from_pods=to_tun)
        for sent, arrived, counted, bound in (
            (to_socket, beyond.from_peer, beyond.socket_overflows, from_peer),
            (to_tun, beyond.from_pods, beyond.queue_drops, from_pods),
        ):
            # Of the nodes' own packets, some may be among those that had room, or had none.
            lost = sent - len(arrived)
            print(f"bound {bound}: {sent} sent, {len(arrived)} arrived, {counted} counted as lost")
            assert MORE <= lost <= counted <= lost + OWN
            assert bound - OWN <= len(arrived) <= bound


async def test_a_short_queue_is_lengthened_and_a_long_one_kept(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        (one,) = overlay.nodes.values()

        async def has_length(length: int) -> bool:
            link = await link_of(one.host, "flannel0")
            status = await one.status_document()
            return (
                link is not None
                and link.queue_len == status["backend"]["device"]["queue_len"] == length
            )

        await until(lambda: has_length(QUEUE_LEN))
        await must_run(one.host, *["ip", "link", "set", "flannel0", "txqueuelen", "20000"])
        # A change the daemon does look at, as proof that it passed over the other.
        await must_run(one.host, *["ip", "link", "set", "flannel0", "mtu", "1400"])
        await until(lambda: log_contains(one, "MTU 1472 (was 1400)"))
        await until(lambda: has_length(20_000))
        await must_run(one.host, *["ip", "link", "set", "flannel0", "txqueuelen", "500"])
        await until(lambda: has_length(QUEUE_LEN))
        await until_logged(one, f"queue of {QUEUE_LEN:,} packets (was 500)")


async def test_what_a_start_would_get_is_said_before_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        (one,) = overlay.nodes.values()
        found = await said(one)
        assert found["verdict"] == "ok"
        assert found["evidence"].startswith("a start would have room for a gap of")
        assert found["facts"]["receive_buffer"] == str(2 * RECEIVE_BUFFER_LEN)
        # Without the right to force it, what the host allows to anybody (socket(7): twice that).
        least = int(Path("/proc/sys/net/core/rmem_max").read_text(encoding="ascii"))
        assert least < RECEIVE_BUFFER_LEN // 2, "this host allows everybody what tundp wants"
        found = await said(
            one, before=("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
        )
        assert (found["verdict"], found["facts"]["receive_buffer"]) == ("warn", str(2 * least))
        assert found["next_step"].startswith(f"sysctl -w net.core.rmem_max={RECEIVE_BUFFER_LEN}")
        # Loopback is what it measures over: it does not guess.
        await must_run(one.host, *["ip", "link", "set", "lo", "down"])
        found = await said(one)
        assert (found["verdict"], found["facts"]) == ("unknown", {})
