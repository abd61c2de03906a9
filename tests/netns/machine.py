"""A lab host as a machine with files of its own, and what a daemon may change of it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tundp.lab.lab import Host, stop_process
from tundp.lab.overlay import LabNode, OverlayLab

FLANNELD = str(Path(sys.executable).with_name("flanneld"))
TUNDP = str(Path(sys.executable).with_name("tundp"))


class Machine:
    """A lab host with a /run and a /var/lib of its own: a daemon there needs no flag to keep
    off this machine's files."""

    def __init__(self, overlay: OverlayLab, node: LabNode) -> None:
        self.node = node
        self._overlay = overlay
        self._started: subprocess.Popen[bytes] | None = None

    @property
    def _holder(self) -> subprocess.Popen[bytes]:
        """The process that keeps the mounts."""
        assert self._started is not None, "not entered"
        return self._started

    async def __aenter__(self) -> Machine:
        script = "mount -t tmpfs none /run && mount -t tmpfs none /var/lib && echo up && exec cat"
        popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
        self._started = await self.node.host.call(
            popen,
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert await asyncio.to_thread(self._holder.stdout.readline) == b"up\n"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        await stop_process(self._holder)
        assert self._holder.stdout is not None
        self._holder.stdout.close()

    def path(self, name: str) -> Path:
        """A file of that machine, as seen from here."""
        return Path(f"/proc/{self._holder.pid}/root{name}")

    def _inside(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", "--mount", f"--target={self._holder.pid}", *argv]

    async def run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return await self.node.host.run(*self._inside(argv), environment=environment)

    async def start(
        self, *argv: str, log: Path | None = None, **environment: str
    ) -> subprocess.Popen[bytes]:
        path = log or self.node.log_path
        with path.open("ab") as file:
            return await self.node.host.popen(self._inside(argv), log=file, environment=environment)


async def state_of(host: Host) -> dict[str, str]:
    """What a daemon may change of a host, in words."""
    found = {}
    for command in ("nft list ruleset", "ip -4 route show table all", "ip -o -4 addr", "ip rule"):
        done = await host.run(*command.split())
        found[command] = re.sub(r"valid_lft \d+sec|preferred_lft \d+sec", "", done.stdout)
    return found
