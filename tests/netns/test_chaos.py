"""`tundp chaos` between real daemons: what it takes is what is missing, and it is said everywhere.

node1, whose packets are impaired -- node2, node3
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.netns.conftest import NETWORK
from tests.nodes import HEALTH_PORT, MakeOverlay, answers, must_run
from tests.wait import until
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import PingStream, ping
from tundp.linux import uapi
from tundp.observe.status import Status

TUNDP = (sys.executable, "-m", "tundp")
PORT = 7000
HEADERS_LEN = 28
LEASE = '{"PublicIP":"192.0.2.%d","BackendType":"udp"}'


@pytest.fixture(params=["gso", "reference"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


one_engine = pytest.mark.parametrize("engine", ["auto"])


async def chaos(node: LabNode, *words: str) -> list[dict[str, Any]]:
    """`tundp chaos WORDS`: its answer."""
    socket_flag = f"--admin-socket={node.admin_socket}"
    printed = await must_run(node.host, *TUNDP, "chaos", *words, "--json", socket_flag)
    found: list[dict[str, Any]] = json.loads(printed)["chaos"]
    return found


async def begin(node: LabNode, peer: str, *words: str, for_: str = "10m") -> dict[str, Any]:
    (found,) = await chaos(node, peer, *words, f"--for={for_}", "--yes-break-traffic")
    return found


async def status(node: LabNode) -> Status:
    return await node.status()


@dataclass(slots=True, kw_only=True)
class Receiver:
    """What reaches a node's TUN address."""

    numbers: list[int] = field(default_factory=list)
    """Of the datagrams that a socket got, each of which is answered."""
    packets: list[bytes] = field(default_factory=list)
    """IPv4 packets, those with wrong sums, too; the engine may have put right ones together."""
    sender: socket.socket
    to: tuple[str, int]

    def has(self, count: int) -> bool:
        return len(self.numbers) >= count

    async def send(self, lengths: Sequence[int]) -> None:
        """Send numbered datagrams with so many bytes of payload each."""
        for number, length in enumerate(lengths):
            self.sender.sendto(number.to_bytes(4) + bytes(length - 4), self.to)
            if number % 50 == 49:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def receiving(node: LabNode, source: LabNode) -> AsyncIterator[Receiver]:
    """Datagrams are answered, so that nobody asks whether the peer is there."""
    with (
        await node.host.socket(socket.SOCK_RAW, socket.IPPROTO_UDP) as raw,
        await node.host.socket(socket.SOCK_DGRAM) as echo,
        await source.host.socket(socket.SOCK_DGRAM) as sender,
    ):
        for sock in (raw, echo, sender):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 8 << 20)
        echo.bind((node.tunnel_address, PORT))
        sender.bind((source.tunnel_address, PORT))
        loop = asyncio.get_running_loop()

        found = Receiver(sender=sender, to=(node.tunnel_address, PORT))

        async def answer() -> None:
            while True:
                data, origin = await loop.sock_recvfrom(echo, 65_535)
                found.numbers.append(int.from_bytes(data[:4]))
                await loop.sock_sendto(echo, data, origin)

        async def look() -> None:
            while True:
                packet = await loop.sock_recv(raw, 65_535)
                if (
                    packet[12:16] == socket.inet_aton(source.tunnel_address)
                    and packet[9] == socket.IPPROTO_UDP
                ):
                    found.packets.append(packet)

        tasks = [asyncio.ensure_future(each) for each in (look(), answer())]
        try:
            yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def until_given(node: LabNode, count: int) -> dict[str, int]:
    """Until the relay was given so many of the engine's datagrams, and none waits; its counts."""

    async def is_given() -> dict[str, int] | None:
        counts: dict[str, int] = (await chaos(node, "list"))[0]["counts"]
        is_done = counts["received"] - counts["own"] >= count and not counts["waiting"]
        return counts if is_done else None

    found = await until(is_given, f"{count} datagrams in the relay", poll_s=0.1)
    assert found is not None
    return found


def assert_conserved(found: Status) -> None:
    assert found.counters is not None
    assert all(counted.is_conserved for _, counted in found.counters.directions)
    assert all(each.conserved for each in found.chaos)


async def test_what_is_lost_is_what_is_missing(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        count = 400
        # Both daemons may ask each other at any time: then the sums are taken once more.
        for seed in (7, 8, 9):
            async with receiving(two, one) as received:
                out, in_ = await totals(one, two)
                begun = await begin(one, two.public_ip, "--loss=30%", f"--seed={seed}")
                assert (begun["impairment"], begun["seed"]) == ("loss 30%", seed)
                await received.send([100] * count)
                agree = functools.partial(agreed, one, two, out + count, in_)
                try:
                    counts = await until(agree, "the sums to agree", poll_s=0.1, deadline_s=15)
                    break
                except AssertionError:
                    if seed == 9:
                        raise
                    await chaos(one, "stop")
        assert counts is not None
        assert counts["lost"] > 0
        missing = count - len(received.numbers)
        others = counts["received"] - count
        assert counts["lost"] - others <= missing <= counts["lost"]
        if not others:
            # The same draws, made here: six for each packet, the first of them for its loss.
            draw = random.Random(f"{seed} {two.public_ip}:8285").random
            firsts = [min([draw() for _ in range(6)][:1]) for _ in range(count)]
            assert received.numbers == [n for n in range(count) if firsts[n] >= 0.3]
        assert_conserved(await status(one))
        drops = await must_run(
            one.host, *TUNDP, "drops", "--interval=0", f"--admin-socket={one.admin_socket}"
        )
        assert re.search(rf"loss 30%; seed {seed}; .* given.* = \d+ sent \+ \d+ lost", drops), drops
        (ended,) = await chaos(one, "stop")
        assert ended["why_ended"] == "stopped by command"
        async with receiving(two, one) as received:
            await received.send([100] * 50)
            await until(lambda: len(received.numbers) >= 50, "every packet to arrive again")


async def totals(one: LabNode, two: LabNode) -> tuple[int, int]:
    """What the engine of one has sent, and what that of the other has received."""
    first, second = (await status(one)).counters, (await status(two)).counters
    assert first is not None and second is not None
    return first.encap.packets_out, second.decap.packets_in


async def agreed(one: LabNode, two: LabNode, out: int, in_: int) -> dict[str, int] | None:
    """What chaos counted, once it was given all that was sent, and the peer has got the rest.

    out: what the engine has sent at least by then. in_: what the peer had received before.
    """
    (run,) = (await status(one)).chaos_now
    sent, received = await totals(one, two)
    counts = dict(run.counts)
    given = counts["received"] - counts["own"]
    is_all = sent >= out and given >= 400 and not counts["waiting"]
    return (
        counts
        if is_all and given == sent - (out - 400) and received - in_ == counts["sent"]
        else None
    )


async def test_copies_flips_sizes_and_order(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with receiving(two, one) as received:
            await begin(one, two.public_ip, "--duplicate=100%", "--mtu=1300")
            await received.send([1300 - HEADERS_LEN, 1301 - HEADERS_LEN, 64])
            counts = await until_given(one, 3)
            await until(lambda: len(received.numbers) >= 4, "two packets, twice each")
            assert received.numbers == [0, 0, 2, 2]
            # What measures the path is taken for it as well, and counted.
            assert counts["too_big"] >= 1
            assert counts["duplicated"] == counts["sent"] / 2 >= 2
            await chaos(one, "stop")

            await until(lambda: len(received.packets) >= 2, "the packets themselves")
            received.packets.clear()
            await begin(one, two.public_ip, "--corrupt=100%")
            await received.send([1000] * 40)
            counts = await until_given(one, 40)
            await until(lambda: len(received.packets) >= 40, "corrupt packets to arrive")
            assert counts["corrupted"] == counts["received"]
            assert received.numbers == [0, 0, 2, 2], "no socket takes a packet with a wrong sum"
            for packet in received.packets:
                assert len(packet) == HEADERS_LEN + 1000
                assert not _sum_is_right(packet), "one bit differs, and nobody mended the sum"
            await chaos(one, "stop")

            received.numbers.clear()
            await begin(one, two.public_ip, "--reorder=40%", "--seed=1")
            await received.send([100] * 50)
            counts = await until_given(one, 50)
            await until(lambda: len(received.numbers) >= 50, "all packets to arrive")
            assert sorted(received.numbers) == list(range(50)) != received.numbers
            assert counts["reordered"] > 0
        assert_conserved(await status(one))


def _sum_is_right(packet: bytes) -> bool:
    """RFC 768, over the pseudo header."""
    whole = packet[12:20] + b"\0\x11" + packet[24:26] + packet[20:]
    if len(whole) % 2:
        whole += b"\0"
    total = sum(int.from_bytes(whole[at : at + 2]) for at in range(0, len(whole), 2))
    return total % 0xFFFF == 0


async def test_delay_and_the_peer_beside_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = (overlay.nodes[number] for number in (1, 2, 3))
        await begin(one, two.tunnel_address, "--delay=150ms+-50ms")
        answer = await ping(one.host, two.tunnel_address)
        assert answer is not None and answer.rtt_s >= 0.1
        # The answers of the peer are not delayed: its own way has no chaos.
        assert (await chaos(two, "list")) == []
        async with receiving(two, one) as received:
            await received.send([100] * 50)
            await until(lambda: len(received.numbers) >= 50, "every delayed packet to arrive")
            assert received.numbers == list(range(50)), "one flow keeps its order"
        await chaos(one, "stop", two.public_ip)

        await begin(one, two.public_ip, "--loss=100%")
        assert await answers(one.host, three.tunnel_address, timeout_s=5)
        assert not await answers(one.host, two.tunnel_address)
        assert await answers(three.host, two.tunnel_address, timeout_s=5)
        # And all: those not yet impaired as well.
        refused = await one.host.run(
            *TUNDP, "chaos", "all", "--loss=1%", "--for=9s", "--yes-break-traffic",
            f"--admin-socket={one.admin_socket}",
        )  # fmt: skip
        assert refused.returncode == 1
        assert "is impaired already: tundp chaos stop" in refused.stderr
        await chaos(one, "stop")
        both = await chaos(one, "all", "--loss=100%", "--for=9m", "--yes-break-traffic")
        assert {each["public_ip"] for each in both} == {two.public_ip, three.public_ip}
        assert not await answers(one.host, three.tunnel_address)
        assert len(await chaos(one, "stop")) == 2
        assert await answers(one.host, three.tunnel_address, timeout_s=5)


@one_engine
async def test_it_is_said_everywhere(make_overlay: MakeOverlay) -> None:
    async with make_overlay("--healthz-port=10256", "--metrics-addr=127.0.0.1:9100") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        socket_flag = f"--admin-socket={one.admin_socket}"

        async def said(*words: str) -> str:
            done = await one.host.run(*TUNDP, *words, socket_flag)
            return f"{done.stdout}{done.stderr}"

        assert "chaos" not in await said("status")
        assert "nothing is impaired" in await said("chaos", "list")
        await begin(one, two.public_ip, "--loss=100%")
        assert not await answers(one.host, two.tunnel_address)
        assert (await said("status")).startswith("chaos to 10.5."), "first of all"
        assert "chaos, ready" in await said("status", "--brief")
        code, body = await one.get(HEALTH_PORT, "/readyz?verbose")
        assert code == 200 and "are impaired on purpose until" in body, body
        _, metrics = await one.get(9100, "/metrics")
        assert "\ntundp_chaos_active 1.0\n" in metrics
        assert '\ntundp_chaos_datagrams_total{fate="lost"}' in metrics
        found = (await said("doctor", f"--subnet-file={one.subnet_file}")).splitlines()
        assert found[0].startswith("FAIL chaos"), found
        assert "on purpose until" in found[0]
        assert any("tundp chaos stop 192.0.2.2" in line for line in found[:3]), found
        assert "tundp chaos: packets to" in await said("trace", "--for=0.1s", "icmp")
        events = json.loads(await said("blackbox", "--json"))
        told = [e for e in events["control"] if e["kind"] == "chaos"]
        assert [each["fields"]["what"] for each in told] == ["begin"], told

        path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"  # its command is tundp
        fix = (*TUNDP, "doctor", f"--subnet-file={one.subnet_file}", "--fix=chaos", "--yes")
        mended = await one.host.run("env", path, *fix, socket_flag)
        assert "looked again, and it is gone" in mended.stdout, mended
        assert await answers(one.host, two.tunnel_address, timeout_s=5)
        assert not (await said("status")).startswith("chaos")
        _, metrics = await one.get(9100, "/metrics")
        assert "\ntundp_chaos_active 0.0\n" in metrics


@one_engine
async def test_tools_that_ask_a_peer_do_not_blame_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await begin(one, two.public_ip, "--loss=100%")

        async def said(code: int, *words: str) -> dict[str, Any]:
            flags = (f"--admin-socket={one.admin_socket}", f"--subnet-file={one.subnet_file}")
            done = await one.host.run(*TUNDP, *words, "--json", *flags)
            assert done.returncode == code, (words, done)
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        pinged = await said(1, "ping", two.public_ip)
        answers_of = {each["id"]: each["answer"] for each in pinged["layers"]}
        assert answers_of["tun"] == "silent", answers_of
        assert pinged["conclusion"].startswith("tundp chaos impairs packets to"), pinged
        assert pinged["next_step"].startswith("tundp chaos stop 192.0.2.2;"), pinged
        asked = await said(1, "matrix", "--count=1")
        assert re.match(
            r"tundp chaos impairs .*: tundp chaos stop 192\.0\.2\.2$", asked["notes"][0]
        )
        explained = await said(3, "explain", one.tunnel_address, two.tunnel_address)
        assert "chaos" in [each["id"] for each in explained["steps"]], explained

        await chaos(one, "stop")
        pinged = await said(0, "ping", two.public_ip, "-c", "1")
        assert not pinged["notes"], pinged


@one_engine
async def test_its_end(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # By itself, and though the command was killed.
        words = [*TUNDP, "chaos", two.public_ip, "--loss=100%", "--for=3s", "--yes-break-traffic"]
        command = await one.host.popen([*words, f"--admin-socket={one.admin_socket}"])
        await _until_active(one)
        command.send_signal(signal.SIGKILL)
        command.wait()
        assert not await answers(one.host, two.tunnel_address, timeout_s=0.2)
        await until(lambda: answers(one.host, two.tunnel_address), "packets to pass again")
        (ended,) = await chaos(one, "list")
        assert ended["why_ended"] == "its time is over"
        assert ended["ended_at"] >= ended["ends_at"] - 0.1
        # With the daemon, while packets wait.
        await begin(one, two.public_ip, "--delay=5s")
        async with PingStream(one.host, two.tunnel_address):
            await asyncio.sleep(0.3)
            assert await one.stop_daemon() == 0
        await overlay.start_daemon(one)
        await until(lambda: answers(one.host, two.tunnel_address), "packets to pass")
        assert await chaos(one, "list") == []


async def _until_active(node: LabNode) -> None:
    async def is_active() -> bool:
        return bool((await node.status()).chaos_now)

    await until(is_active, "chaos to begin")


@one_engine
async def test_a_lease_that_moves_ends_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd") as overlay:
        one = overlay.nodes[1]
        await overlay.write_etcd("subnets/10.5.177.0-24", LEASE % 77)

        async def goes_to(address: str) -> bool:
            peers = (await one.status()).peers
            return address in [str(peer.public_ip) for peer in peers]

        await until(lambda: goes_to("192.0.2.77"), "the lease to come")
        await begin(one, "10.5.177.0/24", "--loss=100%")
        await overlay.write_etcd("subnets/10.5.177.0-24", LEASE % 78)
        await until(lambda: goes_to("192.0.2.78"), "the lease to move")
        (ended,) = await chaos(one, "list")
        assert (ended["public_ip"], ended["why_ended"]) == (
            "192.0.2.77",
            "the peer's lease moved or went",
        )


@one_engine
async def test_a_black_hole_narrows_the_path(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await begin(one, two.public_ip, "--mtu=1300")

        async def inner_mtu() -> int | None:
            await ping(one.pod, two.pod_address, size=1400, timeout_s=0.2)
            (peer,) = (await one.status()).peers
            return None if peer.path is None else peer.path.inner_mtu

        narrow = await until(inner_mtu, "the path to be measured")
        assert narrow is not None and 1200 <= narrow <= 1300
        answer = await ping(one.pod, two.pod_address, size=1400)
        assert answer is not None and answer.is_echo_reply, "fragments pass"
        await chaos(one, "stop")

        async def is_wide() -> bool:
            return await inner_mtu() is None

        await until(is_wide, "the path to be wide again")


@one_engine
async def test_what_is_refused(make_overlay: MakeOverlay) -> None:
    async with make_overlay(network=NETWORK) as overlay:
        one = overlay.nodes[1]
        agreed = ("--loss=1%", "--for=9s", "--yes-break-traffic")
        for peer, why in (
            ("10.9.0.0/24", "is no peer's: tundp status lists"),
            ("10.5.0.0/16", "is no peer's: tundp status lists"),
            ("node2", "is no peer: its subnet, its PublicIP"),
            ("10.5.2.0/33", "is no peer: its subnet, its PublicIP"),
        ):
            done = await one.host.run(
                *TUNDP, "chaos", peer, *agreed, f"--admin-socket={one.admin_socket}"
            )
            assert done.returncode == 1 and why in done.stderr, (peer, done.stderr)
        # A client of its own: what the command would not send is refused by the daemon.
        for body, why in (
            ('{"peer": "all", "for_s": 9, "impairment": {"loss": 1}}', "--yes-break-traffic"),
            ("[" * 100_000, "no JSON"),
            ('{"stop": 1}', "stop is no text"),
        ):
            done = await one.host.run(
                "curl", "-s", "--unix-socket", str(one.admin_socket),
                "-d", body if len(body) < 1000 else "[" * 1000, "http://tundp/v1/chaos",
            )  # fmt: skip
            assert why in done.stdout, done.stdout
        assert (await one.status()).chaos == ()
        # No loopback: nothing is begun that would lose everything.
        await must_run(one.host, "ip", "link", "set", "dev", "lo", "down")
        (other,) = (await one.status()).peers
        done = await one.host.run(
            *TUNDP, "chaos", str(other.public_ip), *agreed, f"--admin-socket={one.admin_socket}"
        )
        assert done.returncode == 1 and "ip link set dev lo up" in done.stderr, done.stderr
        assert (await one.status()).chaos == ()
