"""Network devices, what they are stacked on, and their XDP programs: one rtnetlink dump."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles.scene import NOT_JUDGED
from tundp.linux.rtnl import attribute_u32, attributes

_IFINFOMSG: Final = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, device type, index, flags, changed flags (linux/rtnetlink.h)."""
_XDP_MODES: Final = {
    uapi.XDP_ATTACHED_DRV: ("xdpdrv",),
    uapi.XDP_ATTACHED_SKB: ("xdpgeneric",),
    uapi.XDP_ATTACHED_HW: ("xdpoffload",),
}
_XDP_PROGRAMS: Final = {
    uapi.IFLA_XDP_DRV_PROG_ID: "xdpdrv",
    uapi.IFLA_XDP_SKB_PROG_ID: "xdpgeneric",
    uapi.IFLA_XDP_HW_PROG_ID: "xdpoffload",
}
_STACKED: Final = ("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec")
"""Kinds whose IFLA_LINK is the device that carries their frames. A veth's is its other end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One network device of this namespace."""

    index: int
    name: str
    kind: str = ""
    """The driver's name for it (IFLA_INFO_KIND); empty for hardware."""
    master: int = 0
    """The index of the bridge, bond or VRF it belongs to; 0 for none."""
    member_of: str = ""
    """The kind of `master`."""
    carrier: int = 0
    """The index of the device its frames are carried by; 0 if it is none of `_STACKED`."""
    xdp: tuple[str, ...] = ()
    """The modes in which an XDP program is attached, as ip-link(8) spells them."""


async def read(netlink: Netlink) -> list[Device]:
    """All devices. PlatformError if the kernel refuses to list them."""
    body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    body += attribute_u32(uapi.IFLA_EXT_MASK, uapi.RTEXT_FILTER_SKIP_STATS)
    return await netlink.dump("list links", (uapi.RTM_GETLINK, body), decode)


def decode(body: memoryview) -> Device | None:
    """The device of an RTM_NEWLINK; None for the port of a bridge as the bridge sees it."""
    family, _, index, _, _ = _IFINFOMSG.unpack_from(body)
    if family != socket.AF_UNSPEC:
        return None
    values = dict(attributes(body[_IFINFOMSG.size :]))
    info = dict(attributes(values.get(uapi.IFLA_LINKINFO, memoryview(b""))))
    kind = _text(info.get(uapi.IFLA_INFO_KIND))
    is_here = uapi.IFLA_LINK_NETNSID not in values
    return Device(
        index=index,
        name=_text(values.get(uapi.IFLA_IFNAME)),
        kind=kind,
        master=_number(values.get(uapi.IFLA_MASTER)),
        member_of=_text(info.get(uapi.IFLA_INFO_SLAVE_KIND)),
        carrier=_number(values.get(uapi.IFLA_LINK)) if is_here and kind in _STACKED else 0,
        xdp=_xdp(values.get(uapi.IFLA_XDP)),
    )


def _xdp(value: memoryview | None) -> tuple[str, ...]:
    """What is attached. Before Linux 4.16 the kernel names no program of a mode."""
    values = dict(attributes(memoryview(b"") if value is None else value))
    attached = values.get(uapi.IFLA_XDP_ATTACHED)
    if not attached or not attached[0]:
        return ()
    if (modes := _XDP_MODES.get(attached[0])) is not None:
        return modes
    return tuple(mode for kind, mode in _XDP_PROGRAMS.items() if kind in values) or ("xdp",)


def vrfs(devices: Sequence[Device], names: Collection[str]) -> Iterator[Finding]:
    """Devices of ours that belong to a VRF: their routes are in a table of its own (vrf.rst)."""
    by_index = {each.index: each.name for each in devices}
    for device in devices:
        if device.member_of != "vrf" or device.name not in names:
            continue
        command = f"ip link set dev {quote(device.name)} nomaster"
        yield Finding(
            id="obstacle.vrf",
            verdict=Verdict.NOTE,
            evidence=f"{device.name} belongs to the VRF {by_index.get(device.master, '?')}: what"
            " comes in by it meets the routes and sockets of the VRF alone",
            meaning=NOT_JUDGED,
            next_step=f"to see whether that is in the way: {command}",
            facts={"command": command},
        )


def ports(devices: Sequence[Device], names: Collection[str]) -> tuple[str, ...]:
    """The devices that are ports of these bridges."""
    bridges = {each.index for each in devices if each.kind == "bridge" and each.name in names}
    return tuple(each.name for each in devices if each.master in bridges)


def below(devices: Sequence[Device], name: str) -> tuple[str, ...]:
    """The devices that carry the frames of one: the ports of a bridge or bond, a VLAN's base."""
    by_index = {each.index: each for each in devices}
    found: dict[str, None] = {}
    waiting = [each for each in devices if each.name == name]
    while waiting:
        device = waiting.pop()
        under = [each for each in devices if each.master == device.index]
        if device.carrier in by_index:
            under.append(by_index[device.carrier])
        for each in under:
            if each.name not in found and each.name != name:
                found[each.name] = None
                waiting.append(each)
    return tuple(found)


def _text(value: memoryview | None) -> str:
    return "" if value is None else bytes(value).rstrip(b"\0").decode(errors="replace")


def _number(value: memoryview | None) -> int:
    return 0 if value is None or len(value) != 4 else int.from_bytes(value, sys.byteorder)
