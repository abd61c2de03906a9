"""Measures how large an inner packet the path to each peer carries; sets what engines go by.

    engine.bytes_out     which hops carry more than small packets
    netlink              the MTU of their routes: the operator's word, believed at once
    echo requests        from our TUN address to the peer's, DF set outside, with a cookie nobody
                         can guess: what arrives is answered by the peer's kernel, flanneld's too;
                         engines copy the answers to linux/echo.py's sockets
    engine.limit_path    the smaller of the two

No ICMP error is believed, since anybody can forge one: no socket of ours uses what they say of a
path. Until a path is measured, and where no answer comes at all, datagrams of full size leave with
DF clear, and routers fragment them. path_search.py decides what is asked, and what follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from typing import Final

import numpy as np
import numpy.typing as npt

from tundp.backend.base import PathMeasuring
from tundp.backend.udp.echoes import Echoes, ProberSettings
from tundp.backend.udp.path import Path, concerned, limit_of, path_findings
from tundp.backend.udp.path_search import FLOOR, Answer, PathSearch
from tundp.backoff import Ration
from tundp.choices import Measuring
from tundp.engine.base import PATH_STATE_S, Dataplane
from tundp.errors import PlatformError
from tundp.finding import Finding, worries
from tundp.lease.fib import Fib
from tundp.lease.model import Peer
from tundp.lease.routing import RoutingDelta
from tundp.linux.netlink import Change, Flow, Netlink, RouteLookup
from tundp.wire import overhead

_log = logging.getLogger(__name__)

ACTIVE_BYTES: Final = 1280
"""A hop that was sent fewer bytes since the last look carries no large packets."""
LOOK_S: Final = 1.0
"""Between two looks at who is active, while nothing is being measured."""
PACE_S: Final = 0.16
"""Between two rounds of a search."""
AGAIN_S: Final = 30.0
"""Between two measurements of a path in use."""
SETTLE_S: Final = 0.5
"""From a change of routes or links to the measurement: more changes follow."""
_SEARCHES: Final = 64
"""Paths whose routes are asked for at a time."""
_LINES: Final = 10
_UNMEASURED: Final = (
    "paths to the peers are not measured, so routers fragment what a narrow one does not carry,"
    " and a path that swallows large packets is not noticed: {}"
)


class PathProber:
    """See the module. A consumer of routes (backend.base.FibSink): they say whose hop is whose."""

    def __init__(self, netlink: Netlink, echoes: Echoes) -> None:
        """echoes: started by the caller; if it cannot ask, routes are looked up only."""
        self._netlink = netlink
        self._echoes = echoes
        self._engine: Dataplane | None = None
        self._settings: ProberSettings | None = None
        self._peers: dict[int, Peer] = {}
        """By hop id; one of those at the same endpoint."""
        self._paths: dict[int, Path] = {}
        self._sent: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._generation = 0
        self._is_disturbed = asyncio.Event()
        self._lines = Ration(_LINES)

    def start(
        self,
        engine: Dataplane,
        settings: ProberSettings,
        fib: Fib,
        peers: Mapping[IPv4Network, Peer],
    ) -> None:
        """Measure on behalf of `engine`, which routes by `fib`."""
        self._engine = engine
        self._settings = settings
        self._generation = fib.generation
        self._peers = {peer.hop_id: peer for peer in peers.values()}

    def install(self, fib: Fib, delta: RoutingDelta) -> None:
        """See FibSink."""
        self._generation = fib.generation
        if delta.is_whole:
            self._peers.clear()
        for hop_id in delta.hops_assigned:
            self._drop(hop_id)
        for peer in (*delta.gone, *(old for old, _ in delta.moved)):
            known = self._peers.get(peer.hop_id)
            if known is not None and known.subnet == peer.subnet:
                del self._peers[peer.hop_id]
                self._drop(peer.hop_id)
        for peer in (*delta.come, *(new for _, new in delta.moved)):
            self._peers[peer.hop_id] = peer

    def peer(self, hop_id: int) -> Peer | None:
        """A peer at the hop; None if there is none any more."""
        return self._peers.get(hop_id)

    def seen(self) -> int:
        """See FibSink."""
        return self._generation

    def reset(self, settings: ProberSettings) -> None:
        """The underlay's address or the MTU is another: forget everything."""
        for hop_id in list(self._paths):
            self._drop(hop_id)
        self._settings = settings

    def note(self, changes: Iterable[Change]) -> None:
        """Look again at the paths that changes of routes, links or rules concern, soon."""
        if not self._paths:
            return
        due_at = asyncio.get_running_loop().time() + SETTLE_S
        for path in concerned(changes, list(self._paths.values())):
            self._disturb(path, due_at)

    def measure_again(self, hop_ids: Iterable[int]) -> None:
        """Look again at the paths of some hops, soon, if they are in use."""
        due_at = asyncio.get_running_loop().time() + SETTLE_S
        for hop_id in hop_ids:
            if (path := self._paths.get(hop_id)) is not None:
                self._disturb(path, due_at)

    def _disturb(self, path: Path, due_at: float) -> None:
        # Changes in a row do not put it off.
        if not path.is_due or path.due_at > due_at:
            path.due_at = due_at
        path.is_due = True
        self._end_search(path)
        self._is_disturbed.set()

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            with self._echoes.receiving():
                while True:
                    now = loop.time()
                    self._find_active(now)
                    await self._begin_due(loop.time)
                    is_busy = self._step(loop.time())
                    self._is_disturbed.clear()
                    if is_busy:
                        await asyncio.sleep(PACE_S)
                        continue
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await self._is_disturbed.wait()
                        await asyncio.sleep(SETTLE_S)
        finally:
            for path in self._paths.values():
                self._end_search(path)

    def measurings(self) -> Mapping[int, PathMeasuring]:
        """What measuring has come to, by hop id, of the paths that carried large packets lately."""
        return {path.hop_id: path.measuring for path in self._paths.values()}

    def findings(self) -> list[Finding]:
        """What is to be said of the paths in use; nothing without one."""
        if self._echoes.error:
            return worries("path-mtu", _UNMEASURED.format(self._echoes.error))
        return path_findings(self._paths.values())

    def _find_active(self, now: float) -> None:
        """Note the hops that carry large packets; forget those that have long carried none."""
        assert self._engine is not None
        sent = self._engine.bytes_out()
        grown = sent.copy()
        common = min(len(sent), len(self._sent))
        grown[:common] -= self._sent[:common]
        self._sent = sent
        for hop_id in np.flatnonzero(grown >= ACTIVE_BYTES).tolist():
            path = self._paths.get(hop_id)
            if path is None:
                if (peer := self._peers.get(hop_id)) is not None:
                    self._paths[hop_id] = Path(hop_id, peer, active_at=now, due_at=now)
                continue
            path.active_at = now
            path.is_due = True
            if path.search is None:
                path.peer = self._peers.get(hop_id, path.peer)
        for path in [each for each in self._paths.values() if now - each.active_at > PATH_STATE_S]:
            self._drop(path.hop_id)

    async def _begin_due(self, clock: Callable[[], float]) -> None:
        """Ask for the routes of the paths that are due, and begin to measure them."""
        assert self._settings is not None
        now = clock()
        due = [
            path
            for path in self._paths.values()
            if path.is_due and path.search is None and path.due_at <= now
        ][:_SEARCHES]
        if not due:
            return
        for path in due:
            path.is_due = False
            path.due_at = now + AGAIN_S
        flow = Flow(source=self._settings.source, port=self._settings.port)
        addresses = dict.fromkeys(path.peer.endpoint.address for path in due)
        try:
            found = await self._netlink.lookups(addresses, flow, of_routes=True)
        except PlatformError as error:
            _log.debug("routes are not looked up: %s", error)
            found = {}
        for path in due:
            if self._paths.get(path.hop_id) is not path:
                continue  # gone meanwhile
            route = found.get(path.peer.endpoint.address)
            if isinstance(route, RouteLookup):
                path.link = route.index
                path.route = None if route.mtu is None else overhead.inner_mtu(route.mtu)
            self._apply(path)
            full = min(self._settings.full, path.route or self._settings.full)
            if self._echoes.can_ask and full > FLOOR and not path.is_due:
                path.search = PathSearch(full, path.measured)

    def _step(self, now: float) -> bool:
        """Send what is due of each search, within the rate; whether any search goes on."""
        searching = [path for path in self._paths.values() if path.search is not None]
        # The rate may not do for all: those never searched, or longest ago, come first.
        for path in sorted(searching, key=lambda path: path.searched_at):
            if not self._echoes.may_ask(now):
                break
            assert path.search is not None
            self._ask(path, path.search.next_sizes())
            self._conclude(path, now)
        return bool(searching)

    def _ask(self, path: Path, sizes: Sequence[int]) -> None:
        if path.search is None:
            return
        of_round = path.search.round

        def answered(size: int) -> None:
            if path.search is not None:
                path.search.answered(size, of_round)
                self._conclude(path, asyncio.get_running_loop().time())

        cookies = self._echoes.ask(path.peer, sizes, answered)
        if cookies is None:
            self._end_search(path)
        else:
            path.cookies += cookies

    def _conclude(self, path: Path, now: float) -> None:
        """Use the result of a search, if there is one."""
        search = path.search
        if search is None or search.result is None:
            return
        path.searched_at = now
        if search.result is Answer.UNKNOWN:
            # A peer that is down for a moment has the path it had.
            if now - path.measured_at > PATH_STATE_S:
                path.measured = None
            path.note(Measuring.PENDING if search.largest else Measuring.NO_ANSWER)
        else:
            path.note(Measuring.MEASURED)
            path.measured = search.largest if search.result is Answer.NARROW else None
            path.measured_at = now
        self._end_search(path)
        self._apply(path)

    def _end_search(self, path: Path) -> None:
        path.search = None
        self._echoes.forget(path.cookies)
        path.cookies.clear()

    def _apply(self, path: Path) -> None:
        """Give the engine the limit of a path, if it is another than before."""
        assert self._engine is not None and self._settings is not None
        wanted = limit_of(path, self._settings.full)
        before = path.limit
        if (wanted and (wanted.inner_mtu, wanted.origin)) == (
            before and (before.inner_mtu, before.origin)
        ):
            return
        path.limit = wanted
        self._engine.limit_path(path.hop_id, wanted)
        address = path.peer.endpoint.address
        if not self._lines.take(time.monotonic()):
            return
        withheld = self._lines.withheld_words()
        if wanted is None:
            _log.info("path to %s: carries the device's MTU again%s", address, withheld)
        else:
            _log.warning(
                "path to %s: inner packets up to %d bytes, the device's MTU is %d: %s%s",
                address,
                wanted.inner_mtu,
                self._settings.full,
                wanted.text,
                withheld,
            )

    def _drop(self, hop_id: int) -> None:
        """Forget a path, and what the engine was given of it."""
        path = self._paths.pop(hop_id, None)
        if path is None:
            return
        self._end_search(path)
        if path.limit is not None and self._engine is not None:
            self._engine.limit_path(hop_id, None)
