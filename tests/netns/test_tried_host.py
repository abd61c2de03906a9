"""What hosts of public bug reports do to a tunnel that runs: docs/tried-cases.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from tests.nodes import (
    HEALTH_PORT,
    MakeOverlay,
    answers,
    counters,
    fails,
    has_peer,
    has_received,
    is_ready,
    link_of,
    must_run,
    readiness,
)
from tests.wait import until
from tundp.errors import LabError
from tundp.lab.lab import Host
from tundp.lab.offload import _set_features
from tundp.lab.traffic import PingStream, transfer


async def ip(host: Host, *words: str) -> str:
    return await must_run(host, "ip", *" ".join(words).split())


async def test_the_device_renamed_moved_or_given_more_addresses(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # What NetworkManager, avahi or dhcpcd put on any device they find.
        await ip(one.host, "addr add 169.254.7.7/16 dev flannel0")
        await ip(one.host, "addr add 10.5.250.9/24 dev flannel0")
        await ip(one.host, "link set flannel0 promisc on")
        await ip(one.host, "link set flannel0 multicast off")
        await ip(one.host, "link set flannel0 txqueuelen 1")
        await ip(one.host, "link set flannel0 alias overlay")
        await until(lambda: answers(one.host, two.tunnel_address), "more addresses")
        await ip(one.host, "link set flannel0 down")
        await ip(one.host, "link set flannel0 name overlay9")
        await ip(one.host, "link set overlay9 up")
        await until(lambda: answers(one.host, two.tunnel_address), "renamed")
        await until(lambda: answers(two.host, one.tunnel_address), "renamed")
        await ip(one.host, "link del overlay9")
        await until(lambda: answers(one.host, two.tunnel_address), "deleted after the renaming")


async def test_the_device_moved_to_another_namespace(make_overlay: MakeOverlay) -> None:
    """The descriptor lives on, and reading it says nothing: the kernel's links do."""
    async with make_overlay(f"--healthz-port={HEALTH_PORT}") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        elsewhere = overlay.switch
        await until(lambda: answers(one.host, two.tunnel_address), "before")
        async with PingStream(two.host, one.tunnel_address) as stream:
            await until(lambda: has_received(stream, 5), "packets before")
            await ip(one.host, f"link set flannel0 netns {elsewhere.namespace}")
            await until(lambda: answers(one.host, two.tunnel_address), "moved away")
            before = stream.received
            await until(lambda: has_received(stream, before + 5), "packets from the other node")
        await until(lambda: is_ready(one))
        assert await link_of(elsewhere, "flannel0") is None, "the former device is gone"
        text = one.log_path.read_text()
        assert text.count("flannel0 was moved to another network namespace") == 1
        status = await counters(one)
        for direction in (status["encap"], status["decap"]):
            dropped = sum(direction["drops"].values())
            assert direction["packets_in"] == direction["packets_out"] + dropped
        # Down first, and renamed on the way, as a CNI plugin does it.
        await ip(one.host, "link set flannel0 down")
        await ip(one.host, f"link set flannel0 netns {elsewhere.namespace} name eth7")
        await until(lambda: answers(one.host, two.tunnel_address), "moved and renamed")
        # Deleted where it is now: nothing of this namespace changes any more.
        await ip(one.host, "link del flannel0")
        await until(lambda: answers(one.host, two.tunnel_address), "deleted after that")
        assert one.log_path.read_text().count("was moved to another network namespace") == 1


async def test_the_device_moved_while_another_of_its_name_is_made(
    make_overlay: MakeOverlay,
) -> None:
    """Named until the name is free, and made again then."""
    async with make_overlay(f"--healthz-port={HEALTH_PORT}") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await until(lambda: answers(one.host, two.tunnel_address), "before")
        script = (
            f"ip link set flannel0 netns {overlay.switch.namespace} &&"
            " ip link add flannel0 type bridge"
        )
        await must_run(one.host, "sh", "-c", script)
        await until(lambda: fails(one, "device"))
        assert "flannel0 was moved to another network namespace" in (await readiness(one)).details
        await ip(one.host, "link del flannel0")
        await until(lambda: answers(one.host, two.tunnel_address), "the name is free")
        await until(lambda: is_ready(one))


async def test_a_fight_over_the_address_and_the_route_is_quiet(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for _ in range(15):
            await one.host.run("ip", "addr", "flush", "dev", "flannel0")
            await one.host.run("ip", "route", "flush", "dev", "flannel0")
            await asyncio.sleep(0.2)
        await until(lambda: answers(one.host, two.tunnel_address))
        text = one.log_path.read_text()
        assert len(text.splitlines()) < 60


async def test_a_dhcp_client_that_takes_the_address_and_gives_it_back(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=2) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with PingStream(two.host, one.tunnel_address) as stream:
            for _ in range(4):
                # A renewal: the same address with new lifetimes, as dhclient and networkd do it.
                await ip(
                    one.host,
                    "addr replace 192.0.2.1/24 dev eth0 valid_lft 600 preferred_lft 600",
                )
                await asyncio.sleep(0.1)
        assert stream.lost == 0, stream
        for pause in (0.0, 0.3, 2.0):
            await ip(one.host, "addr del 192.0.2.1/24 dev eth0")
            await asyncio.sleep(pause)
            await ip(one.host, "addr add 192.0.2.1/24 dev eth0")
            await until(lambda: answers(one.host, two.tunnel_address), f"after {pause} s")
            await until(lambda: answers(two.host, one.tunnel_address), f"after {pause} s")
        assert await has_peer(two, str(one.gateway.network), "192.0.2.1")


async def test_the_uplink_is_unplugged_and_made_again(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await ip(one.host, "link del eth0")
        await asyncio.sleep(0.5)
        await overlay.lab.cable(one.host, "eth0", overlay.switch, "port1")
        await overlay.switch.configure("port1")
        await overlay.switch.enslave("port1", "br0")
        await one.host.configure("eth0", "192.0.2.1/24")
        await until(lambda: answers(one.host, two.tunnel_address))
        await until(lambda: answers(two.host, one.tunnel_address))


async def test_the_uplink_becomes_a_bridge_port(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await ip(one.host, "route add default via 192.0.2.254")
        await overlay.start_daemon(one, "--iface=")
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        await one.host.bridge("br-ex")
        await ip(one.host, "addr flush dev eth0")
        await one.host.enslave("eth0", "br-ex")
        await one.host.configure("br-ex", "192.0.2.1/24")
        await ip(one.host, "route add default via 192.0.2.254")
        await until(lambda: answers(one.host, two.tunnel_address))
        await until(lambda: answers(two.host, one.tunnel_address))


async def test_a_macvlan_uplink(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await ip(one.host, "addr flush dev eth0")
        await ip(one.host, "link add up0 link eth0 type macvlan mode bridge")
        await one.host.configure("up0", "192.0.2.1/24")
        await overlay.start_daemon(one, "--iface=up0")
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        await until(lambda: answers(one.host, two.tunnel_address))
        assert one.environment["FLANNEL_MTU"] == "1472"


async def test_offloads_taken_from_every_device(make_overlay: MakeOverlay) -> None:
    """`ethtool -K ... off` on the TUN, the uplink and the pod's veth, while packets flow."""
    off = (
        "tx-checksum-ip-generic",
        "tx-generic-segmentation",
        "tx-tcp-segmentation",
        "tx-tcp-ecn-segmentation",
        "tx-udp-segmentation",
        "tx-scatter-gather",
        "rx-gro",
    )
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for device in ("flannel0", "eth0", "veth1"):
            refused = []
            for name in off:
                try:
                    await one.host.call(_set_features, device, {name: False})
                except LabError:
                    refused.append(name)
            assert "tx-checksum-ip-generic" not in refused, device
            assert len(refused) <= 2, (device, refused)
            _, is_equal = await transfer(one.pod, two.pod, two.pod_address, payload_len=2 << 20)
            assert is_equal, device
            _, is_equal = await transfer(two.pod, one.pod, one.pod_address, payload_len=2 << 20)
            assert is_equal, device
        for node in (one, two):
            assert (await counters(node))["conserved"]


async def test_sysctls_that_distributions_and_hardening_guides_set(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        for name, value in (
            ("ipv4/conf/all/rp_filter", 1),
            ("ipv4/conf/default/rp_filter", 1),
            ("ipv4/conf/flannel0/rp_filter", 1),
            ("ipv4/conf/all/log_martians", 1),
            ("ipv4/conf/all/accept_local", 0),
            ("ipv4/conf/all/send_redirects", 0),
            ("ipv4/conf/all/secure_redirects", 0),
            ("ipv4/ip_no_pmtu_disc", 1),
            ("ipv4/tcp_ecn", 1),
            ("ipv4/tcp_timestamps", 0),
            ("ipv4/tcp_sack", 0),
            ("ipv4/ip_default_ttl", 12),
            ("ipv6/conf/all/disable_ipv6", 1),
            ("ipv4/ip_early_demux", 0),
            ("ipv4/udp_early_demux", 0),
            ("ipv4/fib_multipath_hash_policy", 1),
        ):
            for host in (one.host, two.host, one.pod, two.pod):
                if "flannel0" not in name or host in (one.host, two.host):
                    await host.sysctl(name, value)
        for node in (one, two):
            await node.host.netlink.set_link(await node.host.index("cni0"), state="up")
        for source, target in ((one, two), (two, one)):
            await until(lambda s=source, t=target: answers(s.pod, t.pod_address))
            await until(lambda s=source, t=target: answers(s.host, t.tunnel_address))
            _, is_equal = await transfer(
                source.pod, target.pod, target.pod_address, payload_len=2 << 20
            )
            assert is_equal


async def test_sockets_of_uncommon_kinds(make_overlay: MakeOverlay) -> None:
    """MPTCP, TCP urgent data, a zero window, multicast, broadcast and a node's own addresses."""
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        listener = await two.pod.socket(socket.SOCK_STREAM)
        client = await one.pod.socket(socket.SOCK_STREAM)
        with listener, client:
            listener.bind((two.pod_address, 0))
            listener.listen(1)
            client.settimeout(10)
            await asyncio.to_thread(client.connect, listener.getsockname())
            server, _ = listener.accept()
            with server:
                server.settimeout(10)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
                # The reader stands still until the window is shut, then takes everything.
                sent = bytearray()
                client.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    while len(sent) < 64 << 20:
                        block = os.urandom(1 << 16)
                        sent += block[: client.send(block)]
                client.settimeout(10)
                received = bytearray()

                def read() -> None:
                    while data := server.recv(1 << 16):
                        received.extend(data)

                reading = asyncio.create_task(asyncio.to_thread(read))

                def urge() -> None:
                    for number in range(50):
                        client.send(bytes([number]), socket.MSG_OOB)
                        client.sendall(b"between" * 300)
                        sent.extend(bytes([number]) + b"between" * 300)
                    client.shutdown(socket.SHUT_WR)

                await asyncio.to_thread(urge)
                await reading
                assert received == sent
        for address in ("239.1.2.3", "10.5.255.255", "255.255.255.255"):
            datagrams = await one.pod.socket(socket.SOCK_DGRAM)
            with datagrams:
                datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                datagrams.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 9)
                datagrams.sendto(b"anybody?", (address, 9999))
        # Hairpins: a pod to its own node, to the other node's address, and a node to itself.
        for host, address in (
            (one.pod, "192.0.2.1"),
            (one.pod, one.tunnel_address),
            (one.pod, str(one.gateway.ip)),
            (one.host, one.tunnel_address),
            (one.host, one.pod_address),
        ):
            await until(lambda h=host, a=address: answers(h, a), address)
        for node in (one, two):
            assert (await counters(node))["conserved"]
