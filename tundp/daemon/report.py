"""What a node says of itself: the records of observe/status.py, made from its live parts."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final

import tundp
from tundp.backend.base import Backend, PathMeasuring
from tundp.backend.udp.chaos import Run
from tundp.choices import Measuring
from tundp.engine.base import Dataplane
from tundp.finding import Finding, Verdict, must_hold, worries
from tundp.lease.claim import LeaseState
from tundp.lease.identity import identity_of
from tundp.lease.model import Peer
from tundp.lease.routing import Routing
from tundp.linux import notify, sandbox
from tundp.linux.losses import udp_errors
from tundp.linux.obstacles.scene import PeerPlace, Scene
from tundp.observe import collect
from tundp.observe.collect import PeerView
from tundp.observe.ledger import Ledger, LedgerRows
from tundp.observe.peer_series import PeerSource
from tundp.observe.status import (
    BackendStatus,
    ChaosStatus,
    DaemonState,
    DeviceStatus,
    FirewallStatus,
    KernelStatus,
    MeasuringStatus,
    RoutingStatus,
    SandboxStatus,
    SettingStatus,
    Status,
    StoreStatus,
)
from tundp.settings.settings import DEFAULT, Settings
from tundp.settings.show import reported
from tundp.store.base import StoreWarning

if TYPE_CHECKING:
    from tundp.daemon.node import Node
    from tundp.observe.health import Health

SCENE_PEERS: Final = 256
"""Peers whose addresses are compared with the firewall's rules."""


def starting(settings: Settings, health: Health, started_at: float) -> Status:
    """The status of a daemon that has no lease yet."""
    return Status(
        version=tundp.__version__,
        pid=os.getpid(),
        state=DaemonState.STARTING,
        waiting_for=health.startup_phase,
        started_at=started_at,
        uptime_s=round(time.time() - started_at, 3),
        sandbox=sandbox_status(),
        findings=health.ready(),
        settings=setting_statuses(settings),
    )


def summary(node: Node) -> Status:
    """See observe.collect.StatusSource: nothing here costs more with more leases."""
    lease = node.manager.state()
    backend = node.backend.status()
    engine = node.backend.engine
    lost = udp_errors().since(node.udp_errors_before)
    return Status(
        version=tundp.__version__,
        pid=os.getpid(),
        state=DaemonState.RUNNING,
        started_at=node.started_at,
        uptime_s=round(time.time() - node.started_at, 3),
        loop=type(asyncio.get_running_loop()).__module__.partition(".")[0],
        node_id=node.identity.node_id,
        network=node.network_config.network,
        subnet=lease.key.subnet,
        public_ip=node.underlay.interface.public_ip,
        lease=collect.lease_status(str(lease.key), lease.state, lease),
        store=StoreStatus(
            description=lease.description,
            is_answering=lease.is_answering,
            is_from_cache=not lease.is_synced,
            revision=node.routing.revision,
            synced_at=lease.synced_at,
            age_s=lease.age_s,
            is_cached=lease.is_cached,
            cached_at=lease.cached_at,
            cache_error=lease.cache_error,
        ),
        backend=BackendStatus(
            type=backend.name,
            interface=collect.interface_status(node.underlay.interface),
            port=backend.port,
            mtu=backend.mtu,
            device=None
            if backend.device is None
            else DeviceStatus(name=backend.device, mtu=backend.mtu, queue_len=backend.queue_len),
            receive_buffer=backend.receive_buffer,
            routes=backend.routes,
            path_probes=backend.path_probes,
            peer_messages=backend.peer_messages,
            paths_in_use=_paths_in_use(backend.paths),
        ),
        engine=None if engine is None else collect.engine_status(engine),
        kernel=KernelStatus(
            tun_queue_drops=backend.queue_drops,
            udp_errors=lost.all,
            udp_checksum_errors=lost.checksum,
        ),
        firewall=FirewallStatus(flavour=node.firewall.flavour, missing=node.firewall.missing),
        routing=routing_status(node.routing, engine, backend.silent_peers),
        sandbox=sandbox_status(),
        findings=findings(node),
        counters=None if engine is None else collect.counters_status(engine.counters()),
        chaos=chaos_statuses(node.backend),
        chaos_totals=_chaos_totals(node.backend),
    )


def chaos_statuses(backend: Backend, runs: Sequence[Run] | None = None) -> list[ChaosStatus]:
    """What `tundp chaos` does and did; runs: of these only."""
    if (chaos := backend.chaos) is None:
        return []
    found = []
    for run in chaos.runs() if runs is None else runs:
        counts = chaos.counts(run)
        found.append(
            ChaosStatus(
                subnet=run.subnet,
                public_ip=run.address,
                port=run.port,
                impairment=run.impairment.words,
                slowest_s=run.impairment.slowest_s,
                seed=run.seed,
                since=run.since,
                ends_at=run.ends_at,
                ended_at=run.ended_at,
                why_ended=run.why_ended,
                counts=counts.as_dict(),
                conserved=counts.holds,
            )
        )
    return found


def _chaos_totals(backend: Backend) -> dict[str, int]:
    if (chaos := backend.chaos) is None or not chaos.runs():
        return {}
    return chaos.totals().as_dict()


def routing_status(
    routing: Routing, engine: Dataplane | None, silent_peers: int | None = None
) -> RoutingStatus:
    """The routing ledger in numbers; costs the same whatever they are. engine: None if none."""
    narrow, no_gso = collect.path_counts(engine)
    return RoutingStatus(
        generation=routing.generation,
        peers=len(routing.peers),
        refused=len(routing.refused),
        bad_entries=len(routing.bad_entries),
        narrow_paths=narrow,
        no_gso_paths=no_gso,
        silent_peers=silent_peers,
        narrow_by_origin=collect.narrow_by_origin(engine),
    )


def status(node: Node) -> Status:
    """See observe.collect.StatusSource: everything, the long parts lazy."""
    routing = node.routing
    peers = tuple(routing.peers.values())
    measurings = {
        hop_id: MeasuringStatus(state=each.state, since=each.since)
        for hop_id, each in (node.backend.status().paths or {}).items()
    }

    def views() -> Iterator[PeerView]:
        for peer in peers:
            yield PeerView(
                subnet=peer.subnet,
                public_ip=peer.endpoint.address,
                port=peer.endpoint.port or None,
                hop_id=peer.hop_id,
                backend_type=peer.backend_type or node.backend.name,
            )

    return replace(
        summary(node),
        peers=collect.peer_statuses(
            len(peers), views, node.backend.engine, measurings, node.backend.reaches()
        ),
        refused=collect.refused_statuses(routing.refused.values()),
        bad_entries=collect.bad_entry_statuses(routing.bad_entries.values()),
        settings=setting_statuses(node.settings),
    )


def ledger(node: Node) -> Callable[[], Ledger]:
    """What makes the lease table, in any thread: of a copy, so that nothing changes meanwhile."""
    routing, backend = node.routing, node.backend.status()
    rows = LedgerRows.of(routing)
    table = Ledger(
        network=node.network_config.network,
        subnet=routing.own_key.subnet,
        public_ip=routing.public_ip,
        backend=backend.name,
        port=backend.port,
        mtu=backend.mtu,
        source_check=node.settings.source_check,
        admitted=node.settings.source_admit,
        own_addresses=tuple(sorted(routing.own_addresses)),
        broadcasts=tuple(sorted(routing.broadcasts)),
        revision=routing.revision,
        generation=routing.generation,
        bad_entries=len(routing.bad_entries),
    )
    return lambda: replace(table, leases=rows.made())


def peer_source(backend: Backend) -> PeerSource | None:
    """What series of single peers are made of; None if the backend has no engine."""
    if (engine := backend.engine) is None:
        return None

    def name(hop_id: int) -> str | None:
        peer = backend.peer_at(hop_id)
        return None if peer is None else str(peer.endpoint.address)

    return PeerSource(
        activity=engine.activity, name=name, reaches=backend.reaches, paths=engine.path_states
    )


def _paths_in_use(paths: Mapping[int, PathMeasuring] | None) -> Mapping[str, int] | None:
    if paths is None:
        return None
    counts = Counter(each.state for each in paths.values())
    return {state.value: counts[state] for state in Measuring}


def findings(node: Node) -> list[Finding]:
    """What must hold for pods to use the overlay."""
    lease = node.manager.state()
    underlay = node.underlay
    link = underlay.interface.link
    duplicate = _duplicate(node.routing)
    return [
        must_hold(
            "lease",
            lease.state is LeaseState.HELD and not duplicate,
            lease.conflict or duplicate or lease.state.value,
        ),
        *node.backend.checks(),
        must_hold(
            "underlay",
            not underlay.error and link.is_up,
            underlay.error
            or f"{link.name} {underlay.interface.address} {'up' if link.is_up else 'is down'}",
        ),
        must_hold(
            "leases-synced",
            lease.is_synced,
            f"{'' if lease.is_synced else 'only from the lease cache, '}age {lease.age_s} s",
        ),
        must_hold("firewall", not node.firewall.missing, node.firewall.evidence),
        must_hold("subnet-file", not node.subnet_file.error, node.subnet_file.error or "written"),
        *worries("subnet-file-unseen", node.subnet_file.unseen),
        *worries("firewall-contest", node.firewall.contest),
        *worries("kernel-contest", node.contest.words(now=time.monotonic())),
        *worries("state-dir", lease.cache_error),
        *node.worries(),
        *worries("systemd", notify.failure()),
        *sandbox_findings(),
        *node.supervisor.findings(),
        *store_findings(node.manager.warnings),
        *node.obstacles.findings(),
    ]


def sandbox_status() -> SandboxStatus | None:
    """What this process is held to; None if it entered no sandbox."""
    holds = sandbox.held()
    if holds is None:
        return None
    return SandboxStatus(
        landlock_abi=holds.landlock_abi,
        seccomp=holds.has_seccomp,
        missing=holds.missing,
        gaps=holds.gaps,
    )


def sandbox_findings() -> list[Finding]:
    """A warning of what --sandbox=auto could not hold."""
    holds = sandbox.held()
    return worries(
        "sandbox",
        "" if holds is None else "; ".join(f"does not hold: {each}" for each in holds.missing),
        next_step="a newer kernel, or --sandbox=off to say that none is wanted",
    )


def _duplicate(routing: Routing) -> str:
    """Which other node advertises our PublicIP; empty if none does."""
    key = next(iter(routing.duplicates), None)
    if key is None:
        return ""
    identity = identity_of(routing.leases[key])
    who = "a flannel without node id" if identity is None else f"node {identity}"
    return f"{who} has our PublicIP, too: lease {key}"


def store_findings(warnings: Iterable[StoreWarning]) -> Iterator[Finding]:
    """Warnings of the store as findings. None of them makes a node unready."""
    for warning in warnings:
        yield Finding(
            id=f"store.{warning.id}",
            verdict=Verdict.WARN,
            title="store",
            evidence=warning.evidence,
            next_step=warning.next_step,
        )


def scene(node: Node) -> Scene | None:
    """What the node's packets look like from outside; None while it has no device."""
    backend = node.backend.status()
    interface = node.underlay.interface
    if backend.device == "":
        return None
    routing = node.routing
    return Scene(
        network=node.network_config.network,
        subnet=node.acquired.lease.key.subnet,
        device=backend.device or interface.link.name,
        is_open=True,
        is_tunnel=backend.device is not None,
        uplink=interface.link.name,
        address=interface.address,
        port=backend.port,
        peers=tuple(
            PeerPlace(peer.subnet, peer.endpoint.address)
            for peer in _spread(routing.peers.values(), SCENE_PEERS)
        ),
        peer_count=len(routing.peers),
        accepts=node.settings.iptables_forward_rules,
        pid=os.getpid(),
        keeps_route=True,
    )


def _spread(peers: Collection[Peer], most: int) -> Iterator[Peer]:
    """At most `most` of the peers, from all over the table: the store decides who comes first."""
    return islice(peers, 0, None, max(1, -(-len(peers) // most)))


def setting_statuses(settings: Settings) -> dict[str, SettingStatus]:
    """Every setting in force, passwords blanked."""
    return {
        name: SettingStatus(value=value, origin=settings.origins.get(name, DEFAULT))
        for name, value in reported(settings).items()
    }
