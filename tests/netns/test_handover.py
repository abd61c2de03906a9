"""A daemon takes over from another: no packet is lost, and at every step one of them goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.handover import (
    CLEAN,
    FakeSuccessor,
    in_place_of,
    is_daemon,
    refused,
    replace,
    replaced,
    streams,
)
from tests.nodes import (
    MakeOverlay,
    answers,
    counters,
    link_of,
    log_contains,
    must_run,
    until_logged,
)
from tests.wait import until
from tundp.admin_handover import fetch_handover
from tundp.daemon.handover import protocol
from tundp.daemon.lock import is_running
from tundp.instance import Instance
from tundp.lab.overlay import LabNode


@pytest.mark.parametrize("engine", ["auto", "reference"])
async def test_five_replacements_lose_nothing_and_write_nothing(
    make_overlay: MakeOverlay, engine: str
) -> None:
    flags = ("--healthz-port=10256", "--sandbox=on", f"--engine={engine}")
    async with make_overlay(*flags, pods=True) as overlay:
        one = overlay.nodes[1]
        link = await link_of(one.host, "flannel0")
        lease = (await overlay.read_leases())[f"{one.gateway.network}".replace("/", "-")]
        files = [overlay.lease_file, one.subnet_file]
        written = [path.stat().st_mtime_ns for path in files]
        async with streams(overlay) as both:
            for _ in range(5):
                count = (await counters(one))["encap"]["packets_in"]
                taken = await replaced(overlay, one, *flags)
                assert taken["gap_ms"] < 1000
                assert (await counters(one))["encap"]["packets_in"] >= count
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]
        assert await link_of(one.host, "flannel0") == link
        assert [path.stat().st_mtime_ns for path in files] == written
        assert is_running(Instance(one.subnet_file))
        now = (await overlay.read_leases())[f"{one.gateway.network}".replace("/", "-")]
        assert now == lease
        status, _ = await one.get(10256, "/healthz")
        assert status == 200


async def goes_on(node: LabNode, text: str) -> None:
    """The daemon of before is there, all of it, and said why."""
    await until(lambda: log_contains(node, text))
    await until(lambda: is_daemon(node, node.daemon.pid))
    await until(lambda: log_contains(node, "; going on"))


async def a_successor_that_fails(node: LabNode) -> None:
    """At each step in turn, by death, by silence, and by nonsense."""
    async with FakeSuccessor(node) as fake:
        assert " 101 " in await fake.ask()
    await goes_on(node, "it went away before it was ready")
    async with FakeSuccessor(node) as fake:
        assert isinstance(await fake.offered(), protocol.Offer)
        fake.say(protocol.Refuse(why="the test says so"))
        assert isinstance(await fake.hear(), protocol.Withdrawn)
    await goes_on(node, "it refuses: the test says so")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say_bytes(b"GET / HTTP/1.1\r\n\r\n")
        assert isinstance(await fake.hear(), protocol.Withdrawn)
    await goes_on(node, "are the most")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say(protocol.Gone())
        assert isinstance(await fake.hear(), protocol.Withdrawn)
    await goes_on(node, "a successor says no Gone")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say(protocol.Ready())
        assert isinstance(await fake.hear(), protocol.Paused)
    await goes_on(node, "it went away before it carried packets")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        for may_try_again in (True, True, False):
            fake.say(protocol.Ready())
            assert isinstance(await fake.hear(), protocol.Paused)
            withdrawn = await fake.hear()
            assert isinstance(withdrawn, protocol.Withdrawn)
            assert withdrawn.may_try_again is may_try_again
            with contextlib.suppress(BrokenPipeError):
                fake.say(protocol.Attached(gap_ns=1))  # too late
    await goes_on(node, "it did not carry packets within 0.25 s")
    async with FakeSuccessor(node) as fake:
        await fake.offered()
        fake.say(protocol.Ready())
        assert isinstance(await fake.hear(), protocol.Paused)
        # It sees both at once.
        node.daemon.send_signal(signal.SIGSTOP)
        fake.say(protocol.Attached(gap_ns=1))
        fake.close()
        node.daemon.send_signal(signal.SIGCONT)
    await until(lambda: log_contains(node, "it went away before it carried packets", times=2))
    await until(lambda: is_daemon(node, node.daemon.pid))


async def test_a_successor_that_fails_at_any_step_costs_no_packet(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(pods=True) as overlay:
        one = overlay.nodes[1]
        pid = one.daemon.pid
        lease = overlay.lease_file.stat().st_mtime_ns
        async with streams(overlay) as both:
            await a_successor_that_fails(one)
            assert one.daemon.pid == pid
            assert one.daemon.poll() is None
            await replaced(overlay, one)  # as if nothing had happened
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]
        assert overlay.lease_file.stat().st_mtime_ns == lease


async def test_who_may_not_take_over_is_told_why(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        for change, text in (
            ({"schema": 2}, "restart the daemon instead"),
            ({"subnet_file": "/run/other.env"}, "not of /run/other.env"),
            ({"version": 3}, "version is not of type string"),
        ):
            async with FakeSuccessor(one) as fake:
                answer = await fake.ask(**change)
                assert " 409 " in answer
                assert text in answer
        async with FakeSuccessor(one) as fake, FakeSuccessor(one) as second:
            await fake.offered()
            assert "another handover is under way" in await second.ask()
        await until(lambda: log_contains(one, "it went away"))
        for flags, text in (
            (("--workers=2",), "--workers=2 cannot be taken over"),
            (("--engine=simple",), "it has vnet headers"),
            (("--tun-name=other0",), "--tun-name=other0 cannot be taken over"),
            ((f"--subnet-file={one.directory}/other.env",), "not of"),
        ):
            assert text in await refused(overlay, one, *flags)
            await until(lambda: is_daemon(one, one.daemon.pid))


async def test_without_a_daemon_to_take_over_from_a_start_is_a_normal_one(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay("--replace", nodes=1) as overlay:
        one = overlay.nodes[1]
        await until_logged(one, "a normal start")
        assert (await fetch_handover(one.admin_socket))["taken_over"] is None
        other = f"--admin-socket={one.directory}/other.sock"
        assert "nobody answers on" in await refused(overlay, one, other)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
async def test_a_daemon_that_dies_while_it_hands_over_is_gone_on_for(
    make_overlay: MakeOverlay, signum: signal.Signals
) -> None:
    async with make_overlay(pods=True) as overlay:
        one = overlay.nodes[1]
        lease = overlay.lease_file.stat().st_mtime_ns
        async with streams(overlay, rate=100) as both:
            before = await replace(overlay, one)
            await until(lambda: log_contains(one, "taking over from process"))
            before.send_signal(signum)
            await until(lambda: is_daemon(one, one.daemon.pid))
            assert await asyncio.to_thread(before.wait, 10) == -signal.SIGKILL
            assert is_running(Instance(one.subnet_file))
            seen = [len(each.seen) for each in both]
            await until(lambda: all(len(s.seen) > n + 20 for s, n in zip(both, seen, strict=True)))
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]
        assert overlay.lease_file.stat().st_mtime_ns == lease


@pytest.mark.parametrize(
    "step",
    ["die-offer", "stop-ready", "die-paused", "stop-paused", "die-attached", "hang-attached"],
)
async def test_a_successor_goes_on_alone_when_the_one_before_dies_or_hangs(
    make_overlay: MakeOverlay, step: str
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        lease = overlay.lease_file.stat().st_mtime_ns
        async with in_place_of(one, step) as before:
            await replace(overlay, one)
            await until(lambda: is_daemon(one, one.daemon.pid))
            # Dead, not forgotten: it must not wake up beside the new one.
            assert await asyncio.to_thread(before.wait, 10) == -signal.SIGKILL
        assert is_running(Instance(one.subnet_file))
        await until(lambda: answers(two.host, one.tunnel_address))
        assert overlay.lease_file.stat().st_mtime_ns == lease


ENDS = {
    "refuse": "does not hand over: the test says so",
    "old": "is of a version that cannot hand over",
    "die-request": "has just ended",
    "withdraw-ready": "goes on: the test says so",
    "withdraw-attached": "goes on: the test says so",
    "garbage-paused": "no JSON object",
    "close-ready": "has closed the connection and lives",
    "stop-request": "is stopped: kill -CONT",
}
"""What a successor says at its end, by how the predecessor goes on."""


@pytest.mark.parametrize("step", ENDS)
async def test_a_successor_ends_when_the_one_before_goes_on(
    make_overlay: MakeOverlay, step: str
) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        async with in_place_of(one, step) as before:
            await replace(overlay, one)
            assert await asyncio.to_thread(one.daemon.wait, 60) == 1
            assert ENDS[step] in one.log_tail()
            assert before.poll() is None or step == "die-request"
        # A start is a normal one again.
        await overlay.start_daemon(one)
        await overlay.wait_ready()


async def test_upgrade_says_what_became_of_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay, contextlib.AsyncExitStack() as stack:
        one = overlay.nodes[1]
        before = one.daemon
        argv = [sys.executable, "-m", "tundp", "upgrade", f"--admin-socket={one.admin_socket}"]
        async with streams(overlay) as both:
            done = json.loads(await must_run(one.host, *argv, "--json"))
            stack.callback(end, done["pid"])
            assert await asyncio.to_thread(before.wait, 10) == 0
            assert done["before_pid"] == before.pid
            report = await fetch_handover(one.admin_socket)
            assert (report["pid"], report["is_running"]) == (done["pid"], True)
            assert done["gap_ms"] == report["taken_over"]["gap_ms"]
            assert done["packets"].keys() == done["packets_before"].keys()
            assert all(done["packets"][name] >= n for name, n in done["packets_before"].items())
            # It is the same daemon: flags, log and all.
            await until_logged(one, f"took over from process {before.pid}")
            words = Path(f"/proc/{done['pid']}/cmdline").read_bytes().decode().split("\0")
            assert f"--subnet-file={one.subnet_file}" in words
            again = json.loads(await must_run(one.host, *argv, "--json"))
            stack.callback(end, again["pid"])
            assert again["before_pid"] == done["pid"]
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]


def end(pid: int) -> None:
    """Stop a daemon that is no child of the test, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


async def test_upgrade_names_what_it_cannot_do(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        argv = [sys.executable, "-m", "tundp", "upgrade", "--timeout=30"]
        nowhere = await one.host.run(*argv, f"--admin-socket={one.directory}/nowhere.sock")
        assert nowhere.returncode == 1
        assert "no daemon answers" in nowhere.stderr
        async with FakeSuccessor(one) as fake:
            await fake.offered()
            done = await one.host.run(*argv, f"--admin-socket={one.admin_socket}")
        assert done.returncode == 1
        assert f"process {one.daemon.pid}, goes on" in done.stderr
        await until(lambda: is_daemon(one, one.daemon.pid))
