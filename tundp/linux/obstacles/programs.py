"""What meets frames below IP: filters and queues of tc, and XDP: where they are, not what they do.

A filter's work is known to itself. What its qdisc has dropped so far is counted by the kernel
(linux/gen_stats.h: gnet_stats_queue); what an XDP program drops is not. Programs attached as
links (tcx, Linux 6.6) belong to no qdisc: bpf.py.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles.devices import Device
from tundp.linux.obstacles.scene import NOT_JUDGED
from tundp.linux.rtnl import attributes

_TCMSG: Final = struct.Struct("=BxxxiIII")
"""struct tcmsg: family, index, handle, parent, info (linux/rtnetlink.h)."""
_BASIC: Final = struct.Struct("=QI")
"""struct gnet_stats_basic: bytes and packets sent."""
_QUEUE: Final = struct.Struct("=IIIII")
"""struct gnet_stats_queue: length, backlog, drops, requeues, overlimits."""
_WAYS: Final = {
    "ingress": uapi.TC_H_CLSACT & 0xFFFF0000 | uapi.TC_H_MIN_INGRESS,
    "egress": uapi.TC_H_CLSACT & 0xFFFF0000 | uapi.TC_H_MIN_EGRESS,
}
_HOOKED: Final = ("clsact", "ingress")
"""Kinds of qdisc that only carry filters."""


@dataclass(frozen=True, slots=True)
class Qdisc:
    """A qdisc that carries filters, or the root of a device's queues."""

    index: int
    kind: str
    sent: int
    """Packets so far."""
    dropped: int

    @property
    def is_hooked(self) -> bool:
        """Whether it only carries filters."""
        return self.kind in _HOOKED


async def findings(
    netlink: Netlink, devices: Sequence[Device], names: Collection[str]
) -> list[Finding]:
    """Filters and programs of the devices named. PlatformError if the kernel does not list them."""
    known = {each.index: each.name for each in devices if each.name in names}
    found = []
    request = uapi.RTM_GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0)
    for qdisc in await netlink.dump("list qdiscs", request, decode_qdisc):
        if qdisc.index not in known:
            continue
        if qdisc.is_hooked:
            found += await _filters(netlink, known[qdisc.index], qdisc)
        else:
            found += _queue(known[qdisc.index], qdisc)
    return [*found, *_xdp(devices, names)]


def _xdp(devices: Sequence[Device], names: Collection[str]) -> Iterator[Finding]:
    for device in devices:
        if device.name not in names or not device.xdp:
            continue
        # Without its mode `ip link` removes what the driver runs, and leaves a generic one.
        command = " && ".join(
            f"ip link set dev {quote(device.name)} {mode} off" for mode in device.xdp
        )
        yield Finding(
            id="obstacle.xdp",
            verdict=Verdict.NOTE,
            evidence=f"an XDP program is attached to {device.name}, and may drop packets",
            meaning=NOT_JUDGED,
            next_step=f"{command}  (to see whether it does; refused as busy while a program holds"
            " it by a link: end that program, or bpftool link detach)",
            facts={"command": command},
        )


def _queue(device: str, qdisc: Qdisc) -> Iterator[Finding]:
    """A queue that has dropped whatever it got. One that shapes drops some, as it should."""
    if qdisc.sent or not qdisc.dropped:
        return
    command = f"tc qdisc del dev {quote(device)} root"
    yield Finding(
        id="obstacle.tc",
        verdict=Verdict.WARN,
        evidence=f"the qdisc {qdisc.kind} of {device} has dropped all of {qdisc.dropped} packets",
        next_step=f"{command}  (tc -s qdisc show dev {device})",
        facts={"command": command, "dropped": str(qdisc.dropped)},
    )


async def _filters(netlink: Netlink, device: str, qdisc: Qdisc) -> list[Finding]:
    found = []
    for way, parent in _WAYS.items():
        request = uapi.RTM_GETTFILTER, _TCMSG.pack(0, qdisc.index, 0, parent, 0)
        listed = await netlink.dump(f"list filters of {device}", request, decode_filter)
        if not (kinds := ", ".join(dict.fromkeys(listed))):
            continue
        command = f"tc filter del dev {quote(device)} {way}"
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


def decode_qdisc(body: memoryview) -> Qdisc | None:
    """The qdisc of an RTM_NEWQDISC; None for one below another one."""
    _, index, _, parent, _ = _TCMSG.unpack_from(body)
    values = dict(attributes(body[_TCMSG.size :]))
    kind = _text(values.get(uapi.TCA_KIND))
    if kind not in _HOOKED and parent != uapi.TC_H_ROOT:
        return None
    stats = dict(attributes(values.get(uapi.TCA_STATS2, memoryview(b""))))
    basic, queue = stats.get(uapi.TCA_STATS_BASIC), stats.get(uapi.TCA_STATS_QUEUE)
    return Qdisc(
        index=index,
        kind=kind,
        sent=0 if basic is None else int(_BASIC.unpack_from(basic)[1]),
        dropped=0 if queue is None else int(_QUEUE.unpack_from(queue)[2]),
    )


def decode_filter(body: memoryview) -> str | None:
    """The kind of the filter of an RTM_NEWTFILTER."""
    _TCMSG.unpack_from(body)
    return _text(dict(attributes(body[_TCMSG.size :])).get(uapi.TCA_KIND)) or None


def _text(value: memoryview | None) -> str:
    return "" if value is None else bytes(value).rstrip(b"\0").decode(errors="replace")
