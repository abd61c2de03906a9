"""Checks of packets: what is dropped while this looks, and what slows the rest down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from shlex import quote
from typing import Final

from tundp.choices import Engine
from tundp.doctor import remedy
from tundp.doctor.context import Context, ask_daemon, finding, reasons, running
from tundp.engine.choose import best_engine
from tundp.finding import Finding, Verdict
from tundp.linux.device import queue_len as device_queue_len
from tundp.linux.losses import UdpErrors, udp_errors
from tundp.linux.offload import find_offloads
from tundp.observe.status import CountersStatus, Status
from tundp.wire.drop import DropReason

AT_LEAST_S: Final = 1.0
"""Between the two looks at the counters."""
ROUTINE: Final = frozenset(
    each.label for each in (DropReason.NOT_IPV4, DropReason.HOP_LIMIT_EXCEEDED, DropReason.TOO_BIG)
)
"""Drops that traceroute, path MTU discovery and IPv6's own noise cause; with none other a note."""
_OF_SOURCE_CHECK: Final = frozenset(
    each.label
    for each in (
        DropReason.SOURCE_MISMATCH,
        DropReason.SOURCE_PORT_MISMATCH,
        DropReason.DESTINATION_MISMATCH,
    )
)
_CPU_TIME: Final = "top -H shows whether a packet thread has a CPU of its own; --workers"
_UDP_TABLE: Final = Path("/proc/thread-self/net/udp")
_COUNTED: Final = ("source_mismatches", "destination_mismatches")


async def check_drops(context: Context) -> AsyncIterator[Finding]:
    """What the daemon and the kernel below it drop now, and what they dropped before."""
    before, seen_at = context.status, asyncio.get_running_loop().time()
    if before is None:
        return
    if before.counters is None:
        yield finding("drops", Verdict.OK, "the kernel carries packets: there are no counters")
        return
    port = None if before.backend is None else before.backend.port
    # What a socket lost is counted before all that is lost, and after it at the end: a datagram
    # lost in between is never taken for another socket's.
    lost_before, errors_before = _socket_drops(port), udp_errors()
    await context.probed.wait()
    await asyncio.sleep(max(0.0, AT_LEAST_S - (asyncio.get_running_loop().time() - seen_at)))
    after = running(await ask_daemon(context.inspection.settings.admin_socket))
    if after is None or after.counters is None or after.pid != before.pid:
        yield finding("drops", Verdict.UNKNOWN, "the daemon did not answer a second time")
        return
    took_s = asyncio.get_running_loop().time() - seen_at
    for each in _drops(context, before.counters, after.counters, took_s):
        yield each
    queue_len = await _queue_len(context, after)
    for each in _kernel(context, before, after, took_s, queue_len=queue_len):
        yield each
    for each in _sockets(after, took_s, lost_before, errors_before):
        yield each
    if not after.counters.is_conserved:
        yield finding(
            "counters",
            Verdict.FAIL,
            "packets that came in are not those that went out and were dropped: a bug of tundp",
            words="please report it with tundp status --json",
        )
    yield finding("drops", Verdict.OK, f"counters were compared over {took_s:.1f} s")


def _drops(
    context: Context, before: CountersStatus, after: CountersStatus, took_s: float
) -> Iterator[Finding]:
    earlier = {name: counted.drops for name, counted in before.directions}
    for direction, counted in after.directions:
        for label, count in counted.drops.items():
            more = count - earlier[direction].get(label, 0)
            yield _drop(context, direction, label, (count, more), took_s)
    for name in _COUNTED:
        count = after.totals.get(name, 0)
        if more := count - before.totals.get(name, 0):
            yield finding(
                f"source.{name.replace('_', '-')}",
                Verdict.NOTE,
                f"{more:,} in {took_s:.1f} s ({count:,} since the start): datagrams were let in"
                " although their sender or destination is not the lease's (--source-check=count)",
                words="NAT between nodes, a host without masquerade, or a forged packet: tcpdump"
                " the overlay's UDP port",
            )


def _drop(
    context: Context, direction: str, label: str, counts: tuple[int, int], took_s: float
) -> Finding:
    count, more = counts
    reason = reasons().get(label)
    means = "" if reason is None else reason.means
    step = "" if reason is None else reason.next_step
    if not more:
        return finding(
            f"drop.{label}",
            Verdict.NOTE,
            f"{count:,} packets ({direction}) since the daemon's start, none in the last"
            f" {took_s:.1f} s: {means}",
        )
    return finding(
        f"drop.{label}",
        Verdict.NOTE if label in ROUTINE else Verdict.WARN,
        f"{more:,} packets ({direction}) in {took_s:.1f} s, {count:,} since the daemon's start:"
        f" {means}",
        command=_command(context, label),
        words=step,
        direction=direction,
    )


def _command(context: Context, label: str) -> str:
    """What ends drops of one reason; empty if no single command does."""
    status = context.status
    assert status is not None
    device = None if status.backend is None else status.backend.device
    if label in _OF_SOURCE_CHECK and context.setting("source-check") == "enforce":
        return remedy.restart(status.pid, "--source-check=count")
    if label == DropReason.TUN_DOWN.label and device is not None:
        return f"ip link set dev {quote(device.name)} up"
    return ""


def _kernel(
    context: Context, before: Status, after: Status, took_s: float, *, queue_len: int
) -> Iterator[Finding]:
    """What the kernel lost below and above the engine, full sockets of the overlay apart."""
    was, now = before.kernel, after.kernel
    if was is not None and now is not None:
        more = (now.tun_queue_drops or 0) - (was.tun_queue_drops or 0)
        if more:
            workers = int(context.setting("workers") or 1)
            command = _longer_queue(after, queue_len, device_queue_len(workers)) or _faster_engine(
                after
            )
            yield finding(
                "kernel.tun-queue",
                Verdict.WARN,
                f"{more:,} packets in {took_s:.1f} s were routed into the TUN while its queue of"
                f" {queue_len:,} packets was full: more is sent than the engine takes in",
                command=command,
                words="" if command else _CPU_TIME,
            )
    lost = udp_errors().since(context.udp_before)
    if lost.checksum:
        yield finding(
            "kernel.udp-checksum",
            Verdict.WARN,
            f"{lost.checksum:,} UDP datagrams in {took_s:.1f} s came with a wrong checksum: a"
            " network card that was to finish it did not, or corruption on the way",
            command=f"ethtool -K {quote(_uplink(after))} tx off",
            on=", ".join(sorted(str(each) for each in context.dead)) or "the sender",
        )


def _sockets(
    after: Status, took_s: float, lost_before: int, errors_before: UdpErrors
) -> Iterator[Finding]:
    """Datagrams for which sockets had no room: the overlay's, and others'."""
    errors = udp_errors().since(errors_before)
    port = None if after.backend is None else after.backend.port
    lost = _socket_drops(port)
    more = max(0, lost - lost_before)
    if more:
        command = _faster_engine(after)
        yield finding(
            "kernel.receive-buffer",
            Verdict.WARN,
            f"the sockets of port {port} lost {more:,} datagrams in {took_s:.1f} s, as their"
            " buffers were full: more is received than the engine takes in",
            command=command,
            words="" if command else _CPU_TIME,
        )
    elif lost:
        yield finding(
            "kernel.receive-buffer",
            Verdict.NOTE,
            f"the sockets of port {port} have lost {lost:,} datagrams for lack of room since they"
            f" were opened, none in the last {took_s:.1f} s",
            words=_CPU_TIME,
        )
    if (others := errors.all - errors.checksum - more) > 0:
        yield finding(
            "kernel.udp-errors",
            Verdict.NOTE,
            f"{others:,} UDP datagrams in {took_s:.1f} s were lost on receipt in this network"
            " namespace, not the overlay's, for lack of room in a socket's buffer",
            words="ss -uamn shows whose (d); nstat -az 'Udp*'",
        )


def _longer_queue(status: Status, queue_len: int, wanted: int) -> str:
    """What gives the TUN's queue the length the daemon gave it; empty if it has that."""
    device = None if status.backend is None else status.backend.device
    if device is None or queue_len >= wanted:
        return ""
    return f"ip link set dev {quote(device.name)} txqueuelen {wanted}"


def _faster_engine(status: Status) -> str:
    """What replaces the Python engine by a fast one; empty if it is one, or there is none."""
    if status.engine is None or status.engine.name != Engine.REFERENCE.value:
        return ""
    best, _ = best_engine(find_offloads())
    return "" if best is Engine.REFERENCE else remedy.restart(status.pid, "--engine=auto")


async def _queue_len(context: Context, status: Status) -> int:
    """Packets the TUN's queue holds; 0 if it cannot be asked."""
    device = None if status.backend is None else status.backend.device
    link = None if device is None else await context.link(device.name)
    return 0 if link is None else link.queue_len


def _uplink(status: Status) -> str:
    return "eth0" if status.backend is None else status.backend.interface.name


def _socket_drops(port: int | None) -> int:
    """Datagrams the sockets of a port lost (proc(5), the last column of net/udp)."""
    if port is None:
        return 0
    try:
        lines = _UDP_TABLE.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return 0
    rows = [line.split() for line in lines]
    return sum(int(row[-1]) for row in rows if int(row[1].rpartition(":")[2], 16) == port)


async def check_speed(context: Context) -> AsyncIterator[Finding]:
    """What makes the engine slower than it could be here."""
    status = context.status
    if status is None:
        return
    if (engine := status.engine) is None:
        yield finding("engine", Verdict.OK, "the kernel carries packets: there is no engine")
        return
    if engine.name == "reference":
        yield finding(
            "engine.reference",
            Verdict.WARN,
            "packets are moved by Python: a hundredth of the speed of the C engines",
            command=_faster_engine(status),
            words="tundp probe tells why; --engine=auto takes the fastest there is",
        )
    for offload in engine.offloads_disabled:
        if offload.since is not None:
            yield finding(
                "engine.offload",
                Verdict.NOTE,
                f"{offload.name} was in use and is disabled: {offload.reason}",
                words="it is tried again after ten minutes",
            )
    yield finding("engine", Verdict.OK, f"{engine.name}: {engine.uses}")
