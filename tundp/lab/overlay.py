"""The standard lab: two or more tundp nodes on one underlay, each with a pod behind a bridge.

pod1 ── cni0 [node1] eth0 ──┐               ┌── eth0 [node2] cni0 ── pod2
        10.5.x.1     192.0.2.1   [switch]   192.0.2.2     10.5.y.1
                            └── br0 192.0.2.254 ─┘
                                 etcd
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, Final

from tundp.admin import fetch_document, fetch_status
from tundp.errors import LabError, PlatformError
from tundp.lab.etcd import PrivateEtcd
from tundp.lab.lab import Host, Lab, stop_process
from tundp.observe.status import DaemonState, Status

PREFIX: Final = "/coreos.com/network"
STORE_ADDRESS: Final = "192.0.2.254"
READY_S: Final = 60.0


@dataclass(slots=True)
class LabNode:
    """One node: its namespace, its pod's, and its daemon."""

    number: int
    host: Host
    directory: Path
    interface_flags: tuple[str, ...] = ("--iface=eth0",)
    """What its daemon is told of the interface to the other nodes."""
    _pod: Host | None = None
    _daemon: subprocess.Popen[bytes] | None = None

    @property
    def pod(self) -> Host:
        """Its pod; LabError before `OverlayLab.add_pod`."""
        if self._pod is None:
            raise LabError(f"{self.host.namespace} has no pod yet")
        return self._pod

    @pod.setter
    def pod(self, pod: Host) -> None:
        self._pod = pod

    @property
    def daemon(self) -> subprocess.Popen[bytes]:
        """The process of its daemon, which may have ended; LabError before one is started."""
        if self._daemon is None:
            raise LabError(f"{self.host.namespace} has no daemon yet")
        return self._daemon

    @daemon.setter
    def daemon(self, daemon: subprocess.Popen[bytes]) -> None:
        self._daemon = daemon

    @property
    def public_ip(self) -> str:
        """The node's underlay address."""
        return f"192.0.2.{self.number}"

    @property
    def admin_socket(self) -> Path:
        """Where its daemon answers."""
        return self.directory / f"node{self.number}.sock"

    @property
    def log_path(self) -> Path:
        """What its daemon said."""
        return self.directory / f"node{self.number}.log"

    @property
    def state_dir(self) -> Path:
        """What it remembers: a machine of its own."""
        return self.directory / f"node{self.number}.state"

    @property
    def subnet_file(self) -> Path:
        """Its subnet.env."""
        return self.directory / f"node{self.number}.env"

    @property
    def environment(self) -> dict[str, str]:
        """The contents of its subnet.env."""
        lines = self.subnet_file.read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def gateway(self) -> IPv4Interface:
        """The bridge's address, e.g. 10.5.7.1/24: what subnet.env says."""
        return IPv4Interface(self.environment["FLANNEL_SUBNET"])

    @property
    def tunnel_address(self) -> str:
        """The TUN's address, e.g. 10.5.7.0."""
        return str(self.gateway.network.network_address)

    @property
    def pod_address(self) -> str:
        """The pod's address, e.g. 10.5.7.2."""
        return str(self.gateway.ip + 1)

    async def status(self) -> Status:
        """What its daemon says of itself."""
        return await fetch_status(self.admin_socket)

    async def status_document(self) -> dict[str, Any]:
        """The same as the daemon sent it."""
        return await fetch_document(self.admin_socket)

    async def stop_daemon(self, signum: int = signal.SIGTERM) -> int:
        """Stop its daemon; the exit code, negative for the signal that killed it."""
        if signum != signal.SIGTERM and self.daemon.poll() is None:
            self.daemon.send_signal(signum)
            await asyncio.to_thread(self.daemon.wait)
        return await stop_process(self.daemon)

    async def get(self, port: int, path: str, *, address: str = "127.0.0.1") -> tuple[int, str]:
        """What its daemon answers to an HTTP GET: status and body."""
        return await self.host.call(_get, f"http://{address}:{port}{path}")

    async def wait_for_peers(self, count: int) -> None:
        """Until its daemon has a lease, has told it to the node, and sees so many peers."""
        deadline = time.monotonic() + READY_S
        while not await self.sees_peers(count):
            if self.daemon.poll() is not None:
                raise LabError(f"the daemon of {self.host.namespace} ended:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise LabError(
                    f"the daemon of {self.host.namespace} is not ready:\n{self.log_tail()}"
                )
            await asyncio.sleep(0.05)

    def log_tail(self) -> str:
        """The last lines of its daemon's log."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")[-3000:]

    async def sees_peers(self, count: int) -> bool:
        """Whether its daemon is past its start and sees so many peers."""
        try:
            status = await self.status()
        except PlatformError:
            return False
        if status.state is not DaemonState.RUNNING:
            return False
        # The status is there before all of the start is done; subnet.env comes last.
        is_started = all(each.evidence != "not written yet" for each in status.findings)
        return is_started and len(status.peers) >= count


class OverlayLab:
    """Builds the picture above piece by piece; what it starts ends with its `lab`."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.nodes: dict[int, LabNode] = {}
        self._etcd: PrivateEtcd | None = None
        self.etcd_api = "v3"
        self._switch: Host | None = None

    @property
    def switch(self) -> Host:
        """The underlay: a bridge every node's eth0 is plugged into as `port<number>`."""
        if self._switch is None:
            raise LabError("build() first")
        return self._switch

    @property
    def etcd(self) -> PrivateEtcd:
        """The private etcd; LabError in a lab with a lease file."""
        if self._etcd is None:
            raise LabError("this lab has no etcd")
        return self._etcd

    async def close_etcd(self) -> None:
        """Stop the private etcd, if there is one."""
        if self._etcd is not None:
            await self._etcd.close()

    @property
    def lease_file(self) -> Path:
        """The lease file, when there is no etcd."""
        return self.directory / "leases.json"

    @property
    def store_flags(self) -> list[str]:
        """The daemon's flags that name the store."""
        if self._etcd is not None:
            return [f"--etcd-endpoints={self._etcd.url}"]
        return [f"--store=file:{self.lease_file}"]

    async def build(self, node_count: int = 2, *, mtu: int = 1500) -> None:
        """The switch and the nodes, no daemons yet."""
        self._switch = await self.lab.host("switch")
        await self._switch.bridge("br0")
        await self._switch.configure("br0", f"{STORE_ADDRESS}/24", mtu=mtu)
        for number in range(1, node_count + 1):
            host = await self.lab.host(f"node{number}")
            node = LabNode(number, host, self.directory)
            self.nodes[number] = node
            await self.lab.cable(host, "eth0", self._switch, f"port{number}")
            await self._switch.configure(f"port{number}", mtu=mtu)
            await self._switch.enslave(f"port{number}", "br0")
            await host.configure("eth0", f"{node.public_ip}/24", mtu=mtu)
            await host.sysctl("ipv4/ip_forward", 1)

    async def start_etcd(
        self, config: dict[str, Any], *, api: str = "v3", is_kept: bool = False
    ) -> None:
        """A private etcd on the switch, with the network config in its `v2` or `v3` API."""
        self.etcd_api = api
        directory = self.directory / "etcd"
        directory.mkdir()
        self._etcd = PrivateEtcd(STORE_ADDRESS, self.switch, directory=directory, is_kept=is_kept)
        await self._etcd.start()
        await self.write_etcd("config", json.dumps(config))

    def write_lease_file(self, config: dict[str, Any]) -> None:
        """The lease file instead of an etcd."""
        self.lease_file.write_text(json.dumps({"config": config, "leases": {}}), encoding="utf-8")

    async def write_etcd(self, key: str, value: str, *, api: str = "") -> None:
        """Write a key under the prefix, as an operator would."""
        await self.etcd.put(f"{PREFIX}/{key}", value, api=api or self.etcd_api)

    async def delete_etcd(self, key: str, *, api: str = "") -> None:
        """Delete a key under the prefix."""
        await self.etcd.delete(f"{PREFIX}/{key}", api=api or self.etcd_api)

    async def read_leases(self, *, api: str = "") -> dict[str, str]:
        """Key to value, straight from the store and not through a daemon."""
        if self._etcd is None:
            document = json.loads(self.lease_file.read_text(encoding="utf-8"))
            return {key: json.dumps(value) for key, value in document["leases"].items()}
        found = await self.etcd.read_all(f"{PREFIX}/subnets/", api=api or self.etcd_api)
        return {key.rsplit("/", 1)[-1]: value for key, value in found.items()}

    async def start_daemon(self, node: LabNode, *flags: str, is_kept: bool = False) -> None:
        """Start tundp on a node. It is not ready yet: see `wait_ready`."""
        await start_tundp(node, self.store_flags, *flags, is_kept=is_kept)

    async def wait_ready(self, nodes: Sequence[LabNode] | None = None) -> None:
        """Until every daemon has its lease and sees all the others' as peers."""
        nodes = list(self.nodes.values()) if nodes is None else nodes
        for node in nodes:
            await node.wait_for_peers(len(nodes) - 1)

    async def add_pod(self, node: LabNode) -> Host:
        """A pod behind a bridge with the subnet's first address, as CNI would make it."""
        pod = await self.lab.host(f"pod{node.number}")
        node.pod = pod
        mtu = int(node.environment["FLANNEL_MTU"])
        await self.lab.cable(pod, "eth0", node.host, "veth1")
        await node.host.configure("veth1", mtu=mtu)
        await node.host.bridge("cni0", "veth1")
        await node.host.configure("cni0", str(node.gateway), mtu=mtu)
        prefix_len = node.gateway.network.prefixlen
        await pod.configure("eth0", f"{node.pod_address}/{prefix_len}", mtu=mtu)
        await pod.route("0.0.0.0/0", via=str(node.gateway.ip))
        return pod

    def log_tail(self, node: LabNode) -> str:
        """The last lines of a daemon's log."""
        return node.log_tail()


async def start_tundp(
    node: LabNode, store_flags: Sequence[str], *flags: str, is_kept: bool = False
) -> None:
    """Start a daemon on a node."""
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(
            run_command(node, store_flags, *flags), log=log, is_kept=is_kept
        )


def run_command(node: LabNode, store_flags: Sequence[str], *flags: str) -> list[str]:
    """The command line of a node's daemon; its files lie in the node's directory."""
    return [
        sys.executable,
        "-m",
        "tundp",
        "run",
        *store_flags,
        *node.interface_flags,
        f"--subnet-file={node.subnet_file}",
        f"--admin-socket={node.admin_socket}",
        f"--state-dir={node.state_dir}",
        *flags,
    ]


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def make_directory() -> Path:
    """A directory for a lab's sockets, logs and lease file."""
    return Path(tempfile.mkdtemp(prefix="tundp-lab-"))
