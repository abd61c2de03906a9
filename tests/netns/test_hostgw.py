"""The host-gw backend between namespaces: kernel routes to the other nodes, and nothing else.

pod1 -- cni0 [node1] eth0 -- port1 [switch br0] port2 -- eth0 [node2] cni0 -- pod2
        10.5.x.1     192.0.2.1     192.0.2.254     192.0.2.2     10.5.y.1
"""

from __future__ import annotations

import json
import re
import signal
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.netns.machine import TUNDP
from tests.nodes import HEALTH_PORT, MakeOverlay, answers, is_ready, log_contains, until_logged
from tests.wait import until
from tundp.lab.lab import Host
from tundp.lab.traffic import PingStream, ping, transfer
from tundp.linux.unreachable import PROTOCOL

NETWORK = {"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}
HEALTH = "--healthz-port=10256"


async def routes_of(host: Host) -> dict[str, str]:
    """What `ip route` says of routes with our protocol number: destination to the rest."""
    done = await host.run("ip", "-4", "route", "show", "proto", str(PROTOCOL))
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip()]
    return {destination: rest.strip() for destination, rest in lines}


async def has_route(host: Host, destination: IPv4Network | str, gateway: str) -> bool:
    return (await routes_of(host)).get(str(destination), "").startswith(f"via {gateway} ")


async def has_no_route(host: Host, destination: IPv4Network | str) -> bool:
    return str(destination) not in await routes_of(host)


async def test_pods_reach_each_other_without_device_socket_or_encapsulation(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(HEALTH, pods=True, network=NETWORK) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        answer = await ping(one.pod, two.pod_address, size=1472)
        assert answer is not None
        assert answer.is_echo_reply
        # Two kernels forward; there is no tunnel to take its own hops.
        assert answer.ttl == 62
        assert answer.source == IPv4Address(two.pod_address)
        for source, destination in ((one, two), (two, one)):
            _, is_equal = await transfer(
                source.pod, destination.pod, destination.pod_address, payload_len=24 << 20
            )
            assert is_equal
        for node, other in ((one, two), (two, one)):
            assert node.environment["FLANNEL_MTU"] == "1500"
            assert await has_route(node.host, other.gateway.network, other.public_ip)
            assert "tun" not in {link.kind for link in await node.host.netlink.links()}
            sockets = await node.host.run("ss", "-Hlun", "sport = :8285")
            assert sockets.stdout == ""
            leases = json.loads(overlay.lease_file.read_text())["leases"]
            ours = leases[str(node.gateway.network).replace("/", "-")]
            assert ours["BackendType"] == "host-gw"
            assert "BackendData" not in ours or ours["BackendData"] is None
            assert await is_ready(node)
            status = await node.status_document()
            assert status["backend"]["type"] == "host-gw"
            assert (status["backend"]["mtu"], status["backend"]["routes"]) == (1500, 1)
            assert status["backend"]["device"] is status["backend"]["port"] is None
            assert status["engine"] is status["counters"] is None
            shown = await node.host.run(TUNDP, "status", f"--admin-socket={node.admin_socket}")
            assert shown.returncode == 0
            assert re.search(rf"{other.gateway.network} +{other.public_ip}\n", shown.stdout)
            metrics = await node.host.run(
                *("curl", "-s", "--unix-socket", str(node.admin_socket), "http://x/v1/metrics")
            )
            assert 'tundp_backend_info{type="host-gw"} 1.0' in metrics.stdout
            assert "tundp_peers 1.0" in metrics.stdout


async def test_routes_follow_the_leases(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", network=NETWORK) as overlay:
        one = overlay.nodes[1]
        key = "subnets/10.5.250.0-24"
        lease = '{{"PublicIP":"192.0.2.{0}","PublicIPv6":null,"BackendType":"{1}"}}'
        await overlay.write_etcd(key, lease.format(77, "host-gw"))
        await until(lambda: has_route(one.host, "10.5.250.0/24", "192.0.2.77"))
        await overlay.write_etcd(key, lease.format(78, "host-gw"))
        await until(lambda: has_route(one.host, "10.5.250.0/24", "192.0.2.78"))
        # A lease of another backend is no peer: its node would not take our packets.
        await overlay.write_etcd(key, lease.format(78, "vxlan"))
        await until(lambda: has_no_route(one.host, "10.5.250.0/24"))
        assert [each["reason"] for each in (await one.status_document())["refused"]] == [
            "other_backend"
        ]
        await overlay.write_etcd(key, lease.format(79, "host-gw"))
        await until(lambda: has_route(one.host, "10.5.250.0/24", "192.0.2.79"))
        await overlay.delete_etcd(key)
        await until(lambda: has_no_route(one.host, "10.5.250.0/24"))


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("ip route del {subnet}", "removed"),
        ("ip route replace {subnet} via 192.0.2.99 dev eth0", "led elsewhere by somebody"),
        ("ip route replace {subnet} via 192.0.2.99 dev eth0 proto 85", "with our number, even"),
    ],
)
async def test_a_route_somebody_took_is_put_back(
    make_overlay: MakeOverlay, command: str, text: str
) -> None:
    async with make_overlay(network=NETWORK) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        subnet = two.gateway.network
        done = await one.host.run(*command.format(subnet=subnet).split())
        assert done.returncode == 0, done.stderr
        await until(lambda: has_route(one.host, subnet, two.public_ip))
        await until(lambda: log_contains(one, "put back"))


async def test_a_stale_route_of_ours_goes_and_others_stay(make_overlay: MakeOverlay) -> None:
    async with make_overlay(network=NETWORK) as overlay:
        one = overlay.nodes[1]
        for command in (
            "ip route add 10.5.249.0/24 via 192.0.2.9 dev eth0 proto 85",
            "ip route add 10.5.248.0/24 via 192.0.2.9 dev eth0 proto static",
        ):
            assert (await one.host.run(*command.split())).returncode == 0
        await until(lambda: has_no_route(one.host, "10.5.249.0/24"))
        static = await one.host.run("ip", "route", "show", "10.5.248.0/24")
        assert "192.0.2.9" in static.stdout


async def test_a_peer_on_another_network_is_named_and_costs_no_other(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(HEALTH, store="etcd", network=NETWORK) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.write_etcd(
            "subnets/10.5.250.0-24",
            '{"PublicIP":"198.51.100.7","PublicIPv6":null,"BackendType":"host-gw"}',
        )
        await until(lambda: log_contains(one, "no route to 10.5.250.0/24 via 198.51.100.7"))
        # One bad lease must not take every node of the cluster out of service.
        status, text = await one.get(HEALTH_PORT, "/readyz?verbose")
        assert status == 200, text
        assert "[!]routes warning: 1 of 2 refused: 10.5.250.0/24: via 198.51.100.7: " in text
        assert await has_route(one.host, two.gateway.network, two.public_ip)
        check = await one.host.run(
            TUNDP, "config", "check", "--running", f"--admin-socket={one.admin_socket}"
        )
        assert re.search(r"WARN .*10\.5\.250\.0-24.*198\.51\.100\.7.*eth0", check.stdout)
        await overlay.delete_etcd("subnets/10.5.250.0-24")

        async def has_no_warning() -> bool:
            return "[+]routes" in (await one.get(HEALTH_PORT, "/readyz?verbose"))[1]

        await until(has_no_warning)


async def test_pods_keep_their_way_while_the_daemon_restarts(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True, network=NETWORK) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with PingStream(one.pod, two.pod_address) as stream:
            await until(lambda: stream.received >= 20)
            await one.stop_daemon(signal.SIGKILL)
            now = stream.received
            await until(lambda: stream.received >= now + 20)
            await overlay.start_daemon(one)
            await overlay.wait_ready([one])
            now = stream.received
            await until(lambda: stream.received >= now + 20)
        assert stream.lost == 0, stream


async def test_what_has_no_lease_does_not_leave_by_the_default_route(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(network=NETWORK) as overlay:
        one = overlay.nodes[1]
        found = await one.host.run("ip", "route", "get", "10.5.240.1")
        assert "unreachable" in found.stderr or found.returncode != 0
        assert not await answers(one.host, "10.5.240.1")


async def test_a_public_ip_of_no_interface_is_refused(make_overlay: MakeOverlay) -> None:
    async with make_overlay(network=NETWORK, start=False) as overlay:
        one = overlay.nodes[1]
        await overlay.start_daemon(one, "--public-ip=203.0.113.9")
        code = await until(lambda: one.daemon.poll())
        assert code == 1
        await until_logged(one, "--public-ip 203.0.113.9 differs from the address 192.0.2.1")


async def test_cleanup_removes_the_routes(make_overlay: MakeOverlay) -> None:
    async with make_overlay(network=NETWORK) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        flags = [
            f"--subnet-file={one.subnet_file}",
            f"--state-dir={one.state_dir}",
            f"--admin-socket={one.admin_socket}",
            f"--store=file:{overlay.lease_file}",
        ]
        await one.stop_daemon()
        subnet = two.gateway.network
        assert await has_route(one.host, subnet, two.public_ip), "as flannel leaves its own"
        dry = await one.host.run(TUNDP, "cleanup", "--dry-run", *flags)
        assert f"would remove route {subnet} via {two.public_ip}" in dry.stdout
        assert await has_route(one.host, subnet, two.public_ip)
        done = await one.host.run(TUNDP, "cleanup", *flags)
        assert f"removed route {subnet} via {two.public_ip}" in done.stdout
        assert await routes_of(one.host) == {}


async def test_the_links_mtu_and_address_are_followed(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", network=NETWORK) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        subnet = one.gateway.network

        async def tells(mtu: str) -> bool:
            return one.environment["FLANNEL_MTU"] == mtu

        await one.host.run("ip", "link", "set", "eth0", "mtu", "1400")
        await until(lambda: tells("1400"))
        await one.host.sysctl("ipv4/conf/eth0/promote_secondaries", 1)
        await one.host.run("ip", "addr", "add", "192.0.2.51/24", "dev", "eth0")
        await one.host.run("ip", "addr", "del", "192.0.2.1/24", "dev", "eth0")
        await until(lambda: has_route(two.host, subnet, "192.0.2.51"))
        await until(lambda: has_route(one.host, two.gateway.network, two.public_ip))
        assert IPv4Network(subnet) == one.gateway.network
