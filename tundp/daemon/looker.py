"""What a daemon lets be seen besides its status: events of packets, the flight recorder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tundp
from tundp.backend.udp.chaos import Chaos
from tundp.daemon import report
from tundp.engine.base import Dataplane
from tundp.engine.recorder import FlightRecorder
from tundp.engine.taps import Tap, TapRequest
from tundp.errors import Unsupported
from tundp.observe import blackbox
from tundp.observe.chaos import read_order
from tundp.observe.events import Hello
from tundp.observe.ledger import Ledger
from tundp.observe.status import ChaosStatus
from tundp.wire.drop import DropReason

if TYPE_CHECKING:
    from tundp.daemon.node import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLooker:
    """See tundp.admin.Looker."""

    node: Callable[[], Node | None]
    """The node, once it has its lease."""
    recorder: FlightRecorder | None

    def open_tap(self, request: TapRequest) -> Tap:
        """See Looker."""
        return self._engine()[1].open_tap(request)

    def hello(self) -> Hello:
        """See Looker."""
        node, engine = self._engine()
        backend = node.backend.status()
        return Hello(
            version=tundp.__version__,
            node=str(node.underlay.interface.public_ip),
            network=str(node.network_config.network),
            subnet=str(node.acquired.lease.key.subnet),
            tun=backend.device or "",
            mtu=backend.mtu,
            port=backend.port or 0,
            engine=engine.name,
            workers=max(1, len(engine.heartbeat())),
            unix_ns=time.time_ns() - time.monotonic_ns(),
            reasons=tuple(reason.label for reason in DropReason),
            chaos="" if node.backend.chaos is None else node.backend.chaos.words(),
        )

    def blackbox(self) -> Mapping[str, Any]:
        """See Looker."""
        if self.recorder is None:
            raise Unsupported("this daemon has no flight recorder: its log says why")
        return blackbox.document(self.recorder.recorded())

    def ledger(self) -> Callable[[], Ledger]:
        """See Looker."""
        return report.ledger(self._running())

    async def begin_chaos(self, document: Mapping[str, Any]) -> Sequence[ChaosStatus]:
        """See ChaosDesk."""
        node, chaos = self._chaos()
        order = read_order(document)
        runs = await chaos.begin(order.peer, order.impairment, for_s=order.for_s, seed=order.seed)
        return report.chaos_statuses(node.backend, runs)

    def stop_chaos(self, peer: str) -> Sequence[ChaosStatus]:
        """See ChaosDesk."""
        node, chaos = self._chaos()
        return report.chaos_statuses(node.backend, chaos.stop(peer))

    def chaos(self) -> Sequence[ChaosStatus]:
        """See ChaosDesk."""
        return report.chaos_statuses(self._chaos()[0].backend)

    def _chaos(self) -> tuple[Node, Chaos]:
        node = self._running()
        if node.backend.chaos is None:
            raise Unsupported(
                f"the backend {node.backend.name} leaves packets to the kernel: tc qdisc add dev"
                f" {node.underlay.interface.link.name} root netem ... impairs them"
            )
        return node, node.backend.chaos

    def _engine(self) -> tuple[Node, Dataplane]:
        node = self._running()
        if node.backend.engine is None:
            raise Unsupported(
                f"the backend {node.backend.name} leaves packets to the kernel, and sees none:"
                " tcpdump on the interface shows them"
            )
        return node, node.backend.engine

    def _running(self) -> Node:
        if (node := self.node()) is None:
            raise Unsupported("the daemon is starting: it has no lease, and carries no packets yet")
        return node
