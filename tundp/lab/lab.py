"""Hosts as network namespaces, joined by veth pairs and bridges; all of it gone at the end.

    async with Lab("mylab") as lab:
        a, b = await lab.host("a"), await lab.host("b")
        await lab.cable(a, "eth0", b, "eth0")
        await a.configure("eth0", "192.0.2.1/24")

A host is the namespace `<lab>-<host>` under /run/netns, so `ip netns exec` reaches it.
The lab makes namespaces only of its own prefix, touches no other, and refuses to start
where one of its names is taken. Processes it starts end with it, by their pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from pyroute2 import netns

from tundp.blocking import BlockingThread
from tundp.errors import LabError, TundpError
from tundp.linux.netlink import Netlink, enter_namespace

T = TypeVar("T")

NETNS_DIR: Final = Path("/run/netns")
STOP_S: Final = 5.0
"""How long a process may take over SIGTERM before it is killed."""
RUN_S: Final = 60.0
"""How long a command may take."""


class Host:
    """One namespace. Made by `Lab.host`."""

    def __init__(self, lab: str, name: str) -> None:
        self.name = name
        self.namespace = f"{lab}-{name}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._netlink = Netlink(self.namespace)
        self._thread = BlockingThread(f"lab-{name}")

    async def start(self) -> None:
        """Create the namespace, loopback up."""
        try:
            await asyncio.to_thread(create_namespace, self.namespace)
        except OSError as error:
            raise LabError(
                f"cannot create network namespace {self.namespace}: {error}; run as root"
            ) from None
        await self._thread.run(enter_namespace, self.namespace)
        await self._netlink.start()
        await self._netlink.set_link(await self.index("lo"), state="up")

    async def stop(self) -> None:
        """End this host's processes and remove the namespace with everything in it."""
        for process in reversed(self.processes):
            await stop_process(process)
        await self._netlink.stop()
        self._thread.close()
        if (NETNS_DIR / self.namespace).exists():
            await asyncio.to_thread(remove_namespace, self.namespace)

    async def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `function` inside the namespace, on the host's one thread."""
        return await self._thread.run(function, *args, **kwargs)

    async def socket(
        self, kind: int, protocol: int = 0, *, family: int = socket.AF_INET
    ) -> socket.socket:
        """Open a socket of this namespace; it may be used anywhere, and is the caller's."""
        return await self.call(socket.socket, family, kind, protocol)

    async def popen(
        self,
        argv: Sequence[str],
        *,
        log: IO[bytes] | None = None,
        environment: dict[str, str] | None = None,
        is_kept: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a process in the namespace; stdout and stderr go to `log`.

        is_kept: in a session of its own, so that it outlives us if the lab is kept.
        pass_fds: descriptors it inherits, under the same numbers.
        """
        process: subprocess.Popen[bytes] = await self.call(
            subprocess.Popen,
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=is_kept,
            pass_fds=pass_fds,
        )
        self.processes.append(process)
        return process

    async def run(
        self, *argv: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace to its end, whatever its exit code."""
        return await self.call(
            subprocess.run,
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            env=os.environ | (environment or {}),
        )

    async def index(self, device: str) -> int:
        """The interface index of `device`."""
        for link in await self._netlink.links():
            if link.name == device:
                return link.index
        raise LabError(f"{self.namespace} has no interface {device}")

    async def configure(
        self, device: str, *addresses: str, mtu: int | None = None, mac: str | None = None
    ) -> None:
        """Set MTU and MAC address, bring the device up, and add addresses."""
        index = await self.index(device)
        if mtu is not None:
            await self._netlink.set_link(index, mtu=mtu)
        if mac is not None:
            await self._netlink.set_link(index, address=mac)
        await self._netlink.set_link(index, state="up")
        for address in addresses:
            await self._netlink.ensure_address(index, IPv4Interface(address))

    async def bridge(self, name: str, *ports: str) -> None:
        """Make a bridge with these devices as ports, all up."""
        await self.netlink.call(f"add bridge {name}", "link", "add", ifname=name, kind="bridge")
        index = await self.index(name)
        await self._netlink.set_link(index, state="up")
        for port in ports:
            await self.enslave(port, name)

    async def enslave(self, port: str, bridge: str) -> None:
        """Plug `port` into `bridge` and bring it up."""
        index = await self.index(port)
        await self._netlink.set_link(index, master=await self.index(bridge))
        await self._netlink.set_link(index, state="up")

    async def route(self, destination: str, via: str) -> None:
        """Add a route through a gateway."""
        await self._netlink.call(
            f"add route {destination} via {via}",
            "route",
            "add",
            dst=str(IPv4Network(destination)),
            gateway=via,
        )

    async def sysctl(self, name: str, value: int) -> None:
        """Set a net sysctl, e.g. `ipv4/ip_forward`."""
        path = Path("/proc/sys/net") / name
        await self.call(path.write_text, f"{value}\n", encoding="ascii")

    @property
    def netlink(self) -> Netlink:
        """For what the methods above do not cover."""
        return self._netlink


class Lab:
    """All hosts of one lab. Leaving the context stops and removes them, unless `is_kept`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.hosts: dict[str, Host] = {}
        self.is_kept = False

    async def __aenter__(self) -> Lab:
        if os.geteuid() != 0:
            raise LabError("network namespaces need root: run it as root")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.is_kept:
            return
        await finish(self._stop())

    async def host(self, name: str) -> Host:
        """Make a host."""
        host = Host(self.prefix, name)
        if (NETNS_DIR / host.namespace).exists():
            raise LabError(f"network namespace {host.namespace} exists already")
        # Known before it is started, so that one started by half is stopped as well.
        self.hosts[name] = host
        await finish(host.start())
        return host

    async def cable(self, left: Host, left_device: str, right: Host, right_device: str) -> None:
        """Join two hosts by a veth pair; both ends are still down."""
        await left.netlink.call(
            f"add veth {left_device} to {right.namespace}",
            "link",
            "add",
            ifname=left_device,
            kind="veth",
            peer={"ifname": right_device, "net_ns_fd": right.namespace},
        )

    async def _stop(self) -> None:
        failures: list[Exception] = []
        for host in reversed(self.hosts.values()):
            try:
                await host.stop()
            except (TundpError, OSError) as error:
                # The others go all the same; the first failure is told at the end.
                failures.append(error)
        self.hosts.clear()
        if failures:
            raise failures[0]


async def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await `coroutine` to its end even if we are cancelled meanwhile; then be cancelled."""
    task = asyncio.ensure_future(coroutine)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            is_cancelled = True
        except BaseException:  # noqa: BLE001  (the task's own: result() raises it below)
            break
    if is_cancelled:
        raise asyncio.CancelledError
    return task.result()


async def stop_process(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, a while, SIGKILL; the exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return await asyncio.to_thread(process.wait)


@contextlib.asynccontextmanager
async def interruptible() -> AsyncIterator[None]:
    """SIGINT, SIGTERM and SIGHUP cancel the block, so that its clean-up runs; once is enough."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, lambda: None)
        task.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, stop)
    try:
        yield
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(signum)


def leftovers(prefix: str, names: Sequence[str]) -> list[str]:
    """Namespaces an earlier lab of this prefix and these hosts left."""
    return [f"{prefix}-{name}" for name in names if (NETNS_DIR / f"{prefix}-{name}").exists()]


def processes_in(namespace: str) -> list[int]:
    """Pids of the processes inside a namespace."""
    inode = (NETNS_DIR / namespace).stat().st_ino
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == inode:
                found.append(int(entry.name))
    return found


def create_namespace(name: str) -> None:
    """Create one network namespace by name; OSError with what ip(8) said if it cannot.

    By ip(8): pyroute2's own waits a fixed time for a child, too short on a busy machine.
    """
    done = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, timeout=RUN_S, check=False
    )
    if done.returncode:
        raise OSError(done.stderr.strip() or f"ip netns add: exit code {done.returncode}")


def remove_namespace(name: str) -> None:
    """Remove one namespace by name."""
    netns.remove(name)
