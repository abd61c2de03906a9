"""A namespace to make firewall rules in, and three neighbours whose packets they meet."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from ipaddress import IPv4Network, IPv6Network
from typing import Any, TypeVar

from tests.loops import LOOPS, run_on
from tests.nodes import MakeLab
from tests.wait import DEADLINE_S
from tundp.lab.lab import Host
from tundp.linux.firewall.choose import Firewall, FirewallSettings, make_firewall

N, S = IPv4Network("10.5.0.0/16"), IPv4Network("10.5.7.0/24")
V6 = {"network6": IPv6Network("fd05::/48"), "subnet6": IPv6Network("fd05:0:0:7::/64")}
OTHER_N, OTHER_S = IPv4Network("10.6.0.0/16"), IPv4Network("10.6.9.0/24")
BARE = {
    "nat": "-P PREROUTING ACCEPT\n-P INPUT ACCEPT\n-P OUTPUT ACCEPT\n-P POSTROUTING ACCEPT\n",
    "filter": "-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT\n",
}
BACK_ENDS = ["iptables", "iptables-legacy"]
FLAVOURS = [*BACK_ENDS, "nftables"]
T = TypeVar("T")


def settings(**changes: Any) -> FirewallSettings:
    wanted: dict[str, Any] = {
        "network": N,
        "subnet": S,
        "is_masquerading": True,
        "is_forwarding": True,
    }
    return FirewallSettings(**wanted | changes)


def make(flavour: str, **changes: Any) -> Firewall:
    if flavour == "nftables":
        return make_firewall(settings(**changes), is_nftables=True)
    return make_firewall(settings(**changes), is_nftables=False, binary=flavour)


class Box:
    """A namespace, and ways to run things in it."""

    def __init__(self, host: Host) -> None:
        self.host = host

    async def do(
        self,
        function: Callable[..., Coroutine[Any, Any, T]],
        *arguments: Any,
        loop: str = "asyncio",
    ) -> T:
        """Await `function(*arguments)` on a loop of its own inside the namespace."""
        return await self.host.call(lambda: run_on(LOOPS[loop], function(*arguments)))

    async def sh(self, script: str) -> str:
        """Run a shell script inside; its standard output."""
        done = await self.host.call(
            subprocess.run, ["sh", "-ec", script], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    async def everything(self) -> Any:
        """All there is, in every table of every kind, but counters and dates."""
        text = await self.sh(
            "nft list ruleset; iptables-legacy-save; ip6tables-legacy-save;"
            "cat /proc/self/net/ip_tables_names /proc/self/net/ip6_tables_names"
        )
        return [re.sub(r"\[\d+:\d+\]", "", line) for line in text.splitlines() if line[:1] != "#"]


MakeBox = Callable[[], contextlib.AbstractAsyncContextManager[Box]]
"""The fixture `box`."""


async def echo_source(client: Any, server: Any, address: Any) -> Any:
    """The source address `server` sees when `client` sends to it."""
    with (
        await server.socket(socket.SOCK_DGRAM) as listener,
        await client.socket(socket.SOCK_DGRAM) as sender,
    ):
        listener.bind((address, 0))
        listener.setblocking(False)
        sender.sendto(b"hello", listener.getsockname())
        async with asyncio.timeout(DEADLINE_S):
            _, source = await asyncio.get_running_loop().sock_recvfrom(listener, 64)
        return source[0]


@contextlib.asynccontextmanager
async def neighbours(make_lab: MakeLab) -> AsyncIterator[tuple[Box, Host, Host, Host]]:
    """A forwarding node; pod 10.5.7.2, peer 10.5.8.2 (another node's pod), outside 192.0.2.2."""
    async with make_lab() as lab:
        node = await lab.host("node")
        hosts = {}
        for name, gateway, address in (
            ("pod", "10.5.7.1/24", "10.5.7.2"),
            ("peer", "10.5.8.1/24", "10.5.8.2"),
            ("outside", "192.0.2.1/24", "192.0.2.2"),
        ):
            hosts[name] = await lab.host(name)
            await lab.cable(node, name, hosts[name], "eth0")
            await node.configure(name, gateway)
            await hosts[name].configure("eth0", f"{address}/24")
            await hosts[name].route("0.0.0.0/0", gateway.split("/")[0])
        await node.sysctl("ipv4/ip_forward", 1)
        yield Box(node), hosts["pod"], hosts["peer"], hosts["outside"]
