"""What changes in the kernel cost a daemon, counted in questions to it: tundp_netlink_requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from tests.nodes import MakeOverlay, must_run
from tests.wait import until
from tundp.lab.lab import Host
from tundp.lab.overlay import LabNode, OverlayLab

METRICS_PORT = 9285
KEY, MARK = "10.5.200.0-24", "203.0.113.7"


async def asked(node: LabNode) -> tuple[int, int]:
    """Questions and dumps so far."""
    _, body = await node.get(METRICS_PORT, "/metrics")
    found = dict(
        re.findall(r'^tundp_netlink_requests_total{kind="(\w+)"} ([0-9.]+)', body, re.MULTILINE)
    )
    return int(float(found["single"])), int(float(found["dump"]))


async def is_quiet(node: LabNode) -> bool:
    before = await asked(node)
    return await asked(node) == before


async def batch(host: Host, lines: Iterable[str], directory: LabNode) -> None:
    """Let one `ip` make many changes."""
    path = directory.directory / "batch"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    await must_run(host, "ip", "-batch", str(path))


async def processed(node: LabNode, number: int) -> None:
    """Until the daemon has seen all changes made so far.

    An address more is the last of them: learnt from its message alone, it refuses a lease.
    """
    command = "add" if number % 2 else "del"
    await must_run(node.host, "ip", "addr", command, f"{MARK}/32", "dev", "lo")

    async def is_seen() -> bool:
        refused = (await node.status_document())["refused"]
        return (KEY in [each["key"] for each in refused]) is bool(number % 2)

    await until(is_seen)


async def one_node(overlay: OverlayLab, backend: str) -> LabNode:
    one = overlay.nodes[1]
    document = {
        "config": {"Network": "10.5.0.0/16", "Backend": {"Type": backend}},
        "leases": {KEY: {"PublicIP": MARK, "BackendType": "" if backend == "udp" else backend}},
    }
    overlay.lease_file.write_text(json.dumps(document), encoding="utf-8")
    await must_run(one.host, "ip", "route", "add", "default", "via", "192.0.2.254")
    flags = f"--metrics-addr=127.0.0.1:{METRICS_PORT}"
    await overlay.start_daemon(one, "--iptables-forward-rules=false", flags)
    await one.wait_for_peers(1)
    await processed(one, 1)
    await until(lambda: is_quiet(one))
    return one


LOOKS = 14
"""Lists that two looks for obstacles ask for; one for each of the changes would be hundreds."""


async def check_foreign_changes(one: LabNode) -> None:
    """Containers, a routing daemon and router advertisements: none of them is our business."""
    before = await asked(one)
    host = one.host
    for _ in range(5):
        names = range(20)
        await batch(host, (f"link add c{n} type veth peer name d{n}" for n in names), one)
        await batch(host, (f"link set c{n} up" for n in names), one)
        await batch(host, (f"addr add 172.17.{n}.1/24 dev c{n}" for n in names), one)
        await batch(host, (f"link del c{n}" for n in names), one)
    routes = [f"203.{100 + n // 256}.{n % 256}.0/24" for n in range(1000)]
    await batch(host, (f"route add {each} via 192.0.2.253" for each in routes), one)
    await batch(host, (f"route replace {each} via 192.0.2.252" for each in routes), one)
    await batch(host, (f"route del {each}" for each in routes), one)
    await batch(host, (f"addr add 2001:db8::{n:x}/64 dev eth0" for n in range(1, 50)), one)
    await batch(host, ("route add default via fe80::1 dev eth0",), one)
    await processed(one, 2)
    # The look for obstacles, a minute apart, has questions of its own: a few, for all of these.
    singles, dumps = (now - then for now, then in zip(await asked(one), before, strict=True))
    assert singles <= 20, "some change was answered by a question"
    assert dumps <= LOOKS, "some change was answered by a list"


async def test_foreign_changes_are_answered_by_no_question(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False, nodes=1) as overlay:
        one = await one_node(overlay, "udp")
        await check_foreign_changes(one)
        # And one that concerns us by few, however many came with it.
        before = await asked(one)
        await must_run(one.host, "ip", "addr", "flush", "dev", "flannel0")
        subnet = one.tunnel_address

        async def is_back() -> bool:
            return subnet in await must_run(one.host, "ip", "addr", "show", "dev", "flannel0")

        await until(is_back)
        await processed(one, 3)
        singles, dumps = (now - then for now, then in zip(await asked(one), before, strict=True))
        assert 0 < singles < 40
        assert 0 < dumps < 20


async def test_foreign_changes_ask_nothing_with_the_host_gw_backend(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False, nodes=1) as overlay:
        one = await one_node(overlay, "host-gw")
        # Every ten seconds it compares its routes, whatever happens: one dump of its own routes.
        before = await asked(one)
        await check_batches(one)
        singles, dumps = (now - then for now, then in zip(await asked(one), before, strict=True))
        assert singles <= 20
        assert dumps <= LOOKS


async def check_batches(one: LabNode) -> None:
    names = range(40)
    for _ in range(5):
        await batch(one.host, (f"link add c{n} type veth peer name d{n}" for n in names), one)
        await batch(one.host, (f"link del c{n}" for n in names), one)
    await processed(one, 2)
