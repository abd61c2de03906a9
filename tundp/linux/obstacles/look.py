"""One look at everything that decides whether the overlay's packets pass. Changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles import firewall, ipsec, programs, rulesets, sysctls
from tundp.linux.obstacles.routes import Routes
from tundp.linux.obstacles.rules import bases
from tundp.linux.obstacles.rulesets import Rulesets
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


async def look(netlink: Netlink, scene: Scene) -> Looked:
    """Ask the kernel. Never fails: what could not be asked is in the summary."""
    unread: list[str] = []
    found: list[Finding] = []
    pods: list[str] = []
    routes = Routes(netlink, scene)
    try:
        pods = await routes.pod_devices()
        found += await routes.findings(pods)
    except PlatformError as error:
        unread.append(f"routes: {error}")
    if why_not := sysctls.why_not_seen():
        unread.append(why_not)
    found += sysctls.findings(scene, pods)
    listed = await rulesets.read()
    judged = await asyncio.to_thread(firewall.judge, listed, scene, pods)
    found += await firewall.findings(listed, scene, judged)
    devices = tuple(dict.fromkeys((scene.uplink, scene.device, *pods)))
    try:
        found += await routes.marked(judged.marks, pods)
        found += await programs.findings(netlink, devices)
        found += ipsec.findings(await asyncio.to_thread(ipsec.read), scene, pods)
    except PlatformError as error:
        unread.append(str(error))
    return Looked(
        findings=found,
        summary=_summary(scene, routes.asked, pods, listed, [*unread, *listed.unread], found),
    )


def _summary(
    scene: Scene,
    asked: int,
    pods: Sequence[str],
    listed: Rulesets,
    unread: Sequence[str],
    found: Sequence[Finding],
) -> Finding:
    chains = sum(len(bases(listed.tables, hook)) for hook in firewall.HOOKS)
    devices = dict.fromkeys((scene.device, *pods))
    looked_at = [
        f"routes to {asked} of {scene.peer_count} peers",
        f"{len(listed.tables)} firewall tables ({chains} base chains that drop or mark)",
        *(() if sysctls.why_not_seen() else (f"forwarding by {', '.join(devices)}",)),
        "filters of tc, XDP",
        "IPsec policies",
    ]
    count = sum(each.verdict is not Verdict.NOTE for each in found)
    result = f"{count} found in the way" if count else "nothing found in the way"
    if doubts := sum(each.meaning == NOT_JUDGED for each in found):
        result += f", {doubts} that nobody can judge from outside"
    not_read = f"; not looked at: {'; '.join(unread)}" if unread else ""
    verdict = Verdict.NOTE if count or doubts else Verdict.OK
    return Finding(
        id=SUMMARY,
        verdict=Verdict.UNKNOWN if unread else verdict,
        evidence=f"{', '.join(looked_at)}: {result}{not_read}",
        facts={"unread": str(len(unread))},
    )
