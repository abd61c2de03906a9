"""The lab that faults are planted in, and `tundp doctor` is asked in, as an operator would.

pod1 -- cni0 [node1] eth0 -- [switch br0, etcd] -- eth0 [node2] cni0 -- pod2

One lab for all faults, with real daemons; each leaves it as it was. `doctor` runs as a process of
its own in the namespace of a node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.json_schema import validate
from tests.netns.broken_rows import PINGS, WORSE, Row
from tests.nodes import HEALTH_PORT, must_run
from tests.wait import until
from tundp.doctor import diagnosis
from tundp.doctor.cases import is_known
from tundp.lab.lab import Host, Lab, processes_in
from tundp.lab.overlay import PREFIX, STORE_ADDRESS, LabNode, OverlayLab, make_directory
from tundp.linux.command import SYSTEM_PATH

T = TypeVar("T")
VENV = Path(sys.executable).parent
TUNDP = str(VENV / "tundp")
PATH = f"{VENV}:{SYSTEM_PATH}"
FLAGS = ("--engine=auto", "--iptables-forward-rules=false", f"--healthz-port={HEALTH_PORT}")
SOURCE_CHECKS = {1: "--source-check=count", 2: "--source-check=enforce"}
COUNTED = ("drop.", "kernel.", "source.")
"""Ids that remain as notes: so many since the daemon's start."""
CANNOT = 77
"""The exit code of a script that cannot plant its fault here; a sentence says why."""
_RESTART = re.compile(r"@restart\(([^)]*)\)")
FAULT_S = 30.0
"""Within which what was planted breaks something: leases and neighbours live a while."""
NAMED_S = 10.0
"""Within which a fault is to be named: a silence has to be one first."""
MENDED_S = 20.0
"""Within which what a command did shows."""


@dataclass
class Broken:
    """The lab, and questions to it."""

    overlay: OverlayLab
    cni_dir: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def one(self) -> LabNode:
        return self.overlay.nodes[1]

    @property
    def two(self) -> LabNode:
        return self.overlay.nodes[2]

    def host(self, name: str) -> Host:
        return self.overlay.lab.hosts[name]

    def script(self, text: str) -> Path:
        """A Python program that shell scripts of rows may run."""
        path = self.overlay.directory / "script.py"
        path.write_text(text)
        return path

    async def set_up(self) -> None:
        overlay = self.overlay
        await overlay.build(2)
        await overlay.start_etcd({"Network": "10.5.0.0/16"})
        for node in overlay.nodes.values():
            await overlay.start_daemon(node, *FLAGS, SOURCE_CHECKS[node.number])
        await overlay.wait_ready()
        self.cni_dir.mkdir()
        (self.cni_dir / "10-flannel.conflist").write_text('{"plugins": [{"type": "flannel"}]}')
        for node in overlay.nodes.values():
            await overlay.add_pod(node)
            number = str(node.number)
            self.variables |= {
                f"SUBNET{number}": str(node.gateway.network),
                f"POD{number}": node.pod_address,
                f"KEY{number}": str(node.gateway.network).replace("/", "-"),
            }
            await self.masquerade(node)
        # A second way to the switch, for routes that leave by another one than they come in by.
        await overlay.lab.cable(self.two.host, "eth1", overlay.switch, "port2b")
        await overlay.switch.enslave("port2b", "br0")
        await self.two.host.configure("eth1")
        await self.two.host.sysctl("ipv4/conf/eth1/arp_ignore", 8)
        (link,) = json.loads(await must_run(self.one.host, *["ip", "-j", "link", "show", "eth0"]))
        mac = link["address"]
        etcdctl = f"env ETCDCTL_API=3 etcdctl --endpoints={overlay.etcd.url}"
        self.variables |= {
            "PATH": PATH,
            "MAC1": mac,
            "CNI": str(self.cni_dir),
            "NODE1": self.one.host.namespace,
            "ETHTOOL": f"{sys.executable} {self.script(CHECKSUMS)}",
            "PUT": f"{etcdctl} put {PREFIX}/subnets",
            "DEL": f"{etcdctl} del {PREFIX}/subnets",
            "CONFIG": f"{etcdctl} put {PREFIX}/config",
            "GET": f"{etcdctl} get {PREFIX}/subnets",
            "LEASE": f"{etcdctl} lease",
            "ETCD": f"setsid -f {shlex.join(overlay.etcd.argv)}",
            "SOCKET2": str(self.two.admin_socket),
            "TRACKED": _own_limit(),
        }
        await until(lambda: self.passes("pods"), "the lab carries pings")

    async def masquerade(self, node: LabNode) -> None:
        """As Docker and CNI plugins do."""
        rule = f"-s {node.gateway.network} ! -d 10.5.0.0/16 -j MASQUERADE"
        await must_run(node.host, *f"iptables -t nat -A POSTROUTING {rule}".split())

    async def passes(self, traffic: str) -> bool:
        """Whether packets of one kind arrive and are answered."""
        one, two = self.one, self.two
        if traffic == "nothing":
            return True
        if traffic == "source":
            return await self._is_seen_as_itself()
        host, argv = {
            "pods": (one.pod, (two.pod_address,)),
            "large": (one.pod, ("-s1400", "-Mdont", two.pod_address)),
            "outside": (two.pod, (STORE_ADDRESS,)),
            "node": (one.host, ("-I", one.public_ip, two.pod_address)),
        }[traffic or "pods"]
        done = await host.run("ping", "-qc1", "-W0.5", *argv)
        return done.returncode == 0

    async def _is_seen_as_itself(self) -> bool:
        """Whether pod 1 sees packets of pod 2 come from pod 2's address."""
        loop = asyncio.get_running_loop()
        listener = await self.one.pod.socket(socket.SOCK_DGRAM)
        sender = await self.two.pod.socket(socket.SOCK_DGRAM)
        with listener, sender:
            listener.setblocking(False)
            listener.bind((self.one.pod_address, 0))
            sender.sendto(b"who am I?", listener.getsockname())
            try:
                async with asyncio.timeout(0.5):
                    _, (address, _) = await loop.sock_recvfrom(listener, 100)
            except TimeoutError:
                return False
        return bool(address == self.two.pod_address)

    def shell(self, text: str) -> str:
        """The shell of a row: `@restart(FLAGS)` is node 2's daemon anew, with these flags more."""
        return _RESTART.sub(lambda found: _restart(self.two, self.pid, found[1]), text)

    @property
    def pid(self) -> int:
        """Node 2's daemon, whoever started it."""
        (pid,) = _pids(self.two.host, "tundp\0run\0", f"--admin-socket={self.two.admin_socket}")
        return pid

    async def sh(self, host: Host, script: str) -> None:
        done = await host.run("sh", "-c", self.shell(script), environment=self.variables)
        if done.returncode == CANNOT:
            pytest.skip(f"{script}: {done.stderr}")
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"

    async def pings(self) -> Any:
        """Pings between pods, until they are killed."""
        return await self.one.pod.popen(["sh", "-c", PINGS], environment=self.variables)

    async def doctor(
        self, number: int, *flags: str, given: bool = False, path: str = PATH
    ) -> dict[str, Any]:
        """What a node's doctor says, as JSON; the document fits its schema, the ids the table.

        It is there in time: what could not be looked at by then is in it as that.
        """
        node = self.overlay.nodes[number]
        argv = [TUNDP, "doctor", "--json", f"--cni-dir={self.cni_dir}", *flags]
        argv.append(f"--admin-socket={node.admin_socket}")
        if given:
            argv += [*self.overlay.store_flags, *FLAGS, *node.interface_flags]
            argv.append(SOURCE_CHECKS[number])
            argv += [f"--subnet-file={node.subnet_file}", f"--state-dir={node.state_dir}"]
        done = await node.host.run(*argv, environment={"PATH": path})
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == found["exit_code"]
        validate(found, json.loads(diagnosis.schema_text()))
        unknown = [
            each["id"]
            for each in found["findings"]
            if each["verdict"] != "ok" and not is_known(each["id"])
        ]
        assert not unknown, "not in the table of docs/debugging.md"
        return found

    async def finds(self, number: int, row: Row) -> list[dict[str, Any]]:
        """The findings of a row's id and words."""
        found = await self.doctor(number, given=row.given)
        return [
            each
            for each in found["findings"]
            if each["id"] == row.id
            and each["verdict"] in row.verdicts
            and all(word in each["evidence"] for word in row.words)
            and (each["command"] or not row.command)
        ]

    async def names(self, number: int, beginning: str) -> bool:
        """Whether a node's doctor warns of an id that begins so, and of the other node."""
        found = await self.doctor(number)
        other = f"192.0.2.{3 - number}"
        return any(
            each["id"].startswith(beginning) and each["verdict"] in WORSE
            for each in found["findings"]
            if other in each["evidence"] or beginning in ("peer.arp", "drop.no_route")
        )

    async def is_fine(self, row: Row) -> bool:
        """Whether a doctor that could look finds nothing of a row's id any more."""
        found = await self.doctor(row.at, f"--only={row.id}")
        looked = not any(each["id"].startswith("not-looked.") for each in found["findings"])
        return (looked or row.is_blind_after) and not any(
            each["id"] == row.id and each["verdict"] in (*WORSE, "note")
            for each in found["findings"]
            if not each["id"].startswith(COUNTED) or each["verdict"] != "note"
        )


class Runner:
    """A lab and the loop it lives on, for all tests of this module."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = make_directory()
        self.lab = Lab(f"td{os.getpid()}")
        self.broken = Broken(OverlayLab(self.lab, self.directory), self.directory / "cni")

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(main)

    def close(self) -> None:
        self.run(self._close())
        self.loop.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def _close(self) -> None:
        # A daemon that a printed command started is nobody's child here.
        for host in list(self.lab.hosts.values()):
            for pid in processes_in(host.namespace):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        await self.broken.overlay.close_etcd()
        await self.lab.__aexit__()


async def plant_name_mend(broken: Broken, row: Row) -> None:
    """Plant a fault, see what it breaks, have it named, run the command, see that it helped.

    The command has to mend it alone: what the fault leaves is removed after that.
    """
    await until(lambda: broken.passes(row.traffic), "packets pass before the fault is planted")
    (etcd,) = _pids(broken.overlay.switch, "--name=lab\0")
    broken.variables |= {"PID2": str(broken.pid), "ETCDPID": str(etcd)}
    storm, is_undone = None, False
    try:
        await broken.sh(broken.host(row.on), row.plant)
        if row.traffic:
            await until(lambda: fails(broken, row.traffic), "this is a fault", deadline_s=FAULT_S)
        if row.storm:
            storm = await _storm(broken, row)
        hit = await _named(broken, row)
        if storm is not None and not row.storm_stays:
            storm.kill()
        is_undone = await _mend(broken, row, hit)
    finally:
        if storm is not None:
            storm.kill()
        if row.undo and not is_undone:
            undo = broken.shell(row.undo)
            await broken.host(row.on).run("sh", "-c", undo, environment=broken.variables)
        if row.machine_undo:
            await asyncio.to_thread(_sh, row.machine_undo, broken.variables)
    if not row.command:
        await until(
            lambda: broken.is_fine(row), f"doctor finds no {row.id} more", deadline_s=MENDED_S
        )
    await until(lambda: broken.passes("pods"), "packets pass at the end", deadline_s=30)


async def _named(broken: Broken, row: Row) -> dict[str, Any]:
    """The finding of the row; node 1 names what it sees of the fault meanwhile."""
    named = broken.finds(row.at, row)
    if row.there:
        hit, is_named = await asyncio.gather(named, broken.names(1, row.there))
        if not is_named:
            await until(lambda: broken.names(1, row.there), f"node 1 names {row.there}")
    else:
        hit = await named
    if not hit:
        hit = await until(
            lambda: broken.finds(row.at, row), f"doctor names {row.id}", deadline_s=NAMED_S
        )
    found: dict[str, Any] = hit[0]
    return found


async def _mend(broken: Broken, row: Row, hit: dict[str, Any]) -> bool:
    """Run what mends a fault, and see that it does; return whether that was the row's `undo`."""
    assert hit["next_step"], "what to do is always said"
    if row.mended_by:
        other = replace(row, id=row.mended_by, words=())
        hit = (await broken.finds(row.at, other))[0]
    if row.command or row.mended_by:
        command = hit["command"]
        assert command, hit
        assert command in hit["next_step"]
        if row.is_for_machine:
            assert hit["on"] == "the host"
            await asyncio.to_thread(_sh, command, broken.variables)
        else:
            assert not hit["on"], hit
            await broken.sh(broken.overlay.nodes[row.at].host, command)
    else:
        command = row.undo
        assert hit["on"] or not hit["command"], hit
        await broken.sh(broken.host(row.on), command)
    after = row.after or row.traffic
    await until(lambda: broken.passes(after), f"{command} helps", deadline_s=MENDED_S)
    if row.command:
        await until(lambda: broken.is_fine(row), f"{command} ends {row.id}", deadline_s=MENDED_S)
    return not (row.command or row.mended_by)


def _own_limit() -> str:
    """The size of the connection table, if it is this namespace's to set; else empty."""
    path = Path("/proc/sys/net/netfilter/nf_conntrack_max")
    is_ours = path.exists() and bool(path.stat().st_mode & stat.S_IWUSR)
    return path.read_text().strip() if is_ours else ""


def _sh(script: str, variables: dict[str, str]) -> None:
    """Run a command outside the lab."""
    subprocess.run(["sh", "-c", script], env=os.environ | variables, check=True)


async def fails(broken: Broken, traffic: str) -> bool:
    return not await broken.passes(traffic)


async def _storm(broken: Broken, row: Row) -> Any:
    """Packets that go on until all is mended."""
    argv = ["sh", "-c", row.storm]
    return await broken.host(row.storm_on).popen(argv, environment=broken.variables)


def _pids(host: Host, *words: str) -> list[int]:
    """The processes in a host's namespace with these in their command lines, children apart."""
    found = {}
    for pid in processes_in(host.namespace):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            if all(word in line for word in words) and "\0doctor\0" not in line:
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                found[pid] = int(parent)
    return [pid for pid, parent in found.items() if parent not in found]


def _restart(node: LabNode, pid: int, flags: str) -> str:
    """Shell that ends the daemon and starts it with these flags more."""
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    wait = f"while grep -q . /proc/{pid}/cmdline 2>/dev/null; do sleep 0.1; done"
    started = f"setsid -f {shlex.join(argv)} {flags} </dev/null >>{node.log_path} 2>&1"
    return f"kill {pid}; {wait}; {started}"


CHECKSUMS = """
import ctypes, fcntl, socket, struct, sys
value = ctypes.create_string_buffer(struct.pack("II", 0x17, int(sys.argv[2])))  # ETHTOOL_STXCSUM
request = struct.pack("16sP", sys.argv[1].encode(), ctypes.addressof(value))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)  # SIOCETHTOOL
"""
"""Lets a device finish checksums, or not, as `ethtool -K DEVICE tx on|off`."""
