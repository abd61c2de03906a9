"""What every engine offers, and what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from tundp.choices import Offload
from tundp.engine.counters import Counters, HopCounters
from tundp.lease.fib import Fib
from tundp.linux.tun import Tun, TunMode
from tundp.wire.policy import Policy

PATH_STATE_S: Final = 600.0
"""Path state, and what the TUN refused, is forgotten after ten minutes (RFC 1191 section 6.3)."""
EMSGSIZE_ORIGIN: Final = "a send was refused as too long (EMSGSIZE); the kernel's MTU of the route"
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
    """Path state of one hop, learnt from refused sends."""

    inner_mtu: int | None = None
    """Largest inner packet in bytes; None: as the TUN's."""
    no_gso: bool = False
    """UDP_SEGMENT was refused: datagrams go one by one."""
    since: float
    """Unix time of the last change."""
    origin: str
    """What it was learnt from: one of the texts above."""


class HopsAssigned(Protocol):
    """What an engine reads of a change of routes; lease.routing.RoutingDelta is one."""

    @property
    def hops_assigned(self) -> Sequence[int]:
        """Hop ids that stand for another endpoint than before: their state starts anew."""
        ...


class Dataplane(Protocol):
    """An engine. Called from the event loop's thread only; never blocks it for long.

    The engine borrows the TUN and the socket: whoever made them closes them, after
    `detach` or `stop`.
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
        """Begin to carry packets between `tun` and the socket; counters go on."""
        ...

    def detach(self) -> None:
        """Stop reading the current TUN, e.g. because it was deleted."""
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
        """Forget path MTUs the kernel has other figures for by now: routes or links changed.

        What is still narrow is learnt again, without a loss, from the next send that is refused.
        """
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
