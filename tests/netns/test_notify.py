"""What systemd is told of a daemon: never an alarm while nothing is wrong."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import HEALTH_PORT, MakeOverlay
from tests.wait import until


class Systemd:
    """A notify socket, and everything that came to it."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.setblocking(False)
        self.lines: list[str] = []

    def read(self) -> list[str]:
        """Every line so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.lines += self.sock.recv(65_536).decode().splitlines()
        return self.lines


@pytest.mark.parametrize("store", ["file", "etcd"])
async def test_a_healthy_start_raises_no_alarm(
    make_overlay: MakeOverlay, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    async with make_overlay(store=store, start=False) as overlay:
        systemd = Systemd(overlay.directory / "notify")
        with contextlib.closing(systemd.sock):
            monkeypatch.setenv("NOTIFY_SOCKET", str(overlay.directory / "notify"))
            seen: list[dict[str, Any]] = []
            for node in overlay.nodes.values():
                await overlay.start_daemon(node, f"--healthz-port={HEALTH_PORT}")
            await overlay.wait_ready()
            for node in overlay.nodes.values():
                seen.append(await node.status_document())
                status, text = await node.get(HEALTH_PORT, "/readyz?verbose")
                assert "None" not in text, (status, text)
            await until(
                lambda: sum("1 peer" in line for line in systemd.read()) >= 2,
                "both daemons to say that they have a peer",
            )
            statuses = [line for line in systemd.lines if line.startswith("STATUS=")]
    assert systemd.lines.count("READY=1") == 2
    for line in statuses:
        assert "None" not in line, statuses
        assert "not answer" not in line, statuses
        assert "old" not in line, statuses
    for document in seen:
        assert document["store"]["is_answering"]
        assert not document["store"]["is_from_cache"]
