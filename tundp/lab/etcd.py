"""A private etcd for a lab or a test: its own data directory and ports, gone afterwards.

PrivateEtcd     one server, or one member of a cluster
PrivateCluster  several of them on loopback, started together
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import tundp
from tundp.errors import LabError
from tundp.lab.lab import Host, stop_process

T = TypeVar("T")

READY_S: Final = 60.0
FIRST_PORT: Final = 10_000
PORT_TRIES: Final = 100


def find_etcd() -> str | None:
    """The etcd binary on PATH, or the one setup/etcd.sh unpacked beside the sources, or None."""
    unpacked = Path(tundp.__file__).parents[1] / ".tools" / "bin"
    return shutil.which("etcd") or shutil.which("etcd", path=str(unpacked))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """PEM files of an https endpoint. With a `cafile` clients must show a certificate of it."""

    certfile: Path
    keyfile: Path
    cafile: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One server's place in a cluster: its name, its port for the others, and who is in it."""

    name: str
    peer_port: int
    initial_cluster: str


class PrivateEtcd:
    """One etcd server, v2 and v3 APIs on. In `host`'s namespace, or in ours without one.

    Its data survives `stop` and `start`; `close` removes it. With `client_tls` clients come
    to an https `url`; a plain one beside it, `plain_url`, stays for whoever prepares the data.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        host: Host | None = None,
        *,
        directory: Path | None = None,
        is_kept: bool = False,
        client_tls: ServerTls | None = None,
        member: Member | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        binary = find_etcd()
        if binary is None:
            raise LabError("etcd is not installed (apt-get install etcd-server)")
        self._binary = binary
        self._host = host
        self._address = address
        self._is_kept = is_kept
        self._client_tls = client_tls
        self._member = member
        self._extra = tuple(extra)
        self._directory = directory or Path(tempfile.mkdtemp(prefix="tundp-etcd-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 2379 if host else free_port()
        self._peer_port = 2380 if host else free_port()
        self._extra_port = 0 if client_tls is None else free_port()

    @property
    def url(self) -> str:
        """Where clients connect."""
        scheme = "http" if self._client_tls is None else "https"
        return f"{scheme}://{self._address}:{self._port}"

    @property
    def plain_url(self) -> str:
        """The same server without TLS."""
        return f"http://{self._address}:{self._extra_port or self._port}"

    @property
    def pid(self) -> int:
        """The running server's process."""
        if self._process is None:
            raise LabError("etcd is not running")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether there is a process, healthy or not."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start the server and wait until it serves."""
        await self.launch()
        await self.wait_ready()

    async def launch(self) -> None:
        """Start the server. Without a majority of its cluster it will not serve yet."""
        with (self._directory / "log").open("ab") as log:
            if self._host is not None:
                self._process = await self._host.popen(self.argv, log=log, is_kept=self._is_kept)
            else:
                self._process = await asyncio.to_thread(
                    subprocess.Popen, self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )

    async def wait_ready(self) -> None:
        """Until it serves; LabError with the end of its log if it does not."""
        deadline = time.monotonic() + READY_S
        while not await self._is_healthy():
            if not self.is_running or time.monotonic() > deadline:
                log_text = (self._directory / "log").read_text(errors="replace")
                raise LabError(f"etcd does not start:\n{log_text[-2000:]}")
            await asyncio.sleep(0.02)

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

    def save(self) -> None:
        """Remember the data of a stopped server, for `restore`."""
        self._saved.mkdir(exist_ok=True)
        shutil.rmtree(self._saved)
        shutil.copytree(self._directory / "data", self._saved)

    def restore(self) -> None:
        """Give a stopped server the data it had at `save`, as restoring a backup would."""
        self.wipe()
        shutil.copytree(self._saved, self._directory / "data")

    async def put(self, key: str, value: str, *, api: str) -> None:
        """Write a key over the `v2` or the `v3` API (the latter through its JSON gateway)."""
        await self._call(_put_v2 if api == "v2" else _put_v3, key, value)

    async def delete(self, key: str, *, api: str) -> None:
        """Delete a key that is there."""
        await self._call(_delete_v2 if api == "v2" else _delete_v3, key)

    async def read_all(self, prefix: str, *, api: str) -> dict[str, str]:
        """Keys under `prefix`, which ends in a slash, and their values."""
        return await self._call(_list_v2 if api == "v2" else _list_v3, prefix)

    async def _call(self, function: Callable[..., T], *arguments: str) -> T:
        if self._host is not None:
            return await self._host.call(function, self.plain_url, *arguments)
        return await asyncio.to_thread(function, self.plain_url, *arguments)

    @property
    def _saved(self) -> Path:
        return self._directory / "saved"

    @property
    def argv(self) -> list[str]:
        """The command line of the server."""
        member = self._member or _alone(self._peer_port)
        peer = f"http://127.0.0.1:{member.peer_port}"
        urls = self.url if self._client_tls is None else f"{self.url},{self.plain_url}"
        argv = [
            self._binary,
            f"--name={member.name}",
            f"--data-dir={self._directory}/data",
            f"--listen-client-urls={urls}",
            f"--advertise-client-urls={urls}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={member.initial_cluster}",
            "--enable-v2",
            "--log-level=error",
        ]
        if self._member is None:
            # Nobody to disagree with: an election takes a tenth of a second, not one and more.
            # It also lets an etcd lease be as short as a second, which is 1.5 elections.
            argv += ["--heartbeat-interval=10", "--election-timeout=100"]
        if (tls := self._client_tls) is not None:
            argv += [f"--cert-file={tls.certfile}", f"--key-file={tls.keyfile}"]
            if tls.cafile is not None:
                argv += ["--client-cert-auth", f"--trusted-ca-file={tls.cafile}"]
        return [*argv, *self._extra]

    async def _is_healthy(self) -> bool:
        if self._host is not None:
            return await self._host.call(_ask_health, self.plain_url)
        return await asyncio.to_thread(_ask_health, self.plain_url)


class PrivateCluster:
    """Members of one etcd cluster on loopback ports. `start` starts all that do not run."""

    def __init__(self, count: int = 3, *, extra: Sequence[str] = ()) -> None:
        names = {f"m{number}": free_port() for number in range(count)}
        everybody = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in names.items())
        self.members = [
            PrivateEtcd(
                member=Member(name=name, peer_port=port, initial_cluster=everybody),
                # Quick to miss a leader, yet not on a machine that is busy with something else.
                extra=("--heartbeat-interval=50", "--election-timeout=500", *extra),
            )
            for name, port in names.items()
        ]

    @property
    def urls(self) -> list[str]:
        """Where clients connect, one URL a member."""
        return [member.url for member in self.members]

    async def start(self) -> None:
        """Start the members that are down and wait until every one serves."""
        for member in self.members:
            if not member.is_running:
                await member.launch()
        await asyncio.gather(*(member.wait_ready() for member in self.members))

    async def leader(self, among: Sequence[PrivateEtcd] | None = None) -> PrivateEtcd:
        """The member that leads now, which all of `among` (all that run) agree on.

        LabError if nobody comes to lead.
        """
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            asked = [member for member in among or self.members if member.is_running]
            told = await asyncio.gather(
                *(asyncio.to_thread(_ask_leader, member.url) for member in asked)
            )
            leaders = {leader for _, leader in told}
            if len(leaders) == 1 and (leader := leaders.pop()):
                for member, (own, _) in zip(asked, told, strict=True):
                    if own == leader:
                        return member
            await asyncio.sleep(0.02)
        raise LabError(f"no leader among {', '.join(self.urls)}")

    async def close(self) -> None:
        """Stop all and remove their data."""
        for member in self.members:
            await member.close()


def free_port() -> int:
    """A TCP port of loopback that nobody has, below those the kernel gives to clients.

    One that `bind` to port 0 gives is a client's port (`ip_local_port_range`): any connection
    of this machine may have it by the time the server listens, or while the server is stopped.
    """
    for _ in range(PORT_TRIES):
        port = random.randrange(FIRST_PORT, _first_client_port())
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise LabError(f"no free TCP port in {PORT_TRIES} tries from {FIRST_PORT} on")


def _first_client_port() -> int:
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    first = int(text.split()[0])
    return first if first > FIRST_PORT else 65536


def _alone(peer_port: int) -> Member:
    return Member(
        name="lab", peer_port=peer_port, initial_cluster=f"lab=http://127.0.0.1:{peer_port}"
    )


def _ask_leader(url: str) -> tuple[str, str]:
    """The ids of the member at `url` and of its leader; empty where there is none."""
    try:
        request = urllib.request.Request(f"{url}/v3/maintenance/status", b"{}")
        with urllib.request.urlopen(request, timeout=1) as answer:
            status = json.load(answer)
    except (OSError, urllib.error.URLError):
        return "", ""
    return status["header"]["member_id"], status.get("leader", "")


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


def _delete_v2(url: str, key: str) -> None:
    request = urllib.request.Request(f"{url}/v2/keys{key}", method="DELETE")
    urllib.request.urlopen(request, timeout=5).close()


def _list_v2(url: str, prefix: str) -> dict[str, str]:
    try:
        with urllib.request.urlopen(f"{url}/v2/keys{prefix}", timeout=5) as answer:
            nodes = json.load(answer)["node"].get("nodes", [])
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return {}
        raise
    return {node["key"]: node["value"] for node in nodes if "value" in node}


def _put_v3(url: str, key: str, value: str) -> None:
    _ask_v3(url, "kv/put", key=key, value=value)


def _delete_v3(url: str, key: str) -> None:
    if _ask_v3(url, "kv/deleterange", key=key).get("deleted") != "1":
        raise LabError(f"etcd has no key {key}")


def _list_v3(url: str, prefix: str) -> dict[str, str]:
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    answer = _ask_v3(url, "kv/range", key=prefix, range_end=end)
    return {
        base64.b64decode(kv["key"]).decode(): base64.b64decode(kv.get("value", "")).decode()
        for kv in answer.get("kvs", [])
    }


def _ask_v3(url: str, method: str, **texts: str) -> dict[str, Any]:
    body = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
    data = json.dumps(body).encode()
    with urllib.request.urlopen(f"{url}/v3/{method}", data, timeout=5) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
