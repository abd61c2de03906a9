"""A daemon's lease from its first start to its last, on a real etcd: conflicts, twins,
reservations, and etcd away, silent or wiped.

[node1] [node2] [node3] eth0 -- [switch, etcd 192.0.2.254]

Durations and losses are printed for docs/failure-modes.md; none is asserted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from tests.nodes import (
    MakeOverlay,
    answers,
    counters,
    fails,
    has_peer,
    has_received,
    is_ready,
    lease_is,
    log_contains,
    readiness,
)
from tests.stopped import stop
from tests.wait import DEADLINE_S, together, until
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream

HEALTH = "--healthz-port=10256"
METRICS = "--metrics-addr=127.0.0.1:9285"


def pool(first: int, last: int) -> dict[str, str]:
    """A network with room for these /24s."""
    return {
        "Network": "10.5.0.0/16",
        "SubnetMin": f"10.5.{first}.0",
        "SubnetMax": f"10.5.{last}.0",
    }


def key_of(node: LabNode) -> str:
    return str(node.gateway.network).replace("/", "-")


def node_id(value: str) -> str:
    return str(json.loads(value)["TundpNode"])


async def told(node: LabNode) -> str:
    """What `tundp status` prints."""
    finished = await node.host.run(
        sys.executable, "-m", "tundp", "status", f"--admin-socket={node.admin_socket}"
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


async def exit_code(node: LabNode) -> int:
    """Of a daemon that ends by itself."""
    return await asyncio.to_thread(node.daemon.wait, DEADLINE_S)


async def held_in_store(overlay: OverlayLab, key: str) -> bool:
    return key in await overlay.read_leases()


async def v3(overlay: OverlayLab, method: str, **body: str) -> dict[str, Any]:
    """Ask etcd's JSON gateway, as an operator with curl would."""

    def ask() -> dict[str, Any]:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(f"{overlay.etcd.url}/v3/{method}", data, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    return await overlay.switch.call(ask)


async def etcd_lease_of(overlay: OverlayLab, key: str) -> int:
    """The etcd lease a key hangs on, 0 for none."""
    name = base64.b64encode(f"/coreos.com/network/subnets/{key}".encode()).decode()
    (found,) = (await v3(overlay, "kv/range", key=name))["kvs"]
    return int(found.get("lease", 0))


@contextlib.asynccontextmanager
async def cut_off(overlay: OverlayLab, node: LabNode) -> AsyncIterator[None]:
    """etcd and a node hear nothing from each other; nobody is told."""
    rules = (
        f"table ip cut {{ chain in {{ type filter hook input priority -300;"
        f" ip saddr {node.public_ip} drop; }}; chain out {{ type filter hook output priority -300;"
        f" ip daddr {node.public_ip} drop; }}; }}"
    )
    done = await overlay.switch.run("nft", rules)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        await overlay.switch.run("nft", "delete table ip cut")


@contextlib.asynccontextmanager
async def hung(overlay: OverlayLab, node: LabNode) -> AsyncIterator[None]:
    """etcd is there and does nothing."""
    stop(overlay.etcd.pid)
    try:
        yield
    finally:
        os.kill(overlay.etcd.pid, signal.SIGCONT)


async def test_a_node_that_slept_past_its_ttl_never_takes_its_subnet_back(
    make_overlay: MakeOverlay,
) -> None:
    # Room for two: three has one of them, the other goes from one to two.
    async with make_overlay(store="etcd", nodes=3, start=False, network=pool(1, 2)) as overlay:
        one, two, three = (overlay.nodes[n] for n in (1, 2, 3))
        await overlay.start_daemon(three)
        await overlay.start_daemon(one, "--lease-ttl=2", HEALTH, METRICS)
        await overlay.wait_ready([one, three])
        key = key_of(one)
        stop(one.daemon.pid)
        began = time.monotonic()
        await until(lambda: no_longer(overlay, key))
        print(f"TTL 2 s: gone from etcd {time.monotonic() - began:.1f} s after SIGSTOP")
        await overlay.start_daemon(two)
        await until(lambda: held_in_store(overlay, key))
        await until(lambda: has_peer(three, str(one.gateway.network), two.public_ip))
        held = (await overlay.read_leases())[key]
        began = time.monotonic()
        one.daemon.send_signal(signal.SIGCONT)
        await until(lambda: lease_is(one, "conflict"))
        print(f"CONFLICT {time.monotonic() - began:.2f} s after SIGCONT")

        # A loop that stood still is not alive; it takes a second to say that it turns.
        await until(lambda: fails(one, "lease"))
        assert two.public_ip in (await readiness(one)).details
        assert (await one.get(10256, "/readyz"))[1] == "flanneld is not ready yet"
        assert await one.get(10256, "/healthz") == (200, "flanneld is running")
        _, metrics = await one.get(9285, "/metrics")
        assert 'tundp_lease_state{state="conflict"} 1.0' in metrics
        assert 'tundp_lease_state{state="held"} 0.0' in metrics
        assert 'tundp_check_ok{check="lease"} 0.0' in metrics
        assert f"lease {key} CONFLICT: node {node_id(held)}" in one.log_path.read_text()
        assert "conflict" in (await told(one)).lower()
        # What it knew still gets its packets; answers go to who has the subnet now.
        before = (await three.status_document())["counters"]["decap"]["packets_out"]
        async with PingStream(one.host, three.tunnel_address) as stream:
            await until(lambda: delivered(three, before + 20))
        assert stream.sent >= 20

        assert await two.stop_daemon() == 0
        assert (await overlay.read_leases())[key] == held
        assert await lease_is(one, "conflict")
        began = time.monotonic()
        await overlay.delete_etcd(f"subnets/{key}")
        await until(lambda: lease_is(one, "held"))
        print(f"regained {time.monotonic() - began:.2f} s after the other's lease was deleted")
        await until(lambda: has_peer(three, str(one.gateway.network), one.public_ip))
        await until(lambda: answers(one.host, three.tunnel_address))
        await until(lambda: is_ready(one))
        assert one.daemon.poll() is None


async def no_longer(overlay: OverlayLab, key: str) -> bool:
    return not await held_in_store(overlay, key)


async def delivered(node: LabNode, count: int) -> bool:
    return bool((await counters(node))["decap"]["packets_out"] >= count)


async def test_a_reservation_survives_restarts(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        await overlay.write_etcd("subnets/10.5.77.0-24", f'{{"PublicIP":"{one.public_ip}"}}')
        for _ in range(4):
            await overlay.start_daemon(one)
            await overlay.wait_ready([one])
            assert str(one.gateway) == "10.5.77.1/24"
            lease = (await one.status_document())["lease"]
            assert (lease["state"], lease["expires_in_s"]) == ("held", None)
            assert await one.stop_daemon() == 0
            assert await etcd_lease_of(overlay, "10.5.77.0-24") == 0
        assert list(await overlay.read_leases()) == ["10.5.77.0-24"]


async def test_two_nodes_with_one_public_ip(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(one, HEALTH)
        await overlay.wait_ready([one])
        key = key_of(one)
        first = (await overlay.read_leases())[key]
        as_one = f"--public-ip={one.public_ip}"

        # A live one is left alone.
        began = time.monotonic()
        await overlay.start_daemon(two, as_one)
        assert await exit_code(two) == 1
        print(f"refused {time.monotonic() - began:.1f} s after its start")
        text = two.log_tail()
        for told_of in (
            f"PublicIP {one.public_ip} belongs to node {node_id(first)}",
            f"(host {socket.gethostname()})",
            "which is alive",
            "--iface",
            "--public-ip",
            "--force-takeover",
        ):
            assert told_of in text
        assert "Traceback" not in text
        assert (await overlay.read_leases()) == {key: first}
        assert await lease_is(one, "held")
        await until(lambda: "asks whether we are alive; answering" in one.log_path.read_text())

        # Unless one is told to.
        await overlay.start_daemon(two, as_one, "--force-takeover")
        await overlay.wait_ready([two])
        assert key_of(two) == key
        await until(lambda: lease_is(one, "conflict"))
        assert await fails(one, "lease")
        second = (await overlay.read_leases())[key]
        assert node_id(second) == (await two.status_document())["node_id"] != node_id(first)

        # A dead one is not waited for longer than a challenge lasts.
        await one.stop_daemon(signal.SIGKILL)
        await two.stop_daemon(signal.SIGKILL)
        began = time.monotonic()
        await overlay.start_daemon(one)
        await overlay.wait_ready([one])
        print(f"a dead twin's lease is taken over {time.monotonic() - began:.1f} s after the start")
        assert key_of(one) == key
        assert f"node {node_id(second)} (host {socket.gethostname()}) does not answer" in (
            one.log_path.read_text()
        )
        # Its own lease again, of another process.
        (again,) = (await overlay.read_leases()).items()
        former, latter = json.loads(first), json.loads(again[1])
        assert former.pop("TundpRun") != latter.pop("TundpRun")
        assert (again[0], latter) == (key, former)
        assert await lease_is(one, "held")


async def test_a_stock_flannelds_lease_and_a_new_address(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        stock = f'{{"PublicIP":"{one.public_ip}","PublicIPv6":null}}'
        await overlay.write_etcd("subnets/10.5.33.0-24", stock)
        began = time.monotonic()
        await overlay.start_daemon(one)
        await overlay.wait_ready([one])
        print(f"a stock lease is adopted {time.monotonic() - began:.1f} s after the start")
        assert key_of(one) == "10.5.33.0-24"
        assert "asking whether it is alive" not in one.log_path.read_text()
        identity = node_id((await overlay.read_leases())["10.5.33.0-24"])

        # Only the node id tells that it is the same node: nothing else is left.
        assert await one.stop_daemon() == 0
        one.subnet_file.unlink()
        await one.host.run("ip", "addr", "del", "192.0.2.1/24", "dev", "eth0")
        await one.host.run("ip", "addr", "add", "192.0.2.11/24", "dev", "eth0")
        await overlay.start_daemon(one)
        await overlay.wait_ready([one])
        leases = await overlay.read_leases()
        assert list(leases) == ["10.5.33.0-24"]
        assert json.loads(leases["10.5.33.0-24"])["PublicIP"] == "192.0.2.11"
        assert node_id(leases["10.5.33.0-24"]) == identity
        assert str(one.gateway) == "10.5.33.1/24"


async def test_etcd_away_at_a_start_or_silent(make_overlay: MakeOverlay) -> None:
    """Three labs at a time: nearly all of it is waiting for what has to be noticed."""
    await together(
        {
            "away at a start": restart_without_etcd(make_overlay),
            "cut off": silent_etcd(make_overlay, cut_off),
            "hung": silent_etcd(make_overlay, hung),
        }
    )


async def restart_without_etcd(make_overlay: MakeOverlay) -> None:
    """Memory serves at once, and what is new comes with etcd; without memory it waits."""
    async with make_overlay(store="etcd", nodes=3, start=False) as overlay:
        one, two, three = (overlay.nodes[n] for n in (1, 2, 3))
        await overlay.write_etcd("subnets/10.5.250.0-24", '{"PublicIP":"192.0.2.200"}')
        await overlay.start_daemon(two)
        await overlay.wait_ready([two])
        await overlay.start_daemon(one, HEALTH)
        await one.wait_for_peers(2)
        subnet = one.gateway
        await until(lambda: remembers(one, key_of(two)))

        await overlay.etcd.stop()
        assert await one.stop_daemon() == 0
        began = time.monotonic()
        await overlay.start_daemon(one, HEALTH)
        # One that remembers nothing waits, and says for what.
        await overlay.start_daemon(three, HEALTH, "--state-dir=")
        await one.wait_for_peers(2)
        await until(lambda: answers(one.host, two.tunnel_address))
        print(f"etcd refuses: first ping {time.monotonic() - began:.1f} s after the start")
        await check_stale(one, two)
        assert one.gateway == subnet
        await until(lambda: is_waiting(three))
        await overlay.etcd.start()
        began = time.monotonic()
        await until(lambda: is_ready(one))
        assert await lease_is(one, "held")
        print(f"etcd back: ready again after {time.monotonic() - began:.1f} s")
        await overlay.wait_ready([three])
        await until(lambda: has_peer(one, str(three.gateway.network), three.public_ip))

        # Killed, and etcd only silent; meanwhile the hand-made peer moves.
        await until(lambda: remembers(one, key_of(two)))
        async with cut_off(overlay, one):
            await one.stop_daemon(signal.SIGKILL)
            began = time.monotonic()
            await overlay.start_daemon(one, HEALTH)
            await one.wait_for_peers(2)
            await until(lambda: answers(one.host, two.tunnel_address))
            print(f"etcd silent: first ping {time.monotonic() - began:.1f} s after the start")
            await check_stale(one, two)
            assert await has_peer(one, "10.5.250.0/24", "192.0.2.200")
            await overlay.write_etcd("subnets/10.5.250.0-24", f'{{"PublicIP":"{three.public_ip}"}}')
        began = time.monotonic()
        await until(lambda: has_peer(one, "10.5.250.0/24", three.public_ip))
        print(f"healed: the new next hop after {time.monotonic() - began:.1f} s")
        await until(lambda: is_ready(one))
        assert await lease_is(one, "held")
        assert one.gateway == subnet


async def remembers(node: LabNode, key: str) -> bool:
    return any(key in path.read_text() for path in node.state_dir.glob("*.json"))


async def is_waiting(node: LabNode) -> bool:
    with contextlib.suppress(OSError):
        found = await readiness(node)
        is_about_config = found.details.startswith("waiting for the network config: ")
        return (found.status, found.failing, is_about_config) == (503, ["start"], True)
    return False


async def check_stale(one: LabNode, two: LabNode) -> None:
    """`one` runs on what it remembers, and says so wherever it is asked."""
    await until(lambda: fails(one, "lease", "leases-synced"))
    assert "only from the lease cache, age " in (await readiness(one)).details
    assert (await one.get(10256, "/healthz"))[0] == 200
    assert await has_peer(one, str(two.gateway.network), two.public_ip)
    await until(lambda: answers(two.host, one.tunnel_address))
    store = (await one.status_document())["store"]
    assert store["is_from_cache"]
    assert not store["is_answering"]
    assert "from disk" in await told(one)


async def silent_etcd(make_overlay: MakeOverlay, silence: Any) -> None:
    """No packet is lost, little is said, and the lease is renewed when it is over."""
    # Renewed every 10 s, so that one renewal falls into the silence.
    async with make_overlay("--lease-ttl=30", store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        key = key_of(one)
        expiry = (await one.status_document())["lease"]["expires_at"]
        lines = one.log_path.read_text().count("\n")
        to_one = PingStream(two.host, one.tunnel_address)
        async with to_one, PingStream(one.host, two.tunnel_address) as to_two:
            began = time.monotonic()
            async with silence(overlay, one):
                await until(lambda: answering(one, is_so=False))
                noticed = time.monotonic() - began
                await until(lambda: log_contains(one, "claim: lease: "))
            began = time.monotonic()
            await until(lambda: answering(one, is_so=True))
            await until(lambda: expires_after(one, expiry + 5))
        print(
            f"{silence.__name__}: noticed after {noticed:.1f} s, renewed"
            f" {time.monotonic() - began:.1f} s after it ended; {to_one}; {to_two}"
        )
        assert to_one.lost == to_two.lost == 0
        assert await lease_is(one, "held")
        assert (
            node_id((await overlay.read_leases())[key]) == (await one.status_document())["node_id"]
        )
        said = one.log_path.read_text().splitlines()[lines:]
        assert len(said) < 20, said


async def answering(node: LabNode, *, is_so: bool) -> bool:
    return (await node.status_document())["store"]["is_answering"] is is_so


async def expires_after(node: LabNode, unix_time: float) -> bool:
    return bool((await node.status_document())["lease"]["expires_at"] > unix_time)


async def test_a_peer_of_the_last_moment_is_remembered_too(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=1) as overlay:
        one = overlay.nodes[1]
        await until(lambda: remembers(one, key_of(one)))
        await overlay.write_etcd("subnets/10.5.250.0-24", '{"PublicIP":"192.0.2.200"}')
        await until(lambda: has_peer(one, "10.5.250.0/24", "192.0.2.200"))
        assert await one.stop_daemon() == 0
        assert await remembers(one, "10.5.250.0-24")


async def test_etcd_wiped_under_traffic(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        before = sorted(await overlay.read_leases())
        config = json.dumps({"Network": "10.5.0.0/16"})
        to_one = PingStream(two.host, one.tunnel_address, pause_s=0.002)
        async with to_one, PingStream(one.host, two.tunnel_address, pause_s=0.002) as to_two:
            await until(lambda: has_received(to_one, 20))
            await overlay.etcd.stop()
            overlay.etcd.wipe()
            await overlay.etcd.start()
            began = time.monotonic()
            await overlay.write_etcd("config", config)
            for node in (one, two):
                await until(partial(in_store, overlay, node))
                await until(partial(lease_is, node, "held"))
            print(f"wiped: both leases are back {time.monotonic() - began:.2f} s after it serves")
            await until(lambda: has_peer(one, str(two.gateway.network), two.public_ip))
            await until(lambda: has_peer(two, str(one.gateway.network), one.public_ip))
            now = to_one.received
            await until(lambda: has_received(to_one, now + 20))
        print(f"wiped: {to_one}; {to_two}")
        assert sorted(await overlay.read_leases()) == before
        assert to_one.lost == to_two.lost == 0


async def in_store(overlay: OverlayLab, node: LabNode) -> bool:
    return await held_in_store(overlay, key_of(node))


async def test_a_deleted_lease_is_regained_or_ends_the_daemon(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(one)
        await overlay.start_daemon(two, "--on-lease-lost=exit")
        await overlay.wait_ready()
        key = key_of(one)
        async with PingStream(one.host, two.tunnel_address, pause_s=0.002) as stream:
            await until(lambda: has_received(stream, 5))
            began = time.monotonic()
            await overlay.delete_etcd(f"subnets/{key}")
            await until(lambda: held_in_store(overlay, key), poll_s=0.001)
            print(f"deleted lease regained after {(time.monotonic() - began) * 1000:.0f} ms")
            await until(lambda: has_peer(two, str(one.gateway.network), one.public_ip))
            now = stream.received
            await until(lambda: has_received(stream, now + 5))
        print(f"deleted lease: {stream}")
        assert await lease_is(one, "held")
        assert "it was deleted or has expired; trying to get the same subnet again" in (
            one.log_path.read_text()
        )

        await overlay.delete_etcd(f"subnets/{key_of(two)}")
        assert await exit_code(two) == 0
        assert f"lease {key_of(two)} is lost: exiting with code 0, as flannel does" in (
            two.log_path.read_text()
        )
        assert list(await overlay.read_leases()) == [key]
        assert "flannel0" not in {link.name for link in await two.host.netlink.links()}


async def test_both_apis_of_etcd(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=3, start=False, network=pool(1, 3)) as overlay:
        both, old, new = (overlay.nodes[n] for n in (1, 2, 3))
        await overlay.write_etcd("config", json.dumps(pool(1, 3)), api="v2")
        # v2 and v3 do not see each other: told apart by what they had before.
        old.subnet_file.write_text("FLANNEL_SUBNET=10.5.1.1/24\n")
        new.subnet_file.write_text("FLANNEL_SUBNET=10.5.2.1/24\n")
        await overlay.start_daemon(old, "--etcd-api=v2")
        await overlay.start_daemon(new, "--etcd-api=v3")
        await until(lambda: held_by_each(overlay, old="10.5.1.0-24", new="10.5.2.0-24"))
        await overlay.start_daemon(both, "--etcd-api=both")
        await overlay.wait_ready([both])
        # The only one that is free in both.
        assert key_of(both) == "10.5.3.0-24"
        for other in (old, new):
            subnet = str(other.gateway.network)
            await until(partial(has_peer, both, subnet, other.public_ip))
            await until(partial(has_peer, other, "10.5.3.0/24", both.public_ip))
            await until(partial(answers, both.host, other.tunnel_address))
            await until(partial(answers, other.host, both.tunnel_address))
        for api in ("v2", "v3"):
            own = (await overlay.read_leases(api=api))["10.5.3.0-24"]
            assert json.loads(own)["PublicIP"] == both.public_ip
        assert "10.5.2.0-24" not in await overlay.read_leases(api="v2")
        assert "10.5.1.0-24" not in await overlay.read_leases(api="v3")

        for api in ("v2", "v3"):
            began = time.monotonic()
            await overlay.delete_etcd("subnets/10.5.3.0-24", api=api)
            await until(partial(is_in, overlay, "10.5.3.0-24", api))
            print(f"deleted in {api} alone: back there after {time.monotonic() - began:.2f} s")
            await until(lambda: lease_is(both, "held"))
        for other in (old, new):
            await until(partial(answers, other.host, both.tunnel_address))

        # No subnet is left for one more, whichever store would take it.
        await both.stop_daemon()
        for api in ("v2", "v3"):
            await overlay.delete_etcd("subnets/10.5.3.0-24", api=api)
        await overlay.write_etcd("subnets/10.5.3.0-24", '{"PublicIP":"192.0.2.99"}', api="v2")
        await overlay.start_daemon(both, "--etcd-api=both")
        assert await exit_code(both) == 1
        assert "out of subnets" in both.log_tail()
        assert "10.5.3.0-24" not in await overlay.read_leases(api="v3")


async def held_by_each(overlay: OverlayLab, *, old: str, new: str) -> bool:
    return list(await overlay.read_leases(api="v2")) == [old] and list(
        await overlay.read_leases(api="v3")
    ) == [new]


async def is_in(overlay: OverlayLab, key: str, api: str) -> bool:
    return key in await overlay.read_leases(api=api)


async def test_auto_takes_the_api_with_the_config(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=3, start=False) as overlay:
        homes = {"v2": ["v2"], "v3": ["v3"], "both": ["v2", "v3"]}
        nodes = dict(zip(homes, overlay.nodes.values(), strict=True))
        for prefix, apis in homes.items():
            for api in apis:
                await overlay.etcd.put(f"/{prefix}/config", '{"Network":"10.5.0.0/16"}', api=api)
            await overlay.start_daemon(nodes[prefix], f"--etcd-prefix=/{prefix}")
        for prefix, apis in homes.items():
            one, taken = nodes[prefix], apis[-1]
            await overlay.wait_ready([one])
            store = (await one.status_document())["store"]["description"]
            assert store.startswith(f"etcd {taken} at ")
            for api in ("v2", "v3"):
                found = await overlay.etcd.read_all(f"/{prefix}/subnets/", api=api)
                assert [key.rsplit("/")[-1] for key in found] == [key_of(one)] * (api == taken)
            warning = "there is a network config in etcd v3 and in v2: v3 counts"
            assert (warning in one.log_path.read_text()) is (len(apis) == 2)
