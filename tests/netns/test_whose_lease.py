"""Whose a lease is, where nodes, leftovers and clones of a machine meet in a real etcd.

[node1] [node2] [node3] [node4] eth0 -- [switch, etcd 192.0.2.254]

A clone is a node that starts with the state directory, lease cache and subnet.env of another.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys

import pytest

from tests.nodes import (
    HEALTH_PORT,
    MakeOverlay,
    answers,
    fails,
    is_ready,
    lease_is,
    log_contains,
    must_run,
)
from tests.wait import DEADLINE_S, until
from tundp.lab.overlay import LabNode, OverlayLab

HEALTH = f"--healthz-port={HEALTH_PORT}"


async def boot(overlay: OverlayLab, node: LabNode, *flags: str) -> None:
    """Start tundp on a machine whose subnet.env has the same path as on every other one.

    The node id ends with that path's digest, unless it is the default one.
    """
    disk = node.state_dir.with_suffix(".disk")
    mounted = overlay.directory / "disk"
    disk.mkdir(exist_ok=True)
    mounted.mkdir(exist_ok=True)
    if not node.subnet_file.is_symlink():
        node.subnet_file.symlink_to(disk / "subnet.env")
    script = f'mount --bind {disk} {mounted} && exec "$@"'
    command = [
        *("unshare", "--mount", "sh", "-c", script, "sh"),
        *(sys.executable, "-m", "tundp", "run", *overlay.store_flags, "--iface=eth0"),
        *(f"--subnet-file={mounted}/subnet.env", f"--admin-socket={node.admin_socket}"),
        *(f"--state-dir={node.state_dir}", *flags),
    ]
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(command, log=log)


def clone(image: LabNode, *copies: LabNode) -> None:
    """The disk of `image`, on other machines."""
    for copy in copies:
        for suffix in (".state", ".disk"):
            target = copy.state_dir.with_suffix(suffix)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(image.state_dir.with_suffix(suffix), target)


async def holders(overlay: OverlayLab) -> dict[str, tuple[str, str]]:
    """PublicIP and node id of every lease, by key."""
    found = {key: json.loads(value) for key, value in (await overlay.read_leases()).items()}
    return {key: (each["PublicIP"], each.get("TundpNode", "")) for key, each in found.items()}


async def assert_all_have_joined(overlay: OverlayLab, *nodes: LabNode) -> None:
    """Each has a subnet and a node id of its own, and packets pass between all of them."""
    await overlay.wait_ready(nodes)
    found = await holders(overlay)
    assert sorted(ip for ip, _ in found.values()) == sorted(node.public_ip for node in nodes)
    assert len({node_id for _, node_id in found.values()}) == len(nodes)
    for node in nodes:
        assert node.daemon.poll() is None
        assert (await node.status_document())["node_id"] in {
            node_id for _, node_id in found.values()
        }
        for other in nodes:
            if other is not node:
                await until(lambda n=node, o=other: answers(n.host, o.tunnel_address))


def lines(node: LabNode, text: str) -> int:
    return node.log_path.read_text().count(text)


@pytest.mark.parametrize("order", [("10.5.7.0-24", "10.5.9.0-24"), ("10.5.9.0-24", "10.5.7.0-24")])
async def test_leftovers_of_this_host_are_named_and_the_subnet_of_subnet_env_is_kept(
    make_overlay: MakeOverlay, order: tuple[str, str]
) -> None:
    async with make_overlay(store="etcd", nodes=2, start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for key in order:
            value = {"PublicIP": one.public_ip, "PublicIPv6": None}
            await overlay.write_etcd(f"subnets/{key}", json.dumps(value))
        one.subnet_file.write_text(
            "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.9.1/24\n"
            "FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
        )
        await overlay.start_daemon(one, HEALTH)
        await until(lambda: is_ready(one), "readyz, though a leftover has its PublicIP")
        assert str(one.gateway) == "10.5.9.1/24", "the subnet that pods have addresses of"
        refused = (await one.status_document())["refused"]
        assert [each["key"] for each in refused] == ["10.5.7.0-24"]
        await until(lambda: "a former lease of this node" in one.log_path.read_text())
        assert set(await overlay.read_leases()) == set(order), "by hand: not ours to delete"
        # Somebody renews it: a stock flanneld elsewhere that has our address by mistake.
        await overlay.write_etcd(
            "subnets/10.5.7.0-24", json.dumps({"PublicIP": one.public_ip, "PublicIPv6": None})
        )
        await until(lambda: fails(one, "lease"))
        await overlay.delete_etcd("subnets/10.5.7.0-24")
        await until(lambda: is_ready(one))
        await overlay.start_daemon(two)
        await overlay.wait_ready([one, two])


async def test_a_bad_address_in_one_lease_makes_no_node_unready(make_overlay: MakeOverlay) -> None:
    async with make_overlay(HEALTH, store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for node in (one, two):
            await node.host.bridge("docker0")
            await node.host.configure("docker0", "172.17.0.1/16")
            await until(lambda n=node: is_ready(n))
        bad = {"10.5.211.0-24": "127.0.0.1", "10.5.212.0-24": "172.17.0.1"}
        for key, ip in bad.items():
            await overlay.write_etcd(
                f"subnets/{key}", json.dumps({"PublicIP": ip, "PublicIPv6": None})
            )
        for node in (one, two):

            async def has_refused(node: LabNode = node) -> bool:
                return {each["reason"] for each in (await node.status_document())["refused"]} == {
                    "host_address"
                }

            await until(has_refused)
            assert await is_ready(node)
        assert await answers(one.host, two.tunnel_address, timeout_s=5)
        # Another node with the address that we do advertise is a duplicate.
        value = {"PublicIP": one.public_ip, "TundpNode": "them", "TundpHost": "kube9"}
        await overlay.write_etcd("subnets/10.5.213.0-24", json.dumps(value))
        await until(lambda: fails(one, "lease"))
        assert await is_ready(two)


async def test_clones_of_a_live_machine_take_new_node_ids(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=3, start=False) as overlay:
        one, *clones = overlay.nodes.values()
        await boot(overlay, one, HEALTH)
        await overlay.wait_ready([one])
        key = str(one.gateway.network).replace("/", "-")
        before = (await holders(overlay))[key]
        # The image is made of a machine that has run before, with a lease cache.
        await one.stop_daemon()
        clone(one, *clones)
        await boot(overlay, one, HEALTH)
        await overlay.wait_ready([one])
        for each in clones:
            await boot(overlay, each)
        await assert_all_have_joined(overlay, one, *clones)
        assert (await holders(overlay))[key] == before, "the original keeps what it had"
        assert await is_ready(one)
        assert lines(one, "asks whether we are alive") <= 1
        for each in clones:
            assert lines(each, "is this machine a clone of it?") == 1
        # The new id is kept: the next start takes the same subnet, and asks nobody.
        two = clones[0]
        asked = lines(two, "asking whether a clone is alive")
        kept = (two.gateway, (await two.status_document())["node_id"])
        await two.stop_daemon()
        await boot(overlay, two)
        await overlay.wait_ready([two])
        assert (two.gateway, (await two.status_document())["node_id"]) == kept
        assert lines(two, "asking whether a clone is alive") == asked


async def test_a_clone_that_starts_from_its_copied_lease_cache_writes_nothing_over(
    make_overlay: MakeOverlay,
) -> None:
    """Without etcd it goes on with the cached leases, and meets the live original later."""
    async with make_overlay(store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await boot(overlay, one, HEALTH)
        await overlay.wait_ready([one])
        key = str(one.gateway.network).replace("/", "-")
        await one.stop_daemon()
        clone(one, two)
        await boot(overlay, one, HEALTH)
        await until(lambda: is_ready(one))
        before = (await holders(overlay))[key]
        await must_run(two.host, "ip", "route", "add", "blackhole", "192.0.2.254/32")
        await boot(overlay, two)
        await until(
            lambda: log_contains(two, "going on with the leases of"), "a start without etcd"
        )
        await must_run(two.host, "ip", "route", "del", "blackhole", "192.0.2.254/32")
        await until(lambda: two.daemon.poll() is not None, "the clone's end")
        assert two.daemon.poll() == 1
        assert lines(two, "is this machine a clone of it?") >= 1
        assert lines(two, "CONFLICT") == lines(one, "CONFLICT") == 0
        assert (await holders(overlay))[key] == before, "the original keeps what it had"
        # What a supervisor does next.
        await boot(overlay, two)
        await assert_all_have_joined(overlay, one, two)


async def test_clones_of_a_machine_that_is_down_and_comes_back(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=3, start=False) as overlay:
        one, two, three = overlay.nodes.values()
        await boot(overlay, one)
        await overlay.wait_ready([one])
        await one.stop_daemon(signal.SIGKILL)
        clone(one, two, three)
        # Both at the same moment: one of them takes the dead one's lease, the other a new id.
        await boot(overlay, two)
        await boot(overlay, three)
        await assert_all_have_joined(overlay, two, three)
        await boot(overlay, one)
        await assert_all_have_joined(overlay, one, two, three)


async def test_a_node_that_cannot_keep_its_id_has_one_lease(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        # A file where the directory should be: even root can make nothing in it.
        one.state_dir.write_text("")
        gateway = None
        for _ in range(2):
            await overlay.start_daemon(one)
            await overlay.wait_ready([one])
            assert gateway in (None, one.gateway)
            gateway = one.gateway
            await one.stop_daemon()
        assert len(await overlay.read_leases()) == 1


async def test_a_duplicate_address_is_refused_and_asks_seldom(make_overlay: MakeOverlay) -> None:
    """What a supervisor does that starts it again two seconds later, for ever."""
    async with make_overlay(store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(one)
        await overlay.wait_ready([one])
        as_one = (f"--public-ip={one.public_ip}", HEALTH)
        for _ in range(2):
            await overlay.start_daemon(two, *as_one)
            code = await asyncio.to_thread(two.daemon.wait, DEADLINE_S)
            assert code == 1, two.log_tail()
        assert lines(two, f"PublicIP {one.public_ip} belongs to node") >= 2
        await overlay.start_daemon(two, *as_one)
        await until(lambda: log_contains(two, "asking again in"), "a pause after two refusals")
        assert lines(one, "asks whether we are alive") == 1
        await until(lambda: fails(two, "start"))
        assert await lease_is(one, "held")
        await two.stop_daemon()
        # What was remembered is of no concern once it has another address.
        await overlay.start_daemon(two)
        await overlay.wait_ready([one, two])


async def test_a_clone_with_the_same_address_gives_way_to_the_live_one(
    make_overlay: MakeOverlay,
) -> None:
    """Same node id, same PublicIP: behind two NATs of one plan, or a forgotten --public-ip."""
    async with make_overlay(store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        same = "--public-ip=192.0.2.1"
        await boot(overlay, one, same)
        await overlay.wait_ready([one])
        clone(one, two)
        began = len(one.log_path.read_text())
        await boot(overlay, two, same)
        assert await asyncio.to_thread(two.daemon.wait, DEADLINE_S) == 1
        assert "our node id and our PublicIP 192.0.2.1, and is alive" in two.log_tail()
        assert await lease_is(one, "held")
        assert one.log_path.read_text()[began:].count(" W ") <= 1
        # A restart of the first is answered by nobody.
        await one.stop_daemon()
        await boot(overlay, one, same)
        await overlay.wait_ready([one])
        await asyncio.sleep(0.5)
        assert await lease_is(one, "held")
