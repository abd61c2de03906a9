"""Programs that meet frames below IP, filters of tc and XDP: where they are, not what they do.

A filter's work is known to itself. What its qdisc has dropped so far is counted by the kernel
(linux/gen_stats.h: gnet_stats_queue); what an XDP program drops is not. Programs attached as
links (tcx, Linux 6.6) belong to no qdisc, and are not listed here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles.scene import NOT_JUDGED
from tundp.linux.rtnl import attributes

_TCMSG: Final = struct.Struct("=BxxxiIII")
"""struct tcmsg: family, index, handle, parent, info (linux/rtnetlink.h)."""
_IFINFOMSG: Final = struct.Struct("=BxHiII")
_QUEUE: Final = struct.Struct("=IIIII")
"""struct gnet_stats_queue: length, backlog, drops, requeues, overlimits."""
_WAYS: Final = {
    "ingress": uapi.TC_H_CLSACT & 0xFFFF0000 | uapi.TC_H_MIN_INGRESS,
    "egress": uapi.TC_H_CLSACT & 0xFFFF0000 | uapi.TC_H_MIN_EGRESS,
}
_HOOKED: Final = ("clsact", "ingress")
"""Kinds of qdisc that only carry filters."""


@dataclass(frozen=True, slots=True)
class _Qdisc:
    index: int
    dropped: int


async def findings(netlink: Netlink, devices: Sequence[str]) -> list[Finding]:
    """Filters and programs of these devices. PlatformError if the kernel refuses to list them."""
    found = []
    names = {link.index: link.name for link in await netlink.links() if link.name in devices}
    request = uapi.RTM_GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0)
    for qdisc in await netlink.dump("list qdiscs", request, _decode_qdisc):
        if qdisc.index in names:
            found += await _filters(netlink, names[qdisc.index], qdisc)
    request = uapi.RTM_GETLINK, _IFINFOMSG.pack(0, 0, 0, 0, 0)
    for index in await netlink.dump("list XDP programs", request, _decode_xdp):
        if index in names:
            command = f"ip link set dev {names[index]} xdp off"
            found.append(
                Finding(
                    id="obstacle.xdp",
                    verdict=Verdict.NOTE,
                    evidence=f"an XDP program is attached to {names[index]}, and may drop packets",
                    meaning=NOT_JUDGED,
                    next_step=f"to see whether it does: {command}",
                    facts={"command": command},
                )
            )
    return found


async def _filters(netlink: Netlink, device: str, qdisc: _Qdisc) -> list[Finding]:
    found = []
    for way, parent in _WAYS.items():
        request = uapi.RTM_GETTFILTER, _TCMSG.pack(0, qdisc.index, 0, parent, 0)
        listed = await netlink.dump(f"list filters of {device}", request, _decode_kind)
        if not (kinds := ", ".join(dict.fromkeys(listed))):
            continue
        command = f"tc filter del dev {device} {way}"
        # The kernel counts what the filters of both ways drop as one.
        what = "drop packets, some of them maybe ours" if qdisc.dropped else "may drop packets"
        found.append(
            Finding(
                id="obstacle.tc",
                verdict=Verdict.WARN if qdisc.dropped else Verdict.NOTE,
                evidence=f"filters of tc on {device} ({way}: {kinds}) {what}",
                meaning="" if qdisc.dropped else NOT_JUDGED,
                next_step=f"{command}  (all of them; tc -s filter show dev {device} {way})",
                facts={"command": command, "dropped": str(qdisc.dropped)},
            )
        )
    return found


def _decode_qdisc(body: memoryview) -> _Qdisc | None:
    _, index, _, _, _ = _TCMSG.unpack_from(body)
    values = dict(attributes(body[_TCMSG.size :]))
    if _text(values.get(uapi.TCA_KIND)) not in _HOOKED:
        return None
    queue = dict(attributes(values.get(uapi.TCA_STATS2, memoryview(b"")))).get(uapi.TCA_STATS_QUEUE)
    dropped = 0 if queue is None else int(_QUEUE.unpack_from(queue)[2])
    return _Qdisc(index, dropped)


def _decode_kind(body: memoryview) -> str | None:
    return _text(dict(attributes(body[_TCMSG.size :])).get(uapi.TCA_KIND)) or None


def _decode_xdp(body: memoryview) -> int | None:
    """The index of a link that has a program."""
    values = dict(attributes(body[_IFINFOMSG.size :]))
    xdp = dict(attributes(values.get(uapi.IFLA_XDP, memoryview(b""))))
    attached = xdp.get(uapi.IFLA_XDP_ATTACHED)
    if attached is None or not attached[0]:
        return None
    return int(_IFINFOMSG.unpack_from(body)[2])


def _text(value: memoryview | None) -> str:
    return "" if value is None else bytes(value).rstrip(b"\0").decode(errors="replace")
