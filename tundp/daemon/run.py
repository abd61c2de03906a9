"""From settings to a running node: opens everything in order, closes it all in reverse.

    resources -> admin, health, metrics -> network config -> interface -> backend.prepare
        -> lease and snapshot -> ledger -> backend.open(FIB) -> firewall -> subnet.env
        -> READY -> Node.run

Shutdown is cancellation and nothing else: `run` ends when its task is cancelled, and
what it opened is closed on the way out. As with flannel the lease, the firewall rules and
subnet.env stay, so that the next start finds the same subnet and nothing leaks meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tundp.admin import AdminSocket, serve_admin
from tundp.admin_chaos import serve_chaos
from tundp.backend.base import Backend
from tundp.backend.choose import parse_network_config
from tundp.blocking import off_loop
from tundp.choices import OnLeaseLost
from tundp.daemon import report
from tundp.daemon.backends import lease_offer, make_backend
from tundp.daemon.dumps import Dumps
from tundp.daemon.firewall_keeper import FirewallKeeper
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
from tundp.lease.model import LeaseKey
from tundp.lease.network import NetworkConfig
from tundp.linux import fd_store
from tundp.linux.firewall.choose import Firewall, FirewallSettings, Previous, make_firewall
from tundp.linux.iface import Interface, Selection, look
from tundp.linux.netlink import Netlink
from tundp.linux.tun import require_device
from tundp.observe.health import Health
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


async def run(
    settings: Settings, store: Store, resources: Resources, supervisor: Supervisor
) -> None:
    """Be a node of the overlay until cancelled. Raises TundpError when it cannot be one.

    The store and the resources are closed on the way out. `supervisor` keeps the tasks.
    """
    _warn_of_vain_flags(settings)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        stack.callback(resources.close)
        journal = _open_journal(stack, resources)
        cache = LeaseCache(settings.state_dir, settings.instance)
        identity = cache.identity()
        manager = _make_manager(settings, store, identity, cache)
        stack.push_async_callback(manager.close)
        desk = await _open_desk(stack, settings, resources, supervisor)
        netlink = await stack.enter_async_context(Netlink())
        desk.metrics.netlink = lambda: (netlink.requests, netlink.dumps)
        selection = selection_of(settings)
        # Before the network config, which may be long in coming: a wrong flag fails at once.
        await look(netlink, selection, None)
        network_config = await manager.network_config(desk.health)
        _log_network(network_config, manager)
        interface = await _choose_interface(netlink, selection, network_config)
        backend = _make_backend(network_config, settings, netlink, resources)
        stack.callback(backend.close)
        offer = lease_offer(backend, settings, network_config, interface)
        backend.prepare(interface)
        env_text = read_text(settings.subnet_file)
        before = await _start_before(env_text, cache, identity.node_id)
        acquired = await manager.acquire(
            network_config,
            offer,
            previous=subnet_env.previous_key(env_text),
            progress=desk.health,
        )
        if acquired.cache_age_s is None:
            _log_lease(settings, env_text, acquired)
        node = Node(
            settings=settings,
            network_config=network_config,
            manager=manager,
            acquired=acquired,
            backend=backend,
            underlay=Underlay(
                netlink, selection, interface=interface, network=network_config.network
            ),
            netlink=netlink,
            firewall=FirewallKeeper(
                _make_firewall(settings, network_config, acquired.lease.key),
                before,
                settings.iptables_resync_s,
            ),
            metrics=desk.metrics,
            identity=manager.identity or identity,
            worries=desk.worries,
            supervisor=supervisor,
            journal=journal,
        )
        stack.callback(node.close)
        stack.callback(resources.kept.freeze)
        await _bring_up(node, desk, before, resources)
        await node.run()


@dataclass(slots=True)
class _Desk:
    """Answers for the daemon: sockets that are there before the node is."""

    settings: Settings
    health: Health
    metrics: Metrics
    started_at: float = field(default_factory=time.time)
    node: Node | None = None
    admin: AdminSocket | None = None
    metrics_server: MetricsServer | None = None

    def duplicates(self, resources: Resources) -> dict[str, int]:
        """What is kept in the descriptor store of it; the caller's. OSError."""
        found = resources.duplicates()
        if self.admin is not None:
            found["admin"] = self.admin.duplicate()
        if self.metrics_server is not None and self.metrics_server.sock is not None:
            found["metrics"] = os.dup(self.metrics_server.sock.fileno())
        return found

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


async def _bring_up(node: Node, desk: _Desk, before: Previous | None, resources: Resources) -> None:
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
    resources.kept.follow(fd_store.QUEUES, lambda: node.backend.give().by_name())
    resources.kept.sync()
    desk.node = node
    desk.health.waits_for("the firewall rules")
    await node.firewall.set_up()
    node.write_subnet_file()
    desk.health.attend(node.backend.heartbeat, node.findings)
    desk.metrics.summary = node.summary
    desk.metrics.peers = report.peer_source(node.backend)


async def _open_desk(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    resources: Resources,
    supervisor: Supervisor,
) -> _Desk:
    """Serve admin socket, health and metrics from now on, and watch the event loop."""
    health = Health()
    metrics = Metrics(health.ready, supervisor.failures, peers_max=settings.metrics_peers)
    health.on_lag = metrics.loop_lag.observe
    desk = _Desk(settings, health, metrics)
    looker = NodeLooker(node=lambda: desk.node, recorder=resources.recorder)
    desk.admin = await stack.enter_async_context(
        serve_admin(
            settings.admin_socket,
            desk.status,
            metrics.render,
            desk.leases,
            sock=resources.admin,
            looker=looker,
            peers=NodePeerDesk(node=lambda: desk.node),
            more=lambda server: serve_chaos(server, looker),
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
        desk.metrics_server = server
        tasks.append(asyncio.ensure_future(supervisor.keep("serve metrics", server.run)))
    resources.kept.follow(
        tuple(each for each in fd_store.SINGLE if each != "image"),
        lambda: desk.duplicates(resources),
    )
    tasks.append(asyncio.ensure_future(supervisor.keep("keep descriptors", resources.kept.keep)))
    stack.push_async_callback(_cancel, *tasks)
    stack.enter_context(StallWatch(asyncio.get_running_loop()).watching())
    return desk


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


def _make_backend(
    network: NetworkConfig, settings: Settings, netlink: Netlink, resources: Resources
) -> Backend:
    """The backend, with what a daemon before left to it; the store follows what it has."""
    return make_backend(
        network.backend,
        settings,
        netlink,
        resources.take_backend(),
        resources.recorder,
        on_descriptors=resources.kept.sync,
    )


def _make_firewall(settings: Settings, network: NetworkConfig, key: LeaseKey) -> Firewall:
    """The rules that are wanted, if any."""
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
    return make_firewall(wanted, is_nftables=network.enable_nftables)


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
    """Name the lease; warn if pods and bridges made before have addresses of another subnet."""
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
