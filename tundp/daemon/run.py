"""From settings to a running node: opens everything in order, closes it all in reverse.

    resources -> admin, health, metrics -> network config -> interface -> backend.prepare
        -> lease and snapshot -> ledger -> backend.open(FIB) -> firewall -> subnet.env
        -> READY -> Node.run

Shutdown is cancellation and nothing else: `run` ends when its task is cancelled, and what it opened
is closed on the way out, the backend last: packets flow until then. As with flannel the lease, the
firewall rules and subnet.env stay, so that the next start finds the same subnet and nothing leaks
meanwhile.

With a takeover (daemon/handover) all of that is done beside the daemon that runs: nothing is
written or served until `backend.open` has got the packets from it.

Why one room: it is the order of a start, and whoever moves a step has to see the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tundp.admin import AdminSocket, serve_admin
from tundp.admin_chaos import serve_chaos
from tundp.admin_handover import serve_handover
from tundp.backend.base import Backend
from tundp.backend.choose import parse_network_config
from tundp.blocking import off_loop
from tundp.choices import OnLeaseLost
from tundp.daemon import report
from tundp.daemon.backends import lease_offer, make_backend
from tundp.daemon.dumps import Dumps
from tundp.daemon.firewall_keeper import FirewallKeeper
from tundp.daemon.handover.giver import Giver, Holdings
from tundp.daemon.handover.taker import Takeover
from tundp.daemon.handover.taker import report as handover_report
from tundp.daemon.journal import Journal
from tundp.daemon.looker import NodeLooker
from tundp.daemon.node import Node
from tundp.daemon.peer_desk import NodePeerDesk
from tundp.daemon.resources import Resources
from tundp.daemon.stall_watch import StallWatch
from tundp.daemon.stores import store_name
from tundp.daemon.subnet_file import read_text
from tundp.daemon.supervise import Supervisor
from tundp.daemon.underlay import Underlay, selection_of
from tundp.daemon.unreachable import remove_routes_of_before
from tundp.errors import ConfigError, PlatformError
from tundp.finding import Finding, worries
from tundp.lease import subnet_env
from tundp.lease.identity import Identity
from tundp.lease.model import LeaseAttributes, LeaseKey
from tundp.lease.network import NetworkConfig
from tundp.linux import fd_store
from tundp.linux.firewall.choose import FirewallSettings, Previous, make_firewall
from tundp.linux.iface import Interface, Selection, look
from tundp.linux.netlink import Netlink
from tundp.linux.tun import require_device
from tundp.observe.health import Health
from tundp.observe.http_server import HttpServer
from tundp.observe.leases import Leases
from tundp.observe.metrics import Metrics
from tundp.observe.status import Status
from tundp.observe.web import MetricsServer, serve_health
from tundp.settings.settings import Settings
from tundp.store.base import Store
from tundp.subnet.base import Acquired, SubnetManager
from tundp.subnet.lease_cache import LeaseCache
from tundp.subnet.manager import CacheSettings, LeaseSettings, StoreSubnetManager

_log = logging.getLogger(__name__)

CONFIG_S: Final = 20.0
"""A successor waits no longer for the network config: the daemon before goes on instead."""


async def run(
    settings: Settings,
    store: Store,
    resources: Resources,
    supervisor: Supervisor,
    takeover: Takeover | None = None,
) -> None:
    """Be a node of the overlay until cancelled, or handed over. TundpError if it cannot be one.

    The store and the resources are closed on the way out. `supervisor` keeps the tasks.
    takeover: from whom to take over; None: from nobody.
    """
    _warn_of_vain_flags(settings)
    async with contextlib.AsyncExitStack() as stack:
        # What is opened first is closed last: packets flow until everything else is gone.
        stack.callback(resources.close)
        journal = _open_journal(stack, resources)
        carrying = stack.enter_context(contextlib.ExitStack())
        stack.push_async_callback(store.close)
        cache = LeaseCache(settings.state_dir, settings.instance)
        identity = cache.identity() if takeover is None else takeover.identity
        manager = _make_manager(settings, store, identity, cache)
        stack.push_async_callback(manager.close)
        desk = _Desk(settings, resources, supervisor, takeover)
        if takeover is None:
            await _open_desk(stack, desk)
        netlink = await stack.enter_async_context(Netlink())
        desk.metrics.netlink = lambda: (netlink.requests, netlink.dumps)
        selection = selection_of(settings)
        # Before the network config, which may be long in coming: a wrong flag fails at once.
        await look(netlink, selection, None)
        network_config = await _network_config(manager, desk)
        _log_network(network_config, manager)
        if desk.takeover is not None:
            desk.takeover.held(network_config)  # before anything of the predecessor's is touched
        interface = await _choose_interface(netlink, selection, network_config)
        backend = _make_backend(desk, network_config, netlink)
        carrying.callback(backend.close)
        offer = lease_offer(backend, settings, network_config, interface)
        backend.prepare(interface)
        env_text = read_text(settings.subnet_file)
        before = await _start_before(env_text, cache, identity.node_id)
        acquired = await _acquire(manager, desk, network_config, offer, env_text)
        underlay = Underlay(netlink, selection, interface=interface, network=network_config.network)
        node = Node(
            settings=settings,
            network_config=network_config,
            manager=manager,
            acquired=acquired,
            backend=backend,
            underlay=underlay,
            netlink=netlink,
            firewall=_make_firewall(settings, network_config, acquired.lease.key, before),
            metrics=desk.metrics,
            identity=manager.identity or identity,
            worries=desk.worries,
            supervisor=supervisor,
            journal=journal,
        )
        stack.callback(node.close)
        stack.callback(resources.kept.freeze)
        await _bring_up(stack, node, desk, before)
        await node.run()


@dataclass(slots=True)
class _Desk:
    """Answers for the daemon: sockets that are there before the node is."""

    settings: Settings
    resources: Resources
    supervisor: Supervisor
    takeover: Takeover | None
    health: Health = field(default_factory=Health)
    metrics: Metrics = field(init=False)
    started_at: float = field(default_factory=time.time)
    node: Node | None = None
    admin: AdminSocket | None = None
    metrics_server: MetricsServer | None = None

    def duplicates(self) -> dict[str, int]:
        """What is kept in the descriptor store of it; the caller's. OSError."""
        found = self.resources.duplicates()
        if self.admin is not None:
            found["admin"] = self.admin.duplicate()
        metrics = self.listeners()["metrics"]
        if metrics is not None and metrics.fileno() >= 0:
            found["metrics"] = os.dup(metrics.fileno())
        return found

    def __post_init__(self) -> None:
        self.metrics = Metrics(
            self.health.ready, self.supervisor.failures, peers_max=self.settings.metrics_peers
        )
        self.health.on_lag = self.metrics.loop_lag.observe

    def listeners(self) -> Mapping[str, socket.socket | None]:
        """See handover.giver.Holdings."""
        return {
            "admin": None if self.admin is None else self.admin.sock,
            "health": self.resources.health,
            "metrics": None if self.metrics_server is None else self.metrics_server.sock,
        }

    def leave(self) -> None:
        """Accept no more connections: a successor does. What the store keeps is its affair."""
        self.resources.kept.freeze()
        if self.admin is not None:
            self.admin.leave()

    def worries(self) -> list[Finding]:
        """Who cannot ask the daemon, and why."""
        return [
            *worries("admin-socket", "" if self.admin is None else self.admin.error),
            *worries("metrics", "" if self.metrics_server is None else self.metrics_server.error),
        ]

    def leases(self, since: int | None) -> Callable[[], Leases] | None:
        """None: there is no node yet."""
        return None if self.node is None else self.node.leases(since)

    def dropped(self) -> int | None:
        """Packets dropped so far, in both directions; None while there is no engine."""
        engine = None if self.node is None else self.node.backend.engine
        if engine is None:
            return None
        counted = engine.counters()
        return counted.encap.dropped + counted.decap.dropped

    def status(self) -> Status:
        if self.node is not None:
            return self.node.status()
        return report.starting(self.settings, self.health, self.started_at)


async def _bring_up(
    stack: contextlib.AsyncExitStack, node: Node, desk: _Desk, before: Previous | None
) -> None:
    """Make everything pods need: routes and device, firewall rules, subnet.env, in this order.

    Docker and CNI go by subnet.env, so it comes last. Nor are the network and subnet of the
    last start (`before`) forgotten before what they left is gone.
    """
    desk.health.waits_for(f"the {node.backend.name} backend")
    await remove_routes_of_before(
        node.netlink,
        before,
        network=node.network_config.network,
        subnet=node.acquired.lease.key.subnet,
    )
    await node.open()
    kept = desk.resources.kept
    kept.follow((*fd_store.QUEUES, "image"), lambda: node.backend.give().by_name())
    kept.sync()
    desk.node = node
    takeover = desk.takeover
    if takeover is not None:
        await _settle(stack, node, desk, takeover)
    desk.health.waits_for("the firewall rules")
    if takeover is not None and takeover.offer.firewall == node.firewall.wanted:
        await node.firewall.take_over(takeover.firewall_memory())
    else:
        await node.firewall.set_up()
    node.write_subnet_file(is_there=takeover is not None)
    desk.health.attend(node.backend.heartbeat, node.findings)
    desk.metrics.summary = node.summary
    desk.metrics.peers = report.peer_source(node.backend)


def _make_backend(desk: _Desk, network_config: NetworkConfig, netlink: Netlink) -> Backend:
    """With what a predecessor gave, if there is one, and not before it lets go."""
    resources, takeover = desk.resources, desk.takeover
    return make_backend(
        network_config.backend,
        desk.settings,
        netlink,
        resources.take_backend(),
        resources.recorder,
        resources.kept.sync,
        switch=None if takeover is None else takeover.switch,
        totals=None if takeover is None else takeover.base,
    )


async def _acquire(
    manager: StoreSubnetManager,
    desk: _Desk,
    network_config: NetworkConfig,
    offer: LeaseAttributes,
    env_text: str,
) -> Acquired:
    """The lease: one to be had from the store, or that of the predecessor."""
    if desk.takeover is not None:
        held = desk.takeover.held(network_config)
        acquired = await manager.take_over(network_config, offer, held)
    else:
        acquired = await manager.acquire(
            network_config,
            offer,
            previous=subnet_env.previous_key(env_text),
            progress=desk.health,
        )
    if acquired.cache_age_s is None:
        _log_lease(desk.settings, env_text, acquired)
    return acquired


async def _settle(
    stack: contextlib.AsyncExitStack, node: Node, desk: _Desk, takeover: Takeover
) -> None:
    """The predecessor is gone: its lease, its sockets and its flight recorder's name are ours."""
    node.manager.taken_over(takeover.held(node.network_config))
    if desk.resources.recorder is not None:
        with contextlib.suppress(OSError):
            desk.resources.recorder.take_place(
                desk.settings.instance.recorder(desk.settings.admin_socket)
            )
    await _open_desk(stack, desk)
    gap = "" if takeover.gap_ns is None else f"; packets waited {takeover.gap_ns / 1e6:.1f} ms"
    _log.info("took over from process %d%s", takeover.pid, gap)


async def _network_config(manager: StoreSubnetManager, desk: _Desk) -> NetworkConfig:
    """The network config; with a predecessor it is not waited for longer than packets flow."""
    if desk.takeover is None:
        return await manager.network_config(desk.health)
    try:
        async with asyncio.timeout(CONFIG_S):
            return await manager.network_config(desk.health)
    except TimeoutError:
        raise PlatformError(
            f"{manager.description} has no network config to be had within {CONFIG_S:g} s"
        ) from None


async def _open_desk(stack: contextlib.AsyncExitStack, desk: _Desk) -> None:
    """Serve admin socket, health and metrics from now on, and watch the event loop."""
    settings, resources, supervisor = desk.settings, desk.resources, desk.supervisor
    health, metrics = desk.health, desk.metrics
    giver = Giver(
        lambda: desk.node,
        Holdings(
            settings=settings,
            lock=resources.lock,
            listeners=desk.listeners,
            stop_serving=desk.leave,
        ),
    )
    giver.taken_over = None if desk.takeover is None else handover_report(desk.takeover)
    stack.push_async_callback(giver.close)
    looker = NodeLooker(node=lambda: desk.node, recorder=resources.recorder)

    def serve_more(server: HttpServer) -> None:
        serve_chaos(server, looker)
        serve_handover(server, giver)

    desk.admin = await stack.enter_async_context(
        serve_admin(
            settings.admin_socket,
            desk.status,
            metrics.render,
            desk.leases,
            sock=resources.admin,
            looker=looker,
            peers=NodePeerDesk(node=lambda: desk.node),
            more=serve_more,
        )
    )
    await stack.enter_async_context(serve_health(resources.health, health))
    watch = supervisor.keep("watch health", health.watch)
    dumps = Dumps(
        resources.recorder, settings.instance.recorder(settings.admin_socket), desk.dropped
    )
    tasks = [
        asyncio.ensure_future(watch),
        asyncio.ensure_future(supervisor.keep("copy flight recorder", dumps.run)),
    ]
    if settings.metrics_addr is not None:
        server = MetricsServer(*settings.metrics_addr, resources.metrics, metrics)
        resources.metrics = None  # the server's
        desk.metrics_server = server
        tasks.append(asyncio.ensure_future(supervisor.keep("serve metrics", server.run)))
    resources.kept.follow(
        tuple(each for each in fd_store.SINGLE if each != "image"),
        desk.duplicates,
    )
    tasks.append(asyncio.ensure_future(supervisor.keep("keep descriptors", resources.kept.keep)))
    stack.push_async_callback(_cancel, *tasks)
    stack.enter_context(StallWatch(asyncio.get_running_loop()).watching())


def _open_journal(
    stack: contextlib.ExitStack | contextlib.AsyncExitStack, resources: Resources
) -> Journal:
    """Keep what is logged from now on in the flight recorder, too."""
    journal = Journal(resources.recorder)
    handler = journal.handler()
    logger = logging.getLogger("tundp")
    logger.addHandler(handler)
    stack.callback(logger.removeHandler, handler)
    return journal


async def _cancel(*tasks: asyncio.Future[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _log_network(config: NetworkConfig, manager: SubnetManager) -> None:
    port = config.backend.peer_port
    _log.info(
        "network %s, backend %s%s, from %s",
        config.network,
        config.backend.name,
        f", port {port}" if port else "",
        manager.description,
    )


async def _choose_interface(
    netlink: Netlink, selection: Selection, network: NetworkConfig
) -> Interface:
    chosen = await look(netlink, selection, network.network)
    for warning in chosen.warnings:
        _log.warning("%s", warning)
    _log.info(
        "interface %s (%s), MTU %d, advertising %s: %s",
        chosen.link.name,
        chosen.address,
        chosen.link.mtu,
        chosen.public_ip,
        chosen.why,
    )
    for other in chosen.others:
        _log.info("not taken: %s", other)
    return chosen


def _make_manager(
    settings: Settings, store: Store, identity: Identity, cache: LeaseCache
) -> StoreSubnetManager:
    exits_when_lost = settings.on_lease_lost is OnLeaseLost.EXIT
    return StoreSubnetManager(
        store,
        identity=identity,
        lease=LeaseSettings(
            lease_ttl_s=settings.lease_ttl_s,
            margin_s=settings.subnet_lease_renew_margin_min * 60,
            is_forced=settings.force_takeover,
            exits_when_lost=exits_when_lost,
        ),
        cache=CacheSettings(
            cache=cache,
            store_name=store_name(settings),
            # Whoever would exit without a lease starts with none.
            is_start_allowed=not exits_when_lost,
        ),
        parse=parse_network_config,
        rng=random.SystemRandom(),
    )


def _make_firewall(
    settings: Settings, network: NetworkConfig, key: LeaseKey, before: Previous | None
) -> FirewallKeeper:
    """Who keeps the rules that are wanted, if any. before: as of the last start."""
    wanted = FirewallSettings(
        network=network.network,
        subnet=key.subnet,
        network6=network.network6,
        subnet6=None if key.v6 is None else key.v6.network,
        is_masquerading=settings.ip_masq,
        is_forwarding=settings.iptables_forward_rules,
        is_random_fully=not settings.ip_masq_fully_random_disable,
        mark=settings.instance.chain_suffix,
    )
    firewall = make_firewall(wanted, is_nftables=network.enable_nftables)
    return FirewallKeeper(firewall, before, settings.iptables_resync_s)


async def _start_before(env_text: str, cache: LeaseCache, node_id: str) -> Previous | None:
    """Network and subnet of the last start: of subnet.env, else of the lease cache."""
    return _previous_start(env_text) or await off_loop(
        partial(_cached_start, cache, node_id), cache.entries_about
    )


def _previous_start(env_text: str) -> Previous | None:
    """Network and subnet of the last start, whose rules and routes may still be there."""
    network = subnet_env.previous_network(env_text)
    key = subnet_env.previous_key(env_text)
    if network is None or key is None:
        return None
    return Previous(
        network=network, subnet=key.subnet, network6=subnet_env.previous_network6(env_text)
    )


def _cached_start(cache: LeaseCache, node_id: str) -> Previous | None:
    """The same from the lease cache: a reboot empties /run, but may restore saved rules."""
    cached = cache.load(None, node_id)
    if cached is None:
        return None
    try:
        config = parse_network_config(cached.network_config, "lease cache")
    except ConfigError:
        return None
    return Previous(network=config.network, subnet=cached.own_key.subnet, network6=config.network6)


def _log_lease(settings: Settings, env_text: str, acquired: Acquired) -> None:
    """Name a lease the store gave; warn if pods and bridges made before have other addresses."""
    if acquired.cache_age_s is not None:
        return
    key = acquired.lease.key
    _log.info("lease %s, subnet %s (%s)", key, key.subnet, acquired.origin)
    before = subnet_env.previous_key(env_text)
    if before is not None and before.subnet != key.subnet:
        _log.warning(
            "this node's subnet is %s now, was %s (%s): bridges (docker0, cni0) and pods made"
            " before have addresses of the old one; restart them",
            key.subnet,
            before.subnet,
            settings.subnet_file,
        )


def _warn_of_vain_flags(settings: Settings) -> None:
    """Name flags without effect, and a device that will be missed."""
    try:
        require_device()
    except PlatformError as error:
        _log.warning("%s; the udp backend cannot start without it", error)
    for sentence in settings.without_effect():
        _log.warning("%s", sentence)
    if settings.ignored:
        _log.warning(
            "arguments from the first that is no flag on are ignored, as flannel does: %s%s",
            " ".join(settings.ignored),
            "; a boolean takes its value with =, as in -ip-masq=false"
            if settings.ignored[0].lower() in ("true", "false", "0", "1")
            else "",
        )
