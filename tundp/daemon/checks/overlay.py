"""Checks of what the node has in common with the others: store, leases, interface, gateways."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from tundp.backend.base import Surroundings
from tundp.backend.choose import kind_of, parse_network_config
from tundp.daemon.checks.inspection import Inspection
from tundp.daemon.peer_paths import PeerPaths
from tundp.daemon.report import store_findings
from tundp.daemon.underlay import selection_of
from tundp.errors import ConfigError, OutOfSubnets, PlatformError, StoreError
from tundp.files import SMALL_LEN, read_regular
from tundp.finding import Finding, Verdict
from tundp.lease import subnet_env
from tundp.lease.allocate import Keep, plan_claim
from tundp.lease.identity import identity_of
from tundp.lease.model import LeaseKey, Snapshot
from tundp.lease.network import (
    BackendConfig,
)
from tundp.lease.routing import Refusal, Routing
from tundp.lease.table import keys_of
from tundp.linux.iface import look
from tundp.linux.netlink import Flow
from tundp.store.base import Store
from tundp.subnet.lease_cache import LeaseCache

LEASES_NAMED: Final = 5
"""More refused leases are counted."""
REQUESTS: Final = 2
"""That the check of the store sends; each of them may try every endpoint."""


async def check_store(inspection: Inspection) -> AsyncIterator[Finding]:
    """The network config and the leases."""
    store = inspection.store
    try:
        async with asyncio.timeout(REQUESTS * store.round_s):
            text = await store.network_config()
            config = inspection.network_config = parse_network_config(text, store.description)
            snapshot = inspection.snapshot = await store.snapshot()
    except ConfigError as error:
        yield Finding(
            id="store.network-config",
            verdict=Verdict.FAIL,
            title="network config",
            evidence=f"{store.description}: {error}",
            next_step="write a network config to that key: nodes that run keep the one they had,"
            " none starts with this one",
        )
        return
    except (StoreError, TimeoutError) as error:
        yield Finding(
            id="store",
            verdict=Verdict.FAIL,
            evidence=str(error) or f"{store.description} timed out",
            next_step="tundp doctor looks at each endpoint",
        )
        return
    pool = config.pool
    yield Finding(
        id="store.network-config",
        verdict=Verdict.OK,
        title="network config",
        evidence=f"{config.network}, /{pool.subnet_len} subnets from {pool.subnet_min} to"
        f" {pool.subnet_max}, backend {_backend(config.backend)}",
    )
    for finding in store_findings(store.warnings):
        yield finding
    for finding in _lease_findings(store, snapshot):
        yield finding


def _backend(config: BackendConfig) -> str:
    return f"{config.name}, port {config.peer_port}" if config.peer_port else config.name


def _lease_findings(store: Store, snapshot: Snapshot) -> Iterator[Finding]:
    yield Finding(
        id="store",
        verdict=Verdict.OK,
        evidence=f"{store.description}: {len(snapshot.leases)} leases",
    )
    for entry in snapshot.bad:
        yield Finding(
            id="store.unreadable",
            verdict=Verdict.WARN,
            title="unreadable entry",
            evidence=f"{entry.name}: {entry.why}",
            next_step="delete that key, if no node writes it",
        )
    if held := keys_of(snapshot.bad):
        yield Finding(
            id="store.withheld",
            verdict=Verdict.WARN,
            title="subnets not given out",
            evidence=", ".join(str(key) for key in held),
        )


async def check_interface(inspection: Inspection) -> AsyncIterator[Finding]:
    """Which interface leads to the other nodes."""
    config = inspection.network_config
    try:
        chosen = inspection.interface = await look(
            inspection.netlink,
            selection_of(inspection.settings),
            None if config is None else config.network,
        )
    except (ConfigError, PlatformError) as error:
        yield Finding(id="interface", verdict=Verdict.FAIL, evidence=str(error))
        return
    mtu = None
    if config is not None:
        try:
            mtu = kind_of(config.backend).mtu(chosen)
        except ConfigError as error:
            yield Finding(id="interface.mtu", verdict=Verdict.FAIL, evidence=str(error))
    yield Finding(
        id="interface",
        verdict=Verdict.OK,
        evidence=f"{chosen.link.name} ({chosen.address}), advertising {chosen.public_ip},"
        f"{'' if mtu is None else f' overlay MTU {mtu}'} (chosen: {chosen.why})",
    )
    for other in chosen.others:
        yield Finding(
            id="interface.other", verdict=Verdict.NOTE, title="interface not taken", evidence=other
        )
    for warning in chosen.warnings:
        yield Finding(
            id="interface.warning", verdict=Verdict.WARN, title="interface", evidence=warning
        )


async def check_lease(inspection: Inspection) -> AsyncIterator[Finding]:
    """Which lease a start would take."""
    settings, config = inspection.settings, inspection.network_config
    snapshot, interface = inspection.snapshot, inspection.interface
    text = ""
    try:
        text = read_regular(settings.subnet_file, most_len=SMALL_LEN)
    except FileNotFoundError:
        pass
    except OSError as error:
        yield Finding(
            id="subnet-file.unreadable",
            verdict=Verdict.WARN,
            title="subnet.env",
            evidence=f"{settings.subnet_file}: {error.strerror}; the subnet of last time is not"
            " known, and a start takes another one",
            next_step="remove it, or name another file with --subnet-file",
        )
    if config is None or snapshot is None or interface is None:
        return
    node_id = LeaseCache(settings.state_dir, settings.instance).known_node_id()
    previous = subnet_env.previous_key(text)
    public_ip = interface.public_ip
    verdict = Verdict.OK
    try:
        plan = plan_claim(
            snapshot.leases,
            unreadable=keys_of(snapshot.bad),
            network_config=config,
            public_ip=public_ip,
            node_id=node_id,
            previous=previous,
            rng=random.Random(),
        )
    except OutOfSubnets as error:
        verdict, evidence = Verdict.FAIL, str(error)
    else:
        if isinstance(plan, Keep):
            inspection.subnet = plan.lease.key.subnet
        elif plan.key == previous:
            inspection.subnet = plan.key.subnet
        if isinstance(plan, Keep):
            verdict, evidence = _kept(plan, public_ip, node_id)
        elif plan.key == previous:
            evidence = f"would take {plan.key} again, as in subnet.env"
        elif previous is not None:
            verdict = Verdict.WARN
            evidence = (
                f"none for {public_ip}, and {previous} of subnet.env cannot be had: a new subnet"
                " would be taken, and bridges and pods made before have addresses of the old one"
            )
        else:
            evidence = "would take a new one"
    yield Finding(id="lease", verdict=verdict, evidence=evidence)


def _kept(plan: Keep, public_ip: IPv4Address, node_id: str | None) -> tuple[Verdict, str]:
    """Verdict and evidence for a lease that is there already."""
    key, holder = plan.lease.key, identity_of(plan.lease)
    if holder is None:
        return (
            Verdict.OK,
            f"would keep {key}, found by its PublicIP {public_ip}",
        )
    if holder.node_id == node_id:
        return Verdict.OK, f"would keep {key}, ours from before"
    return (
        Verdict.WARN,
        f"{key} with our PublicIP {public_ip} is of node {holder}: a start asks whether that is"
        " alive, and fails if it is",
    )


async def check_peers(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether the other nodes' leases would be peers, by the kernel's routes as they are."""
    config, snapshot, chosen = (
        inspection.network_config,
        inspection.snapshot,
        inspection.interface,
    )
    if config is None or snapshot is None or chosen is None:
        return
    addresses = await inspection.netlink.addresses()
    port = config.backend.peer_port
    paths = PeerPaths(inspection.netlink, network=config.network, has_device=port != 0)
    paths.set_own_networks(each.interface.network for each in addresses)
    public_ips = [lease.attributes.public_ip for lease in snapshot.leases]
    own = (each.key for each in snapshot.leases if each.attributes.public_ip == chosen.public_ip)
    routing = Routing(
        network=config.network,
        backend=config.backend,
        own_key=next(own, LeaseKey(IPv4Interface("0.0.0.0/32"))),
        own_addresses=[chosen.public_ip, *(each.interface.ip for each in addresses)],
    )
    try:
        await paths.predict(public_ips, Flow(source=chosen.address, port=port))
    except PlatformError as error:
        yield Finding(id="peers", verdict=Verdict.WARN, evidence=str(error))
        return
    routing.set_misrouted(paths.misrouted)
    routing.apply(snapshot)
    yield _peers_finding(routing)


def _peers_finding(routing: Routing) -> Finding:
    refused = [
        each for each in routing.refused.values() if each.refusal is not Refusal.OWN_PUBLIC_IP
    ]
    count = len(routing.peers) + len(refused)
    if not refused:
        evidence = f"{count} leases of other nodes, each would be a peer"
        return Finding(id="peers", verdict=Verdict.OK, evidence=evidence)
    named = "; ".join(
        f"{each.lease.key} ({each.lease.attributes.public_ip}) {each.refusal.value}"
        for each in refused[:LEASES_NAMED]
    )
    more = f"; and {len(refused) - LEASES_NAMED} more" if len(refused) > LEASES_NAMED else ""
    return Finding(
        id="peers",
        verdict=Verdict.WARN if routing.peers else Verdict.FAIL,
        evidence=f"{len(refused)} of {count} leases of other nodes would be refused: {named}{more}",
        next_step="what this host does with such an address tells: ip route get ADDRESS",
    )


async def check_backend(inspection: Inspection) -> AsyncIterator[Finding]:
    """What the network's backend needs of the interface and of the other nodes."""
    config, snapshot, chosen = (
        inspection.network_config,
        inspection.snapshot,
        inspection.interface,
    )
    if config is None or snapshot is None or chosen is None:
        return
    networks = tuple(
        address.interface.network
        for address in await inspection.netlink.addresses()
        if address.index == chosen.link.index
    )
    around = Surroundings(interface=chosen, networks=networks, leases=snapshot.leases)
    for finding in kind_of(config.backend).check(config.backend, around):
        yield finding
