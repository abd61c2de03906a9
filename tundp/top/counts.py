"""Rates from two status documents of a daemon (GET /v1/status). Pure.

The documents are read as they are, not made into typed records: there may be 10,000 peers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tundp.errors import PlatformError
from tundp.observe.status import STATUS_SCHEMA
from tundp.observe.top import (
    DirectionRate,
    DropRate,
    Flows,
    PeerRate,
    ThreadRate,
    TopRound,
)
from tundp.printable import SENTENCE_MAX, printable
from tundp.wire.drop import DropReason

_NEXT_STEPS: Final = {reason.label: reason.next_step for reason in DropReason}
_NOTHING: Final[Mapping[str, Any]] = {}
CLOCK_SLACK_S: Final = 0.5
"""Two clocks further apart than this over a round: the daemon's was set meanwhile."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A peer's endpoint as a status document has it."""

    peer: Mapping[str, Any]
    """The first of `peers` that leads there."""
    subnets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at a daemon's counters."""

    document: Mapping[str, Any]
    monotonic: float
    """When it was made, by this process's monotonic clock, seconds."""
    endpoints: Mapping[tuple[str, int | None], Endpoint]
    ticks: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    """CPU time of threads by kind: how many, seconds of user and of system time."""

    @property
    def process(self) -> tuple[int, float]:
        """Which daemon it is."""
        return self.document["pid"], self.document["started_at"]

    @property
    def at(self) -> float:
        """When it was made, by the daemon's clock, Unix time."""
        return float(self.document["started_at"] + self.document["uptime_s"])

    @property
    def device_mtu(self) -> int | None:
        """Bytes of an inner packet that the device takes."""
        mtu: int | None = (self.document.get("backend") or _NOTHING).get("mtu")
        return mtu


def sample_of(
    document: Any, *, monotonic: float, ticks: Mapping[str, tuple[int, float, float]] = _NOTHING
) -> Sample:
    """A look at a daemon, out of its status document; PlatformError for what is none."""
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != STATUS_SCHEMA:
        raise PlatformError(
            f"the daemon's status has schema {printable(str(schema))}, and tundp top reads"
            f" {STATUS_SCHEMA}: it needs a daemon of tundp 0.2.0; restart the daemon"
        )
    try:
        endpoints: dict[tuple[str, int | None], Endpoint] = {}
        for peer in document["peers"]:
            key = peer["public_ip"], peer.get("port")
            known = endpoints.get(key)
            endpoints[key] = Endpoint(peer, 1) if known is None else _one_more(known)
    except _MISSING as error:
        raise _unreadable(error) from None
    return Sample(document=document, monotonic=monotonic, endpoints=endpoints, ticks=ticks)


_MISSING: Final = (KeyError, TypeError, ValueError, AttributeError)
"""What a document raises that is not laid out as a status."""


def _unreadable(error: Exception) -> PlatformError:
    words = printable(f"{type(error).__name__}: {error}", SENTENCE_MAX)
    return PlatformError(f"the daemon's status cannot be read ({words}): is it of another version?")


def _one_more(known: Endpoint) -> Endpoint:
    return Endpoint(known.peer, known.subnets + 1)


def round_of(
    before: Sample | None, after: Sample, *, interval_s: float, flows: Flows | None = None
) -> TopRound:
    """What happened between two looks; PlatformError if the later one cannot be read.

    before: None at the first one. interval_s: time between looks now.
    """
    try:
        return _round(before, after, interval_s, flows)
    except _MISSING as error:
        raise _unreadable(error) from None


def _round(
    before: Sample | None, after: Sample, interval_s: float, flows: Flows | None
) -> TopRound:
    document = after.document
    restarted = before is not None and before.process != after.process
    then = None if restarted else before
    seconds = 0.0 if then is None else _seconds(then, after)
    rate = _Rate(seconds)
    counters = document["counters"] or _NOTHING
    base = after if then is None or not seconds else then
    old = base.document["counters"] or _NOTHING
    engine = document["engine"] or _NOTHING
    kernel, old_kernel = (each.document["kernel"] or _NOTHING for each in (after, base))
    return TopRound(
        version=document["version"],
        node=document["public_ip"] or "",
        subnet=document["subnet"] or "",
        engine=engine.get("name", ""),
        pid=document["pid"],
        started_at=document["started_at"],
        at=round(after.at, 3),
        seconds=round(seconds, 3),
        interval_s=round(interval_s, 3),
        restarted=restarted,
        peers_total=len(after.endpoints),
        silent_peers=(document["routing"] or _NOTHING).get("silent_peers"),
        directions=[
            _direction(name, old.get(name, _NOTHING), counters[name], rate)
            for name in ("encap", "decap")
            if name in counters
        ],
        syscalls_s=rate(_more(old.get("syscalls", 0), counters.get("syscalls", 0))),
        tun_queue_drops=_more(
            old_kernel.get("tun_queue_drops") or 0, kernel.get("tun_queue_drops") or 0
        ),
        threads=_threads(then, after),
        peers=_peers(then, after, rate),
        drops=_drops(old, counters, rate),
        flows=flows,
        notes=_notes(document, before, restarted=restarted),
    )


class _Rate:
    """Counts of a round as rates a second; 0 without a round."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __bool__(self) -> bool:
        return self._seconds > 0

    def __call__(self, count: int) -> float:
        return round(count / self._seconds, 3) if self._seconds else 0.0


def _seconds(before: Sample, after: Sample) -> float:
    """Between two looks: by the daemon's clock, or by ours if that was set meanwhile."""
    ours = after.monotonic - before.monotonic
    theirs = after.at - before.at
    return theirs if theirs > 0 and abs(theirs - ours) < CLOCK_SLACK_S else max(ours, 0.0)


def _more(before: int, after: int) -> int:
    """What a counter grew by. One that fell was made anew: all it has came since then."""
    return after - before if after >= before else after


def _direction(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], rate: _Rate
) -> DirectionRate:
    def grown(member: str) -> int:
        return _more(before.get(member, 0), after[member])

    packets_in, packets_out = grown("packets_in"), grown("packets_out")
    reads, writes = grown("reads"), grown("writes")
    drops = _more(sum(before.get("drops", _NOTHING).values()), sum(after["drops"].values()))
    return DirectionRate(
        direction=name,
        packets_in=packets_in,
        packets_out=packets_out,
        bytes_in=grown("bytes_in"),
        bytes_out=grown("bytes_out"),
        drops=drops,
        packets_s=rate(packets_in),
        bits_s=rate(8 * grown("bytes_in")),
        drops_s=rate(drops),
        reads_s=rate(reads),
        writes_s=rate(writes),
        packets_per_read=round(packets_in / reads, 1) if reads else None,
        packets_per_write=round(packets_out / writes, 1) if writes else None,
    )


def _peers(before: Sample | None, after: Sample, rate: _Rate) -> list[PeerRate]:
    mtu, now = after.device_mtu, after.at
    found = []
    for (public_ip, port), endpoint in after.endpoints.items():
        peer = endpoint.peer
        traffic, reach = peer["traffic"], peer["reach"] or _NOTHING
        then = before.endpoints.get((public_ip, port)) if before else None
        old = (then.peer["traffic"] if then else None) or _NOTHING
        new = traffic or _NOTHING
        if rate:
            out, into, bytes_out, bytes_in, drops = (
                _more(old.get(name, 0), new.get(name, 0)) for name in _COUNTS
            )
        else:
            out = into = bytes_out = bytes_in = drops = 0
        heard = new.get("last_heard")
        path = peer["path"] or _NOTHING
        found.append(
            PeerRate(
                subnet=peer["subnet"],
                subnets=endpoint.subnets,
                public_ip=public_ip,
                port=port,
                standing=reach.get("standing", ""),
                is_counted=traffic is not None,
                packets_out=out,
                packets_in=into,
                bytes_out=bytes_out,
                bytes_in=bytes_in,
                drops=drops,
                packets_out_s=rate(out),
                packets_in_s=rate(into),
                bits_out_s=rate(8 * bytes_out),
                bits_in_s=rate(8 * bytes_in),
                drops_s=rate(drops),
                rtt_ms=reach.get("rtt_ms"),
                heard_s=None if heard is None else round(max(0.0, now - heard), 1),
                path_mtu=path.get("inner_mtu") or mtu,
            )
        )
    return found


_COUNTS: Final = ("packets_out", "packets_in", "bytes_out", "bytes_in", "drops")


def _drops(before: Mapping[str, Any], after: Mapping[str, Any], rate: _Rate) -> list[DropRate]:
    found = []
    for direction in ("encap", "decap"):
        old = before.get(direction, _NOTHING).get("drops", _NOTHING)
        for reason, total in after.get(direction, {"drops": {}})["drops"].items():
            count = _more(old.get(reason, 0), total)
            found.append(
                DropRate(
                    direction=direction,
                    reason=reason,
                    count=count,
                    total=total,
                    drops_s=rate(count),
                    next_step=_NEXT_STEPS.get(reason, ""),
                )
            )
    return sorted(found, key=lambda each: (-each.count, -each.total))


def _threads(before: Sample | None, after: Sample) -> Sequence[ThreadRate]:
    if before is None:
        return ()
    seconds = after.monotonic - before.monotonic
    found = []
    for name, (threads, user, system) in after.ticks.items():
        _, old_user, old_system = before.ticks.get(name, (0, user, system))
        found.append(
            ThreadRate(
                name=name,
                threads=threads,
                user=round(max(0.0, user - old_user) / seconds, 3) if seconds else 0.0,
                system=round(max(0.0, system - old_system) / seconds, 3) if seconds else 0.0,
            )
        )
    return found


def _notes(document: Mapping[str, Any], before: Sample | None, *, restarted: bool) -> Sequence[str]:
    found = []
    if restarted and before is not None:
        found.append(
            f"the daemon was restarted (pid {before.process[0]}, now {document['pid']}):"
            " rates begin anew"
        )
    if document["counters"] is None:
        if document["state"] == "running":
            found.append("the backend leaves packets to the kernel: nothing of them is counted")
        else:
            found.append(f"the daemon is starting: {document.get('waiting_for', '')}".rstrip(": "))
    return found
