"""etcd has a name, and the name server keeps silent when the connection to etcd is lost.

A query that is given up fails later, by itself: with glibc, seconds after whoever asked
has gone. Nothing of that may end a daemon, nor keep one from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.nodes import MakeOverlay
from tests.wait import together, until
from tundp.lab.overlay import STORE_ADDRESS, LabNode, OverlayLab
from tundp.lab.traffic import ping

NAME = "etcd.example"
NAME_SERVER = "192.0.2.53"
NAMED = f"127.0.0.1 localhost\n{STORE_ADDRESS} {NAME}\n"
UNNAMED = "127.0.0.1 localhost\n"


@dataclass
class SilentServer:
    """A name server that takes queries and never answers."""

    queries: list[bytes] = field(default_factory=list)

    async def serve(self, sock: socket.socket) -> None:
        while True:
            self.queries.append(await asyncio.get_running_loop().sock_recv(sock, 512))


class Resolver:
    """A node's own /etc/hosts and /etc/resolv.conf; editing them changes what it knows."""

    def __init__(self, directory: Path, *, timeout_s: int) -> None:
        self.hosts = directory / "hosts"
        self.resolv_conf = directory / "resolv.conf"
        self.resolv_conf.write_text(
            f"nameserver {NAME_SERVER}\noptions timeout:{timeout_s} attempts:2\n"
        )

    def wrap(self, *command: str) -> list[str]:
        mounts = f"mount --bind {self.hosts} /etc/hosts && mount --bind {self.resolv_conf}"
        script = f'{mounts} /etc/resolv.conf && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh", *command]


@contextlib.asynccontextmanager
async def name_server(overlay: OverlayLab) -> AsyncIterator[SilentServer]:
    await overlay.switch.configure("br0", f"{NAME_SERVER}/24")
    server = SilentServer()
    with await overlay.switch.socket(socket.SOCK_DGRAM) as sock:
        sock.bind((NAME_SERVER, 53))
        sock.setblocking(False)
        task = asyncio.ensure_future(server.serve(sock))
        try:
            yield server
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def start(overlay: OverlayLab, node: LabNode, resolver: Resolver, *flags: str) -> None:
    command = [
        *(sys.executable, "-m", "tundp", "run", "--iface=eth0"),
        f"--etcd-endpoints={overlay.etcd.url.replace(STORE_ADDRESS, NAME)}",
        f"--subnet-file={node.subnet_file}",
        f"--admin-socket={node.admin_socket}",
        f"--state-dir={node.state_dir}",
        *flags,
    ]
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(resolver.wrap(*command), log=log)


async def watch_pings(source: LabNode, address: str, until: asyncio.Event) -> tuple[int, int]:
    """Ping until the event; how many were sent, and how many were lost."""
    sent = lost = 0
    while not until.is_set():
        answer = await ping(source.host, address, timeout_s=2.0)
        sent, lost = sent + 1, lost + (answer is None or not answer.is_echo_reply)
        await asyncio.sleep(0.1)
    return sent, lost


FLAGS = (
    ("--loop=uvloop", "--etcd-api=v3"),
    ("--loop=uvloop", "--etcd-api=v2"),
    ("--loop=uvloop", "--etcd-api=both"),
    ("--loop=asyncio", "--etcd-api=v3"),
)


async def test_silent_name_server_and_a_lost_connection(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """Each in a lab of its own, all at a time: nearly all of it is waiting for lookups to fail."""
    await together(
        {
            " ".join(flags): lose_connection(make_overlay, tmp_path / str(number), flags)
            for number, flags in enumerate(FLAGS)
        }
    )


async def lose_connection(
    make_overlay: MakeOverlay, directory: Path, flags: tuple[str, str]
) -> None:
    """No ping is lost while etcd is down and its name is not to be had, and etcd is found again."""
    directory.mkdir()
    async with make_overlay(nodes=2, store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        if flags[1] in ("--etcd-api=both", "--etcd-api=v2"):
            await overlay.write_etcd("config", '{"Network": "10.5.0.0/16"}', api="v2")
        resolver = Resolver(directory, timeout_s=3)  # a lookup fails after 6 s: a connect has 5
        resolver.hosts.write_text(NAMED)
        async with name_server(overlay) as server:
            await start(overlay, one, resolver, *flags)
            await overlay.start_daemon(two, flags[1])
            await overlay.wait_ready()
            resolver.hosts.write_text(UNNAMED)
            is_over = asyncio.Event()
            pings = asyncio.ensure_future(watch_pings(one, two.tunnel_address, is_over))
            try:
                await overlay.etcd.stop()

                async def was_asked_again() -> bool:
                    # A and AAAA, twice each, are one lookup; the fifth query is the next one's.
                    return len(server.queries) > 8 or one.daemon.poll() is not None

                await until(was_asked_again)
                await overlay.etcd.start()

                async def is_answering() -> bool:
                    if one.daemon.poll() is not None:
                        raise AssertionError(f"the daemon ended: {one.log_tail()}")
                    status = await one.status_document()
                    return bool(
                        status["lease"]["state"] == "held" and status["store"]["is_answering"]
                    )

                await until(is_answering)
            finally:
                is_over.set()
                sent, lost = await pings
            assert sent > 20
            assert lost == 0
            assert await one.stop_daemon() == 0


async def test_a_start_that_waits_for_a_name_server_can_be_stopped(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    await together(
        {
            f"{loop} {api}": stop_waiting(make_overlay, tmp_path / f"{loop}-{api}", loop, api)
            for loop in ("uvloop", "asyncio")
            for api in ("v2", "v3")
        }
    )


async def stop_waiting(make_overlay: MakeOverlay, directory: Path, loop: str, api: str) -> None:
    """A daemon ends with code 0 while a lookup of etcd's name is under way."""
    directory.mkdir()
    async with make_overlay(nodes=1, store="etcd", start=False) as overlay:
        one = overlay.nodes[1]
        resolver = Resolver(directory, timeout_s=30)
        resolver.hosts.write_text(UNNAMED)
        async with name_server(overlay) as server:
            await start(overlay, one, resolver, f"--loop={loop}", f"--etcd-api={api}")

            async def was_asked() -> bool:
                return bool(server.queries)

            await until(was_asked)
            assert await one.stop_daemon() == 0, one.log_tail()
