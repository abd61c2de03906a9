"""A private etcd for a lab or a test: its own data directory and ports, gone afterwards."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Final

import tundp
from tundp.errors import LabError
from tundp.lab.lab import Host, stop_process

READY_S: Final = 20.0


def find_etcd() -> str | None:
    """The etcd binary on PATH, or the one setup/etcd.sh unpacked beside the sources, or None."""
    unpacked = Path(tundp.__file__).parents[1] / ".tools" / "bin"
    return shutil.which("etcd") or shutil.which("etcd", path=str(unpacked))


class PrivateEtcd:
    """One etcd server, v2 and v3 APIs on. In `host`'s namespace, or in ours without one.

    Its data survives `stop` and `start`; `close` removes it.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        host: Host | None = None,
        *,
        directory: Path | None = None,
        is_kept: bool = False,
    ) -> None:
        binary = find_etcd()
        if binary is None:
            raise LabError("etcd is not installed (apt-get install etcd-server)")
        self._binary = binary
        self._host = host
        self._address = address
        self._is_kept = is_kept
        self._directory = directory or Path(tempfile.mkdtemp(prefix="tundp-etcd-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 2379 if host else _free_port()
        self._peer_port = 2380 if host else _free_port()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://{self._address}:{self._port}"

    @property
    def pid(self) -> int:
        """The running server's process."""
        if self._process is None:
            raise LabError("etcd is not running")
        return self._process.pid

    async def start(self) -> None:
        """Start the server and wait until it serves."""
        peer = f"http://127.0.0.1:{self._peer_port}"
        argv = [
            self._binary,
            "--name=lab",
            f"--data-dir={self._directory}/data",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=lab={peer}",
            "--enable-v2",
            "--log-level=error",
        ]
        with (self._directory / "log").open("ab") as log:
            if self._host is not None:
                self._process = await self._host.popen(argv, log=log, is_kept=self._is_kept)
            else:
                self._process = await asyncio.to_thread(
                    subprocess.Popen, argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
        deadline = time.monotonic() + READY_S
        while not await self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log_text = (self._directory / "log").read_text(errors="replace")
                raise LabError(f"etcd does not start:\n{log_text[-2000:]}")
            await asyncio.sleep(0.05)

    async def stop(self, signum: int = signal.SIGTERM) -> None:
        """Stop the server; its data stays."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signum)
            await stop_process(self._process)
            self._process = None

    async def close(self) -> None:
        """Stop the server and remove its data."""
        await self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def wipe(self) -> None:
        """Remove the data of a stopped server."""
        shutil.rmtree(self._directory / "data", ignore_errors=True)

    async def put(self, key: str, value: str, *, api: str) -> None:
        """Write a key over the `v2` or the `v3` API (the latter through its JSON gateway)."""
        write = _put_v2 if api == "v2" else _put_v3
        if self._host is not None:
            await self._host.call(write, self.url, key, value)
        else:
            await asyncio.to_thread(write, self.url, key, value)

    async def _is_healthy(self) -> bool:
        if self._host is not None:
            return await self._host.call(_ask_health, self.url)
        return await asyncio.to_thread(_ask_health, self.url)


def _ask_health(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
            return b'"true"' in answer.read()
    except (OSError, urllib.error.URLError):
        return False


def _put_v2(url: str, key: str, value: str) -> None:
    body = urllib.parse.urlencode({"value": value}).encode()
    request = urllib.request.Request(f"{url}/v2/keys{key}", body, method="PUT")
    urllib.request.urlopen(request, timeout=5).close()


def _put_v3(url: str, key: str, value: str) -> None:
    pair = {
        name: base64.b64encode(text.encode()).decode()
        for name, text in (("key", key), ("value", value))
    }
    body = json.dumps(pair).encode()
    urllib.request.urlopen(f"{url}/v3/kv/put", body, timeout=5).close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
