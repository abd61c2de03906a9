"""`tundp demo`: the whole overlay on one machine, every step shown and checked.

Two nodes with a pod each are built from network namespaces (lab/overlay.py draws them),
a daemon runs on both, and what pod 1 sends to pod 2 crosses the real TUN devices and the
real UDP sockets. Each line ends in what was measured; the exit code is 0 only if all
checks passed. Everything is removed at the end, also after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from shutil import which
from typing import Final

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from tundp.backend.udp.config import DEFAULT_PORT
from tundp.choices import DemoStore
from tundp.engine.native.self_test import self_test
from tundp.errors import ConfigError, Interrupted, LabError, TundpError, Unsupported
from tundp.lab.etcd import find_etcd
from tundp.lab.lab import (
    STOP_S,
    Lab,
    interruptible,
    leftovers,
    processes_in,
    remove_namespace,
)
from tundp.lab.overlay import LabNode, OverlayLab, make_directory
from tundp.lab.restarts import REPLACE, STOP, why_not
from tundp.lab.streams import Streams
from tundp.lab.traffic import ping, transfer
from tundp.layout import Line
from tundp.lease.fib import FIRST_HOP_ID, build_fib
from tundp.lease.model import Endpoint, Peer
from tundp.observe.status import CountersStatus, Status
from tundp.show import counters_grid, drop_lines

PREFIX: Final = "tundp"
HOSTS: Final = ("switch", "node1", "node2", "pod1", "pod2")
STATE: Final = Path("/run/tundp-demo.json")
"""Names the lab's directory while a demo runs, so that --clean finds it after any end."""
NETWORK: Final = {"Network": "10.5.0.0/16", "Backend": {"Type": "udp", "Port": 8285}}
PING_COUNT: Final = 20
SETTLE_S: Final = 3.0
RESTART_RATE: Final = 1000
RESTART_TCP_PACE: Final = 1_000_000
"""Bytes a second."""
_TOOLS: Final = ("ping", "tcpdump", "tshark")
_PICTURE: Final = """\
   pod1 ── cni0 \\[node1] eth0 ──── switch ──── eth0 \\[node2] cni0 ── pod2
                 flannel0  192.0.2.1   │   192.0.2.2  flannel0
                                     {store}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What to show."""

    store: DemoStore
    payload_len: int
    """Bytes of TCP payload to move and verify."""
    is_kept: bool
    """Leave the lab running at the end."""


Show = Callable[[RenderableType], None]
"""Shows a text with rich's markup, a line of it, or a table."""


async def run_demo(settings: DemoSettings, show: Show) -> bool:
    """Build, check, show each step, tear down. Whether every check passed.

    ConfigError or LabError if it cannot start, Interrupted after a signal.
    """
    _require_root()
    if settings.store is DemoStore.ETCD and find_etcd() is None:
        raise ConfigError("--store etcd: etcd is not installed; use --store=file")
    left = leftovers(PREFIX, HOSTS)
    if left:
        raise LabError(
            f"a demo is still there ({', '.join(left)}): remove it with tundp demo --clean"
        )
    directory = make_directory()
    lab = Lab(PREFIX)
    try:
        STATE.write_text(json.dumps({"directory": str(directory)}), encoding="utf-8")
        async with interruptible(), lab:
            demo = Demo(settings, OverlayLab(lab, directory), show)
            try:
                passed = await demo.run()
            except TundpError as error:
                show(f"\n[red]{escape(str(error))}[/]")
                passed = False
            if settings.is_kept and passed:
                lab.is_kept = True
                demo.print_ways_to_look_around()
                return passed
            show("\ntearing down ...")
        show("torn down, nothing left behind")
    except asyncio.CancelledError:
        raise Interrupted("interrupted; everything torn down") from None
    finally:
        if not lab.is_kept:
            shutil.rmtree(directory, ignore_errors=True)
            STATE.unlink(missing_ok=True)
    show("[bold green]all checks passed[/]" if passed else "[bold red]some checks failed[/]")
    return passed


async def clean_demo(show: Show) -> bool:
    """Remove what a kept or killed demo left: processes, namespaces, files. True if all went."""
    _require_root()
    left = leftovers(PREFIX, HOSTS)
    if not left and not STATE.exists():
        show("there is no demo to remove")
        return True
    pids = [pid for name in left for pid in processes_in(name) if _is_ours(pid)]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while any(map(_is_ours, pids)) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # others' processes: there is nothing to wait on
    for pid in filter(_is_ours, pids):
        os.kill(pid, signal.SIGKILL)
    for name in left:
        remove_namespace(name)
    if STATE.exists():
        directory = json.loads(STATE.read_text(encoding="utf-8"))["directory"]
        shutil.rmtree(directory, ignore_errors=True)
        STATE.unlink()
    show("the demo is gone")
    return not leftovers(PREFIX, HOSTS)


class Demo:
    """One run. The steps are in `run`, in order."""

    def __init__(self, settings: DemoSettings, overlay: OverlayLab, show: Show) -> None:
        self._settings = settings
        self._overlay = overlay
        self._show = show
        self._has_failed = False

    async def run(self) -> bool:
        """All steps; whether every check passed."""
        await self._build()
        await self._start_daemons()
        await self._show_leases()
        self._check_native()
        await self._check_pings()
        await self._check_errors()
        await self._check_transfer()
        await self._check_conservation()
        await self._check_restart()
        return not self._has_failed

    @property
    def _nodes(self) -> tuple[LabNode, LabNode]:
        return self._overlay.nodes[1], self._overlay.nodes[2]

    async def _build(self) -> None:
        store = self._settings.store
        uses_etcd = store is not DemoStore.FILE and find_etcd() is not None
        self._show("[bold]tundp demo[/]: two nodes, two pods, one overlay\n")
        self._show(_PICTURE.format(store="etcd" if uses_etcd else ""))
        await self._overlay.build()
        if uses_etcd:
            await self._overlay.start_etcd(NETWORK, is_kept=self._settings.is_kept)
            assert self._overlay.etcd is not None
            self._say("store", f"private etcd at {self._overlay.etcd.url}, v3 API")
        else:
            self._overlay.write_lease_file(NETWORK)
            why = "asked for" if store is DemoStore.FILE else "etcd is not installed"
            self._say("store", f"embedded lease file {self._overlay.lease_file} ({why})")

    async def _start_daemons(self) -> None:
        started = time.perf_counter()
        for node in self._nodes:
            await self._overlay.start_daemon(node, is_kept=self._settings.is_kept)
        await self._overlay.wait_ready()
        for node in self._nodes:
            await self._overlay.add_pod(node)
        status = await self._nodes[0].status()
        self._say(
            "daemons",
            f"2 ready in {time.perf_counter() - started:.1f} s,"
            f" engine {'-' if status.engine is None else status.engine.name} on {status.loop}",
        )

    async def _show_leases(self) -> None:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("lease in the store", "value", "pod", "MTU"):
            table.add_column(column, overflow="fold")
        leases = await self._overlay.read_leases()
        by_subnet = {node.gateway.network: node for node in self._nodes}
        for key, value in sorted(leases.items()):
            node = by_subnet.get(IPv4Network(key.replace("-", "/")))
            if node is None:
                continue
            env = node.environment
            table.add_row(
                key,
                _shorten(value),
                f"pod{node.number} {node.pod_address}",
                env["FLANNEL_MTU"],
            )
        self._show(table)
        self._check("leases", len(leases) == len(self._nodes), f"{len(leases)} in the store")

    def _check_native(self) -> None:
        first, second = self._nodes
        fib = build_fib(
            [
                Peer(
                    subnet=second.gateway.network,
                    endpoint=Endpoint(IPv4Address(second.public_ip), DEFAULT_PORT),
                    hop_id=FIRST_HOP_ID,
                )
            ],
            own_subnet=first.gateway.network,
            generation=1,
        )
        try:
            compared = self_test(fib)
        except Unsupported as error:
            self._say("C module", str(error))
            return
        self._check("C module", True, f"agrees with Python in {compared:,} comparisons")

    async def _check_pings(self) -> None:
        first, second = self._nodes
        for source, destination in ((first, second), (second, first)):
            assert source.pod is not None
            answers = [await ping(source.pod, destination.pod_address) for _ in range(PING_COUNT)]
            times = [answer.rtt_s * 1e3 for answer in answers if answer and answer.is_echo_reply]
            text = f"{len(times)}/{PING_COUNT} answered"
            if times:
                text += f", median {statistics.median(times):.2f} ms, max {max(times):.2f} ms"
            self._check(
                f"ping pod{source.number} -> pod{destination.number}",
                len(times) == PING_COUNT,
                text,
            )

    async def _check_errors(self) -> None:
        first, second = self._nodes
        assert first.pod is not None
        hops = []
        for ttl in range(1, 9):
            answer = await ping(first.pod, second.pod_address, ttl=ttl)
            hops.append(str(answer.source) if answer else "*")
            if answer and answer.is_echo_reply:
                break
        self._check(
            "traceroute", "*" not in hops and hops[-1] == second.pod_address, " > ".join(hops)
        )
        nowhere = str(_unleased(self._nodes) + 1)
        answer = await ping(first.pod, nowhere)
        is_right = answer is not None and (answer.icmp_type, answer.code) == (3, 0)
        said = "net unreachable from " + str(answer.source) if answer else "silence"
        self._check(f"ping unleased {nowhere}", is_right, said)

    async def _check_transfer(self) -> None:
        first, second = self._nodes
        assert first.pod is not None
        assert second.pod is not None
        megabytes = self._settings.payload_len >> 20
        seconds, is_equal = await transfer(
            first.pod, second.pod, second.pod_address, payload_len=self._settings.payload_len
        )
        rate = self._settings.payload_len * 8 / seconds / 1e6
        self._check(
            "TCP pod1 -> pod2",
            is_equal,
            f"{megabytes} MB in {seconds:.1f} s ({rate:.0f} Mbit/s),"
            f" SHA-256 {'equal' if is_equal else 'DIFFERS'} at both ends",
        )

    async def _check_conservation(self) -> None:
        statuses = await self._settled_statuses()
        counters = []
        for node, status in zip(self._nodes, statuses, strict=True):
            assert status.counters is not None
            counters.append(status.counters)
            self._show(f"\n[bold]node{node.number}[/] {status.subnet}")
            self._show(counters_grid(status.counters))
            for line in drop_lines(status.counters):
                self._show(Line(line))
        self._check(
            "conservation",
            all(each.is_conserved for each in counters),
            "every packet in came out or has a named drop, both nodes, both directions",
        )
        for source, destination in ((0, 1), (1, 0)):
            sent = _datagrams_out(statuses[source])
            received = counters[destination].decap.packets_in
            self._check(
                f"wire node{source + 1} -> node{destination + 1}",
                sent == received,
                f"{sent:,} datagrams sent, {received:,} received",
            )

    async def _check_restart(self) -> None:
        """Another daemon in the first one's place, under traffic: by handover, else anew."""
        reason = await asyncio.to_thread(why_not, REPLACE)
        restart = STOP if reason else REPLACE
        first, second = self._nodes
        try:
            streams = Streams(first, second, rate=RESTART_RATE, tcp=True, tcp_pace=RESTART_TCP_PACE)
        except Unsupported as error:
            self._say("restart under traffic", str(error))
            return
        async with streams:
            await streams.flow(RESTART_RATE // 2)
            await restart.run(self._overlay, first)
            await streams.flow(RESTART_RATE // 2)
        result = streams.result
        text = (
            f"{restart.label}: {result.lost:,} lost of {result.sent:,} datagrams at"
            f" {RESTART_RATE:,}/s each way, longest silence"
            f" {result.longest_silence_s * 1e3:.0f} ms; {result.stream}"
        )
        if result.faults:
            self._say("restart under traffic", f"{text}; no verdict: {'; '.join(result.faults)}")
        elif reason:
            self._say("restart under traffic", f"{text} ({reason})")
        else:
            self._check("restart under traffic", result.is_whole, text)

    async def _settled_statuses(self) -> list[Status]:
        """Both daemons' status once nothing is under way: TCP may still be saying goodbye."""
        deadline = time.monotonic() + SETTLE_S
        before: list[CountersStatus | None] = []
        while True:
            statuses = [await node.status() for node in self._nodes]
            counters = [status.counters for status in statuses]
            if counters == before or time.monotonic() > deadline:
                return statuses
            before = counters
            await asyncio.sleep(0.1)

    def print_ways_to_look_around(self) -> None:
        """The lab stays: commands to explore it, and the one that ends it."""
        first, second = self._nodes
        tundp = _own_command()
        commands = [
            f"ip netns exec {PREFIX}-pod1 ping {second.pod_address}",
            f"{tundp} status --admin-socket {first.admin_socket}",
            f"ip netns exec {PREFIX}-node1 ip addr show dev flannel0",
            f"ip netns exec {PREFIX}-switch tcpdump -ni br0 udp port 8285",
            f"ip netns exec {PREFIX}-switch tshark -ni br0 -d udp.port==8285,ip",
            f"cat {first.log_path}",
            f"{tundp} demo --clean",
        ]
        self._show("\n[bold]everything keeps running[/]; look around with:\n")
        for command in commands:
            missing = [tool for tool in _TOOLS if f" {tool} " in command and not which(tool)]
            hint = f"   [dim](needs {missing[0]}, which is not installed)[/]" if missing else ""
            self._show(f"  {command}{hint}")

    def _check(self, what: str, is_ok: bool, text: str) -> None:  # noqa: FBT001
        mark = "[green]ok  [/]" if is_ok else "[red]FAIL[/]"
        self._has_failed = self._has_failed or not is_ok
        self._show(f"{mark} [bold]{what}[/]: {text}")

    def _say(self, what: str, text: str) -> None:
        self._show(f"     [bold]{what}[/]: {text}")


def _own_command() -> str:
    """How this very tundp is called from a shell."""
    return "tundp" if which("tundp") else f"{sys.executable} -m tundp"


def _require_root() -> None:
    if os.geteuid() != 0:
        raise LabError("the demo makes network namespaces and TUN devices: run it as root")


def _shorten(value: str) -> str:
    """A lease value without the fields only the lease file has."""
    return json.dumps({"PublicIP": json.loads(value)["PublicIP"]})


def _datagrams_out(status: Status) -> int:
    """Datagrams one node sent: packets forwarded, ICMP errors to a peer, path probes, messages."""
    assert status.counters is not None
    assert status.backend is not None
    own = status.counters.totals["icmp_to_peers"] + (status.backend.path_probes or 0)
    own += status.backend.peer_messages or 0
    return status.counters.encap.packets_out + own


def _unleased(nodes: tuple[LabNode, ...]) -> IPv4Address:
    """The base of a subnet of the network nobody holds."""
    held = {node.gateway.network for node in nodes}
    for subnet in IPv4Network(str(NETWORK["Network"])).subnets(new_prefix=24):
        if subnet not in held:
            return subnet.network_address
    raise LabError("two nodes cannot hold 256 subnets")


def _is_ours(pid: int) -> bool:
    """Whether `pid` is still the daemon or etcd the demo started, and not its successor."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"tundp-lab-" in command
