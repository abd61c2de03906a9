"""The link that carries the packets, where that is not the one with the address.

             eth0 -- eth0 192.0.2.254
[h] lo/dummy            [r]              as BGP hosts have it: an address that no wire has
             eth1 -- eth1 198.51.100.254
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.nodes import MakeLab, MakeOverlay, answers, link_of, must_run
from tests.wait import until
from tundp.errors import ConfigError
from tundp.lab.lab import Host
from tundp.lab.overlay import LabNode
from tundp.linux.iface import Interface, Selection, look, relook

NETWORK = IPv4Network("10.5.0.0/16")
OURS = "203.0.113.1"
ADDRESS = IPv4Address(OURS)
EVERY_WAY = {
    "--iface=lo": Selection(iface=("lo",)),
    "--iface=the address": Selection(iface=(OURS,)),
    "--iface=eth0": Selection(iface=("eth0",)),
    "--iface-regex of the address": Selection(iface_regex=(r"^203\.",)),
    "--iface-regex of a name": Selection(iface_regex=("^eth0$",)),
    "--iface-can-reach": Selection(iface_can_reach=IPv4Address("100.64.0.9")),
    "--public-ip": Selection(public_ip=ADDRESS),
    "nothing": Selection(),
}


MakeHost = Callable[..., contextlib.AbstractAsyncContextManager[Host]]


@pytest.fixture
def make_host(make_lab: MakeLab) -> MakeHost:
    @contextlib.asynccontextmanager
    async def make(*commands: str) -> AsyncIterator[Host]:
        async with make_lab() as lab:
            host, router = await lab.host("h"), await lab.host("r")
            for number, net in enumerate(("192.0.2", "198.51.100")):
                await lab.cable(host, f"eth{number}", router, f"eth{number}")
                await host.configure(f"eth{number}", mtu=1500 - 100 * number)
                await router.configure(f"eth{number}", f"{net}.254/24")
            for command in commands:
                done = await host.run("ip", *command.split())
                if "Unknown device type" in done.stderr:
                    pytest.skip(f"this kernel has no such device: ip {command}")
                assert done.returncode == 0, f"{command}: {done.stderr}"
            yield host

    return make


ON_LO = (
    f"addr add {OURS}/32 dev lo",
    "route add 192.0.2.254 dev eth0",
    f"route add default via 192.0.2.254 dev eth0 onlink src {OURS}",
)
ON_DEVICE = (
    "link add dummy0 type {kind}",
    "link set dummy0 up",
    f"addr add {OURS}/32 dev dummy0",
    *ON_LO[1:],
)
DEVICES = {
    "lo": ON_LO,
    "dummy": tuple(command.format(kind="dummy") for command in ON_DEVICE),
    "bridge": tuple(command.format(kind="bridge") for command in ON_DEVICE),
}


def found(chosen: Interface) -> tuple[str, str, int]:
    return chosen.link.name, str(chosen.address), chosen.link.mtu


@pytest.mark.parametrize("device", DEVICES)
async def test_every_way_to_name_an_address_that_no_wire_has(
    make_host: MakeHost, device: str
) -> None:
    async with make_host(*DEVICES[device]) as host:
        for name, selection in EVERY_WAY.items():
            if name == "--iface=lo" and device != "lo":
                selection = Selection(iface=("dummy0",))
            chosen = await look(host.netlink, selection, NETWORK)
            assert found(chosen) == ("eth0", OURS, 1500), name
            assert str(chosen.public_ip) == OURS
            assert chosen.warnings == (), name
            assert await relook(host.netlink, selection, chosen, NETWORK) == chosen, name
        # The routes move: the packets go over the other link, from the same address.
        await must_run(host, "ip", "route", "del", "default")
        await must_run(host, "ip", "route", "add", "198.51.100.254", "dev", "eth1")
        default = ("default", "via", "198.51.100.254", "dev", "eth1", "src", OURS)
        await must_run(host, "ip", "route", "add", *default)
        moved = await relook(host.netlink, selection, chosen, NETWORK)
        assert found(moved) == ("eth1", OURS, 1400)
        # No route at all for a moment: what was known stays.
        await must_run(host, "ip", "route", "del", "default")
        assert found(await relook(host.netlink, selection, moved, NETWORK)) == found(moved)


SETUPS = {
    "an address on the link stays flannel's choice": (
        ("addr add 192.0.2.1/24 dev eth0", "route add default via 192.0.2.254", *ON_LO[:1]),
        ("eth0", "192.0.2.1", 1500),
    ),
    "a source of the default route does not displace it": (
        (
            "addr add 192.0.2.1/24 dev eth0",
            *ON_LO[:1],
            f"route add default via 192.0.2.254 src {OURS}",
        ),
        ("eth0", "192.0.2.1", 1500),
    ),
    "equal-cost routes: the first link": (
        (
            *ON_LO[:2],
            "route add 198.51.100.254 dev eth1",
            f"route add default src {OURS} nexthop via 192.0.2.254 dev eth0"
            " nexthop via 198.51.100.254 dev eth1",
        ),
        None,
    ),
    "a default route of another table": (
        (
            "addr add 192.0.2.1/24 dev eth0",
            "route add default via 192.0.2.254 table 100",
            "rule add from all lookup 100 priority 100",
        ),
        ("eth0", "192.0.2.1", 1500),
    ),
    "the first default route's link has no address: the kernel's source": (
        (
            "addr add 198.51.100.1/24 dev eth1",
            "route add default dev eth0 scope link metric 10",
            "route add default via 198.51.100.254 metric 20",
        ),
        ("eth0", "198.51.100.1", 1500),
    ),
    "a /32 of scope link": (
        (
            "addr add 192.0.2.1/32 dev eth0",
            "route add 192.0.2.254/32 dev eth0 scope link",
            "route add default via 192.0.2.254",
        ),
        ("eth0", "192.0.2.1", 1500),
    ),
    "a vlan": (
        (
            "link add link eth0 name eth0.5 type vlan id 5",
            "link set eth0.5 up mtu 1450",
            "addr add 192.0.2.1/24 dev eth0.5",
            "route add default via 192.0.2.254",
        ),
        ("eth0.5", "192.0.2.1", 1450),
    ),
    "a bridge over the uplink": (
        (
            "link add br0 type bridge",
            "link set eth0 master br0",
            "link set br0 up",
            "addr add 192.0.2.1/24 dev br0",
            "route add default via 192.0.2.254",
        ),
        ("br0", "192.0.2.1", 1500),
    ),
    "a virtual address of keepalived, listed after": (
        (
            "addr add 192.0.2.1/24 dev eth0",
            "addr add 192.0.2.100/32 dev eth0",
            "route add default via 192.0.2.254",
        ),
        ("eth0", "192.0.2.1", 1500),
    ),
    "deprecated and secondary ones": (
        (
            "addr add 192.0.2.9/24 dev eth0 preferred_lft 0",
            "addr add 192.0.2.1/24 dev eth0",
            "addr add 198.51.100.1/24 dev eth0",
            "route add default via 192.0.2.254",
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", SETUPS)
async def test_hosts_as_they_are(make_host: MakeHost, name: str) -> None:
    commands, expected = SETUPS[name]
    async with make_host(*commands) as host:
        selection = Selection()
        chosen = await look(host.netlink, selection, NETWORK)
        if name.startswith("equal-cost"):
            # By hash, but always the same: the kernel's own word for this flow.
            assert str(chosen.address) == OURS
            assert chosen.link.name in ("eth0", "eth1")
        elif name.startswith("deprecated"):
            assert chosen.link.name == "eth0"
            assert str(chosen.address) != "192.0.2.9"
        else:
            assert found(chosen) == expected
        assert await relook(host.netlink, selection, chosen, NETWORK) == chosen
        if str(chosen.address) not in await must_run(host, "ip", "addr", "show", chosen.link.name):
            return  # down, packets from another link's address go over that
        # The uplink by another name is the same.
        await must_run(host, "ip", "link", "set", chosen.link.name, "down")
        await must_run(host, "ip", "link", "set", chosen.link.name, "name", "wan0")
        again = await relook(host.netlink, selection, chosen, NETWORK)
        assert (again.link.index, again.address) == (chosen.link.index, chosen.address)


async def test_no_route_yet_from_an_address_on_loopback(make_host: MakeHost) -> None:
    # The BGP daemon starts later: no MTU is that of loopback.
    async with make_host(ON_LO[0]) as host:
        selection = Selection(iface=("lo",))
        chosen = await look(host.netlink, selection, NETWORK)
        assert found(chosen) == ("lo", OURS, 1500)
        for command in ON_LO[1:]:
            await must_run(host, "ip", *command.split())
        again = await relook(host.netlink, selection, chosen, NETWORK)
        assert found(again) == ("eth0", OURS, 1500)


async def test_a_link_without_an_address_that_nothing_goes_over(make_host: MakeHost) -> None:
    async with make_host(*ON_LO) as host:
        with pytest.raises(ConfigError, match="failed to find IPv4 address for interface eth1"):
            await look(host.netlink, Selection(iface=("eth1",)), NETWORK)


async def test_peers_behind_another_link_than_the_addresss(make_host: MakeHost) -> None:
    async with make_host(
        "addr add 192.0.2.1/24 dev eth0",
        "addr add 198.51.100.1/24 dev eth1",
        "route add default via 192.0.2.254",
    ) as host:
        selection = Selection(iface=("eth0",))
        peers = (IPv4Address("198.51.100.9"),)
        chosen = await look(host.netlink, selection, NETWORK, peers=peers)
        assert found(chosen) == ("eth1", "192.0.2.1", 1400)
        both = (*peers, IPv4Address("192.0.2.9"))
        chosen = await look(host.netlink, selection, NETWORK, peers=both)
        assert found(chosen) == ("eth0", "192.0.2.1", 1500)


async def test_a_node_with_its_address_on_loopback(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        run = partial(must_run, one.host, "ip")
        await overlay.switch.sysctl("ipv4/ip_forward", 1)
        await run("addr", "flush", "dev", "eth0")
        await run("addr", "add", f"{OURS}/32", "dev", "lo")
        await run("route", "add", "192.0.2.254", "dev", "eth0")
        await run("route", "add", "default", "via", "192.0.2.254", "dev", "eth0", "src", OURS)
        await must_run(overlay.switch, "ip", "route", "add", OURS, "dev", "br0")
        await must_run(two.host, "ip", "route", "add", OURS, "dev", "eth0")
        # A lease of ours from before, by a flannel: found by the address, wherever that is.
        document = json.loads(overlay.lease_file.read_text())
        document["leases"] = {"10.5.77.0-24": {"PublicIP": OURS}}
        overlay.lease_file.write_text(json.dumps(document))
        one.interface_flags = ("--iface=lo",)
        for node in (one, two):
            await overlay.start_daemon(node, "--iptables-forward-rules=false")
        await overlay.wait_ready()
        status = await one.status_document()
        assert status["subnet"] == "10.5.77.0/24"
        assert status["public_ip"] == OURS
        assert status["backend"]["interface"]["name"] == "eth0"
        assert int(one.environment["FLANNEL_MTU"]) == 1472
        await until(lambda: answers(one.host, two.tunnel_address))
        await until(lambda: answers(two.host, one.tunnel_address))

        # The link that carries is the one that is followed.
        await must_run(one.host, "ip", "link", "set", "eth0", "mtu", "1400")
        await until(partial(has_overlay_mtu, one, 1372))
        await must_run(one.host, "ip", "link", "add", "eth9", "type", "veth", "peer", "name", "b9")
        await must_run(one.host, "ip", "link", "set", "eth9", "mtu", "1300", "up")
        await must_run(one.host, "ip", "route", "add", "192.0.2.2", "dev", "eth9", "src", OURS)
        await until(partial(has_overlay_mtu, one, 1272))
        await must_run(one.host, "ip", "link", "del", "eth9")
        await until(partial(has_overlay_mtu, one, 1372))
        await until(lambda: answers(one.host, two.tunnel_address))


async def has_overlay_mtu(node: LabNode, mtu: int) -> bool:
    tun = await link_of(node.host, "flannel0")
    return tun is not None and tun.mtu == mtu == int(node.environment["FLANNEL_MTU"])
