"""What a report holds of the host: output of programs, files of the kernel, the daemon's log."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from tundp.blocking import BlockingThread
from tundp.errors import PlatformError
from tundp.linux import command

T = TypeVar("T")

PROGRAM_S: Final = 8.0
"""Deadline of a program."""
TEXT_MAX: Final = 8 << 20
"""Characters of one program's output, or of one file, that are kept."""
LOG_LINES: Final = 5000
LOG_LEN: Final = 1 << 20
"""Bytes at the end of a log file that are kept."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one item of a report is made of: a text, a JSON value, or bytes that are redacted."""

    content: Any
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One member of a report, and how it is made."""

    name: str
    about: str
    make: Callable[[], Awaitable[Found]]
    """Raises TundpError or OSError: the reason why it is missing."""
    limit_s: float = PROGRAM_S + 2


_PROGRAMS: Final = (
    ("ip-link.txt", "ip -d -s link show", "iproute2", "links with their counters"),
    ("ip-addr.txt", "ip addr show", "iproute2", "addresses"),
    ("ip-route.txt", "ip route show table all", "iproute2", "routes of every table"),
    ("ip-rule.txt", "ip rule show", "iproute2", "policy rules"),
    ("ip-neigh.txt", "ip -s neigh show", "iproute2", "neighbours: who answers ARP"),
    ("ip-netconf.txt", "ip netconf show", "iproute2", "forwarding and rp_filter of each link"),
    ("ss-udp.txt", "ss -uamn", "iproute2", "UDP sockets, their memory and drops"),
    ("tc-qdisc.txt", "tc -s qdisc show", "iproute2", "queues of each link, and what they dropped"),
    ("nft-ruleset.txt", "nft list ruleset", "nftables", "every rule of nftables"),
    ("iptables-nft-save.txt", "iptables-nft-save -c", "iptables", "rules of iptables-nft"),
    ("iptables-legacy-save.txt", "iptables-legacy-save -c", "iptables", "rules of iptables-legacy"),
)
_UNIT_PROGRAMS: Final = (
    (
        "log/unit.txt",
        "systemctl show tundp.service -p Id,LoadState,ActiveState,SubState,Result,ExecMainStatus,"
        "NRestarts,MainPID,ActiveEnterTimestamp,MemoryCurrent,TasksCurrent,CPUUsageNSec",
        "systemd",
        "the unit's state",
    ),
    (
        "log/unit-file.txt",
        "systemctl cat --no-pager tundp.service",
        "systemd",
        "the unit file with its drop-ins",
    ),
)
_FILES: Final = (
    ("net-snmp.txt", "/proc/net/snmp", "counters of IP, ICMP, TCP and UDP"),
    ("net-netstat.txt", "/proc/net/netstat", "more counters of IP and TCP"),
    ("net-softnet.txt", "/proc/net/softnet_stat", "packets each CPU received and dropped"),
    ("net-dev.txt", "/proc/net/dev", "packets and drops of each link"),
    ("net-sockstat.txt", "/proc/net/sockstat", "sockets and their memory"),
    ("modules.txt", "/proc/modules", "kernel modules"),
    ("cmdline.txt", "/proc/cmdline", "the kernel's command line"),
    ("meminfo.txt", "/proc/meminfo", "memory"),
    ("loadavg.txt", "/proc/loadavg", "load"),
    ("interrupts-softirqs.txt", "/proc/softirqs", "soft interrupts of each CPU"),
)
_SYSCTLS: Final = (
    "net/ipv4/ip_forward",
    "net/ipv4/conf/*/forwarding",
    "net/ipv4/conf/*/rp_filter",
    "net/ipv4/conf/*/accept_local",
    "net/ipv4/conf/*/arp_ignore",
    "net/ipv4/ip_no_pmtu_disc",
    "net/ipv4/ip_forward_use_pmtu",
    "net/ipv4/icmp_ratelimit",
    "net/ipv4/udp_mem",
    "net/ipv4/neigh/default/gc_thresh*",
    "net/core/rmem_default",
    "net/core/rmem_max",
    "net/core/wmem_default",
    "net/core/wmem_max",
    "net/core/netdev_max_backlog",
    "net/core/netdev_budget*",
    "net/core/bpf_jit_enable",
    "net/bridge/bridge-nf-call-iptables",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_udp_timeout*",
    "kernel/unprivileged_bpf_disabled",
    "kernel/panic",
    "vm/overcommit_memory",
)


def host_items(devices: Callable[[], tuple[str, ...]]) -> Iterator[Item]:
    """Everything of this host. devices: the TUN's name and the uplink's, as far as known."""
    for name, line, package, about in _PROGRAMS:
        yield Item(name=f"host/{name}", about=f"{about}: {line}", make=_program(line, package))
    for name, path, about in _FILES:
        yield Item(name=f"host/{name}", about=f"{about}: {path}", make=_file(Path(path)))
    yield Item(
        name="host/sysctl.txt",
        about="kernel settings that matter to packets",
        make=lambda: apart(_sysctls),
    )
    yield Item(
        name="host/ethtool.txt",
        about="offloads of the TUN and the uplink: ethtool -k",
        make=lambda: _ethtool(devices()),
        limit_s=2 * PROGRAM_S + 2,
    )


def log_items(pid: int | None) -> Iterator[Item]:
    """What the daemon logged, and what systemd says of its unit. pid: its process, if known."""
    for name, line, package, about in _UNIT_PROGRAMS:
        yield Item(name=name, about=about, make=_program(line, package))
    line = (
        f"journalctl -u tundp.service -u flanneld.service -n {LOG_LINES} --no-pager --no-hostname"
        " -o short-iso-precise"
    )
    about = f"the last {LOG_LINES} lines of the unit's log"
    yield Item(name="log/journal.txt", about=about, make=_journal(line))
    if pid is not None:
        about = "the end of the file the daemon logs into"
        yield Item(name="log/stderr.txt", about=about, make=lambda: apart(_end_of_log, pid))


def process_items(pid: int) -> Iterator[Item]:
    """What the kernel says of the daemon's process."""
    for name, about in (
        ("limits", "resource limits"),
        ("status", "memory, capabilities, seccomp"),
        ("cgroup", "control group"),
        ("oom_score_adj", "how soon it is killed for memory"),
    ):
        path = Path(f"/proc/{pid}/{name}")
        yield Item(name=f"process/{name}.txt", about=f"{about} of the daemon", make=_file(path))
    yield Item(
        name="process/threads.txt",
        about="state, CPU and CPU time of each thread",
        make=lambda: apart(_threads, pid),
    )
    yield Item(
        name="process/cgroup-limits.txt",
        about="limits and use of its control group",
        make=lambda: apart(_cgroup, pid),
    )


async def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call what reads files on a thread of its own: nobody waits for it at a deadline or the end.

    A read of a dead network filesystem ends neither by a deadline of asyncio nor by a signal.
    """
    thread = BlockingThread("file")
    try:
        return await thread.run(function, *arguments)
    finally:
        thread.close()


def _program(line: str, package: str) -> Callable[[], Awaitable[Found]]:
    async def make() -> Found:
        return await _output(line, package)

    return make


async def _output(line: str, package: str) -> Found:
    """What a program prints; PlatformError if it cannot run, or fails and prints nothing."""
    done = await command.run(
        *line.split(), package=package, is_checked=False, timeout_s=PROGRAM_S, capabilities=()
    )
    if done.code and not done.stdout.strip():
        raise PlatformError(f"{line}: exit code {done.code}: {done.complaint or 'it said nothing'}")
    text, note = _cut(done.stdout)
    if done.code:
        note = f"{note} exit code {done.code}: {done.complaint}".strip()
    if not text.strip():
        note = f"{note} it printed nothing".strip()
    return Found(text, note)


def _journal(line: str) -> Callable[[], Awaitable[Found]]:
    async def make() -> Found:
        found = await _output(line, "systemd")
        if not found.content.strip() or "-- No entries --" in found.content:
            raise PlatformError("the journal has no entries of tundp.service or flanneld.service")
        return found

    return make


def _file(path: Path) -> Callable[[], Awaitable[Found]]:
    async def make() -> Found:
        return Found(*_cut(await apart(_read, path)))

    return make


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PlatformError(f"cannot read {path}: {error.strerror}", error.errno) from None


def _cut(text: str) -> tuple[str, str]:
    if len(text) <= TEXT_MAX:
        return text, ""
    # Whole lines: the beginning of a secret is not found by looking for the secret.
    kept = text[:TEXT_MAX].rpartition("\n")[0]
    return f"{kept}\n", f"cut: the first {len(kept)} of {len(text)} characters"


def _sysctls() -> Found:
    lines, missing = [], []
    for pattern in _SYSCTLS:
        paths = sorted(Path("/proc/sys").glob(pattern))
        if not paths:
            missing.append(pattern.replace("/", "."))
        for path in paths:
            try:
                value = path.read_text(encoding="utf-8", errors="replace").strip()
            except OSError as error:
                value = f"({error.strerror})"
            lines.append(f"{path.relative_to('/proc/sys')} = {value}")
    note = f"this kernel has no {', '.join(missing)}" if missing else ""
    return Found("\n".join([*lines, ""]), note)


async def _ethtool(devices: tuple[str, ...]) -> Found:
    if not devices:
        raise PlatformError(
            "which devices are meant is not known: no daemon says, no default route"
        )
    parts, notes = [], []
    for device in devices:
        try:
            found = await _output(f"ethtool -k {device}", "ethtool")
        except PlatformError as error:
            notes.append(str(error))
        else:
            parts.append(found.content)
    if not parts:
        raise PlatformError("; ".join(notes))
    return Found("\n".join(parts), "; ".join(notes))


def _end_of_log(pid: int) -> Found:
    """The end of the file behind a process's standard error."""
    path = Path(f"/proc/{pid}/fd/2")
    try:
        target = os.readlink(path)
        if not path.is_file():
            raise PlatformError(f"the daemon's standard error is no file but {target}")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_LEN))
            text = file.read(LOG_LEN).decode(errors="replace")
    except PlatformError:
        raise
    except OSError as error:
        raise PlatformError(f"cannot read the daemon's log: {error.strerror}") from None
    if size > LOG_LEN:
        # The first line of what is left may be the end of a secret that nobody knows any more.
        return Found(text.partition("\n")[2], f"cut: the last {LOG_LEN} of {size} bytes")
    return Found(text)


def _threads(pid: int) -> Found:
    lines = []
    try:
        for folder in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda each: int(each.name)):
            stat = _read(folder / "stat")
            name, fields = stat.partition("(")[2].rpartition(")")[::2]
            words = fields.split()
            # proc_pid_stat(5): 3 state, 14 and 15 CPU time in ticks, 39 CPU.
            lines.append(
                f"{folder.name} {name} state={words[0]} user={words[11]} system={words[12]}"
                f" cpu={words[36]}"
            )
    except OSError as error:
        raise PlatformError(f"cannot read the threads of process {pid}: {error}") from None
    return Found("\n".join([*lines, ""]))


def _cgroup(pid: int) -> Found:
    path = _read(Path(f"/proc/{pid}/cgroup")).rpartition("::")[2].strip()
    folder = Path("/sys/fs/cgroup") / path.lstrip("/")
    lines = []
    for name in (
        "cpu.max",
        "cpu.stat",
        "cpu.pressure",
        "cpuset.cpus.effective",
        "memory.max",
        "memory.current",
        "memory.events",
        "pids.max",
        "pids.current",
    ):
        try:
            lines.append(f"{name}: {(folder / name).read_text(encoding='utf-8').strip()}")
        except OSError as error:
            lines.append(f"{name}: ({error.strerror})")
    return Found("\n".join([f"cgroup: {path}", *lines, ""]))
