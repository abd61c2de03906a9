"""The network under the overlay changes while packets flow: address, MTU, link state, device.

[node1] eth0 -- [switch, etcd] -- eth0 [node2]

Streams of pings go both ways; what was lost is printed for docs/failure-modes.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from ipaddress import IPv4Network

import pytest

from tests.nodes import MakeLab, MakeOverlay, answers, has_received, is_sending_to, link_of
from tests.wait import until
from tundp.daemon.underlay import Underlay
from tundp.errors import ConfigError
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import PingStream
from tundp.linux.iface import Selection, look


async def test_the_nodes_address_changes_and_the_others_follow(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        subnet, daemon = one.gateway, one.daemon
        to_one = PingStream(two.host, one.tunnel_address)
        to_two = PingStream(one.host, two.tunnel_address)
        async with to_one, to_two:
            await until(lambda: has_received(to_one, 20))
            # As a DHCP client with a new lease: the old one goes, the new one comes.
            await one.host.run("ip", "addr", "del", "192.0.2.1/24", "dev", "eth0")
            await one.host.run("ip", "addr", "add", "192.0.2.11/24", "dev", "eth0")
            await until(lambda: is_sending_to(two, "192.0.2.11"))
            before = to_one.received, to_two.received
            await until(lambda: has_received(to_one, before[0] + 20))
            await until(lambda: has_received(to_two, before[1] + 20))
        print(f"address replaced: to it {to_one}; from it {to_two}")
        # Requests on a connection from the old address are answered by nobody: the new one
        # must be told on a new connection, not when those have timed out.
        assert "timed out" not in one.log_path.read_text()
        leases = await overlay.read_leases()
        key = str(subnet.network).replace("/", "-")
        assert json.loads(leases[key])["PublicIP"] == "192.0.2.11"
        assert len(leases) == 2
        assert one.daemon is daemon
        assert daemon.poll() is None
        assert one.gateway == subnet
        status = await one.status_document()
        assert status["public_ip"] == "192.0.2.11"
        assert status["backend"]["interface"]["address"] == "192.0.2.11"
        assert status["lease"]["state"] == "held"
        assert [each for each in status["findings"] if each["verdict"] != "ok"] == []


async def test_an_interface_that_cannot_be_used_is_named_once_and_until_it_can(
    make_lab: MakeLab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with make_lab() as lab:
        host, other = await lab.host("one"), await lab.host("two")
        await lab.cable(host, "eth0", other, "eth0")
        await host.configure("eth0", "192.0.2.1/24")
        network, selection = IPv4Network("10.5.0.0/16"), Selection(iface=("eth0",))
        interface = await look(host.netlink, selection, network)
        underlay = Underlay(host.netlink, selection, interface=interface, network=network)
        refused = ConfigError("MTU 68 is too small")
        for _ in range(3):
            now = await underlay.look()
            assert now == interface
            underlay.failed(refused)
            assert underlay.error == str(refused)
        assert await underlay.look() is not None
        assert underlay.error == str(refused), "being there is not being used"
        underlay.follow(interface)
        assert underlay.error == ""
    lines = [line for line in caplog.messages if line.startswith("underlay:")]
    assert len(lines) == 2, lines
    assert str(refused) in lines[0]
    assert "again" in lines[1]


async def test_mtu_down_up_and_a_deleted_device(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        daemon = one.daemon

        async def has_mtu(overlay_mtu: int) -> bool:
            tun = await link_of(one.host, "flannel0")
            said = int(one.environment["FLANNEL_MTU"])
            device = (await one.status_document())["backend"]["device"]
            assert tun is not None
            return tun.mtu == said == overlay_mtu == int(device["mtu"])

        async with PingStream(two.host, one.tunnel_address) as stream:
            for mtu in (1400, 1500):
                await one.host.configure("eth0", mtu=mtu)
                await until(partial(has_mtu, mtu - 28))
        print(f"MTU 1500, 1400, 1500: {stream}")
        assert stream.lost == 0

        async with PingStream(two.host, one.tunnel_address) as stream:
            await until(lambda: has_received(stream, 20))
            await one.host.run("ip", "link", "set", "eth0", "down")
            await until(lambda: underlay_is(one, ok=False))
            await asyncio.sleep(1.0)  # how long it is away, not how long we wait for something
            before = stream.received
            await one.host.run("ip", "link", "set", "eth0", "up")
            await until(lambda: underlay_is(one, ok=True))
            await until(lambda: has_received(stream, before + 20))
        print(f"eth0 down for a second: {stream}")

        async with PingStream(two.host, one.tunnel_address) as stream:
            await until(lambda: has_received(stream, 20))
            await one.host.run("ip", "link", "set", "eth0", "down")
            index = await one.host.index("flannel0")
            await one.host.run("ip", "link", "del", "flannel0")
            await until(lambda: is_another(one, index))
            before = stream.received
            await one.host.run("ip", "link", "set", "eth0", "up")
            await until(lambda: has_received(stream, before + 20))
        print(f"eth0 down and the TUN deleted meanwhile: {stream}")
        await until(lambda: answers(one.host, two.tunnel_address))
        assert one.daemon is daemon
        assert daemon.poll() is None
        assert (await one.status_document())["counters"]["conserved"]


async def underlay_is(node: LabNode, *, ok: bool) -> bool:
    findings = (await node.status_document())["findings"]
    return {each["id"]: each["verdict"] == "ok" for each in findings}["underlay"] is ok


async def is_another(node: LabNode, index: int) -> bool:
    link = await link_of(node.host, "flannel0")
    return link is not None and link.index != index and link.is_up


async def test_an_mtu_no_overlay_fits_in_ends_nothing(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        index = await one.host.index("eth0")
        await one.host.netlink.set_link(index, mtu=90)
        await until(lambda: underlay_is(one, ok=False))
        tun = await link_of(one.host, "flannel0")
        assert tun is not None
        assert tun.mtu == 1472
        await one.host.netlink.set_link(index, mtu=1500)
        await until(lambda: underlay_is(one, ok=True))
        await until(lambda: answers(one.host, two.tunnel_address))
        assert one.daemon.poll() is None
