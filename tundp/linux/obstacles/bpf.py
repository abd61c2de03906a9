"""BPF programs that no netlink dump lists: tcx, sk_lookup and those of control groups.

bpf(2) answers which are attached (BPF_PROG_QUERY, linux/bpf.h), and needs CAP_NET_ADMIN; what a
program does is known to itself. Programs attached to netfilter's hooks (Linux 6.4) cannot be asked
for by device or hook, and are not looked at.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Final, NamedTuple

from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.bpf_call import bpf
from tundp.linux.obstacles.scene import NOT_JUDGED, Scene

ID: Final = "obstacle.bpf"
_QUERY: Final = struct.Struct("=IIIIQIxxxxQQQQ")
"""union bpf_attr, query: target, type of attachment, flags, the kernel's flags, address of program
ids, their number, addresses of flags, of link ids, of their flags; revision."""
MOST: Final = 64
"""Programs of one place that are asked for (BPF_MPROG_MAX of the kernel)."""
_TCX: Final = {"ingress": uapi.BPF_TCX_INGRESS, "egress": uapi.BPF_TCX_EGRESS}
_GROUP: Final = {
    "ingress": uapi.BPF_CGROUP_INET_INGRESS,
    "egress": uapi.BPF_CGROUP_INET_EGRESS,
    "sendmsg4": uapi.BPF_CGROUP_UDP4_SENDMSG,
    "recvmsg4": uapi.BPF_CGROUP_UDP4_RECVMSG,
}
"""Attachments that meet the datagrams of a socket, as bpftool-cgroup(8) spells them."""
_NAMESPACE: Final = Path("/proc/thread-self/ns/net")
_MOUNTS: Final = Path("/proc/self/mountinfo")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


class Program(NamedTuple):
    """An attached program: its id, and that of the link that holds it, 0 for none."""

    program: int
    link: int


def query(target: int, kind: int, *, flags: int = 0, has_links: bool = False) -> list[Program]:
    """The programs attached to a device index or descriptor, in order.

    kind: BPF_ of enum bpf_attach_type. has_links: whether the kernel can name links there
    (6.6). None where the kernel knows no such attachment (EINVAL); PlatformError if it refuses.
    """
    programs, links = (ctypes.c_uint32 * MOST)(), (ctypes.c_uint32 * MOST)()
    attributes = ctypes.create_string_buffer(
        _QUERY.pack(
            *(target, kind, flags, 0, ctypes.addressof(programs), MOST),
            *(0, ctypes.addressof(links) if has_links else 0, 0, 0),
        ),
        _QUERY.size,
    )
    try:
        bpf(uapi.BPF_PROG_QUERY, attributes)
    except PlatformError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            return []
        if error.errno != errno.ENOSPC:
            raise
    count = min(MOST, _QUERY.unpack(attributes.raw)[5])
    return [Program(programs[at], links[at]) for at in range(count)]


class Asked(NamedTuple):
    """What was found."""

    findings: list[Finding]
    looked_at: list[str]
    refused: str
    """What could not be looked at, and why."""


def ask(scene: Scene, devices: Sequence[str]) -> Asked:
    """Look for programs that may drop the overlay's packets. Never fails."""
    parts = {"tcx": _tcx(devices)}
    if scene.is_tunnel:
        parts["sk_lookup"] = _sk_lookup()
        if scene.pid is not None:
            parts["of control groups"] = _of_group(scene.pid)
    found: list[Finding] = []
    looked_at: list[str] = []
    refused: dict[str, list[str]] = {}
    for what, part in parts.items():
        try:
            found += part
            looked_at.append(what)
        except PlatformError as error:
            refused.setdefault(str(error), []).append(what)
    words = (f"BPF programs {', '.join(what)}: {why}" for why, what in refused.items())
    return Asked(found, looked_at, "; ".join(words))


def _tcx(devices: Sequence[str]) -> Iterator[Finding]:
    for device in devices:
        try:
            index = socket.if_nametoindex(device)
        except OSError:
            continue
        for way, kind in _TCX.items():
            found = query(index, kind, has_links=True)
            if not found:
                continue
            command = " && ".join(dict.fromkeys(_detach(each, device, way) for each in found))
            yield Finding(
                id="obstacle.tc",
                verdict=Verdict.NOTE,
                evidence=f"{_ids(found)} of tcx on {device} ({way}) may drop packets",
                meaning=NOT_JUDGED,
                next_step=f"{command}  (as the program that attached it is told to)",
                facts={"command": command},
            )


def _detach(program: Program, device: str, way: str) -> str:
    if program.link:
        return f"bpftool link detach id {program.link}"
    return f"bpftool net detach tcx_{way} id {program.program} dev {quote(device)}"


def _sk_lookup() -> Iterator[Finding]:
    """Programs that choose a socket for what comes in, or none."""
    try:
        descriptor = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PlatformError(f"{_NAMESPACE}: {error.strerror}", error.errno) from None
    try:
        found = query(descriptor, uapi.BPF_SK_LOOKUP)
    finally:
        os.close(descriptor)
    if found:
        yield Finding(
            id=ID,
            verdict=Verdict.NOTE,
            evidence=f"{_ids(found)} of sk_lookup in this network namespace may drop, or give to"
            " other sockets, datagrams of the tunnel (UDP) from peers",
            meaning=NOT_JUDGED,
            next_step="bpftool link  names the link of type netns; bpftool link detach id ..."
            "  (as the program that attached it is told to)",
        )


def _of_group(pid: int) -> Iterator[Finding]:
    """Programs of the daemon's control group and those above: systemd's IPAddressDeny= is one."""
    if (group := group_of(pid)) is None:
        return
    top, inner = group
    for way, kind in _GROUP.items():
        effective = {each.program for each in _at(inner, kind, uapi.BPF_F_QUERY_EFFECTIVE)}
        for place in (inner, *inner.parents):
            here = [each for each in _at(place, kind) if each.program in effective]
            if here:
                command = " && ".join(
                    f"bpftool cgroup detach {place} {way} id {each.program}" for each in here
                )
                yield Finding(
                    id=ID,
                    verdict=Verdict.NOTE,
                    evidence=f"{_ids(here)} of the control group {place} ({way}) may drop"
                    " datagrams of the tunnel (UDP): the daemon belongs to it",
                    meaning=NOT_JUDGED,
                    next_step=f"{command}  (of a systemd unit or slice: IPAddressDeny=,"
                    " RestrictNetworkInterfaces=)",
                    facts={"command": command},
                )
            if place == top:
                break


def _at(place: Path, kind: int, flags: int = 0) -> list[Program]:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PlatformError(f"{place}: {error.strerror}", error.errno) from None
    try:
        return query(descriptor, kind, flags=flags)
    finally:
        os.close(descriptor)


def group_of(pid: int) -> tuple[Path, Path] | None:
    """Where control groups of version 2 are mounted, and the directory of a process's own.

    None where there are none of version 2. PlatformError if that cannot be found out.
    """
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise PlatformError(f"{error.filename}: {error.strerror}", error.errno) from None
    own = next((line[3:] for line in lines.splitlines() if line.startswith("0::/")), None)
    if own is None:
        return None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if not after.startswith("cgroup2 ") or len(fields) < 5:
            continue
        root, mounted = (Path(_OCTAL.sub(_character, each)) for each in fields[3:5])
        # A namespace of control groups shows those outside as /../.
        if Path(own).is_relative_to(root) and ".." not in Path(own).parts:
            return mounted, mounted / Path(own).relative_to(root)
    raise PlatformError(f"{own} of process {pid} is in no file system that is mounted here")


def _character(octal: re.Match[str]) -> str:
    return chr(int(octal[1], 8))


def _ids(programs: Sequence[Program]) -> str:
    """In words."""
    numbers = ", ".join(str(each.program) for each in programs)
    return f"BPF program{'s' if len(programs) > 1 else ''} {numbers}"
