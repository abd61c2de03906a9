"""The early start: a daemon killed or stopped under traffic, and started with its descriptors.

The test process is the descriptor store. Real daemons, real traffic; nothing is timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from tests.nodes import MakeOverlay, answers, counters, is_ready, log_contains, until_logged
from tests.wait import until
from tundp.daemon.lock import take_lock
from tundp.engine import image as images
from tundp.instance import Instance
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream
from tundp.linux.tun import Tun, TunMode
from tundp.linux.udp import open_udp
from tundp.observe.web import open_listener

LAUNCHER = Path(__file__).parents[1] / "given_start.py"
PROGRAM = Path(sys.executable).with_name("tundp")
SUPER = TunMode(has_vnet_header=True, wants_tso=True, wants_uso=True)
CARRIES = "early start: 1 packet threads carry packets"


@dataclass(slots=True, kw_only=True)
class Held:
    """A node's descriptors, in this process; daemons come and go."""

    overlay: OverlayLab
    node: LabNode
    descriptors: Mapping[str, int]

    async def start(self, *flags: str) -> None:
        node = self.node
        with node.log_path.open("ab") as log:
            node.daemon = await node.host.popen(
                [
                    sys.executable,
                    str(LAUNCHER),
                    json.dumps(dict(self.descriptors)),
                    "0",
                    str(PROGRAM),
                    "run",
                    *self.overlay.store_flags,
                    "--iface=eth0",
                    "--healthz-port=10256",
                    f"--subnet-file={node.subnet_file}",
                    f"--state-dir={node.state_dir}",
                    f"--admin-socket={node.admin_socket}",
                    *flags,
                ],
                log=log,
                pass_fds=tuple(self.descriptors.values()),
            )

    async def stop(self) -> None:
        self.node.daemon.terminate()
        await until(lambda: self.node.daemon.poll() is not None)
        assert self.node.daemon.returncode == 0

    async def kill(self) -> None:
        self.node.daemon.kill()
        await until(lambda: self.node.daemon.poll() is not None)

    async def started(self, times: int) -> None:
        """Until the daemon that was started last is ready, the `times`th of this node."""
        await until(lambda: log_contains(self.node, "device flannel0: address", times=times))
        await until(lambda: is_ready(self.node))


@contextlib.asynccontextmanager
async def held(make_overlay: MakeOverlay, *flags: str) -> AsyncIterator[tuple[Held, LabNode]]:
    """Node 1 with descriptors held here, and node 2, both ready."""
    async with make_overlay(start=False) as overlay, contextlib.AsyncExitStack() as stack:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(two)
        tun = await one.host.call(Tun, "flannel%d", SUPER)
        stack.callback(tun.close)
        udp = stack.enter_context(await one.host.call(open_udp, IPv4Address(one.public_ip), 8285))
        health = stack.enter_context(
            await one.host.call(open_listener, "127.0.0.1", 10256, "--healthz-port")
        )
        lock = take_lock(Instance(one.subnet_file))
        assert lock is not None
        stack.callback(os.close, lock)
        image = images.make()
        stack.callback(os.close, image)
        given = Held(
            overlay=overlay,
            node=one,
            descriptors={
                "tun-0": tun.fd,
                "udp-0": udp.fileno(),
                "health": health.fileno(),
                "lock": lock,
                "image": image,
            },
        )
        await given.start(*flags)
        await overlay.wait_ready()
        await given.started(1)
        await until_logged(one, "no early start: the image is empty")
        await until(lambda: answers(two.host, one.tunnel_address))
        yield given, two


async def test_a_killed_daemons_successor_carries_packets_before_it_is_one(
    make_overlay: MakeOverlay,
) -> None:
    async with held(make_overlay) as (given, two):
        one = given.node
        async with PingStream(two.host, one.tunnel_address) as stream:
            await until(lambda: stream.received >= 20)
            await given.kill()
            await given.start()
            now = stream.received
            await until(lambda: stream.received >= now + 50)
            await given.started(2)
            now = stream.received
            await until(lambda: stream.received >= now + 50)
        assert stream.lost == 0, stream
        await until_logged(one, CARRIES)
        await until_logged(one, "early start ended: it carried")
        found = await counters(one)
        assert found["conserved"]


async def peer_counts(node: LabNode) -> dict[str, int]:
    """What a node counts of its one peer."""
    (peer,) = (await node.status_document())["peers"]
    return {name: peer["traffic"][name] for name in ("packets_out", "packets_in", "bytes_out")}


def threads_of(node: LabNode) -> dict[str, tuple[str, str, str]]:
    """Of each thread of a daemon: name, effective and permitted capabilities, seccomp."""
    found = {}
    for task in Path(f"/proc/{node.daemon.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            lines = (task / "status").read_text().splitlines()
            values = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            rights = values["CapEff"], values["CapPrm"], values["Seccomp"].strip()
            found[f"{values['Name']} {task.name}"] = rights
    return found


async def test_a_restarted_daemon_counts_on_and_its_threads_have_no_other_rights(
    make_overlay: MakeOverlay,
) -> None:
    async with held(make_overlay, "--sandbox=on") as (given, two):
        one = given.node
        async with PingStream(two.host, one.tunnel_address) as stream:
            await until(lambda: stream.received >= 20)
            before, peer_before = await counters(one), await peer_counts(one)
            assert before["encap"]["packets_out"] >= 20
            await given.stop()
            await given.start("--sandbox=on")
            await given.started(2)
            now = stream.received
            await until(lambda: stream.received >= now + 20)
            received = stream.received
            after, peer_after = await counters(one), await peer_counts(one)
        assert stream.lost == 0, stream
        await until_logged(one, CARRIES)
        assert before["conserved"] and after["conserved"]
        for direction in ("encap", "decap"):
            for name in ("packets_in", "packets_out", "bytes_in", "bytes_out"):
                assert after[direction][name] >= before[direction][name] + 20, (direction, name)
        # None of those that went through the restart is missing in what was counted.
        assert after["decap"]["packets_in"] >= received
        assert all(peer_after[name] >= count + 20 for name, count in peer_before.items())
        threads = threads_of(one)
        assert any(name.startswith("tundp-gso") for name in threads), threads
        assert {seccomp for _, _, seccomp in threads.values()} == {"2"}, threads
        (rights,) = {(effective, permitted) for effective, permitted, _ in threads.values()}
        assert int(rights[0], 16).bit_count() <= 2, "CAP_NET_ADMIN, CAP_NET_RAW for iptables"


async def test_early_threads_lose_their_rights_with_the_rest(make_overlay: MakeOverlay) -> None:
    """While the daemon waits for its store, whatever was started first runs in the sandbox."""
    async with held(make_overlay, "--sandbox=on") as (given, two):
        one = given.node
        await given.kill()
        lease_file = next(given.overlay.directory.glob("leases.json"))
        shutil.rmtree(one.state_dir)  # no leases but the store's
        hidden = lease_file.rename(lease_file.with_suffix(".away"))
        await given.start("--sandbox=on")
        await until(lambda: log_contains(one, CARRIES))
        await until(lambda: log_contains(one, "sandbox: holds", times=2))
        await until(lambda: answers(two.host, one.tunnel_address))
        await until(lambda: log_contains(one, "lease file", times=2))
        threads = threads_of(one)
        assert any(name.startswith("tundp-gso") for name in threads), threads
        assert {seccomp for _, _, seccomp in threads.values()} == {"2"}, threads
        assert len({rights[:2] for rights in threads.values()}) == 1, threads
        hidden.rename(lease_file)
        await given.started(2)
        await until(lambda: answers(two.host, one.tunnel_address))
