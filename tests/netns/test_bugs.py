"""Bugs in the control plane, planted in a real daemon: packets flow on, and the task is back."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import (
    MakeOverlay,
    answers,
    counters,
    has_peer,
    has_received,
    has_sent,
    is_ready,
    lease_is,
    link_of,
    log_contains,
    must_run,
)
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream

SCRIPT = Path(__file__).with_name("buggy_daemon.py")
METRICS_PORT = 9401


@dataclass(frozen=True)
class Plant:
    """A bug: what raises, how often and when; `tried` makes the daemon come by.

    `works` is true once what was tried has its effect all the same.
    """

    task: str
    target: str
    tried: Callable[[OverlayLab, LabNode], Awaitable[object]]
    works: Callable[[OverlayLab, LabNode], Awaitable[bool]]
    times: int = 1
    when: str = "before"


async def nothing(_: OverlayLab, __: LabNode) -> None:
    """The task comes by on its own."""


async def at_once(_: OverlayLab, __: LabNode) -> bool:
    return True


async def add_lease(overlay: OverlayLab, _: LabNode) -> None:
    document = json.loads(overlay.lease_file.read_text())
    number = 200 + document["revision"] % 50
    document["leases"][f"10.5.{number}.0-24"] = {"PublicIP": "192.0.2.77"}
    document["revision"] += 1
    copy = overlay.lease_file.with_suffix(".new")
    copy.write_text(json.dumps(document))
    copy.rename(overlay.lease_file)


async def has_all_peers(overlay: OverlayLab, node: LabNode) -> bool:
    document = json.loads(overlay.lease_file.read_text())
    own = str(node.gateway.network)
    for key, value in document["leases"].items():
        subnet = key.replace("-", "/")
        if subnet != own and not await has_peer(node, subnet, value["PublicIP"]):
            return False
    # The engine, too, has them: what is sent there leaves, for an address nobody has.
    before = (await counters(node))["encap"]
    await answers(node.host, "10.5.200.9", timeout_s=0.01)
    after = (await counters(node))["encap"]
    return bool(after["packets_in"] > before["packets_in"])


async def remove_lease(overlay: OverlayLab, _: LabNode) -> None:
    """A lease of somebody else's, at which a claim looks whether a conflict is over."""
    document = json.loads(overlay.lease_file.read_text())
    foreign = [k for k, v in document["leases"].items() if v["PublicIP"] == "192.0.2.77"]
    del document["leases"][foreign[0]]
    document["revision"] += 1
    copy = overlay.lease_file.with_suffix(".new")
    copy.write_text(json.dumps(document))
    copy.rename(overlay.lease_file)


async def has_own_lease(overlay: OverlayLab, node: LabNode) -> bool:
    key = str(node.gateway.network).replace("/", "-")
    return key in await overlay.read_leases() and await lease_is(node, "held")


async def shrink_mtu(_: OverlayLab, node: LabNode) -> None:
    await must_run(node.host, "ip", "link", "set", "flannel0", "mtu", "1400")


async def has_mtu(_: OverlayLab, node: LabNode) -> bool:
    link = await link_of(node.host, "flannel0")
    return link is not None and link.mtu == 1472


async def forward_chain(node: LabNode) -> str:
    """The chain the node's forward rules are in."""
    rules = (await must_run(node.host, "iptables", "-S", "FORWARD")).split()
    return next(word for word in rules if word.startswith("FLANNEL"))


async def flush_rules(_: OverlayLab, node: LabNode) -> None:
    await must_run(node.host, "iptables", "-F", await forward_chain(node))


async def has_rules(_: OverlayLab, node: LabNode) -> bool:
    chain = await forward_chain(node)
    return "10.5.0.0/16" in await must_run(node.host, "iptables", "-S", chain)


async def change_file(_: OverlayLab, node: LabNode) -> None:
    with node.subnet_file.open("a") as file:
        file.write("CHANGED=1\n")


async def has_file(_: OverlayLab, node: LabNode) -> bool:
    return "CHANGED" not in node.environment


async def is_cached(overlay: OverlayLab, node: LabNode) -> bool:
    """Whether the lease cache has every lease there is."""
    cached = "".join(path.read_text() for path in node.state_dir.glob("last-known*"))
    return all(key in cached for key in await overlay.read_leases())


FOLLOW = Plant("follow leases", "tundp.lease.routing:Routing.apply", add_lease, has_all_peers)
PLANTS = (
    FOLLOW,
    Plant(
        "follow leases",
        "tundp.lease.table:LeaseTable.apply",
        add_lease,
        has_all_peers,
        when="after",
    ),
    Plant(
        "keep lease",
        "tundp.lease.claim:ClaimMachine.next",
        remove_lease,
        has_own_lease,
    ),
    Plant("keep cache", "tundp.subnet.lease_cache:LeaseCache.save", add_lease, is_cached),
    Plant("watch kernel", "tundp.daemon.kernel_keeper:KernelKeeper._look", shrink_mtu, has_mtu),
    Plant("keep firewall", "tundp.linux.firewall.choose:Firewall.repair", flush_rules, has_rules),
    Plant("keep subnet.env", "tundp.daemon.subnet_file:SubnetFile.check", change_file, has_file),
    Plant("notify", "tundp.daemon.node:Node._summary", nothing, at_once),
    Plant("measure paths", "tundp.backend.udp.path_prober:PathProber._step", nothing, at_once),
    Plant("watch peers", "tundp.backend.udp.peer_watch:PeerWatch._look", nothing, at_once),
    Plant("watch health", "tundp.engine.native.engine:NativeEngine.heartbeat", nothing, at_once),
)


def trigger_of(node: LabNode, number: int) -> Path:
    return node.directory / f"plant{number}"


async def start(overlay: OverlayLab, node: LabNode, plants: tuple[Plant, ...], *flags: str) -> None:
    spelt = [
        (each.target, str(trigger_of(node, number)), each.times, each.when)
        for number, each in enumerate(plants)
    ]
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(
            [
                *(sys.executable, str(SCRIPT), json.dumps(spelt)),
                *overlay.store_flags,
                "--iface=eth0",
                f"--subnet-file={node.subnet_file}",
                f"--admin-socket={node.admin_socket}",
                f"--state-dir={node.state_dir}",
                "--healthz-port=10256",
                "--healthz-ip=127.0.0.1",
                f"--metrics-addr=127.0.0.1:{METRICS_PORT}",
                *flags,
            ],
            log=log,
        )


async def finding(node: LabNode) -> dict[str, Any]:
    """The finding `tasks` of the status."""
    if node.daemon.poll() is not None:
        raise AssertionError(f"the daemon ended: {node.log_tail()}")
    found = (await node.status_document())["findings"]
    (tasks,) = (each for each in found if each["id"] == "tasks")
    return dict(tasks)


async def test_bug_in_a_task_costs_no_packet(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=2, start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, one, PLANTS, "--loop=uvloop")
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        await until(lambda: is_ready(one))
        assert (await finding(one))["verdict"] == "ok"
        failures: dict[str, int] = {}
        async with PingStream(one.host, two.tunnel_address, pause_s=0.02) as pings:
            for number, plant in enumerate(PLANTS):
                trigger_of(one, number).touch()
                await plant.tried(overlay, one)
                failures[plant.task] = failures.get(plant.task, 0) + plant.times
            for plant in PLANTS:

                async def is_told(task: str = plant.task) -> bool:
                    facts = (await finding(one))["facts"]
                    times = {1: "once"}.get(failures[task], f"{failures[task]} times")
                    return f"failed {times}, " in facts.get(task, "")

                await until(is_told, f"the failure of {plant.task}")

                async def is_working(plant: Plant = plant) -> bool:
                    return await plant.works(overlay, one)

                await until(is_working, f"{plant.task} to work again")
            await until(lambda: is_ready(one))
            await until(lambda: has_received(pings, 100))
        assert pings.lost == 0
        assert (await finding(one))["verdict"] == "warn"
        _, text = await one.get(METRICS_PORT, "/metrics")
        for task, count in failures.items():
            assert f'tundp_task_failures_total{{task="{task}"}} {count}.0' in text
        log = one.log_path.read_text()
        for plant in PLANTS:
            name = plant.target.partition(":")[2]
            assert log.count(f"RuntimeError: planted in {name}\n") == 1, name  # one traceback
        assert await one.stop_daemon() == 0


async def test_bug_that_stays_fails_readiness_until_it_is_gone(make_overlay: MakeOverlay) -> None:
    plant = Plant("follow leases", FOLLOW.target, add_lease, has_all_peers, times=4)
    async with make_overlay(nodes=2, start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, one, (plant,), "--loop=asyncio")
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        async with PingStream(one.host, two.tunnel_address, pause_s=0.02) as pings:
            trigger_of(one, 0).touch()
            await add_lease(overlay, one)

            async def is_failing() -> bool:
                return bool((await finding(one))["verdict"] == "fail")

            await until(is_failing)
            assert not await is_ready(one)
            await until(lambda: has_all_peers(overlay, one))
            await until(lambda: has_received(pings, 20))
        assert pings.lost == 0
        assert await one.stop_daemon() == 0


async def test_bug_while_the_device_is_made_again(make_overlay: MakeOverlay) -> None:
    target = "tundp.backend.udp.backend:UdpBackend._open_device"
    plant = Plant("keep backend", target, nothing, at_once)
    async with make_overlay(nodes=2, start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, one, (plant,))
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        trigger_of(one, 0).touch()
        await must_run(one.host, "ip", "link", "del", "flannel0")
        await until(lambda: log_contains(one, f"planted in {target.partition(':')[2]}"))
        await until(lambda: answers(one.host, two.tunnel_address))
        assert "keep backend" in (await finding(one))["facts"]


@pytest.mark.parametrize(
    ("method", "direction", "reason"),
    [("_encapsulate", "encap", "send_failed"), ("_decapsulate", "decap", "tun_failed")],
)
async def test_bug_in_the_reference_engine_costs_one_packet(
    make_overlay: MakeOverlay, method: str, direction: str, reason: str
) -> None:
    plant = Plant("", f"tundp.engine.reference:ReferenceEngine.{method}", nothing, at_once, times=3)
    async with make_overlay(nodes=2, start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await start(overlay, one, (plant,), "--engine=reference")
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        async with PingStream(one.host, two.tunnel_address, pause_s=0.02) as pings:
            trigger_of(one, 0).touch()
            await until(lambda: has_sent(pings, 20))
            await until(lambda: has_received(pings, 17))
        found = await counters(one)
        assert found[direction]["drops"] == {reason: 3}
        assert found["conserved"]
        assert pings.lost == 3
        assert await one.stop_daemon() == 0
