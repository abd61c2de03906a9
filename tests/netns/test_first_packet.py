"""The very first packets of a daemon: a full table from the moment there is a device."""

from __future__ import annotations

import pytest

from tests.nodes import MakeOverlay, counters, has_received
from tests.wait import until
from tundp.lab.traffic import PingStream


@pytest.mark.parametrize("engine", ["reference", "gso"])
@pytest.mark.parametrize("store", ["file", "etcd"])
async def test_no_packet_ever_meets_an_empty_table(
    make_overlay: MakeOverlay, engine: str, store: str
) -> None:
    async with make_overlay(store=store, start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(two)
        await overlay.wait_ready([two])
        # Nothing leads there until the device of `one` has its route; then every packet must
        # find the peer whose lease was there all along.
        async with PingStream(one.host, two.tunnel_address, pause_s=0.002) as stream:
            await overlay.start_daemon(one, f"--engine={engine}")
            await until(lambda: has_received(stream, 20))
            counted = await counters(one)
        assert "no_route" not in counted["encap"]["drops"]
        assert counted["icmp_to_tun"] == 0


async def test_pods_are_told_of_their_subnet_after_the_rules_are_there(
    make_overlay: MakeOverlay,
) -> None:
    """CNI starts pods as soon as subnet.env is there: they must find masquerading in force."""
    async with make_overlay(start=False) as overlay:
        one = overlay.nodes[1]
        await overlay.start_daemon(one, "--ip-masq")
        await until(one.subnet_file.exists, poll_s=0.001)
        rules = await one.host.run("iptables", "-t", "nat", "-S")
        assert "-A POSTROUTING" in rules.stdout
        assert "-j FLANNEL-POSTRTG" in rules.stdout
