"""`tundp drops` beside a real daemon: what was provoked is what it names, counts and shows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import MakeOverlay, counters
from tests.packets import udp
from tests.stopped import stop
from tests.wait import until
from tundp.cli import drops
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import ping

TUNDP = (sys.executable, "-m", "tundp")
NOWHERE = "10.5.199.1"
"""In no lease: what a node draws is one of the first hundred subnets."""


def command(node: LabNode, *arguments: str) -> list[str]:
    return [*TUNDP, "drops", f"--admin-socket={node.admin_socket}", *arguments]


async def asked(node: LabNode) -> dict[str, Any]:
    """What `tundp drops` answers, by direction and reason."""
    done = await node.host.run(*command(node, "--json", "--interval=0"))
    document: dict[str, Any] = json.loads(done.stdout)
    return document | {"rows": {(r["direction"], r["reason"]): r for r in document["drops"]}}


async def provoke(overlay: OverlayLab) -> None:
    """Make node 1 drop packets for seven reasons."""
    one, two = overlay.nodes[1], overlay.nodes[2]
    for _ in range(3):
        await ping(one.host, NOWHERE, timeout_s=1)
    raw = await one.host.socket(socket.SOCK_RAW, socket.IPPROTO_RAW)
    forger = await overlay.switch.socket(socket.SOCK_DGRAM)
    with raw, forger:
        for port in (4000, 4001):
            late = udp(
                b"late", source=one.tunnel_address, destination=two.tunnel_address, ttl=1,
                sport=port, dport=53,
            )  # fmt: skip
            raw.sendto(late, (two.tunnel_address, 0))
            await asyncio.sleep(0.05)  # the recorder takes one a millisecond
        at = (one.public_ip, 8285)
        forger.sendto(b"abc", at)
        forger.sendto(struct.pack("!IHBB", 6 << 28, 0, 58, 64) + bytes(32), at)
        forged = udp(b"forged", source=one.tunnel_address, destination=one.tunnel_address)
        forger.sendto(forged, at)
        forger.sendto(udp(b"forged", source="10.5.7.7", destination="127.0.0.1"), at)
    await one.host.run("iptables", "-I", "OUTPUT", "-p", "udp", "--dport", "8285", "-j", "DROP")

    async def is_forbidden() -> bool:
        # The rule stays until a packet has met it: a busy daemon may send late.
        await ping(one.host, two.tunnel_address, timeout_s=0.2)
        return "send_forbidden" in (await counters(one))["encap"]["drops"]

    await until(is_forbidden, "a packet to meet the rule")
    await one.host.run("iptables", "-D", "OUTPUT", "-p", "udp", "--dport", "8285", "-j", "DROP")


PROVOKED = {
    ("encap", "no_route"): 3,
    ("encap", "hop_limit_exceeded"): 2,
    ("decap", "too_short"): 1,
    ("decap", "not_ipv4"): 1,
    ("decap", "martian_source"): 1,
    ("decap", "martian_destination"): 1,
}


@pytest.mark.parametrize("engine", ["gso", "reference"])
async def test_what_was_provoked_is_named_counted_and_shown(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await provoke(overlay)

        async def all_counted() -> bool:
            counted = await counters(one)
            found = {(way, each) for way in ("encap", "decap") for each in counted[way]["drops"]}
            return {*PROVOKED, ("encap", "send_forbidden")} <= found

        await until(all_counted, "all reasons to be counted")
        found = await asked(one)
        rows = found["rows"]
        assert {kind: rows[kind]["count"] for kind in PROVOKED} == PROVOKED
        assert rows["encap", "send_forbidden"]["count"] >= 1
        # The same figures as in the status, and each packet in exactly one of them.
        status = (await one.status_document())["counters"]
        for direction, reason in PROVOKED:
            assert rows[direction, reason]["count"] == status[direction]["drops"][reason]
        assert [each["holds"] for each in found["balances"]] == [True, True]
        assert found["notes"] == []

        late = rows["encap", "hop_limit_exceeded"]["example"]
        assert (late["source"], late["destination"]) == (one.tunnel_address, two.tunnel_address)
        assert (late["protocol"], late["source_port"], late["destination_port"]) == (17, 4001, 53)
        assert late["length"] == 32
        assert rows["encap", "no_route"]["example"]["destination"] == NOWHERE
        refused = rows["encap", "send_forbidden"]
        assert refused["peer"] == f"{two.public_ip}:8285"
        assert refused["example"]["error"] == 1  # EPERM
        assert rows["decap", "too_short"]["example"]["packet"] == b"abc".hex()
        assert rows["decap", "too_short"]["peer"].startswith("192.0.2.254:")
        assert rows["decap", "martian_source"]["example"]["source"] == one.tunnel_address
        for row in rows.values():
            assert found["started_at"] - 1 <= row["last"] <= found["at"] + 1, row

        late_kind, none = ("encap", "hop_limit_exceeded"), ("encap", "no_route")
        assert await selected(one, "udp port 4000") == {late_kind}
        assert await selected(one, f"dst host {NOWHERE}") == {none}
        assert none not in await selected(one, "not reason no_route")
        to_peer = f"peer {two.public_ip} and icmp"
        assert await selected(one, to_peer) == {("encap", "send_forbidden")}

        table = (await one.host.run(*command(one, "--interval=0.1"))).stdout
        assert "no lease covers the destination" in table
        assert f"{one.tunnel_address}:4001 > {two.tunnel_address}:53 UDP, TTL 1, 32 B" in table
        assert "decap: " in table
        assert "dropped: holds" in table


async def selected(node: LabNode, text: str) -> set[tuple[str, str]]:
    """What the command would show of a selection."""
    found = await drops._report(node.admin_socket, drops.DropsOptions(interval=0.0), text)
    return {(row.direction, row.reason) for row in found.drops}


async def test_drops_are_printed_as_they_happen(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        wanted = f"dst host {NOWHERE} and reason no_route"
        with (tmp_path / "lines").open("wb") as log:
            process = await one.host.popen(command(one, "-f", "-o", "json", wanted), log=log)

            async def has_line() -> bool:
                await ping(one.host, two.tunnel_address, timeout_s=1)
                await ping(one.host, "10.5.198.1", timeout_s=0.2)
                await ping(one.host, NOWHERE, timeout_s=0.2)
                return b"\n" in (tmp_path / "lines").read_bytes()

            await until(has_line, "a drop to be printed")
            assert process.poll() is None
            # A reader that is too slow loses events, says so, and holds nobody up.
            stop(process.pid)
            await flood(one, 40_000)
            process.send_signal(signal.SIGCONT)
            await until(
                lambda: b"drops came too fast" in (tmp_path / "lines").read_bytes(),
                "lost drops to be counted",
            )
            process.send_signal(signal.SIGINT)
            await until(lambda: process.poll() is not None, "tundp drops to end")
            assert process.returncode == 0
        for line in (tmp_path / "lines").read_text().splitlines():
            if not line.startswith("tundp drops: "):
                drop = json.loads(line)
                assert (drop["direction"], drop["reason"]) == ("encap", "no_route")
                assert drop["destination"] == NOWHERE


async def flood(node: LabNode, count: int) -> None:
    """Send datagrams nowhere until so many were dropped."""
    sender = await node.host.socket(socket.SOCK_DGRAM)
    sender.connect((NOWHERE, 9))

    async def are_dropped() -> bool:
        for _ in range(2000):
            with contextlib.suppress(OSError):  # what ICMP says of it
                sender.send(bytes(64))
        return int((await counters(node))["encap"]["drops"]["no_route"]) >= count

    with sender:
        await until(are_dropped, f"{count} datagrams to be dropped")


async def test_following_ends_with_its_reader_and_with_the_daemon(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        with (tmp_path / "head").open("wb") as head, (tmp_path / "rest").open("wb") as rest:
            line = shlex.join(command(one, "-f"))
            reader = await one.host.popen(
                ["bash", "-c", f"{line} | head -n 1; echo ${{PIPESTATUS[0]}}"], log=head
            )
            other = await one.host.popen(command(one, "-f"), log=rest)

            async def has_ended() -> bool:
                await ping(one.host, NOWHERE, timeout_s=0.2)
                return reader.poll() is not None and b"\n" in (tmp_path / "rest").read_bytes()

            await until(has_ended, "the reader of one line to end")
            lines = (tmp_path / "head").read_text().splitlines()
            assert len(lines) == 2, lines
            assert " encap no_route " in lines[0]
            assert f" > {NOWHERE} ICMP echo request " in lines[0]
            assert lines[1] == "0"
            assert await one.stop_daemon() == 0
            await until(lambda: other.poll() is not None, "tundp drops to end")
            assert other.returncode == 1
        assert (tmp_path / "rest").read_text().splitlines()[-1].endswith(" ended")
        # Nobody answers now.
        done = await one.host.run(*command(one))
        assert done.returncode == 1
        assert "no daemon answers" in done.stderr
