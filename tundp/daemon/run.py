"""From settings to a running node: opens everything in order, closes it all in reverse.

    health server -> network config (or memory) -> interface -> UDP socket -> lease -> TUN
        -> engine -> firewall -> fallback routes -> subnet.env -> READY -> Node.run

Shutdown is cancellation and nothing else: `run` ends when its task is cancelled, and
what it opened is closed on the way out. As with flannel the lease, the firewall rules and
subnet.env stay, so that the next start finds the same subnet and nothing leaks meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tundp
from tundp.admin import serve_admin
from tundp.backoff import Backoff, Outage
from tundp.daemon.lease_cache import Memory, Remembered
from tundp.daemon.lock import only_one
from tundp.daemon.node import STATUS_SCHEMA, Node, store_name
from tundp.daemon.rules import Rules
from tundp.daemon.underlay import Underlay, open_sockets, selection_of
from tundp.errors import AccessDenied, ConfigError, StoreError, StoreUnavailable
from tundp.lease import subnet_env
from tundp.lease.identity import Identity
from tundp.lease.model import LeaseAttributes, LeaseKey
from tundp.lease.network import NetworkConfig, parse_network_config
from tundp.linux import capability
from tundp.linux.firewall.choose import Firewall, FirewallSettings, Previous, make_firewall, mark_of
from tundp.linux.iface import Interface, Selection, look
from tundp.linux.netlink import Netlink
from tundp.linux.tun import require_device
from tundp.observe.health import Health
from tundp.observe.metrics import Metrics
from tundp.observe.web import serve_health, serve_metrics
from tundp.settings.settings import Settings
from tundp.store.auto import AutoStore
from tundp.store.base import Store
from tundp.store.claim import Claim

_log = logging.getLogger(__name__)

STALE_AFTER_S: Final = 3.0
"""How long a start waits for the store before it goes on with what it remembers."""
REMIND_S: Final = 60.0


async def run(settings: Settings, store: Store) -> None:
    """Be a node of the overlay until cancelled. Raises TundpError when it cannot be one.

    The store is closed on the way out.
    """
    _log.info("tundp %s starting: %s", tundp.__version__, settings.describe())
    capability.require(capability.CAP_NET_ADMIN, "a TUN device, its address and its route")
    require_device()
    _warn_of_vain_flags(settings)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        stack.enter_context(only_one(settings.subnet_file))
        health = Health()
        metrics = Metrics(health.ready)
        desk = _Desk(health)
        await stack.enter_async_context(
            serve_admin(settings.admin_socket, desk.status, metrics.render)
        )
        await stack.enter_async_context(
            serve_health(settings.healthz_ip, settings.healthz_port, health)
        )
        await stack.enter_async_context(serve_metrics(settings.metrics_addr, metrics))
        watch = asyncio.ensure_future(health.watch())
        stack.callback(watch.cancel)
        netlink = await stack.enter_async_context(Netlink())
        selection = selection_of(settings)
        # Once before the settings, which may be long in coming: a wrong flag is told at once.
        await look(netlink, selection, None)
        memory = Memory(settings.state_dir, settings.instance)
        identity = memory.identity()
        health.waits_for("the network config")
        remembered = None
        if settings.on_lease_lost == "regain":  # who would exit without a lease starts with none
            remembered = _usable(memory.load(store_name(settings), identity.node_id))
        text, network, stale = await _find_network(store, remembered, health)
        interface = await _choose_interface(netlink, selection, network)
        socks = open_sockets(interface.address, network.port, settings.workers)
        for sock in socks:
            stack.enter_context(sock)
        env_text = _read(settings.subnet_file)
        claim = _make_claim(settings, store, network, interface, identity, env_text)
        if stale is not None:
            if isinstance(store, AutoStore) and stale.api:
                await store.choose(stale.api)
            told = [lease for lease in stale.leases if lease.key == stale.own_key]
            claim.resume(
                stale.own_key, told[0].attributes.public_ip if told else interface.public_ip
            )
            _log.error(
                "%s does not answer: going on with the leases of %d s ago, subnet %s",
                store.description,
                stale.age_s,
                stale.own_key.subnet,
            )
        else:
            health.waits_for("a lease")
            lease = await claim.acquire()
            _log.info("lease %s, subnet %s (%s)", lease.key, lease.key.subnet, claim.origin)
            _warn_of_a_new_subnet(settings, env_text, lease.key)
        node = Node(
            settings=settings,
            store=store,
            network=network,
            network_text=text,
            underlay=Underlay(
                netlink,
                selection,
                interface=interface,
                network=network.network,
                port=network.port,
                socks=socks,
            ),
            claim=claim,
            netlink=netlink,
            rules=Rules(
                _make_firewall(settings, network, claim),
                _previous_rules(env_text),
                settings.iptables_resync,
            ),
            memory=memory,
            metrics=metrics,
            node_id=identity.node_id,
        )
        stack.callback(node.close)
        await node.open_device()
        if stale is not None:
            node.recall(stale)
        desk.node = node
        await node.rules.set_up()
        await node.ensure_fallback()
        node.write_subnet_env()
        health.attend(node.engine.heartbeat, node.checks)
        metrics.status = node.status
        await node.run()


@dataclass(slots=True)
class _Desk:
    """Answers the admin socket, which is there before the node is."""

    health: Health
    node: Node | None = None

    def status(self) -> dict[str, Any]:
        if self.node is not None:
            return self.node.status()
        return {
            "schema": STATUS_SCHEMA,
            "version": tundp.__version__,
            "pid": os.getpid(),
            "starting": self.health.waits,
            "checks": [check.as_dict() for check in self.health.ready()],
            "peers": [],
        }


def _usable(remembered: Remembered | None) -> Remembered | None:
    if remembered is not None:
        try:
            parse_network_config(remembered.network_config, "memory")
        except ConfigError as error:
            _log.warning("what is remembered cannot be used: %s", error)
            return None
    return remembered


async def _find_network(
    store: Store, remembered: Remembered | None, health: Health
) -> tuple[str, NetworkConfig, Remembered | None]:
    """The network settings, as soon as there is a valid one: an operator may still be typing.

    Its text, what it says, and `remembered` if it is from there: with a memory, a store
    that does not answer is waited for STALE_AFTER_S only.
    """
    outage = Outage(_log, f"waiting for the network config from {store.description}")
    failed = health.waiting_failed
    backoff = Backoff(0.5, 5.0)
    clock = asyncio.get_running_loop().time
    began = clock()
    while True:
        try:
            async with asyncio.timeout(STALE_AFTER_S if remembered is not None else None):
                text = await store.network_config()
            network = parse_network_config(text, store.description)
        except (StoreUnavailable, AccessDenied, TimeoutError) as error:
            failed(str(error) or "timed out")
            outage.failed(str(error) or "timed out", now=clock())
            if remembered is not None and clock() - began >= STALE_AFTER_S:
                origin = f"memory of {store.description}"
                network = parse_network_config(remembered.network_config, origin)
                return remembered.network_config, network, remembered
            left_s = began + STALE_AFTER_S - clock() if remembered is not None else math.inf
            await asyncio.sleep(min(backoff.next_s(), left_s))
        except (StoreError, ConfigError) as error:
            failed(str(error))
            outage.failed(error, now=clock())
            await asyncio.sleep(backoff.next_s())
        else:
            outage.ended(now=clock())
            _log.info(
                "network %s, udp port %d, from %s", network.network, network.port, store.description
            )
            return text, network, None


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


def _make_claim(
    settings: Settings,
    store: Store,
    network: NetworkConfig,
    interface: Interface,
    identity: Identity,
    env_text: str,
) -> Claim:
    return Claim(
        store,
        config=network,
        attributes=LeaseAttributes(
            public_ip=interface.public_ip,
            public_ipv6=settings.public_ipv6 if network.pool6 is not None else None,
        ),
        previous=subnet_env.previous_key(env_text),
        lease_ttl_s=settings.lease_ttl,
        margin_s=settings.subnet_lease_renew_margin * 60,
        rng=random.SystemRandom(),
        identity=identity,
        is_forced=settings.force_takeover,
        exits_when_lost=settings.on_lease_lost == "exit",
    )


def _make_firewall(settings: Settings, network: NetworkConfig, claim: Claim) -> Firewall | None:
    """The rules that are wanted, or None if none are."""
    if not (settings.ip_masq or settings.iptables_forward_rules):
        return None
    key = claim.lease.key
    wanted = FirewallSettings(
        network=network.network,
        subnet=key.subnet,
        network6=network.network6,
        subnet6=None if key.v6 is None else key.v6.network,
        is_masquerading=settings.ip_masq,
        is_forwarding=settings.iptables_forward_rules,
        is_random_fully=not settings.ip_masq_fully_random_disable,
        mark=mark_of(settings.instance),
    )
    return make_firewall(wanted, is_nftables=network.enable_nftables)


def _previous_rules(env_text: str) -> Previous | None:
    network = subnet_env.previous_network(env_text)
    key = subnet_env.previous_key(env_text)
    if network is None or key is None:
        return None
    return Previous(network=network, subnet=key.subnet)


def _warn_of_a_new_subnet(settings: Settings, env_text: str, key: LeaseKey) -> None:
    """Pods and bridges made before keep the addresses of the subnet before."""
    before = subnet_env.previous_key(env_text)
    if before is not None and before.subnet != key.subnet:
        _log.warning(
            "this node's subnet is %s now, was %s (%s): bridges (docker0, cni0) and pods made"
            " before have addresses of the old one; restart them",
            key.subnet,
            before.subnet,
            settings.subnet_file,
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _warn_of_vain_flags(settings: Settings) -> None:
    for name in ("vmodule", "log_backtrace_at"):
        if getattr(settings, name):
            _log.warning("--%s has no effect here: there is no klog", name)
    if settings.ignored:
        _log.warning(
            "arguments from the first that is no flag on are ignored, as flannel does: %s%s",
            " ".join(settings.ignored),
            "; a boolean takes its value with =, as in -ip-masq=false"
            if settings.ignored[0].lower() in ("true", "false", "0", "1")
            else "",
        )
