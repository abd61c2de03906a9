"""One look at everything that decides whether the overlay's packets pass. Changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles import (
    bpf,
    devices,
    firewall,
    ipsec,
    neighbours,
    own_rules,
    programs,
    rulesets,
    sysctls,
)
from tundp.linux.obstacles.devices import Device
from tundp.linux.obstacles.routes import Routes
from tundp.linux.obstacles.rules import bases
from tundp.linux.obstacles.scene import NOT_JUDGED, Scene

IDS: Final = (
    "obstacle.route",
    "obstacle.tunnel",
    "obstacle.forwarding",
    "obstacle.rp_filter",
    "obstacle.firewall",
    "obstacle.hooks",
    "obstacle.conntrack",
    "obstacle.tc",
    "obstacle.xdp",
    "obstacle.ipsec",
    "obstacle.bpf",
    "obstacle.neighbour",
    "obstacle.vrf",
)
"""The ids of what can be found."""
SUMMARY: Final = "obstacles"
"""The id of the finding that tells what was looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What was found."""

    findings: Sequence[Finding]
    """Of the ids above; none if nothing was found in the way."""
    summary: Finding
    """What was looked at, and what was not."""


async def look(netlink: Netlink, scene: Scene, *, rules_s: float | None = None) -> Looked:
    """Ask the kernel. Never fails: what could not be asked is in the summary.

    rules_s: how long listing and judging firewall rules may take; None for as long as it takes.
    """
    seen = _Look(netlink, scene, rules_s)
    await seen.at_everything()
    return Looked(findings=seen.found, summary=seen.summary())


class _Look:
    """One look: each part on its own, so that one the kernel refuses hides no other."""

    def __init__(self, netlink: Netlink, scene: Scene, rules_s: float | None) -> None:
        self._netlink = netlink
        self._scene = scene
        self._rules_s = rules_s
        self._routes = Routes(netlink, scene)
        self._devices: Sequence[Device] = ()
        self._pods: Sequence[str] = ()
        self._unread: list[str] = []
        self._looked_at: list[str] = []
        self.found: list[Finding] = []

    async def at_everything(self) -> None:
        """Fill `found`."""
        await self._part("devices", self._at_devices)
        await self._part("routes", self._at_routes)
        await self._part("neighbours", self._at_neighbours)
        self.found += sysctls.findings(self._scene, self._pods)
        if why_not := sysctls.why_not_seen():
            self._unread.append(why_not)
        else:
            forwarding = dict.fromkeys((self._scene.device, *self._pods))
            self._looked_at.append(f"forwarding by {', '.join(forwarding)}")
        await self._part("firewall rules", self._at_firewall)
        await self._part("filters and queues of tc, XDP", self._at_programs)
        await self._part("BPF programs", self._at_bpf)
        await self._part("IPsec policies", self._at_ipsec)

    async def _part(self, what: str, part: Callable[[], Awaitable[str | None]]) -> None:
        try:
            said = await part()
            if said != "":
                self._looked_at.append(said or what)
        except PlatformError as error:
            self._unread.append(f"{what}: {error}")

    async def _at_devices(self) -> str:
        found = await devices.read(self._netlink)
        self._pods = await self._routes.pod_devices(found)
        self._devices = found
        return ""

    def _require_devices(self) -> None:
        """Raise PlatformError if what depends on them would find nothing for lack of them."""
        if not self._devices:
            raise PlatformError("the devices of this host could not be listed")

    async def _at_routes(self) -> str:
        self._require_devices()
        scene = self._scene
        names = (scene.uplink, scene.device, *self._pods)
        self.found += devices.vrfs(self._devices, names)
        self.found += await own_rules.findings(self._netlink)
        self.found += await self._routes.findings(self._pods)
        return f"routes to {self._routes.asked} of {scene.peer_count} peers"

    async def _at_neighbours(self) -> None:
        self._require_devices()
        scene = self._scene
        index = next((each.index for each in self._devices if each.name == scene.uplink), 0)
        self.found += await neighbours.findings(
            self._netlink, index, scene.uplink, self._routes.next_hops()
        )

    async def _at_firewall(self) -> str:
        try:
            async with asyncio.timeout(self._rules_s):
                return await self._at_rules()
        except TimeoutError:
            # A thread that judges goes on, and nobody waits for it.
            raise PlatformError(f"not finished within {self._rules_s:g} s") from None

    async def _at_rules(self) -> str:
        scene = self._scene
        listed = await rulesets.read()
        ports = {
            name: devices.ports(self._devices, (name,)) for name in (scene.uplink, *self._pods)
        }
        judged = await asyncio.to_thread(firewall.judge, listed, scene, self._pods, ports)
        self.found += await firewall.findings(scene, judged)
        self._unread += listed.unread
        self.found += await self._routes.marked(judged.marks, self._pods)
        chains = sum(len(bases(listed.tables, hook)) for hook in firewall.HOOKS)
        return (
            f"{len(listed.tables)} firewall tables ({chains} base chains that drop, divert or mark)"
        )

    @property
    def _names(self) -> tuple[str, ...]:
        """The devices whose frames carry packets of ours."""
        scene = self._scene
        below = devices.below(self._devices, scene.uplink)
        return tuple(dict.fromkeys((scene.uplink, *below, scene.device, *self._pods)))

    async def _at_programs(self) -> None:
        self._require_devices()
        self.found += await programs.findings(self._netlink, self._devices, self._names)

    async def _at_bpf(self) -> str:
        asked = await asyncio.to_thread(bpf.ask, self._scene, self._names)
        self.found += asked.findings
        if asked.refused:
            self._unread.append(asked.refused)
        return f"BPF programs ({', '.join(asked.looked_at)})" if asked.looked_at else ""

    async def _at_ipsec(self) -> None:
        policies = await asyncio.to_thread(ipsec.read)
        self.found += await asyncio.to_thread(ipsec.findings, policies, self._scene, self._pods)

    def summary(self) -> Finding:
        """What was looked at, and what was not."""
        count = sum(each.verdict is not Verdict.NOTE for each in self.found)
        result = f"{count} found in the way" if count else "nothing found in the way"
        if doubts := sum(each.meaning == NOT_JUDGED for each in self.found):
            result += f", {doubts} that nobody can judge from outside"
        unread = self._unread
        not_read = f"; not looked at: {'; '.join(unread)}" if unread else ""
        verdict = Verdict.NOTE if count or doubts else Verdict.OK
        return Finding(
            id=SUMMARY,
            verdict=Verdict.UNKNOWN if unread else verdict,
            evidence=f"{', '.join(self._looked_at)}: {result}{not_read}",
            facts={"unread": str(len(unread))},
        )
