"""Choosing the interface on hosts with real links, addresses and routes, and choosing again.

    eth0 192.0.2.1/24    -- eth0 192.0.2.254
[h] eth1 198.51.100.1/24 -- eth1 198.51.100.254 [r]
    eth2 203.0.113.1/24  -- eth2 203.0.113.254
    default route over eth0
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import pytest

from tests.loops import LOOPS, run_on
from tests.nodes import MakeLab
from tundp.errors import ConfigError, PlatformError
from tundp.lab.lab import Host
from tundp.linux.iface import Interface, Selection, look, relook
from tundp.linux.netlink import RouteLookup

NETS = ("192.0.2", "198.51.100", "203.0.113")
NETWORK = IPv4Network("10.5.0.0/16")
FAR = IPv4Address("100.64.0.9")
DEFAULT = Selection()


class Case:
    """The host under test, and short words for what is done to it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.netlink = host.netlink

    async def look(self, selection: Selection = DEFAULT) -> Interface:
        return await look(self.netlink, selection, NETWORK)

    async def relook(self, chosen: Interface, selection: Selection = DEFAULT) -> Interface:
        return await relook(self.netlink, selection, chosen, NETWORK)

    async def address(self, command: str, device: str, text: str, **more: Any) -> None:
        interface = IPv4Interface(text)
        await self.netlink.call(
            f"{command} {text}",
            "addr",
            command,
            index=await self.host.index(device),
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
            **more,
        )

    async def route(self, command: str, destination: str, **more: Any) -> None:
        # Without a family pyroute2 0.9 looks for one in the gateway, and fails over multipath.
        await self.netlink.call(
            f"{command} route", "route", command, family=2, dst=destination, **more
        )

    async def set_link(self, device: str, **attributes: Any) -> None:
        await self.netlink.set_link(await self.host.index(device), **attributes)


MakeCase = Callable[..., contextlib.AbstractAsyncContextManager[Case]]


@pytest.fixture
def make_case(make_lab: MakeLab) -> MakeCase:
    @contextlib.asynccontextmanager
    async def make(links: int = 3, *, default: str | None = "192.0.2.254") -> AsyncIterator[Case]:
        async with make_lab() as lab:
            host, router = await lab.host("h"), await lab.host("r")
            for number, net in enumerate(NETS[:links]):
                await lab.cable(host, f"eth{number}", router, f"eth{number}")
                await host.configure(f"eth{number}", f"{net}.1/24")
                await router.configure(f"eth{number}", f"{net}.254/24")
            if default:
                await host.route("0.0.0.0/0", via=default)
            yield Case(host)

    return make


def found(chosen: Interface) -> tuple[str, str]:
    return chosen.link.name, str(chosen.address)


async def test_each_selector(make_case: MakeCase) -> None:
    async with make_case() as case:
        await case.host.route("100.64.0.0/16", via="198.51.100.254")
        wanted = {
            "eth0": [DEFAULT, Selection(iface=("eth0",)), Selection(iface=("nosuch0", "eth0"))],
            "eth1": [
                Selection(iface=("198.51.100.1",)),
                Selection(iface_regex=(r"^198\.",)),
                Selection(iface_regex=("nosuch", "th1$")),
                Selection(iface_can_reach=FAR),
                Selection(iface_can_reach=IPv4Address("198.51.100.1")),
                Selection(iface=("nosuch0",), iface_regex=("nosuch",), iface_can_reach=FAR),
                Selection(public_ip=IPv4Address("198.51.100.1")),
            ],
            "eth2": [Selection(iface=("eth2",), iface_regex=("eth1",), iface_can_reach=FAR)],
        }
        for name, selections in wanted.items():
            for selection in selections:
                chosen = await case.look(selection)
                number = int(name[-1])
                assert found(chosen) == (name, f"{NETS[number]}.1"), selection
                assert chosen.public_ip == chosen.address
                assert len(chosen.others) == 2
                assert await case.relook(chosen, selection) == chosen, "nothing changed"


async def test_selectors_that_fit_no_interface_are_all_named(make_case: MakeCase) -> None:
    async with make_case(1, default=None) as case:
        with pytest.raises(ConfigError, match=r"unable to find default route.*eth0 192\.0\.2\.1"):
            await case.look()
        selection = Selection(iface=("eth7",), iface_regex=("wlan",), iface_can_reach=FAR)
        with pytest.raises(ConfigError) as caught:
            await case.look(selection)
        for text in (
            "no interface is called eth7",
            "lo:[], eth0:[192.0.2.1]",
            "failed to get ifcanreach based interface: cannot find the route to 100.64.0.9",
            "no route that leads there",
        ):
            assert text in str(caught.value)


async def test_a_multipath_default_route(make_case: MakeCase) -> None:
    async with make_case(default=None) as case:
        gateways = [{"gateway": "203.0.113.254"}, {"gateway": "192.0.2.254"}]
        await case.route("add", "0.0.0.0/0", multipath=gateways)
        chosen = await case.look()
        assert found(chosen) == ("eth2", "203.0.113.1"), "the first next hop"
        assert "eth0 192.0.2.1: its default route comes after that of eth2" in chosen.others
        assert "eth1 198.51.100.1: has no default route" in chosen.others


async def test_the_default_route_with_the_lowest_metric(make_case: MakeCase) -> None:
    async with make_case(default=None) as case:
        await case.route("add", "0.0.0.0/0", gateway="192.0.2.254", priority=200)
        await case.route("add", "0.0.0.0/0", gateway="198.51.100.254", priority=100)
        assert found(await case.look()) == ("eth1", "198.51.100.1")


async def test_which_address_of_a_link(make_case: MakeCase) -> None:
    # As the kernel flags them: a lifetime makes one dynamic, none left deprecated.
    async with make_case(1) as case:
        await case.address("add", "eth0", "169.254.3.3/16")
        await case.address("add", "eth0", "192.0.2.2/24")
        dynamic = {"preferred_lft": 3600, "valid_lft": 3600}
        await case.address("add", "eth0", "192.0.2.3/24", **dynamic)
        deprecated = {"preferred_lft": 0, "valid_lft": 3600}
        await case.address("add", "eth0", "192.0.2.4/24", **deprecated)
        chosen = await case.look()
        assert found(chosen) == ("eth0", "192.0.2.1")
        assert sorted(chosen.others) == [
            "eth0 169.254.3.3: link-local",
            "eth0 192.0.2.2: a secondary address",
            "eth0 192.0.2.3: dynamic",
        ]
        addresses = {str(a.interface.ip): a for a in await case.netlink.addresses()}
        assert addresses["127.0.0.1"].scope == 254
        assert addresses["192.0.2.1"].scope == 0
        assert addresses["192.0.2.4"].is_deprecated


async def test_a_public_ip_behind_a_nat(make_case: MakeCase) -> None:
    async with make_case() as case:
        public_ip = IPv4Address("100.64.7.7")
        selection = Selection(public_ip=public_ip)
        chosen = await case.look(selection)
        assert found(chosen) == ("eth0", "192.0.2.1")
        assert chosen.public_ip == public_ip
        assert ["NAT" in warning for warning in chosen.warnings] == [True]

        selection = Selection(iface=("eth1",), public_ip=public_ip)
        chosen = await case.look(selection)
        assert found(chosen) == ("eth1", "198.51.100.1")
        assert chosen.warnings == ()
        await case.host.sysctl("ipv4/conf/eth1/promote_secondaries", 1)
        await case.address("add", "eth1", "198.51.100.8/24")
        await case.address("del", "eth1", "198.51.100.1/24")
        again = await case.relook(chosen, selection)
        assert found(again) == ("eth1", "198.51.100.8")
        assert again.public_ip == public_ip, "it does not follow the address"


async def test_device_kinds_and_their_warnings(make_case: MakeCase) -> None:
    async with make_case(1) as case:
        host = case.host
        await host.bridge("docker0")
        await host.configure("docker0", "172.17.0.1/16")
        await case.netlink.call(
            "add flannel.1", "link", "add", ifname="flannel.1", kind="vxlan", vxlan_id=1
        )
        await host.configure("flannel.1", "10.5.1.0/32")
        await case.netlink.call("add tap7", "link", "add", ifname="tun7", kind="tuntap", mode="tun")
        kinds = {link.name: link.kind for link in await case.netlink.links()}
        assert kinds == {
            "lo": None, "eth0": "veth", "docker0": "bridge", "flannel.1": "vxlan", "tun7": "tun",
        }  # fmt: skip
        chosen = await case.look()
        assert chosen.warnings == ()
        assert chosen.others == (
            "docker0 172.17.0.1: a bridge",
            "flannel.1 10.5.1.0: a device of another overlay or tunnel (vxlan)",
        )
        (warning,) = (await case.look(Selection(iface=("docker0",)))).warnings
        assert "docker0 is a bridge" in warning
        inside, device = (await case.look(Selection(iface=("flannel.1",)))).warnings
        assert "inside the overlay's Network 10.5.0.0/16" in inside
        assert "(vxlan)" in device
        # Its own devices are no underlay, whatever a regex says.
        with pytest.raises(ConfigError, match="Could not match pattern"):
            await case.look(Selection(iface_regex=("^10",)))


async def test_an_address_that_comes_and_one_that_goes(make_case: MakeCase) -> None:
    async with make_case() as case:
        chosen = await case.look()
        await case.address("add", "eth0", "192.0.2.8/24")
        again = await case.relook(chosen)
        assert found(again) == ("eth0", "192.0.2.1")
        assert "eth0 192.0.2.8: a secondary address" in again.others

        # The kernel takes secondaries along with their primary, unless told otherwise.
        await case.host.sysctl("ipv4/conf/eth0/promote_secondaries", 1)
        await case.address("del", "eth0", "192.0.2.1/24")
        moved = await case.relook(again)
        assert found(moved) == ("eth0", "192.0.2.8"), "another of the same link"
        assert str(moved.public_ip) == "192.0.2.8"
        assert await case.relook(moved) == moved

        # The old one back: what works stays.
        await case.address("add", "eth0", "192.0.2.1/24")
        assert found(await case.relook(moved)) == ("eth0", "192.0.2.8")


async def test_the_same_link_comes_before_what_would_be_chosen_today(make_case: MakeCase) -> None:
    async with make_case(default=None) as case:
        await case.host.sysctl("ipv4/conf/eth0/promote_secondaries", 1)
        await case.address("add", "eth0", "192.0.2.8/24")
        await case.route("add", "0.0.0.0/0", gateway="192.0.2.254", priority=200)
        chosen = await case.look()
        await case.route("add", "0.0.0.0/0", gateway="198.51.100.254", priority=100)
        assert found(await case.look())[0] == "eth1"
        await case.address("del", "eth0", "192.0.2.1/24")
        assert found(await case.relook(chosen)) == ("eth0", "192.0.2.8")


async def test_the_same_link_as_a_later_next_hop(make_case: MakeCase) -> None:
    async with make_case() as case:
        await case.host.sysctl("ipv4/conf/eth0/promote_secondaries", 1)
        await case.address("add", "eth0", "192.0.2.8/24")
        chosen = await case.look()
        await case.route("del", "0.0.0.0/0", gateway="192.0.2.254")
        gateways = [{"gateway": "203.0.113.254"}, {"gateway": "192.0.2.254"}]
        await case.route("add", "0.0.0.0/0", multipath=gateways)
        await case.address("del", "eth0", "192.0.2.1/24")
        assert found(await case.look()) == ("eth2", "203.0.113.1")
        assert found(await case.relook(chosen)) == ("eth0", "192.0.2.8")


async def test_a_link_that_is_renamed_is_the_same(make_case: MakeCase) -> None:
    async with make_case(1) as case:
        selection = Selection(iface=("eth0",))
        chosen = await case.look(selection)
        await case.set_link("eth0", state="down")
        await case.set_link("eth0", ifname="wan0")
        again = await case.relook(chosen, selection)
        assert found(again) == ("wan0", "192.0.2.1")
        assert again.link.index == chosen.link.index


async def test_all_addresses_of_the_link_go(make_case: MakeCase) -> None:
    async with make_case() as case:
        chosen = await case.look()
        await case.address("del", "eth0", "192.0.2.1/24")
        with pytest.raises(ConfigError, match="unable to find default route"):
            await case.relook(chosen)
        await case.host.route("0.0.0.0/0", via="203.0.113.254")
        assert found(await case.relook(chosen)) == ("eth2", "203.0.113.1")


async def test_only_what_the_selection_allows_replaces_a_lost_address(make_case: MakeCase) -> None:
    async with make_case() as case:
        await case.address("add", "eth1", "198.51.100.8/24")
        await case.address("add", "eth1", "10.77.0.1/24")
        await case.host.sysctl("ipv4/conf/eth1/promote_secondaries", 1)
        exact = Selection(iface=("198.51.100.1", "eth2"))
        regex = Selection(iface_regex=(r"100\.1$", r"^10\.77"))
        name = Selection(iface=("nosuch0", "eth1"))
        before = [(one, await case.look(one)) for one in (exact, regex, name)]
        assert [found(chosen) for _, chosen in before] == [("eth1", "198.51.100.1")] * 3
        await case.address("del", "eth1", "198.51.100.1/24")
        after = [found(await case.relook(chosen, one)) for one, chosen in before]
        assert after == [("eth2", "203.0.113.1"), ("eth1", "10.77.0.1"), ("eth1", "10.77.0.1")]


async def test_the_public_ip_is_followed_to_another_link(make_case: MakeCase) -> None:
    async with make_case() as case:
        selection = Selection(public_ip=IPv4Address("192.0.2.1"))
        chosen = await case.look(selection)
        await case.address("add", "eth0", "192.0.2.7/24")
        await case.host.sysctl("ipv4/conf/eth0/promote_secondaries", 1)
        await case.address("del", "eth0", "192.0.2.1/24")
        await case.address("add", "eth2", "192.0.2.1/32")
        again = await case.relook(chosen, selection)
        assert found(again) == ("eth2", "192.0.2.1")


async def test_mtu_and_state_of_the_chosen_link_are_fresh(make_case: MakeCase) -> None:
    async with make_case() as case:
        chosen = await case.look()
        assert (chosen.link.mtu, chosen.link.is_up, chosen.warnings) == (1500, True, ())
        await case.set_link("eth0", mtu=1400)
        smaller = await case.relook(chosen)
        assert smaller.link.mtu == 1400
        assert found(smaller) == found(chosen)

        await case.set_link("eth0", state="down")  # takes the default route along
        down = await case.relook(smaller)
        assert found(down) == found(chosen)
        assert not down.link.is_up
        assert down.warnings == ("eth0 is down, and nothing comes or goes: ip link set eth0 up",)
        assert await case.relook(down) == down

        await case.set_link("eth0", state="up", mtu=1500)
        await case.host.route("0.0.0.0/0", via="192.0.2.254")
        assert await case.relook(down) == chosen


async def test_the_default_route_moves_and_we_stay(make_case: MakeCase) -> None:
    async with make_case() as case:
        chosen = await case.look()
        await case.route("del", "0.0.0.0/0", gateway="192.0.2.254")
        await case.route("add", "0.0.0.0/0", gateway="198.51.100.254")
        assert found(await case.look()) == ("eth1", "198.51.100.1")
        again = await case.relook(chosen)
        assert found(again) == ("eth0", "192.0.2.1")
        assert again.why == chosen.why
        assert again.others[0] == "eth1 198.51.100.1: eth0 192.0.2.1 is in use and still there"
        assert await case.relook(again) == again


async def test_a_link_that_is_replaced_by_one_of_its_name(
    make_case: MakeCase, make_lab: MakeLab
) -> None:
    async with make_case(2) as case:
        selection = Selection(iface=("eth1",))
        chosen = await case.look(selection)
        await case.netlink.call("del eth1", "link", "del", index=chosen.link.index)
        with pytest.raises(ConfigError, match="no interface is called eth1"):
            await case.relook(chosen, selection)
        await case.netlink.call(
            "add eth1", "link", "add", ifname="eth1", kind="veth", peer={"ifname": "peer1"}
        )
        await case.host.configure("eth1", "198.51.100.3/24")
        again = await case.relook(chosen, selection)
        assert found(again) == ("eth1", "198.51.100.3")
        assert again.link.index != chosen.link.index


async def test_an_unnumbered_link_is_kept_while_loopback_has_the_address(
    make_case: MakeCase,
) -> None:
    async with make_case(1, default=None) as case:
        await case.address("add", "lo", "100.64.1.1/32")
        await case.route(
            "add", "100.64.0.9/32", oif=await case.host.index("eth0"), prefsrc="100.64.1.1"
        )
        selection = Selection(iface_can_reach=FAR)
        chosen = await case.look(selection)
        assert found(chosen) == ("eth0", "100.64.1.1")
        await case.route("del", "100.64.0.9/32")
        assert found(await case.relook(chosen, selection)) == ("eth0", "100.64.1.1")
        await case.address("del", "lo", "100.64.1.1/32")
        with pytest.raises(ConfigError, match="failed to get ifcanreach"):
            await case.relook(chosen, selection)


async def test_route_to(make_case: MakeCase) -> None:
    async with make_case(2) as case:
        index = {link.name: link.index for link in await case.netlink.links()}
        await case.host.route("100.64.0.0/16", via="198.51.100.254")
        assert await case.netlink.route_to(FAR) == RouteLookup(
            index=index["eth1"],
            source=IPv4Address("198.51.100.1"),
            gateway=IPv4Address("198.51.100.254"),
        )
        own = await case.netlink.route_to(IPv4Address("192.0.2.1"))
        assert own == RouteLookup(index=index["lo"], source=IPv4Address("192.0.2.1"), kind="local")
        for kind, number in (
            ("blackhole", errno.EINVAL),
            ("unreachable", errno.EHOSTUNREACH),
            ("prohibit", errno.EACCES),
        ):
            await case.route("add", "100.64.0.9/32", type=kind)
            with pytest.raises(PlatformError, match=f'100.64.0.9: .*"{kind}"') as caught:
                await case.netlink.route_to(FAR)
            assert caught.value.errno == number
            await case.route("del", "100.64.0.9/32", type=kind)
        for address in ("0.0.0.0", "224.0.0.5", "255.255.255.255", "192.0.2.255"):
            with pytest.raises(PlatformError, match=f"route to {address}: it is no "):
                await case.netlink.route_to(IPv4Address(address))
        await case.route("del", "0.0.0.0/0", gateway="192.0.2.254")
        with pytest.raises(PlatformError, match="no route that leads there") as caught:
            await case.netlink.route_to(IPv4Address("8.8.8.8"))
        assert caught.value.errno == errno.ENETUNREACH


async def test_route_to_from_a_host_without_any_address(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host, router = await lab.host("h"), await lab.host("r")
        await lab.cable(host, "eth0", router, "eth0")
        await host.configure("eth0")
        index = await host.index("eth0")
        await Case(host).route("add", "0.0.0.0/0", oif=index, scope=253)
        answer = await host.netlink.route_to(FAR)
        assert answer == RouteLookup(index=index, source=None)
        selection = Selection(iface_can_reach=FAR)
        with pytest.raises(ConfigError, match="failed to find IPv4 address for interface eth0"):
            await look(host.netlink, selection, None)


def test_many_lookers_at_once_under_uvloop(make_case: MakeCase) -> None:
    async def main() -> None:
        async with make_case(1) as case:
            selection = Selection(iface_can_reach=FAR)
            answers = await asyncio.gather(*(case.look(selection) for _ in range(5)))
            assert [found(answer) for answer in answers] == [("eth0", "192.0.2.1")] * 5

    run_on(LOOPS["uvloop"], main())
