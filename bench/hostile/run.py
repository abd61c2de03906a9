"""The lab, the attackers side by side, the honest traffic, and the verdict.

    pod1, pod2, pod3 behind node1 (gso), node2 (reference), node3 (auto)   etcd v3 on the switch
    stranger: a host of the underlay that is no node

Honest traffic, pings both ways and TCP transfers, runs between pod1 and pod2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from bench.hostile import host, judge, packets, store
from bench.hostile.common import HEALTH_PORT, Score
from tundp.files import read_regular
from tundp.lab.lab import Lab
from tundp.lab.overlay import LabNode, OverlayLab, make_directory
from tundp.lab.traffic import ping, transfer

ENGINES: Final = ("gso", "reference", "auto")
TRANSFER_LEN: Final = 1 << 20
PING_S: Final = 0.05
HEAL_S: Final = 10.0
QUIET_SHARE: Final = 0.05
"""Of the pings, at least so many must have been sent while nothing excused their loss."""


@dataclass(slots=True)
class Report:
    """What was found; `faults` empty means that everything held."""

    seed: int
    faults: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


async def run(seconds: float, seed: int, *, only: Sequence[str] = (), slack: float = 1.0) -> Report:
    """Attack for so long, then let everything heal; the lab is gone afterwards.

    only: names of the attackers; all of them if empty. slack: factor of the time limits.

    Its logs stay, and are named in the report, if a fault was found.
    """
    directory = make_directory()
    score = Score(seed)
    report = Report(seed)
    try:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(16))
        async with Lab(f"bh{os.getpid()}") as lab, contextlib.AsyncExitStack() as stack:
            overlay = OverlayLab(lab, directory)
            await overlay.build(len(ENGINES))
            await overlay.start_etcd(json.loads(store.GOOD_CONFIG))
            stack.push_async_callback(overlay.close_etcd)
            world = await build(overlay)
            attack = Attack(overlay, world, report, score)
            attack.only, attack.judge.slack = only, slack
            await attack.run(seconds)
    except BaseException:
        print(f"logs: {directory}/node*.log", flush=True)
        raise
    if report.faults:
        report.lines.append(f"logs: {directory}/node*.log")
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return report


async def build(overlay: OverlayLab) -> packets.World:
    """Daemons, pods, the stranger."""
    for node, engine in zip(overlay.nodes.values(), ENGINES, strict=True):
        host.config_file(node).write_text("v = 0\n")
        await overlay.start_daemon(
            node,
            f"--engine={engine}",
            f"--healthz-port={HEALTH_PORT}",
            f"--metrics-addr=:{host.METRICS_PORT}",
            f"--config={host.config_file(node)}",
        )
    await overlay.wait_ready()
    stranger = await overlay.lab.host("stranger")
    await overlay.lab.cable(stranger, "eth0", overlay.switch, "port66")
    await overlay.switch.enslave("port66", "br0")
    await stranger.configure("eth0", "192.0.2.66/24")
    targets = []
    for node in overlay.nodes.values():
        pod = await overlay.add_pod(node)
        targets.append(
            packets.Target(
                number=node.number,
                host=node.host,
                public_ip=node.public_ip,
                mac=await mac_of(node.host),
                tun_address=node.tunnel_address,
                pod_address=node.pod_address,
                pod=pod,
            )
        )
    world = packets.World(targets, stranger, await mac_of(stranger))
    for each in targets:
        world.addresses += [each.public_ip, each.tun_address, each.pod_address]
    world.addresses += ["192.0.2.66", "192.0.2.254", "10.5.255.1", "203.0.113.9"]
    return world


async def mac_of(machine: Any) -> bytes:
    """The hardware address of a host's eth0."""
    done = await machine.run("ip", "-json", "link", "show", "eth0")
    return bytes.fromhex(json.loads(done.stdout)[0]["address"].replace(":", ""))


class Attack:
    """One run on a lab that is ready."""

    def __init__(
        self, overlay: OverlayLab, world: packets.World, report: Report, score: Score
    ) -> None:
        self.overlay = overlay
        self.world = world
        self.score = score
        self.report = report
        self.nodes: list[LabNode] = list(overlay.nodes.values())
        self.only: Sequence[str] = ()
        self.judge = judge.Judge(score, self.nodes)
        self.leases = {
            str(node.gateway.network).replace("/", "-"): f'"{node.public_ip}"'
            for node in self.nodes
        }
        self.subnet_files = {each.number: read_regular(each.subnet_file) for each in self.nodes}
        self.transfers: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Attack, stop, heal, judge."""
        sock = await self.overlay.switch.socket(1)
        sock.settimeout(20)
        sock.connect(("192.0.2.254", 2379))
        one, two = self.world.targets[0], self.world.targets[1]
        gateway = store.Gateway(sock)
        shots = packets.Packets(self.score, self.world)
        streams: list[judge.HonestPings] = []
        try:
            await shots.open()
            for watched in self.judge.watched:
                await self.judge.look(watched)
            async with contextlib.AsyncExitStack() as stack:
                for source, address in ((one, two.pod_address), (two, one.pod_address)):
                    stream = judge.HonestPings(source.pod, address, pause_s=PING_S)
                    streams.append(stream)
                    await stack.enter_async_context(stream)
                await self.attack(seconds, gateway, shots)
                await asyncio.sleep(0.5)
            await self.heal(gateway)
        finally:
            shots.close()
            gateway.close()
        for watched in self.judge.watched:
            await self.judge.look(watched)
        self.judge_pings(streams)
        self.report.lines += self.judge.judge_at_the_end(seconds=seconds)
        self.tell()
        self.report.faults = self.judge.faults

    async def attack(self, seconds: float, gateway: store.Gateway, shots: packets.Packets) -> None:
        """All attackers at once for so long; one that fails itself is a fault of this program."""
        pause_s = min(1.0, seconds / 60)
        stores = store.StoreAttack(
            self.score, self.world, gateway, {k: v.strip('"') for k, v in self.leases.items()}
        )
        files = host.Files(self.score, self.nodes)
        kernel_pause_s = min(10.0, max(5.0, seconds / 3))
        attackers: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "port": shots.at_the_port,
            "underlay": shots.at_the_underlay,
            "tun": shots.into_the_tun,
            "store": lambda: stores.run(pause_s),
            "clients": host.Clients(self.score, self.nodes).run,
            "files": lambda: files.run(pause_s),
            "kernel": lambda: host.Kernel(self.score, self.nodes).run(kernel_pause_s),
        }
        chosen = [each for name, each in attackers.items() if name in (self.only or attackers)]
        watchers = [
            asyncio.ensure_future(self.judge.own_lateness()),
            asyncio.ensure_future(self.judge.run()),
        ]
        tasks = [asyncio.ensure_future(each()) for each in (*chosen, self.transfer)]
        try:
            done, _ = await asyncio.wait(
                (*tasks, *watchers), timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
        finally:
            for task in (*tasks, *watchers):
                task.cancel()
            await asyncio.gather(*tasks, *watchers, return_exceptions=True)
        self.score.fault("the end: everything is put right", HEAL_S)
        files.restore()
        await stores.restore()

    async def transfer(self) -> None:
        """A verified TCP transfer after the other, in both directions."""
        ends = [self.world.targets[0], self.world.targets[1]]
        while True:
            one, two = ends
            began = time.monotonic()
            try:
                async with asyncio.timeout(60):
                    took, is_equal = await transfer(
                        one.pod, two.pod, two.pod_address, payload_len=TRANSFER_LEN
                    )
            except (OSError, TimeoutError) as error:
                # Unreachable, while its device or its peer's lease was gone.
                why = self.fault_within(began, time.monotonic())
                self.transfers["interrupted"] += 1
                if why is None:
                    self.judge.found("TCP", f"{error!r} after {time.monotonic() - began:.1f} s")
            else:
                self.transfers["complete"] += 1
                self.transfers["ms"] += int(took * 1000)
                if not is_equal:
                    self.judge.found("TCP", "received bytes differ from those sent")
            ends.reverse()
            await asyncio.sleep(0.5)

    def fault_within(self, begin: float, end: float) -> str | None:
        """A fault of a kernel or of all leases between two times."""
        return next(
            (why for start, stop, why in self.score.windows if start <= end and stop >= begin),
            None,
        )

    async def heal(self, gateway: store.Gateway) -> None:
        """Every node ready within HEAL_S, pings between all pods, leases as they were."""
        began = time.monotonic()
        missing = await self.unhealed(gateway)
        while missing and time.monotonic() - began < HEAL_S * self.judge.slack:
            await asyncio.sleep(0.2)
            missing = await self.unhealed(gateway)
        took = time.monotonic() - began
        self.report.lines.append(
            f"healed after {took:.1f} s" if not missing else f"not healed after {took:.1f} s"
        )
        for each in missing:
            self.judge.found(f"not healed: {each[:60]}", each)

    async def unhealed(self, gateway: store.Gateway) -> list[str]:
        """What is not as it was before the attack."""
        missing = []
        for node in self.nodes:
            try:
                _, body = await node.get(HEALTH_PORT, "/readyz?format=json")
                # A contest is told of for a minute after its end, by design: backoff.Contest.
                missing += [
                    f"node{node.number} not ready: {check}"
                    for check in json.loads(body)["checks"]
                    if not check["ok"] and "has undone it" not in check["detail"]
                ]
            except OSError as error:
                missing.append(f"node{node.number} not ready: {error}")
            with contextlib.suppress(OSError):
                if self.subnet_files[node.number] == read_regular(node.subnet_file):
                    continue
            missing.append(f"{node.subnet_file.name} is not as it was")
        for source in self.world.targets:
            for target in self.world.targets:
                if source is not target:
                    answer = None
                    with contextlib.suppress(OSError):
                        answer = await ping(source.pod, target.pod_address, timeout_s=1.0)
                    if answer is None or not answer.is_echo_reply:
                        missing.append(f"no ping from pod{source.number} to pod{target.number}")
        found = await gateway.read(store.SUBNETS, is_prefix=True)
        for name, public_ip in self.leases.items():
            if public_ip not in found.get(store.SUBNETS + name, ""):
                missing.append(f"lease {name} is {found.get(store.SUBNETS + name)}")
        return missing

    def judge_pings(self, streams: list[judge.HonestPings]) -> None:
        """No ping may be lost while no fault excuses it, and most must have had no excuse."""
        excused: Counter[str] = Counter()
        sent = quiet = lost_quiet = lost = 0
        for stream in streams:
            lost += stream.lost
            sent += stream.sent
            quiet += self.score.excuses(stream.sent_times()).count(None)
            losses = stream.losses()
            for at, why in zip(losses, self.score.excuses(losses), strict=True):
                if why is None:
                    lost_quiet += 1
                    self.judge.found("ping lost in quiet", f"sent at {at - self.judge.began:.2f} s")
                else:
                    excused[why.partition(" at ")[0]] += 1
        self.report.lines.append(
            f"pings: {sent} sent, {quiet} of them in quiet windows; {lost} lost, {lost_quiet} in "
            f"quiet windows; the others while: {dict(excused)}"
        )
        complete = self.transfers["complete"]
        each_ms = self.transfers["ms"] // max(1, complete)
        self.report.lines.append(
            f"TCP: {complete} transfers of {TRANSFER_LEN >> 20} MB complete and equal, "
            f"{each_ms} ms each, {self.transfers['interrupted']} interrupted by a fault"
        )
        if quiet < sent * QUIET_SHARE or not complete:
            self.judge.found(
                "nothing measured", f"{quiet} of {sent} pings in quiet, {complete} transfers"
            )

    def tell(self) -> None:
        """The table of what was sent, and what became of it in each daemon."""
        by_attacker: dict[str, list[str]] = {}
        for (who, kind), count in sorted(self.score.done.items()):
            by_attacker.setdefault(who, []).append(f"{kind} {count}")
        self.report.lines += [f"{who}: {', '.join(kinds)}" for who, kinds in by_attacker.items()]
        self.report.lines.append(
            f"sent: {dict(self.score.packets)}; "
            f"refused by the sender's kernel: {dict(self.score.refused)}"
        )
        for watched in self.judge.watched:
            counters = watched.document.get("counters") or {}
            for direction in ("encap", "decap"):
                found = counters.get(direction, {})
                self.report.lines.append(
                    f"node{watched.node.number} {direction}: {found.get('packets_in')} in, "
                    f"{found.get('packets_out')} out, dropped {found.get('drops')}"
                )
            self.report.lines.append(
                f"node{watched.node.number}: socket_overflows {counters.get('socket_overflows')}, "
                f"tun_queue_full {(watched.document.get('kernel') or {}).get('tun_queue_drops')}"
            )
        self.report.lines.append(f"looks at each daemon: {self.judge.looks}")
