"""Whoever may connect, at his worst: a daemon's three doors, each attacked while it must answer.

[node1] eth0 -- [switch, lease file]     admin socket, healthz and metrics
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from tests.netns.machine import TUNDP
from tests.nodes import HEALTH_PORT, MakeOverlay
from tests.wait import until
from tundp.lab.overlay import LabNode
from tundp.observe.http_server import CONNECTIONS

METRICS_PORT = 9285
PATHS = {"admin": "/v1/status", "health": "/readyz?verbose", "metrics": "/metrics"}
COUNT = 4 * CONNECTIONS


async def connect(stack: contextlib.ExitStack, node: LabNode, door: str) -> socket.socket:
    address: str | tuple[str, int] = str(node.admin_socket)
    if door == "admin":
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = await node.host.socket(socket.SOCK_STREAM)
        address = ("127.0.0.1", HEALTH_PORT if door == "health" else METRICS_PORT)
    stack.callback(sock.close)
    sock.setblocking(False)
    async with asyncio.timeout(10):
        while True:
            try:
                await asyncio.get_running_loop().sock_connect(sock, address)
            except BlockingIOError:  # a unix socket's backlog is full for a moment
                await asyncio.sleep(0.01)
            else:
                return sock


def open_files(node: LabNode) -> int:
    return sum(1 for _ in Path(f"/proc/{node.daemon.pid}/fd").iterdir())


@pytest.mark.parametrize("door", PATHS)
async def test_a_door_that_is_attacked_keeps_no_one_from_an_answer(
    make_overlay: MakeOverlay, door: str
) -> None:
    flags = (f"--healthz-port={HEALTH_PORT}", f"--metrics-addr=127.0.0.1:{METRICS_PORT}")
    async with make_overlay(*flags, nodes=1) as overlay:
        node = overlay.nodes[1]
        await node.get(HEALTH_PORT, "/healthz")
        before = open_files(node)
        get = f"GET {PATHS[door]} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        with contextlib.ExitStack() as stack:
            for number in range(COUNT):
                sock = await connect(stack, node, door)
                # Silent, half a request, many requests of which no answer is ever read.
                with contextlib.suppress(OSError):
                    sock.send((b"", get[:-2], get * 400)[number % 3])
            shown = await node.host.run(TUNDP, "status", f"--admin-socket={node.admin_socket}")
            assert shown.returncode == 0, shown.stderr
            assert (await node.get(HEALTH_PORT, "/healthz"))[0] == 200
            assert "tundp_ready" in (await node.get(METRICS_PORT, "/metrics"))[1]
            await until(
                lambda: open_files(node) <= before + CONNECTIONS + 5,
                "no more connections are open than there may be",
            )
            shown = await node.host.run(TUNDP, "status", f"--admin-socket={node.admin_socket}")
            assert shown.returncode == 0, shown.stderr
        await until(lambda: open_files(node) <= before + 5, "all of them are gone")
        assert "Traceback" not in node.log_path.read_text()
