"""Switches of the kernel that decide whether packets are forwarded, read from /proc."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux.kernel_counts import namespace_counts
from tundp.linux.obstacles.scene import Scene

ROOT: Final = Path("/proc/sys/net")
STRICT: Final = 1
"""rp_filter: a source must be reached over the device its packets come in by (RFC 3704)."""
NEARLY_FULL: Final = 0.95
HOST: Final = "the host"
"""Where a command is to be run that a network namespace of its own may not."""


def read(name: str) -> int | None:
    """The value of e.g. `ipv4/ip_forward` in this namespace; None if there is none."""
    try:
        return int((ROOT / name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def why_not_seen() -> str:
    """What of these cannot be read, and why; empty if they can: all kernels have ip_forward."""
    path = ROOT / "ipv4/ip_forward"
    try:
        path.read_text(encoding="ascii")
    except OSError as error:
        return f"forwarding, rp_filter and the connection table: {path}: {error.strerror}"
    return ""


def effective_rp_filter(device: str) -> int:
    """The larger one of `all` and the device counts (Documentation/networking/ip-sysctl)."""
    return max(read(f"ipv4/conf/{each}/rp_filter") or 0 for each in ("all", device))


def findings(scene: Scene, pod_devices: Sequence[str]) -> list[Finding]:
    """What the switches keep from passing."""
    return [*_forwarding(scene, pod_devices), *_rp_filter(scene), *_conntrack()]


def _forwarding(scene: Scene, pod_devices: Sequence[str]) -> Iterator[Finding]:
    verdict = Verdict.FAIL if pod_devices else Verdict.WARN
    meaning = "" if pod_devices else "there are no pods yet"
    if read("ipv4/ip_forward") == 0:
        command = "sysctl -w net.ipv4.ip_forward=1"
        yield Finding(
            id="obstacle.forwarding",
            verdict=verdict,
            evidence="net.ipv4.ip_forward is 0: the kernel forwards nothing between"
            f" {scene.device} and pods",
            meaning=meaning,
            next_step=f"{command}  (to keep it: a file in /etc/sysctl.d)",
            facts={"command": command},
        )
        return
    for device in dict.fromkeys((scene.device, *pod_devices)):
        if read(f"ipv4/conf/{device}/forwarding") == 0:
            command = f"sysctl -w {quote(f'net/ipv4/conf/{device}/forwarding')}=1"
            is_all = device == scene.device or len(pod_devices) == 1
            yield Finding(
                id="obstacle.forwarding",
                verdict=verdict if is_all else Verdict.WARN,
                evidence=f"forwarding is 0 on {device}: the kernel forwards nothing that comes"
                " in by it",
                meaning=meaning,
                next_step=command,
                facts={"command": command},
            )


def _rp_filter(scene: Scene) -> Iterator[Finding]:
    if scene.is_tunnel and scene.is_open and effective_rp_filter(scene.device) == STRICT:
        device = scene.device
        name = quote(f"net/ipv4/conf/{device}/rp_filter")
        is_all = read("ipv4/conf/all/rp_filter") == STRICT
        command = f"sysctl -w {name}=2"
        yield Finding(
            id="obstacle.rp_filter",
            verdict=Verdict.NOTE,
            evidence=f"rp_filter is 1 on {device}{' (by conf/all)' if is_all else ''}: of what"
            f" comes in by it, the kernel drops sources it would not route back over {device},"
            " such as addresses of nodes and virtual addresses",
            next_step=f"where such sources are used: {command}",
            facts={"command": command},
        )


def _conntrack() -> Iterator[Finding]:
    limit = "netfilter/nf_conntrack_max"
    count, most = read("netfilter/nf_conntrack_count"), read(limit)
    if count is None or not most or count < most * NEARLY_FULL:
        return
    dropped = namespace_counts().get("nf_conntrack.drop", 0)
    is_full = count >= most or dropped > 0
    so_far = f" ({dropped} packets so far)" if dropped else ""
    command = f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}"
    facts, where, words = {"command": command}, "", ""
    if not (ROOT / limit).stat().st_mode & stat.S_IWUSR:
        # One limit for all network namespaces, and only the first one may set it.
        facts["on"], where = HOST, f"on {HOST}: "
        words = "the limit is the machine's, not this network namespace's; "
    yield Finding(
        id="obstacle.conntrack",
        verdict=Verdict.WARN if is_full else Verdict.NOTE,
        evidence=f"the connection table holds {count} of {most}"
        + (
            f": new connections are dropped{so_far}"
            if is_full
            else ", and drops new ones when full"
        ),
        next_step=f"{where}{command}  ({words}conntrack -S counts what was dropped)",
        facts=facts,
    )
