"""What happens to a running overlay: routes move, peers go, devices vanish, stores die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import (
    MakeOverlay,
    answers,
    counters,
    has_decapsulated,
    has_peer,
    has_peer_count,
    has_received,
    has_sent,
    lease_is,
    log_contains,
    store_is,
)
from tests.stopped import stop
from tests.wait import DEADLINE_S, until
from tundp.lab.overlay import OverlayLab
from tundp.lab.traffic import PingStream, ping

ENGINES = os.environ.get("TUNDP_TEST_ENGINES", "reference;gso").split(";")
pytestmark = pytest.mark.parametrize("engine", ENGINES)


class Stream:
    """UDP datagrams to one overlay address, as fast as one thread sends them."""

    def __init__(self, sock: socket.socket, address: str, pause_s: float = 0.0) -> None:
        self._sock = sock
        self._address = address
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.sent = 0

    def _send(self) -> None:
        while not self._stop.wait(self._pause_s):
            try:
                self._sock.sendto(b"x" * 200, (self._address, 9999))
                self.sent += 1
            except OSError:
                continue  # an ICMP error came back, or the route is gone for a moment

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sock.close()


def edit_leases(overlay: OverlayLab, change: Any) -> None:
    """As an operator would: edit a copy, move it over."""
    document = json.loads(overlay.lease_file.read_text())
    change(document["leases"])
    document["revision"] += 1
    copy = overlay.lease_file.with_suffix(".new")
    copy.write_text(json.dumps(document))
    copy.rename(overlay.lease_file)


async def test_route_moves_while_traffic_flows(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = (overlay.nodes[n] for n in (1, 2, 3))
        edit_leases(
            overlay, lambda leases: leases.update({"10.5.254.0-24": {"PublicIP": two.public_ip}})
        )
        await until(lambda: has_peer(one, "10.5.254.0/24", two.public_ip))
        before = await counters(three)
        with Stream(await one.host.socket(socket.SOCK_DGRAM), "10.5.254.9"):
            await until(lambda: has_decapsulated(two, 2000))
            edit_leases(
                overlay, lambda leases: leases["10.5.254.0-24"].update(PublicIP=three.public_ip)
            )
            await until(lambda: has_decapsulated(three, before["decap"]["packets_in"] + 2000))
        status = await one.status_document()
        assert status["counters"]["conserved"]
        assert status["counters"]["encap"]["drops"] == {}


async def test_peer_removed_then_back(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        leases = json.loads(overlay.lease_file.read_text())["leases"]
        key = str(two.gateway.network).replace("/", "-")
        stop(two.daemon.pid)  # or it would take its lease back at once
        edit_leases(overlay, lambda leases: leases.pop(key))
        await until(lambda: has_peer_count(one, 0))

        async def is_unreachable() -> bool:
            # The packet thread takes the table up a moment after it is published.
            answer = await ping(one.host, two.tunnel_address)
            return answer is not None and (answer.icmp_type, answer.code) == (3, 0)

        await until(is_unreachable)
        edit_leases(overlay, lambda current: current.update({key: leases[key]}))
        two.daemon.send_signal(signal.SIGCONT)
        await until(lambda: answers(one.host, two.tunnel_address))


async def test_own_lease_deleted_is_regained(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        key = str(one.gateway.network).replace("/", "-")
        edit_leases(overlay, lambda leases: leases.pop(key))

        async def is_back() -> bool:
            leases = await overlay.read_leases()
            return key in leases and json.loads(leases[key])["PublicIP"] == one.public_ip

        await until(is_back)
        await until(lambda: lease_is(one, "held"))
        await until(lambda: answers(overlay.nodes[2].host, one.tunnel_address))


async def test_own_subnet_taken_is_a_conflict_and_never_stolen_back(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        key = str(one.gateway.network).replace("/", "-")
        edit_leases(overlay, lambda leases: leases.update({key: {"PublicIP": "192.0.2.77"}}))
        await until(lambda: lease_is(one, "conflict"))
        assert json.loads((await overlay.read_leases())[key])["PublicIP"] == "192.0.2.77"
        assert "CONFLICT" in overlay.log_tail(one)
        assert one.daemon.poll() is None


async def test_bad_leases_are_named_and_hurt_nobody(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        bad = {
            "10.5.240.0-24": {},
            "10.5.241.0-24": {"PublicIP": one.public_ip},
            "10.5.242.0-24": {"PublicIP": "192.0.2.9", "BackendType": "vxlan"},
            "10.9.1.0-24": {"PublicIP": "192.0.2.9"},
            "10.5.243.0-24": {"PublicIP": "224.0.0.1"},
            "10.5.244.0-24": {"PublicIP": "nonsense"},
            "10.5.245.0-24": "not an object",
            "not a subnet": {"PublicIP": "192.0.2.9"},
        }
        edit_leases(overlay, lambda leases: leases.update(bad))

        async def all_named() -> bool:
            status = await one.status_document()
            return len(status["refused"]) + len(status["bad_entries"]) == len(bad)

        await until(all_named)
        status = await one.status_document()
        assert {each["key"]: each["reason"] for each in status["refused"]} == {
            "10.5.240.0-24": "no_public_ip",
            "10.5.241.0-24": "leftover",
            "10.5.242.0-24": "other_backend",
            "10.9.1.0-24": "outside_network",
            "10.5.243.0-24": "not_unicast",
        }
        assert {each["name"] for each in status["bad_entries"]} == {
            "10.5.244.0-24",
            "10.5.245.0-24",
            "not a subnet",
        }
        assert [peer["public_ip"] for peer in status["peers"]] == [two.public_ip]
        assert await answers(one.host, two.tunnel_address, timeout_s=5)
        for name in bad:
            assert name in overlay.log_tail(one)


async def test_a_lease_value_that_is_a_bomb_kills_nobody(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        bombs = {
            "10.5.250.0-24": '{"PublicIP":"192.0.2.9","x":' + "[" * 900 + "]" * 900 + "}",
            "10.5.251.0-24": '{"PublicIP":"192.0.2.9","x":' + "[" * 50000 + "]" * 50000 + "}",
            "10.5.252.0-24": '{"PublicIP":"192.0.2.9","x":1e999}',
            "10.5.253.0-24": '{"PublicIP":"192.0.2.9","x":"\\ud800"}',
            "10.5.254.0-24": '{"PublicIP":' + "9" * 5000 + "}",
            "10.5.249.0-024": '{"PublicIP":"192.0.2.9"}',
            "deep/10.5.248.0-24": '{"PublicIP":"192.0.2.9"}',
        }
        for name, value in bombs.items():
            await overlay.write_etcd(f"subnets/{name}", value)

        async def all_named() -> bool:
            named = {each["name"] for each in (await one.status_document())["bad_entries"]}
            return len(named) == len(bombs)

        await until(all_named)
        assert await answers(one.host, two.tunnel_address, timeout_s=5)
        assert [peer["public_ip"] for peer in (await one.status_document())["peers"]] == [
            two.public_ip
        ]
        await overlay.delete_etcd("subnets/10.5.250.0-24")
        await overlay.delete_etcd("subnets/10.5.249.0-024")

        async def two_less() -> bool:
            return len((await one.status_document())["bad_entries"]) == len(bombs) - 2

        await until(two_less)


async def test_a_stolen_route_is_named_and_taken_back_when_free(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        index = await one.host.index("eth0")
        arguments = {"dst": "10.5.0.0/16", "oif": index}
        await one.host.netlink.call("steal the route", "route", "replace", **arguments)
        await until(lambda: log_contains(one, "a route over eth0 for 10.5.0.0/16 is already there"))
        await one.host.netlink.call("give it back", "route", "del", **arguments)
        await until(lambda: answers(one.host, two.tunnel_address))


async def test_systemd_that_does_not_listen_is_a_warning(
    make_overlay: MakeOverlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await until(lambda: log_contains(one, "cannot notify systemd at /nonexistent/notify"))
        assert await answers(one.host, two.tunnel_address, timeout_s=5)


async def test_restart_keeps_the_subnet_and_sigterm_leaves_nothing(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        subnet = one.gateway
        links_before = {link.name for link in await one.host.netlink.links()}
        assert "flannel0" in links_before
        with Stream(await one.host.socket(socket.SOCK_DGRAM), two.tunnel_address):
            await until(lambda: has_decapsulated(two, 500))
            one.daemon.terminate()
            assert await asyncio.to_thread(one.daemon.wait, DEADLINE_S) == 0
        assert {link.name for link in await one.host.netlink.links()} == links_before - {"flannel0"}
        # Only what keeps packets from leaking to the default gateway stays.
        left = [r for r in await one.host.netlink.routes() if str(r.destination) == "10.5.0.0/16"]
        assert [(route.kind, route.priority) for route in left] == [("unreachable", 4096)]
        assert not one.admin_socket.exists()
        assert len(await overlay.read_leases()) == 2
        await overlay.start_daemon(one)
        await overlay.wait_ready()
        assert one.gateway == subnet
        await until(lambda: answers(one.host, two.tunnel_address))


async def test_previous_subnet_is_taken_again_from_subnet_env(make_overlay: MakeOverlay) -> None:
    # Nothing in the store tells who had which subnet: only subnet.env does.
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        subnet = one.gateway
        one.daemon.terminate()
        await asyncio.to_thread(one.daemon.wait, DEADLINE_S)
        edit_leases(overlay, lambda leases: leases.pop(str(subnet.network).replace("/", "-")))
        await overlay.start_daemon(one)
        await overlay.wait_ready()
        assert one.gateway == subnet


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_deleted_tun_comes_back_idle_and_under_load(
    make_overlay: MakeOverlay, loop: str
) -> None:
    async with make_overlay(f"--loop={loop}") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for is_loaded in (False, True):
            assert await answers(one.host, two.tunnel_address, timeout_s=5)
            before = await counters(one)
            index = await one.host.index("flannel0")
            sock = await one.host.socket(socket.SOCK_DGRAM)
            with Stream(sock, two.tunnel_address, pause_s=0.001 if is_loaded else 3600):
                await one.host.netlink.set_link(index, state="down")
                await one.host.netlink.call("delete the TUN", "link", "del", index=index)
                await until(lambda: answers(one.host, two.tunnel_address))
            assert await one.host.index("flannel0") != index
            after = await counters(one)
            assert after["encap"]["packets_in"] > before["encap"]["packets_in"]
            assert after["conserved"]


async def test_address_route_mtu_and_state_are_put_back(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        netlink = one.host.netlink
        index = await one.host.index("flannel0")
        damages = (
            ("link", "set", {"index": index, "state": "down"}),
            ("link", "set", {"index": index, "mtu": 1300}),
            ("route", "del", {"dst": "10.5.0.0/16", "oif": index}),
            ("addr", "del", {"index": index, "address": one.tunnel_address, "prefixlen": 32}),
        )
        for what, command, arguments in damages:
            await netlink.call(f"damage: {command} {arguments}", what, command, **arguments)
            await until(lambda: answers(one.host, two.tunnel_address))

            async def is_whole() -> bool:
                link = next(link for link in await netlink.links() if link.index == index)
                addresses = [a for a in await netlink.addresses() if a.index == index]
                routes = [r for r in await netlink.routes() if r.indexes == (index,)]
                return link.mtu == 1472 and link.is_up and bool(addresses) and bool(routes)

            await until(is_whole)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
async def test_etcd_dies_under_traffic_and_no_packet_is_lost(
    make_overlay: MakeOverlay, signum: signal.Signals
) -> None:
    async with make_overlay(store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with PingStream(one.host, two.tunnel_address) as stream:
            await until(lambda: has_received(stream, 20))
            await overlay.etcd.stop(signum)
            await until(lambda: store_is(one, answering=False))
            now = stream.sent
            await until(lambda: has_sent(stream, now + 150))
        assert stream.lost == 0, stream
        assert [peer["public_ip"] for peer in (await one.status_document())["peers"]] == [
            two.public_ip
        ]
        await overlay.etcd.start()
        await overlay.write_etcd("subnets/10.5.250.0-24", '{"PublicIP":"192.0.2.200"}')
        await until(lambda: has_peer(one, "10.5.250.0/24", "192.0.2.200"))
        await until(lambda: store_is(one, answering=True))
        await until(lambda: answers(one.host, two.tunnel_address))
        assert overlay.log_tail(one).count("\n") < 60


async def test_daemons_wait_for_etcd_and_for_the_config(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", start=False) as overlay:
        one = overlay.nodes[1]
        await overlay.delete_etcd("config")
        await overlay.etcd.stop()
        await overlay.start_daemon(one)
        await until(lambda: log_contains(one, "connection refused"))
        await overlay.etcd.start()
        await until(lambda: log_contains(one, "no network config at /coreos.com/network/config"))
        await overlay.write_etcd("config", '{"Network": "10.5.0.0/16", "SubnetLen": 31}')
        await until(lambda: log_contains(one, "SubnetLen must be less than /31: SubnetLen is 31"))
        await overlay.write_etcd("config", '{"network": "10.5.0.0/16"}')
        await overlay.wait_ready([one])
        waiting = [line for line in one.log_path.read_text().splitlines() if " W " in line]
        assert len(waiting) == 3, waiting


async def test_lease_value_in_etcd_is_flannels(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=1) as overlay:
        one = overlay.nodes[1]
        key = str(one.gateway.network).replace("/", "-")
        # The stock fields first, byte for byte; what follows no flannel looks at.
        node_id = (await one.status_document())["node_id"]
        leases = await overlay.read_leases()
        run = json.loads(leases[key])["TundpRun"]
        assert leases == {
            key: '{"PublicIP":"192.0.2.1","PublicIPv6":null,"TundpNode":"'
            f'{node_id}","TundpHost":"{socket.gethostname()}","TundpRun":"{run}"}}'
        }
        assert one.subnet_file.read_text() == (
            "FLANNEL_NETWORK=10.5.0.0/16\n"
            f"FLANNEL_SUBNET={one.gateway}\n"
            "FLANNEL_MTU=1472\n"
            "FLANNEL_IPMASQ=false\n"
        )
        assert one.subnet_file.stat().st_mode & 0o777 == 0o644


async def test_device_is_as_flannel_makes_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        netlink = one.host.netlink
        link = next(link for link in await netlink.links() if link.name == "flannel0")
        assert link.mtu == 1472
        assert link.is_up
        addresses = [a for a in await netlink.addresses() if a.index == link.index]
        assert [str(a.interface) for a in addresses] == [f"{one.tunnel_address}/32"]
        routes = [r for r in await netlink.routes() if r.indexes == (link.index,)]
        assert [(str(r.destination), r.gateway) for r in routes] == [("10.5.0.0/16", None)]

        def sysctls() -> list[str]:
            base = Path("/proc/sys/net")
            names = ("ipv6/conf/flannel0/disable_ipv6", "ipv4/conf/flannel0/accept_local")
            return [(base / name).read_text().strip() for name in names]

        assert await one.host.call(sysctls) == ["1", "1"]


async def test_status_answers_at_saturation(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        with Stream(await one.host.socket(socket.SOCK_DGRAM), two.tunnel_address):
            await until(lambda: has_decapsulated(two, 5000))
            for _ in range(20):
                assert (await counters(one))["conserved"]
                assert (await counters(two))["conserved"]


async def test_descriptors_and_threads_do_not_leak(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]

        async def disturb() -> None:
            for number in range(10):
                key = f"10.5.25{number % 5}.0-24"
                edit_leases(
                    overlay,
                    lambda leases, key=key: leases.update({key: {"PublicIP": "192.0.2.99"}}),
                )
                await until(partial(has_peer, one, key.replace("-", "/"), "192.0.2.99"))
                edit_leases(overlay, lambda leases, key=key: leases.pop(key))
                await until(lambda: has_peer_count(one, 1))
            index = await one.host.index("flannel0")
            await one.host.netlink.call("delete the TUN", "link", "del", index=index)
            await until(lambda: answers(one.host, two.tunnel_address))

        def held() -> Counter[str]:
            return descriptors(one.daemon.pid) + threads(one.daemon.pid)

        await disturb()
        before = held()
        await disturb()
        await disturb()
        # The connections of the last status requests may still be closing.
        await until(lambda: not held() - before, f"no more than {before} is held")


def descriptors(pid: int) -> Counter[str]:
    """Open files by what they are, numbers left out."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            found[re.sub(r"\d+", "N", target)] += 1
    return found


def threads(pid: int) -> Counter[str]:
    return Counter(threads=len(os.listdir(f"/proc/{pid}/task")))
