"""The rows: every way two hosts can be joined here, built the same and measured the same.

left node ── eth0 ═══ veth ═══ eth0 ── right node        192.0.2.1, 192.0.2.2
  10.5.1.0                              10.5.2.0         on the overlay
  pod 10.5.1.2 behind cni0              pod 10.5.2.2     with --topology pods

Why one room: the rows are read side by side, each a page, so that none is built differently.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final

from tundp.bench.foreign import cpu_time
from tundp.engine.choose import ENGINES
from tundp.errors import ConfigError, LabError, PlatformError
from tundp.lab.etcd import PrivateEtcd, find_etcd
from tundp.lab.lab import Host, Lab
from tundp.lab.offload import make_wire_like
from tundp.lab.overlay import LabNode, start_tundp
from tundp.linux.offload import Offload
from tundp.observe.status import CountersStatus
from tundp.wire import overhead

MTU: Final = 1500
VXLAN_OVERHEAD: Final = 50
VXLAN_PORT: Final = 8472
OVERLAY: Final = ("10.5.1.0", "10.5.2.0")
SUBNETS: Final = ("10.5.1.0/24", "10.5.2.0/24")
BRIDGES: Final = ("10.5.1.1/24", "10.5.2.1/24")
PODS: Final = ("10.5.1.2", "10.5.2.2")
UNDERLAY: Final = ("192.0.2.1", "192.0.2.2")
BASELINE: Final = "vxlan"
KERNEL: Final = ("vxlan", "vxlan-again", "vxlan-csum", "veth", "fou", "wireguard")
"""Rows without user space."""
LIMIT: Final = "bare"
BARE_DEVICE: Final = "bare0"
WRONG_USAGE: Final = 2
"""What tundp exits with."""
NULL: Final = "vxlan-again"
READY_S: Final = 60.0
SETTLE_S: Final = 3.0
FLANNEL_PORT: Final = "8285"
WIREGUARD_MTU: Final = 1420
PROBE_PREFIX: Final = "tundp-probe"
ROW_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,11}", re.ASCII)
LADDER: Final = (
    Offload.TUN_TSO.value,
    Offload.UDP_SEGMENT.value,
    Offload.UDP_GRO.value,
    Offload.TCP_COALESCE.value,
    Offload.TUN_USO.value,
    Offload.UDP_COALESCE.value,
)
"""In the order they were worth building."""


@dataclass(slots=True)
class Ground:
    """Two nodes joined by a cable, what a path is built on; and where its traffic runs."""

    nodes: tuple[Host, Host]
    directory: Path
    ends: tuple[Host, Host]
    addresses: tuple[str, str]
    mtu: int = MTU
    daemons: list[LabNode] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Forwarders that have no counters: they are at rest when they take no CPU."""

    async def counters(self) -> list[CountersStatus]:
        """Each daemon's counters, none for kernel paths."""
        statuses = [await node.status() for node in self.daemons]
        return [status.counters for status in statuses if status.counters is not None]

    async def settle(self) -> None:
        """Until no packet moves any more, at most SETTLE_S; kernel paths are at once."""
        deadline = time.monotonic() + SETTLE_S
        before: list[object] = []
        while (self.daemons or self.processes) and time.monotonic() < deadline:
            now: list[object] = [(each.encap, each.decap) for each in await self.counters()]
            now += [cpu_time(each.pid) for each in self.processes]
            if now == before:
                return
            before = now
            await asyncio.sleep(0.05)


class BenchPath(ABC):
    """One row. `name` is what --only takes."""

    name: str
    label: str
    is_encrypted = False

    async def why_not(self) -> str | None:
        """Why this machine cannot run it, or None if it can."""
        return None

    async def why_wrong(self) -> str | None:
        """Why it was asked for in a way that cannot be, or None. Asked before anything is built."""
        return None

    @abstractmethod
    async def build(self, ground: Ground) -> None:
        """Join the two nodes: overlay addresses, routes to the other's subnet, MTU."""


class VethPath(BenchPath):
    """No tunnel at all: what the lab itself can do."""

    name = "veth"
    label = "direct veth route"

    async def build(self, ground: Ground) -> None:
        """See BenchPath."""
        for side, node in enumerate(ground.nodes):
            await node.route(SUBNETS[1 - side], via=UNDERLAY[1 - side])
        ground.addresses = UNDERLAY


class VxlanPath(BenchPath):
    """flannel's vxlan backend: nolearning, static neighbour, FDB entry and onlink route."""

    def __init__(self, name: str, label: str, *, has_checksum: bool) -> None:
        self.name = name
        self.label = label
        self._has_checksum = has_checksum

    async def build(self, ground: Ground) -> None:
        """See BenchPath."""
        macs = ("02:00:00:05:01:00", "02:00:00:05:02:00")
        ground.mtu = MTU - VXLAN_OVERHEAD
        for side, node in enumerate(ground.nodes):
            other = 1 - side
            await node.netlink.call(
                "add flannel.1",
                "link",
                "add",
                ifname="flannel.1",
                kind="vxlan",
                vxlan_id=1,
                vxlan_link=await node.index("eth0"),
                vxlan_local=UNDERLAY[side],
                vxlan_port=VXLAN_PORT,
                vxlan_learning=False,
                vxlan_udp_csum=self._has_checksum,
            )
            await node.configure("flannel.1", f"{OVERLAY[side]}/32", mtu=ground.mtu, mac=macs[side])
            index = await node.index("flannel.1")
            await node.netlink.call(
                "add neighbour",
                "neigh",
                "replace",
                dst=OVERLAY[other],
                lladdr=macs[other],
                ifindex=index,
                state="permanent",
            )
            await node.netlink.call(
                "add FDB entry",
                "fdb",
                "append",
                ifindex=index,
                lladdr=macs[other],
                dst=UNDERLAY[other],
            )
            await node.netlink.call(
                "add route",
                "route",
                "add",
                dst=SUBNETS[other],
                gateway=OVERLAY[other],
                oif=index,
                flags="onlink",
            )


class TundpPath(BenchPath):
    """tundp with one of its engines, or with flags of somebody's own."""

    def __init__(self, name: str, label: str, flags: Sequence[str]) -> None:
        self.name = name
        self.label = label
        self._flags = tuple(flags)

    @classmethod
    def of_engine(cls, engine: str) -> TundpPath:
        """An engine as it comes."""
        if engine == "simple":
            return cls("simple", "one packet per syscall, C", ["--engine=simple"])
        return cls(f"tundp-{engine}", f"tundp, {engine} engine", [f"--engine={engine}"])

    @classmethod
    def of_text(cls, text: str) -> TundpPath:
        """A row of the command line, NAME=FLAGS; ConfigError for another form."""
        name, _, flags = text.partition("=")
        if not ROW_NAME.fullmatch(name) or not flags.strip():
            raise ConfigError(
                f"--row {text}: is not NAME=FLAGS with a name of at most 12 small letters,"
                " digits and -, e.g. --row 'spin=--engine=gso --spin=30'"
            )
        return cls(name, f"tundp {flags}", shlex.split(flags))

    async def why_wrong(self) -> str | None:
        """See BenchPath: what tundp itself says of the flags."""
        argv = [sys.executable, "-m", "tundp", "config", "show", *self._flags]
        done = await asyncio.to_thread(
            subprocess.run, argv, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        return done.stderr.strip() if done.returncode == WRONG_USAGE else None

    async def build(self, ground: Ground) -> None:
        """See BenchPath."""
        lease_file = ground.directory / "leases.json"
        # Reservations: each daemon finds its own by its public IP.
        leases = {
            subnet.replace("/", "-"): {"PublicIP": address}
            for subnet, address in zip(SUBNETS, UNDERLAY, strict=True)
        }
        lease_file.write_text(
            json.dumps({"config": {"Network": "10.5.0.0/16"}, "leases": leases}), encoding="utf-8"
        )
        for side, node in enumerate(ground.nodes):
            lab_node = LabNode(side + 1, node, ground.directory)
            await start_tundp(lab_node, [f"--store=file:{lease_file}"], *self._flags)
            ground.daemons.append(lab_node)
        for lab_node in ground.daemons:
            await lab_node.wait_for_peers(1)
        ground.mtu = overhead.inner_mtu(MTU)


class BarePath(BenchPath):
    """The crossings alone: what any forwarder between a TUN and a UDP socket does (bare.py)."""

    name = LIMIT
    label = "TUN to UDP, nothing else"

    async def build(self, ground: Ground) -> None:
        """See BenchPath."""
        ground.mtu = overhead.inner_mtu(MTU)
        for side, node in enumerate(ground.nodes):
            ready, log_path = (ground.directory / f"bare{side}.{each}" for each in ("ready", "log"))
            ends = (UNDERLAY[side], UNDERLAY[1 - side])
            with log_path.open("ab") as log:
                process = await node.popen(
                    [sys.executable, "-m", "tundp.bench.bare", BARE_DEVICE, *ends, str(ready)],
                    log=log,
                )
            await _until(process, log_path, ready.exists, f"{self.name} to open its TUN")
            ground.processes.append(process)
            await node.configure(BARE_DEVICE, f"{OVERLAY[side]}/32", mtu=ground.mtu)
            await _route_to_device(node, BARE_DEVICE, SUBNETS[1 - side])


class FlanneldPath(BenchPath):
    """A stock flanneld binary with its own udp backend, leases in a private etcd."""

    name = "flanneld"
    label = "stock flanneld, udp backend"

    def __init__(self, binary: str) -> None:
        self._binary = binary

    async def why_not(self) -> str | None:
        """See BenchPath."""
        if shutil.which(self._binary) is None:
            return f"--flanneld {self._binary}: no such program"
        if find_etcd() is None:
            return "it keeps its leases in etcd, which is not installed"
        return None

    async def build(self, ground: Ground) -> None:
        """See BenchPath. The left node's etcd serves both, in the API the binary speaks."""
        left = ground.nodes[0]
        directory = ground.directory / "etcd"
        directory.mkdir()
        server = PrivateEtcd(UNDERLAY[0], left, directory=directory)
        await server.start()
        values = {"config": json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}})}
        for subnet, address in zip(SUBNETS, UNDERLAY, strict=True):
            values[f"subnets/{subnet.replace('/', '-')}"] = json.dumps({"PublicIP": address})
        for key, value in values.items():
            for api in ("v2", "v3"):
                await server.put(f"/coreos.com/network/{key}", value, api=api)
        for side, node in enumerate(ground.nodes):
            env = ground.directory / f"flanneld{side}.env"
            log_path = ground.directory / f"flanneld{side}.log"
            with log_path.open("ab") as log:
                process = await node.popen(
                    [
                        self._binary,
                        f"-etcd-endpoints={server.url}",
                        "-iface=eth0",
                        f"-subnet-file={env}",
                    ],
                    log=log,
                )
            await _until(process, log_path, env.exists, f"{self._binary} to write {env.name}")
            ground.processes.append(process)
        ground.mtu = overhead.inner_mtu(MTU)


class FouPath(BenchPath):
    """Kernel IPIP over FOU: the same bytes on the wire as ours, without user space.

    Set up with iproute2, since pyroute2 has no FOU family.
    """

    name = "fou"
    label = "kernel IPIP over FOU"

    async def why_not(self) -> str | None:
        """See BenchPath."""
        return await _why_no_kind("fou", "ipip")

    async def build(self, ground: Ground) -> None:
        """See BenchPath."""
        ground.mtu = overhead.inner_mtu(MTU)
        for side, node in enumerate(ground.nodes):
            other = 1 - side
            await _output(node, ["ip", "fou", "add", "port", FLANNEL_PORT, "ipproto", "4"])
            ends = ("remote", UNDERLAY[other], "local", UNDERLAY[side])
            ports = ("encap-sport", FLANNEL_PORT, "encap-dport", FLANNEL_PORT)
            await _output(
                node,
                [*("ip", "link", "add", "fou0", "type", "ipip"), *ends, "encap", "fou", *ports],
            )
            await node.configure("fou0", f"{OVERLAY[side]}/32", mtu=ground.mtu)
            await _route_to_device(node, "fou0", SUBNETS[other])


class WireguardPath(BenchPath):
    """WireGuard, in the kernel or as wireguard-go; encrypted, so for orientation only."""

    is_encrypted = True

    def __init__(self, name: str, label: str, *, is_kernel: bool) -> None:
        self.name = name
        self.label = label
        self._is_kernel = is_kernel

    async def why_not(self) -> str | None:
        """See BenchPath."""
        tools = ["wg"] if self._is_kernel else ["wireguard-go", "wg"]
        missing = [tool for tool in tools if shutil.which(tool) is None]
        if self._is_kernel and (why := await _why_no_kind(self.name, "wireguard")):
            return why
        return f"not installed: {', '.join(missing)}" if missing else None

    async def build(self, ground: Ground) -> None:
        """See BenchPath."""
        keys = []
        for node in ground.nodes:
            private = await _output(node, ["wg", "genkey"])
            keys.append((private, await _output(node, ["wg", "pubkey"], private)))
        ground.mtu = WIREGUARD_MTU
        for side, node in enumerate(ground.nodes):
            other = 1 - side
            # wireguard-go's control socket is named after the device, for the whole machine.
            device = f"tbwg{side}"
            await self._add_device(node, device, ground.directory)
            key_file = ground.directory / f"key{side}"
            key_file.write_text(keys[side][0], encoding="ascii")
            await _output(
                node,
                [
                    *("wg", "set", device, "listen-port", "51820", "private-key", str(key_file)),
                    *("peer", keys[other][1], "allowed-ips", SUBNETS[other]),
                    *("endpoint", f"{UNDERLAY[other]}:51820"),
                ],
            )
            await node.configure(device, f"{OVERLAY[side]}/32", mtu=ground.mtu)
            await _route_to_device(node, device, SUBNETS[other])

    async def _add_device(self, node: Host, device: str, directory: Path) -> None:
        if self._is_kernel:
            await node.netlink.call(f"add {device}", "link", "add", ifname=device, kind="wireguard")
            return
        log_path = directory / f"{device}.log"
        with log_path.open("ab") as log:
            process = await node.popen(["wireguard-go", "--foreground", device], log=log)
        socket_path = Path(f"/var/run/wireguard/{device}.sock")
        await _until(process, log_path, socket_path.exists, f"wireguard-go to make {device}")


def ladder() -> list[BenchPath]:
    """Engine gso with one offload more on each rung: what each of them buys."""
    rungs: list[BenchPath] = []
    for count in range(1, len(LADDER)):
        without = ",".join(LADDER[count:])
        rungs.append(
            TundpPath(
                f"rung{count}",
                f"gso up to {LADDER[count - 1]}",
                ["--engine=gso", f"--disable-offloads={without}"],
            )
        )
    return rungs


def all_paths(flanneld: str | None) -> list[BenchPath]:
    """Every row there is, the baseline and its double first; new engines appear by themselves."""
    paths: list[BenchPath] = [
        VxlanPath(BASELINE, "kernel VXLAN, no UDP checksum", has_checksum=False),
        VxlanPath(NULL, "kernel VXLAN again (null test)", has_checksum=False),
        VxlanPath("vxlan-csum", "kernel VXLAN, UDP checksum", has_checksum=True),
        VethPath(),
        BarePath(),
        *(TundpPath.of_engine(engine) for engine in ENGINES),
        FouPath(),
        WireguardPath("wireguard", "kernel WireGuard (encrypted)", is_kernel=True),
        WireguardPath("wireguard-go", "wireguard-go (encrypted)", is_kernel=False),
    ]
    if flanneld is not None:
        paths.append(FlanneldPath(flanneld))
    return paths


def host_names(lab_kind: str, path: BenchPath) -> list[str]:
    """The lab hosts a row needs, so that leftovers are found before anything is built."""
    return [f"{lab_kind[0]}-{path.name}-{role}" for role in ("l", "r", "pl", "pr")]


async def build_ground(
    lab: Lab, lab_kind: str, path: BenchPath, directory: Path, *, has_pods: bool
) -> Ground:
    """Two nodes, a cable of the lab's kind, the path over it, and pods if asked for."""
    left_name, right_name, *pod_names = host_names(lab_kind, path)
    left, right = await lab.host(left_name), await lab.host(right_name)
    await lab.cable(left, "eth0", right, "eth0")
    for side, node in enumerate((left, right)):
        await node.configure("eth0", f"{UNDERLAY[side]}/24", mtu=MTU)
        await node.sysctl("ipv4/ip_forward", 1)
        if lab_kind == "wire":
            await make_wire_like(node, "eth0")
    directory.mkdir(parents=True)
    ground = Ground((left, right), directory, (left, right), OVERLAY)
    await path.build(ground)
    if has_pods:
        await _add_pods(lab, ground, pod_names)
    for end in ground.ends:
        # Connections by the thousand a second, all from one address to one port.
        await end.sysctl("ipv4/tcp_tw_reuse", 1)
    return ground


async def _add_pods(lab: Lab, ground: Ground, names: Sequence[str]) -> None:
    pods = []
    for side, node in enumerate(ground.nodes):
        pod = await lab.host(names[side])
        await lab.cable(pod, "eth0", node, "veth1")
        await node.configure("veth1", mtu=ground.mtu)
        await node.bridge("cni0", "veth1")
        await node.configure("cni0", BRIDGES[side], mtu=ground.mtu)
        await pod.configure("eth0", f"{PODS[side]}/24", mtu=ground.mtu)
        await pod.route("0.0.0.0/0", via=str(IPv4Interface(BRIDGES[side]).ip))
        pods.append(pod)
    ground.ends = (pods[0], pods[1])
    ground.addresses = PODS


async def _why_no_kind(name: str, kind: str) -> str | None:
    """Why the kernel makes no device of this kind, asked by making one."""
    try:
        async with Lab(PROBE_PREFIX) as lab:
            host = await lab.host(name)
            await host.netlink.call(
                f"add a device of kind {kind}", "link", "add", ifname="probe0", kind=kind
            )
    except PlatformError as error:
        return f"not available here: {error}"
    return None


async def _route_to_device(node: Host, device: str, destination: str) -> None:
    index = await node.index(device)
    await node.netlink.call(f"add route {destination}", "route", "add", dst=destination, oif=index)


async def _until(
    process: subprocess.Popen[bytes], log_path: Path, condition: Callable[[], bool], what: str
) -> None:
    """Wait for something another process does; LabError with its log if it does not."""
    deadline = time.monotonic() + READY_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            text = log_path.read_text(encoding="utf-8", errors="replace")[-1500:]
            raise LabError(f"waited in vain for {what}:\n{text}")
        await asyncio.sleep(0.05)


async def _output(host: Host, argv: list[str], stdin: str = "") -> str:
    answer: subprocess.CompletedProcess[str] = await host.call(
        subprocess.run, argv, input=stdin, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise LabError(f"{' '.join(argv[:3])}: {answer.stderr.strip()}")
    return answer.stdout.strip()
