"""What people read of a daemon: its status, checks and probes, as lines and tables.

Everything here returns renderables; the command line prints them, with `crop=False`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from tundp.finding import Finding, Verdict
from tundp.layout import Cell, Column, Figure, Grid, Line
from tundp.linux.probe import ProbeReport
from tundp.observe.counters import BREAKDOWNS, latency_text, spec_of
from tundp.observe.explain.model import Explanation, Ruling
from tundp.observe.explain.model import Verdict as PacketVerdict
from tundp.observe.status import (
    BackendStatus,
    CountersStatus,
    DaemonState,
    EngineStatus,
    KernelStatus,
    LeaseStatus,
    PeerStatus,
    Status,
    StoreStatus,
)
from tundp.show_chaos import now_lines
from tundp.wire.drop import DropReason

SHOWN: Final = 20
"""Refused leases, and unreadable entries, that are shown one by one."""
_COLOURS: Final = {
    Verdict.OK: "green",
    Verdict.NOTE: "",
    Verdict.WARN: "yellow",
    Verdict.FAIL: "red",
    Verdict.UNKNOWN: "yellow",
}
_MARKS: Final = {Verdict.OK: ("yes", "green"), Verdict.UNKNOWN: ("?", "yellow")}


def status_parts(status: Status, *, is_verbose: bool = False) -> Iterator[RenderableType]:
    """The whole answer of the admin socket, most important first."""
    if status.state is DaemonState.STARTING:
        yield Line(Text(f"starting, pid {status.pid}: waiting for {status.waiting_for}"))
        return
    yield from now_lines(status)
    for finding in status.failing:
        yield _marked("not ready:", "red", f"{finding.title}: {_evidence(finding)}")
    yield from map(Line, _head(status))
    unanswered = sorted(filter(_is_told, status.peers), key=lambda peer: peer.urgency)
    yield from map(_unanswered, unanswered[:SHOWN])
    if len(unanswered) > SHOWN:
        more = len(unanswered) - SHOWN
        yield _marked("peers:", "yellow", f"and {more:,} more without an answer; see below")
    for finding in status.findings:
        if finding.id == "chaos" or (finding.id == "peers" and unanswered):
            continue  # the same in short
        if finding.verdict in (Verdict.WARN, Verdict.UNKNOWN):
            yield _marked(
                f"{finding.verdict.value}:", "yellow", f"{finding.title}: {_evidence(finding)}"
            )
    yield Text()
    yield peers_grid(status)
    yield from _trouble(status)
    if status.counters is not None:
        yield Text()
        yield counters_grid(status.counters)
        if text := latency_text(status.counters):
            yield Line(Text(text))
        yield from map(Line, drop_lines(status.counters, is_verbose=is_verbose))
    if status.kernel is not None:
        yield from map(Line, kernel_lines(status.kernel))


def brief_parts(found: Mapping[str, Status | str]) -> Iterator[RenderableType]:
    """One line a daemon, by its socket: its status, or why there is none."""
    if not found:
        yield Text("no daemon on this host")
    for path, status in found.items():
        if isinstance(status, str):
            yield Line(Text(f"{path}  {status}", style="red"))
        elif status.state is DaemonState.STARTING:
            yield Line(Text(f"{path}  starting: waiting for {status.waiting_for}"))
        else:
            yield Line(Text(f"{path}  {_place(status)}, {_readiness(status)}"))


def peers_grid(status: Status) -> Grid:
    """One line a peer: those that do not answer first, then by subnet."""
    columns = (
        Column(head="peer subnet"),
        Column(head="at"),
        Column(head="answers", spare=1),
        Column(head="RTT", is_right=True, spare=2),
        Column(head="out", is_right=True, spare=1),
        Column(head="in", is_right=True, spare=1),
        Column(head="last heard", is_right=True, spare=1),
        Column(head="bytes out", is_right=True, spare=3),
        Column(head="bytes in", is_right=True, spare=3),
        Column(head="dropped", is_right=True, spare=2),
        Column(head="path MTU", is_right=True, spare=2),
        Column(head="without", spare=3),
        Column(head="queue full", is_right=True, spare=3),
        Column(head="last error", spare=4),
    )
    now = status.started_at + status.uptime_s
    peers = sorted(status.peers, key=lambda peer: peer.urgency)
    rows = [_peer_row(peer, now) for peer in peers]
    if not rows:
        rows = [["none yet", *[""] * (len(columns) - 1)]]
    return Grid(columns=columns, rows=rows)


def counters_grid(counters: CountersStatus) -> Grid:
    """Both directions, packets a read and a write, and whether every packet is accounted for."""
    heads = ("in", "out", "dropped", "MB out", "/read", "/write", "balance")
    columns = (Column(head="packets"), *(Column(head=head, is_right=True) for head in heads))
    rows: list[list[Cell]] = [
        [
            name,
            Figure(counted.packets_in),
            Figure(counted.packets_out),
            Figure(counted.dropped),
            f"{counted.bytes_out / 1e6:,.1f}",
            _mean(counted.packets_in, counted.reads),
            _mean(counted.packets_out, counted.writes),
            Text("holds", "green") if counted.is_conserved else Text("VIOLATED", "red"),
        ]
        for name, counted in counters.directions
    ]
    return Grid(columns=columns, rows=rows, turns=True)


def drop_lines(counters: CountersStatus, *, is_verbose: bool = False) -> list[Text]:
    """Each reason that occurred: how often, what it means, what to do next."""
    meanings = {reason.label: reason for reason in DropReason}
    lines = []
    for direction, counted in counters.directions:
        for label, count in counted.drops.items():
            text = ""
            if (meaning := meanings.get(label)) is not None:
                text = f": {meaning.means}; {meaning.next_step}"
            lines.append(Text.assemble((f"{direction} {label}", "yellow"), f" {count:,}{text}"))
    for name, count in counters.totals.items():
        spec = spec_of(name)
        if count and spec is not None and spec.is_notable:
            lines.append(Text.assemble((name, "yellow"), f" {count:,}: {spec.means}"))
    for name, counts in counters.by_reason.items():
        about = BREAKDOWNS.get(name)
        if counts and (is_verbose or about is None or about.is_notable):
            each = ", ".join(f"{label} {count:,}" for label, count in counts.items())
            lines.append(Text(f"{name} {each}" + (f": {about.means}" if about else "")))
    return lines


def kernel_lines(kernel: KernelStatus) -> Iterator[Text]:
    """What the kernel lost before the engine saw it."""
    if kernel.tun_queue_drops:
        yield Text.assemble(
            ("before encap: tun_queue_full", "yellow"),
            f" {kernel.tun_queue_drops:,}: packets routed into the device while its queue was full;"
            " more is sent than this engine takes in: top -H, ip -s link",
        )
    if kernel.udp_errors:
        yield Text.assemble(
            ("before decap: udp_errors", "yellow"),
            f" {kernel.udp_errors:,}: UDP datagrams this network namespace lost on receipt, ours"
            f" and others'; {kernel.udp_checksum_errors:,} of them had a wrong checksum:"
            " nstat -az 'Udp*'",
        )


def probe_parts(report: ProbeReport) -> Iterator[RenderableType]:
    """What `tundp probe` found: a line a question, then the engine it means."""
    yield Line(
        Text(
            f"Linux {report.kernel} on {report.machine}, {report.cpus} CPUs;"
            f" native module {report.native};"
            f" checksums by {', '.join(report.sums) or 'Python'}"
        )
    )
    columns = (
        Column(head="here"),
        Column(head="kernel feature"),
        Column(head="found", wraps=True),
        Column(head="without it", wraps=True, spare=1),
        Column(head="since Linux", spare=2),
    )
    rows: list[list[Cell]] = [
        [
            Text(*_MARKS.get(finding.verdict, ("no", "red"))),
            finding.title,
            finding.evidence,
            finding.meaning,
            finding.facts.get("since", ""),
        ]
        for finding in report.findings
    ]
    yield Text()
    yield Grid(columns=columns, rows=rows)
    yield Text()
    if report.not_asked:
        yield Line(Text(f"TUN not tried: {report.not_asked}; run as root"))
    yield Line(Text(f"engine {report.engine}: {report.why}"))
    yield Line(Text(f"  uses: {', '.join(report.offloads) or 'no offloads'}"))
    for name, why in report.missing.items():
        yield Line(Text(f"  without {name}: {why}"))


def finding_parts(findings: Iterable[Finding]) -> Iterator[RenderableType]:
    """What `tundp config check` found, a line each."""
    for finding in findings:
        line = Text(f"{finding.verdict.value.upper():<5}", _COLOURS[finding.verdict])
        line.append(f"{finding.title}: {_evidence(finding)}", "default")
        yield Line(line, indent=5)


def _evidence(finding: Finding) -> str:
    return "; ".join(filter(None, (finding.evidence, finding.next_step)))


def _head(status: Status) -> Iterator[Text]:
    place = Text(_place(status))
    place.stylize("bold", 0, len(str(status.subnet)))
    yield place
    if status.lease is not None:
        yield _lease(status.lease)
    if status.store is not None:
        yield _store(status.store)
        yield from _cache(status.store, status.started_at + status.uptime_s)
    if (engine := status.engine) is None:
        yield Text(f"packets are carried by the kernel; daemon on {status.loop}, pid {status.pid}")
        return
    yield Text(f"engine {engine.name} on {status.loop}, pid {status.pid}")
    yield Text(f"  {engine.uses}")
    yield from _lost_offloads(engine, status.started_at + status.uptime_s)


def _place(status: Status) -> str:
    """Where the node stands: 10.5.1.0/24 of 10.5.0.0/16 on flannel0 (MTU 1472), udp ..."""
    text = f"{status.subnet} of {status.network}"
    return text if status.backend is None else text + _backend(status.backend)


def _backend(backend: BackendStatus) -> str:
    device = backend.device
    if device is not None:
        on = f" on {device.name or 'no device'} (MTU {device.mtu})"
    else:
        on = "" if backend.mtu is None else f" (MTU {backend.mtu})"
    port = "" if backend.port is None else f":{backend.port}"
    interface = backend.interface
    routes = "" if backend.routes is None else f", {backend.routes} routes"
    return f"{on}, {backend.type} {interface.address}{port} via {interface.name}{routes}"


def _readiness(status: Status) -> str:
    routing = status.routing
    peers, silent = (0, 0) if routing is None else (routing.peers, routing.silent_peers)
    failing = ", ".join(finding.id for finding in status.failing)
    text = f"{peers} peers, {f'{silent} silent, ' if silent else ''}pid {status.pid}: "
    text += "chaos, " if status.chaos_now else ""
    return text + (f"not ready ({failing})" if failing else "ready")


def explain_parts(found: Explanation) -> Iterator[RenderableType]:
    """Every step of a packet, and what becomes of it."""
    asked = found.question
    what = " ".join(filter(None, (asked.proto, str(asked.port or ""))))
    yield Line(
        Text(
            f"{asked.source} -> {asked.destination}{f' {what}' if what else ''}, {asked.size} bytes"
            f"{', DF' if asked.dont_fragment else ''}: {found.direction}; leases of"
            f" {found.leases_of}"
        )
    )
    yield Text()
    rows: list[list[Cell]] = [
        [str(number), step.title, Text(*_RULINGS[step.ruling]), step.evidence]
        for number, step in enumerate(found.steps, 1)
    ]
    columns = (
        Column(head="", is_right=True),
        Column(head="step"),
        Column(head="verdict"),
        Column(head="evidence", wraps=True),
    )
    yield Grid(columns=columns, rows=rows)
    yield Text()
    for number, step in enumerate(found.steps, 1):
        if step.advice and step.ruling is not Ruling.NOTE:
            yield _marked(f"step {number}:", "", step.advice)
    for each in found.not_looked_at:
        yield _marked("not looked at:", "", each)
    yield _marked(f"{found.verdict.value.upper()}:", _VERDICTS[found.verdict], found.summary)


_RULINGS: Final = {
    Ruling.OK: ("ok", "green"),
    Ruling.NOTE: ("note", ""),
    Ruling.WARN: ("WARN", "yellow"),
    Ruling.DROP: ("DROP", "red"),
    Ruling.UNKNOWN: ("unknown", "yellow"),
}
_VERDICTS: Final = {
    PacketVerdict.DELIVERED: "green",
    PacketVerdict.DROPPED: "red",
    PacketVerdict.UNKNOWN: "yellow",
}


def _lease(lease: LeaseStatus) -> Text:
    is_held = lease.state == "held"
    left = lease.expires_in_s
    if left is None:
        expiry = "never expires" if is_held else "not confirmed by the store"
    elif left < 0:
        expiry = f"expired {-left} s ago"
    else:
        expiry = f"{left // 3600}h{left // 60 % 60:02}m left"
    return Text.assemble(
        f"lease {lease.key} ", (lease.state, "green" if is_held else "red"), f", {expiry}"
    )


def _store(store: StoreStatus) -> Text:
    text = Text(f"{store.description} ")
    text.append(*(("answering",) if store.is_answering else ("not answering, peers kept", "red")))
    text.append(f", revision {store.revision}")
    if store.age_s:
        text.append(", ").append(f"leases {store.age_s} s old", "red")
    return text.append(" (from disk)") if store.is_from_cache else text


def _cache(store: StoreStatus, now: float) -> Iterator[Text]:
    """The leases on disk: how old they are, and why they are no newer."""
    if not store.is_cached:
        return
    at = store.cached_at
    text = Text("leases on disk: ")
    text.append("not saved yet" if at is None else f"saved {_age(now - at)} ago")
    if store.cache_error:
        text.append(", ").append(f"failing: {store.cache_error}", "red")
    yield text


def _lost_offloads(engine: EngineStatus, now: float) -> Iterator[Text]:
    """Offloads that were in use and no longer are."""
    for offload in engine.offloads_disabled:
        if offload.since is not None:
            at = time.strftime("%H:%M:%S", time.localtime(offload.since))
            yield Text.assemble(
                ("  disabled: ", "yellow"),
                f"{offload.name} since {at}, {_age(now - offload.since)} ago: {offload.reason}",
            )


def _trouble(status: Status) -> Iterator[RenderableType]:
    warnings = () if status.backend is None else status.backend.interface.warnings
    for warning in warnings:
        yield _marked("interface:", "yellow", warning)
    refused = [f"{each.key} {each.means}" for each in status.refused[:SHOWN]]
    bad = [f"{each.name}: {each.why}" for each in status.bad_entries[:SHOWN]]
    listed = len(status.refused), len(status.bad_entries)
    counts = listed
    if (routing := status.routing) is not None:
        counts = routing.refused, routing.bad_entries
    yield from _first("no peer:", refused, listed[0], counts[0])
    yield from _first("ignored:", bad, listed[1], counts[1])


def _first(mark: str, shown: list[str], listed: int, count: int) -> Iterator[RenderableType]:
    """A line each of `shown`, and one that counts the rest."""
    for text in shown:
        yield _marked(mark, "yellow", text)
    if more := max(listed, count) - len(shown):
        yield _marked(mark, "yellow", f"and {more:,} more; tundp status --json lists {listed:,}")


def _marked(mark: str, colour: str, text: str) -> Line:
    return Line(Text.assemble((mark, colour), f" {text}"))


def _peer_row(peer: PeerStatus, now: float) -> list[Cell]:
    path, traffic = peer.path, peer.traffic
    row: list[Cell] = [str(peer.subnet), peer.endpoint, *_answers(peer)]
    if traffic is None:
        row += [""] * 6
    else:
        row += [Figure(traffic.packets_out), Figure(traffic.packets_in)]
        if traffic.last_heard is not None:
            row.append(_age(now - traffic.last_heard))
        else:
            row.append(Text("never", "red" if peer.is_silent else ""))
        row += map(_unless_zero, (traffic.bytes_out, traffic.bytes_in, traffic.drops))
    narrow = "" if path is None or path.inner_mtu is None else str(path.inner_mtu)
    if narrow and path is not None and path.mtu_origin is not None:
        narrow += f" {path.mtu_origin.value}"
    without = "udp-segment" if path is not None and path.no_gso else ""
    full = "" if traffic is None else _unless_zero(traffic.queue_full)
    error = "" if traffic is None else traffic.last_errno or ""
    return [*row, narrow, without, full, error]


def _answers(peer: PeerStatus) -> tuple[Cell, Cell]:
    """Whether it answers, and how fast."""
    if (reach := peer.reach) is None:
        return "", ""
    colour = "red" if reach.is_trouble else ""
    word = "yes" if reach.standing == "answers" else reach.standing
    rtt = "" if reach.rtt_ms is None else f"{reach.rtt_ms:.2f} ms"
    return Text(word, colour), rtt


def _is_told(peer: PeerStatus) -> bool:
    """Whether there is a sentence about it; not of one that is just being asked."""
    reach = peer.reach
    return reach is not None and bool(reach.evidence) and reach.standing != "waiting"


def _unanswered(peer: PeerStatus) -> Line:
    """What is known of a peer that does not answer, and what to do."""
    assert peer.reach is not None
    said = "; ".join(filter(None, (peer.reach.evidence, peer.reach.next_step)))
    colour = "red" if peer.is_silent else "yellow"
    return _marked(f"{peer.reach.standing}:", colour, f"{peer.subnet} at {peer.endpoint}: {said}")


def _unless_zero(count: int) -> Cell:
    return Figure(count) if count else ""


def _age(seconds: float) -> str:
    """3 s, 5 min, 7 h, 12 d."""
    whole = max(0, round(seconds))
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if whole >= 2 * length:
            return f"{whole // length} {unit}"
    return f"{whole} s"


def _mean(packets: int, calls: int) -> str:
    return f"{packets / calls:.1f}" if calls else "-"
