"""What every engine offers, and what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tundp.choices import MtuOrigin, Offload
from tundp.engine.counter_base import CounterBase
from tundp.engine.counters import Counters, HopCounters
from tundp.engine.taps import Recorder, Tap, TapRequest
from tundp.lease.fib import Fib
from tundp.linux.tun import Tun, TunMode
from tundp.wire.policy import Policy

PATH_STATE_S: Final = 600.0
"""Path state, and what the TUN refused, is forgotten after ten minutes (RFC 1191 section 6.3)."""
EMSGSIZE_ORIGIN: Final = "a send was refused as too long (EMSGSIZE); the MTU of the device"
NO_GSO_ORIGIN: Final = "UDP_SEGMENT was refused, single datagrams were not"
"""What teaches path state: PathState.origin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """What an engine is given besides its sockets, whichever it is."""

    fib: Fib
    """Consulted from the first packet on."""
    policy: Policy
    loop: asyncio.AbstractEventLoop
    """Every method is called on its thread."""
    recorder: Recorder | None = None
    """Where workers keep the last packets they dropped; outlives the engine."""
    echo_fd: int = -1
    """Datagram socket, not blocking, for the heads of echo replies that measure paths
    (wire.encap.Deliver.echo_len); -1: nobody measures. Borrowed until `stop`."""
    peer_fd: int = -1
    """Likewise for messages of other nodes (wire.encap.Deliver.peer_len); -1: nobody talks."""
    has_old_socks: bool = False
    """Whether the sockets are a predecessor's: the kernel's count of what they lost goes on, and
    has in it what went on (`Dataplane.go_on_from`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathLimit:
    """The largest inner packet for one hop, as the control plane sets it."""

    inner_mtu: int
    origin: MtuOrigin
    since: float
    """Unix time."""
    text: str
    """PathState.origin."""


class DisabledOffload(NamedTuple):
    """Why an offload is not in use."""

    reason: str
    since: float | None = None
    """Unix time; None if it was never in use."""


@dataclass(frozen=True, slots=True)
class OffloadState:
    """Offloads as they are now."""

    in_use: tuple[Offload, ...] = ()
    disabled: Mapping[Offload, DisabledOffload] = field(default_factory=dict)
    """Those not in use: asked for by flag, missing in the kernel, or refused at run time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathState:
    """Path state of one hop: learnt from refused sends, or set by `limit_path`."""

    inner_mtu: int | None = None
    """Largest inner packet in bytes; None: as the TUN's."""
    mtu_origin: MtuOrigin | None = None
    """Who says so."""
    no_gso: bool = False
    """UDP_SEGMENT was refused: datagrams go one by one."""
    since: float
    """Unix time of the last change."""
    origin: str
    """What it was learnt from: one of the texts above, or the limit's."""


def limited(state: PathState | None, limit: PathLimit | None) -> PathState | None:
    """Path state as it holds: what was learnt, under what the control plane set."""
    if limit is None:
        return state
    no_gso = state is not None and state.no_gso
    if state is not None and state.inner_mtu is not None and state.inner_mtu <= limit.inner_mtu:
        return state
    return PathState(
        inner_mtu=limit.inner_mtu,
        mtu_origin=limit.origin,
        no_gso=no_gso,
        since=limit.since,
        origin=f"{limit.text}; {NO_GSO_ORIGIN}" if no_gso else limit.text,
    )


def all_limited(
    states: Mapping[int, PathState], limits: Mapping[int, PathLimit]
) -> Mapping[int, PathState]:
    """`limited`, by hop id."""
    found = {}
    for hop_id in states.keys() | limits.keys():
        if (state := limited(states.get(hop_id), limits.get(hop_id))) is not None:
            found[hop_id] = state
    return found


class HopActivity(NamedTuple):
    """What every hop has counted since its id was assigned: columns, by hop id.

    Times only grow, and can be compared with those of another call; 0: never.
    """

    packets_out: npt.NDArray[np.uint64]
    bytes_out: npt.NDArray[np.uint64]
    packets_in: npt.NDArray[np.uint64]
    bytes_in: npt.NDArray[np.uint64]
    drops: npt.NDArray[np.uint64]
    last_refused_ns: npt.NDArray[np.uint64]
    """Of the last send the kernel refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyPlan:
    """What C workers are given, for the image of an early start: engine/image.py."""

    about: Mapping[str, Any]
    """Members of the image's description."""
    workers: bytes
    """A struct tundp_worker_config each, with no pointer and no descriptor in it."""


class HopsAssigned(Protocol):
    """What an engine reads of a change of routes; lease.routing.RoutingDelta is one."""

    @property
    def hops_assigned(self) -> Sequence[int]:
        """Hop ids that stand for another endpoint than before: their state starts anew."""
        ...


class Dataplane(Protocol):
    """An engine. Called from the event loop's thread only; never blocks it for long.

    The engine borrows the TUN and the socket: whoever made them closes them, after
    `detach` or `stop`. Before `attach`, and after `detach`, it reads neither: another process may.
    """

    @property
    def name(self) -> str:
        """What `--engine` calls it."""
        ...

    @property
    def tun_mode(self) -> TunMode:
        """How the TUN it will be given must be opened."""
        ...

    def describe(self) -> str:
        """What it uses now and what it does without, for the log and `tundp status`."""
        ...

    def attach(self, tun: Tun) -> None:
        """Begin to carry packets between `tun` and the socket; counters go on.

        The sockets' options are set here: they may be shared with an engine before this one.
        """
        ...

    def detach(self) -> None:
        """Stop reading the TUN and the socket, e.g. because the device was deleted."""
        ...

    def go_on_from(self, base: CounterBase) -> None:
        """Count on from what was counted before this engine, while it is detached.

        Before the first `attach`; again if that was undone: the last call counts.
        """
        ...

    def base(self) -> CounterBase:
        """What a successor goes on from: all counted so far, `go_on_from`'s included.

        Exact while detached.
        """
        ...

    def early_plan(self) -> EarlyPlan | None:
        """What its workers were given at the last `attach`; None if no early start can be."""
        ...

    def rebound(self) -> None:
        """The underlay sockets were replaced under the same descriptors (dup2).

        Call while detached. The new ones are as `linux.udp.open_udp` makes them, maybe at
        another address. Path state was the old address's and is forgotten; counters go on.
        """
        ...

    def install(self, fib: Fib, delta: HopsAssigned | None = None) -> None:
        """Consult `fib` from the next packet on.

        delta: what changed since the FIB installed before; None: engines compare the hops.
        """
        ...

    def divert(self, ways: Mapping[int, tuple[int, int]]) -> None:
        """Send datagrams of single hops to another address and port, from the next packet on.

        ways: by hop id, address in host order. All others are sent to their endpoint. Nothing but
        the destination of the datagrams changes: counters, path state, events and the source
        check are those of the hop. It holds until the next call, or until the hop id is assigned
        anew.
        """
        ...

    def seen(self) -> int:
        """Generation of the oldest FIB still in use: state of hops gone before it is free."""
        ...

    async def tun_gone(self) -> None:
        """Return when the attached TUN turns out to be deleted."""
        ...

    def counters(self) -> Counters:
        """The counters now; the caller must not change them."""
        ...

    def hop_counters(self, hop_ids: Sequence[int] | None = None) -> Mapping[int, HopCounters]:
        """Counters of each hop asked for; None: of every hop that has counted anything.

        Hop id 0 stands for packets without a hop. Summed over all hops packets_out is
        encap.packets_out, packets_in decap.packets_in, and drops the drops of both.
        """
        ...

    def activity(self) -> HopActivity:
        """`hop_counters` of every hop as columns: a few numpy passes, however many there are."""
        ...

    def hop_sockets(self) -> int:
        """How many send sockets of single hops there are now: engine/hop_slots.py.

        With several workers a hop may have one in each.
        """
        ...

    def offloads(self) -> OffloadState:
        """Offloads in use now, and why others are not."""
        ...

    def path_states(self) -> Mapping[int, PathState]:
        """Path state by hop id, of hops that have any."""
        ...

    def recheck_paths(self) -> None:
        """Forget device MTUs the kernel has other figures for by now: routes or links changed.

        What is still narrow is learnt again, without a loss, from the next send that is refused.
        """
        ...

    def limit_path(self, hop_id: int, limit: PathLimit | None) -> None:
        """Send a hop no larger inner packets than this; None: than its device takes.

        It holds until the next call for the hop, until the hop id is assigned anew, or `rebound`.
        """
        ...

    def bytes_out(self) -> npt.NDArray[np.uint64]:
        """Inner bytes sent to each hop, by hop id. It grows; who compares must bear a reset."""
        ...

    def open_tap(self, request: TapRequest) -> Tap:
        """A stream of event records from the next packet on; TooManyReaders.

        Every packet that is counted has its record in every tap that wants it, or is in the
        tap's `lost`. While no tap is open, none costs anything.
        """
        ...

    def tap_count(self) -> int:
        """How many taps are open."""
        ...

    def heartbeat(self) -> tuple[int, ...]:
        """Iterations each running packet thread has made; () without one, and while detached.

        Asking wakes each thread, so an unchanged count one second later means that the thread
        is stuck.
        """
        ...

    def stop(self) -> None:
        """Detach from everything."""
        ...
