"""A lab host as a machine with files of its own, and what a daemon may change of it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

from tundp.lab.lab import stop_process

FLANNELD = str(Path(sys.executable).with_name("flanneld"))
TUNDP = str(Path(sys.executable).with_name("tundp"))


class Machine:
    """A lab host with a /run and a /var/lib of its own: a daemon there needs no flag to keep
    off this machine's files."""

    def __init__(self, overlay, node):
        self.node = node
        self._overlay = overlay
        self._holder = None

    async def __aenter__(self):
        script = "mount -t tmpfs none /run && mount -t tmpfs none /var/lib && echo up && exec cat"
        self._holder = await self.node.host.call(
            subprocess.Popen,
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert await asyncio.to_thread(self._holder.stdout.readline) == b"up\n"
        return self

    async def __aexit__(self, *_):
        self._holder.stdin.close()
        await stop_process(self._holder)
        self._holder.stdout.close()

    def path(self, name):
        """A file of that machine, as seen from here."""
        return Path(f"/proc/{self._holder.pid}/root{name}")

    def _inside(self, argv):
        return ["nsenter", "--mount", f"--target={self._holder.pid}", *argv]

    async def run(self, *argv, **environment):
        return await self.node.host.run(*self._inside(argv), environment=environment)

    async def start(self, *argv, log=None, **environment):
        path = log or self.node.log_path
        with path.open("ab") as file:
            return await self.node.host.popen(self._inside(argv), log=file, environment=environment)


async def state_of(host) -> dict[str, str]:
    """What a daemon may change of a host, in words."""
    found = {}
    for command in ("nft list ruleset", "ip -4 route show table all", "ip -o -4 addr", "ip rule"):
        done = await host.run(*command.split())
        found[command] = re.sub(r"valid_lft \d+sec|preferred_lft \d+sec", "", done.stdout)
    return found
