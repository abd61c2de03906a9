"""`tundp hold -- tundp run`: device, route and packets over the end of a daemon, and what changes.

The streams are sequence-numbered both ways: one waits in the TUN queue of node 1 while it has no
daemon, the other in its UDP socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.nodes import (
    MakeOverlay,
    answers,
    is_ready,
    link_of,
    log_contains,
    must_run,
    until_logged,
)
from tests.wait import until
from tundp.admin_handover import fetch_handover
from tundp.daemon.kept import AGAIN_S
from tundp.errors import PlatformError
from tundp.lab.lab import processes_in
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream

TUNDP = str(Path(sys.executable).with_name("tundp"))
SHELL = 'exec "$0" run "$@" $(cat {})'
"""Becomes tundp, as env does in the unit: flags that change are read at each start."""


async def hold(overlay: OverlayLab, node: LabNode, *flags: str) -> Path:
    """Start the node's daemon under a holder; the file of the flags of its next start."""
    changing = node.directory / "flags"
    changing.write_text(" ".join(("--healthz-port=10256", *flags)))
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(
            [
                *(TUNDP, "hold", "--watchdog=20", "--"),
                *("sh", "-c", SHELL.format(changing), TUNDP),
                *overlay.store_flags,
                "--iface=eth0",
                "--sandbox=on",
                f"--subnet-file={node.subnet_file}",
                f"--state-dir={node.state_dir}",
                f"--admin-socket={node.admin_socket}",
            ],
            log=log,
        )
    await until(lambda: is_ready(node))
    return changing


def daemon_of(node: LabNode) -> int:
    """The process the holder has started."""
    holder = node.daemon.pid
    words = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
    return int(words[0]) if words else 0


async def running(node: LabNode, *, but: int = 0) -> int:
    """The daemon that answers as the node's, and runs; 0 if none does, or this one."""
    try:
        report = await fetch_handover(node.admin_socket, limit_s=5)
    except PlatformError:
        return 0
    return int(report["pid"]) if report["is_running"] and report["pid"] != but else 0


async def test_a_killed_and_a_restarted_daemon_lose_no_packet_and_no_route(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await hold(overlay, one)
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        await until(lambda: answers(two.host, one.tunnel_address))
        before = await link_of(one.host, "flannel0")
        routes = one.directory / "routes"
        with routes.open("wb") as log:
            await one.host.popen(["ip", "-4", "-o", "monitor", "route"], log=log)
        async with (
            PingStream(two.host, one.tunnel_address, pause_s=0.05) as inward,
            PingStream(one.host, two.tunnel_address, pause_s=0.05) as outward,
        ):
            for order in (signal.SIGKILL, signal.SIGHUP):
                await until(lambda: is_ready(one))
                first = await until(lambda: daemon_of(one))
                os.kill(first if order == signal.SIGKILL else one.daemon.pid, order)
                await until(lambda gone=first: daemon_of(one) not in (0, gone))
                # Whoever asks in the gap waits for the answer of the next one.
                assert (await one.status()).pid == daemon_of(one)
                seen = (inward.received, outward.received)
                await until(lambda seen=seen: inward.received > seen[0] + 10)
                await until(lambda seen=seen: outward.received > seen[1] + 10)
        assert await link_of(one.host, "flannel0") == before, "the same device, up as it was"
        assert (inward.lost, outward.lost) == (0, 0), one.log_tail()
        assert "Deleted" not in routes.read_text()
        await until_logged(one, "device flannel0 adopted with 1 queues", times=2)
        await until_logged(one, "SIGTERM: stopping", times=1)
        await one.stop_daemon()
        assert await link_of(one.host, "flannel0") is None, "nobody keeps it any more"
        listed = (await one.host.run("ip", "route", "show", "table", "main")).stdout
        assert "unreachable 10.5.0.0/16" in listed


async def test_what_other_settings_do_not_fit_is_gone_before_it_is_made_anew(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        flags = await hold(overlay, one, "--tun-name=first0", "--workers=2")
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        await until(lambda: answers(two.host, one.tunnel_address))
        first = await until(lambda: daemon_of(one))
        flags.write_text("--healthz-port=10256 --healthz-ip=127.0.0.1 --tun-name=second0")
        one.daemon.send_signal(signal.SIGHUP)
        await until(lambda: daemon_of(one) not in (0, first))
        await until(lambda: is_ready(one))
        assert await link_of(one.host, "first0") is None
        assert await link_of(one.host, "second0") is not None
        await until(lambda: answers(two.host, one.tunnel_address))
        for text in (
            "its name is first0, --tun-name is second0; first0 deleted",
            "the UDP sockets given are not 1 bound to 192.0.2.1:8285, opening others",
            "descriptor health of the store is not used: it listens on 0.0.0.0:10256",
        ):
            await until_logged(one, text)
        # The store has what there is now: nothing else comes back with the next start.
        second = await until(lambda: daemon_of(one))
        await must_run(one.host, "ip", "link", "delete", "second0")
        await until(lambda: answers(two.host, one.tunnel_address))
        before = await link_of(one.host, "second0")
        assert before is not None
        await asyncio.sleep(
            3 * AGAIN_S
        )  # it has the new device's descriptor by then, and says nothing
        os.kill(second, signal.SIGKILL)
        await until(lambda: daemon_of(one) not in (0, second))
        await until(lambda: is_ready(one))
        assert await link_of(one.host, "second0") == before
        assert not await log_contains(one, "cannot be used, making another")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
async def test_a_daemon_that_dies_while_it_hands_over_is_started_again_by_the_holder(
    make_overlay: MakeOverlay, signum: signal.Signals
) -> None:
    """The successor gives up: the holder has the descriptors, and two would read the queues."""
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await hold(overlay, one)
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        await until(lambda: answers(two.host, one.tunnel_address))
        device = await link_of(one.host, "flannel0")
        argv = [TUNDP, "upgrade", f"--admin-socket={one.admin_socket}"]
        async with (
            PingStream(two.host, one.tunnel_address, pause_s=0.05) as inward,
            PingStream(one.host, two.tunnel_address, pause_s=0.05) as outward,
        ):
            done, count = None, 0
            while done is None or done.returncode == 0:
                # On a busy machine it may be over before it is disturbed: then once more.
                first = await until(lambda: running(one))
                upgrading = asyncio.ensure_future(one.host.run(*argv))
                count += 1
                await until(partial(log_contains, one, "taking over from process", times=count))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(first, signum)
                done = await upgrading
                assert count < 6, one.log_tail()
            second = await until(lambda: running(one, but=first))
            seen = (inward.received, outward.received)
            await until(lambda: inward.received > seen[0] + 10)
            await until(lambda: outward.received > seen[1] + 10)
        assert not Path(f"/proc/{first}").exists()
        assert await link_of(one.host, "flannel0") == device
        assert (inward.lost, outward.lost) == (0, 0), one.log_tail()
        own = str(one.admin_socket).encode()
        runs = [
            pid
            for pid in processes_in(one.host.namespace)
            if own in Path(f"/proc/{pid}/cmdline").read_bytes() and pid != one.daemon.pid
        ]
        assert runs == [second], "nobody else reads the queues"
