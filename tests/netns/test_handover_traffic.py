"""What a handover does to traffic and to settings: full speed, a decoy gateway, other flags."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import AsyncIterator

from tests.handover import CLEAN, FakeSuccessor, is_daemon, replaced, streams
from tests.nodes import MakeOverlay, answers, must_run, until_logged
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import ping, transfer
from tundp.linux.uapi import ETH_P_ALL


class Decoy:
    """A node's default gateway, which counts the overlay's packets that come to it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.leaked = 0

    def count(self) -> int:
        """So far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = self._sock.recv(2048)
                self.leaked += frame[12:14] == b"\x08\x00" and frame[30:32] == bytes([10, 5])
        return self.leaked


@contextlib.asynccontextmanager
async def decoy(overlay: OverlayLab, node: LabNode) -> AsyncIterator[Decoy]:
    """Give a node a default gateway. It is seen to count before the block begins."""
    outside = await overlay.lab.host("decoy")
    await overlay.lab.cable(node.host, "eth1", outside, "eth0")
    await node.host.configure("eth1", "198.51.100.1/24")
    await outside.configure("eth0", "198.51.100.2/24")
    await node.host.route("0.0.0.0/0", via="198.51.100.2")
    with await outside.call(
        socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)
    ) as sock:
        found = Decoy(sock)

        async def leaks() -> bool:
            with contextlib.suppress(OSError):
                await ping(node.host, "10.5.209.9", timeout_s=0.1)
            return found.count() > 0

        await until(leaks)
        found.leaked = 0
        yield found


async def test_no_packet_leaks_to_the_default_gateway(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with decoy(overlay, one) as gateway:
            for node in (one, two):
                await overlay.start_daemon(node)
            await overlay.wait_ready()
            for node in (one, two):
                await overlay.add_pod(node)
            gateway.count()
            gateway.leaked = 0
            async with streams(overlay) as both:
                await replaced(overlay, one)
                async with FakeSuccessor(one) as fake:
                    await fake.offered()
                await replaced(overlay, one, "--disable-offloads=tun-uso")
            assert [each.verdict() for each in both] == [CLEAN, CLEAN]
            assert gateway.count() == 0


async def test_a_tcp_stream_at_full_speed_goes_on(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        sending = asyncio.create_task(
            transfer(one.pod, two.pod, two.pod_address, payload_len=1 << 30)
        )
        try:
            await asyncio.sleep(0.2)
            await replaced(overlay, one)
            await replaced(overlay, two)
            _, is_equal = await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert is_equal


async def test_other_flags_are_applied(make_overlay: MakeOverlay) -> None:
    async with make_overlay(pods=True) as overlay:
        one = overlay.nodes[1]

        async def rules() -> str:
            return (await one.host.run("iptables-save", "-t", "filter")).stdout

        assert "FLANNEL-FWD" in await rules()
        async with streams(overlay) as both:
            await replaced(
                overlay,
                one,
                "--disable-offloads=tun-uso,tcp-coalesce",
                "--healthz-port=10300",
                "--metrics-addr=:9311",
                "--iptables-forward-rules=false",
            )
            assert (await one.get(10300, "/healthz"))[0] == 200
            assert (await one.get(9311, "/metrics"))[0] == 200
            document = await one.status_document()
            assert "tcp-coalesce" not in document["engine"]["offloads_in_use"]
            assert "FLANNEL-FWD" not in await rules()
        assert [each.verdict() for each in both] == [CLEAN, CLEAN]


async def test_another_port_is_applied_and_another_network_refused(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]

        def write(config: dict[str, object]) -> None:
            document = json.loads(overlay.lease_file.read_text())
            overlay.lease_file.write_text(json.dumps(document | {"config": config}))

        write({"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "Port": 8299}})
        for node in (one, two):
            await replaced(overlay, node)
        await until(lambda: answers(one.host, two.tunnel_address))
        assert (await one.status_document())["backend"]["port"] == 8299
        before, device = (
            one.daemon,
            await must_run(one.host, "ip", "-o", "link", "show", "flannel0"),
        )
        for network, backend, what in (
            ("10.0.0.0/8", "udp", "Network"),
            # Which has no device, and would delete the one it is given.
            ("10.5.0.0/16", "host-gw", "Backend.Type"),
        ):
            write({"Network": network, "Backend": {"Type": backend, "Port": 8299}})
            await overlay.start_daemon(one, "--replace")
            assert await asyncio.to_thread(one.daemon.wait, 60) == 1
            one.daemon = before
            await until_logged(one, f"the network config has another {what}")
            await until(lambda: is_daemon(one, before.pid))
            assert await must_run(one.host, "ip", "-o", "link", "show", "flannel0") == device


async def test_ten_thousand_connections_hold_nothing_up(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        flood = (
            "import socket, sys\n"
            "for n in range(10000):\n"
            "    with socket.socket(socket.AF_UNIX) as s:\n"
            "        s.settimeout(5)\n"
            "        try:\n"
            "            s.connect(sys.argv[1])\n"
            "            s.sendall((b'POST /v1/handover HTTP/1.1\\r\\nHost: x\\r\\n'\n"
            "                b'Content-Length: 2\\r\\n\\r\\n{}', b'\\0\\xff' * 50, b'')[n % 3])\n"
            "        except OSError:\n"
            "            pass\n"
        )
        process = await one.host.popen(["python3", "-c", flood, str(one.admin_socket)])
        try:
            await replaced(overlay, one)
            assert await asyncio.to_thread(process.wait, 60) == 0
            await replaced(overlay, one)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
        assert isinstance(process, subprocess.Popen)
