"""Removing what a stopped daemon left on purpose, and nothing that anybody else uses.

Chains, subnet.env and devices of a tundp with default flags are those of a stock flannel.
They are removed only if no such owner is there (see owners.py), and subnet.env only if it
is known to be what tundp wrote: by the stamp in the lock file beside it, or, of a tundp
that made no stamp, by what the lease cache says.
"""

from __future__ import annotations

import errno
import logging
import socket
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final

from tundp.backend.choose import parse_network_config
from tundp.backend.udp.config import DEFAULT_PORT
from tundp.daemon.lock import is_running, is_stamped
from tundp.daemon.owners import Owner, find_owners, identity
from tundp.daemon.stores import store_name
from tundp.errors import ConfigError, PlatformError
from tundp.files import SMALL_LEN, read_regular
from tundp.instance import RUN_DIRECTORY
from tundp.lease import subnet_env
from tundp.lease.network import NetworkConfig
from tundp.linux import capability, unreachable
from tundp.linux.firewall import choose as firewall
from tundp.linux.netlink import Netlink
from tundp.linux.processes import processes, udp_sockets
from tundp.linux.route_table import RouteEntry
from tundp.settings.settings import Settings
from tundp.subnet.lease_cache import CachedLeases, LeaseCache

_log = logging.getLogger(__name__)

Pair = tuple[IPv4Network, IPv4Network]
"""Network and subnet."""
_CONNECT_S: Final = 1.0
_OTHERS: Final = (
    "not a network this tundp is known to have had; if nothing uses it, stop what wrote it and"
    " delete it by hand"
)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was removed (or would be), and what was left and why; a line each."""

    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


async def clean_up(settings: Settings, *, is_dry_run: bool) -> Cleaned:
    """Remove (or only list) what this instance left behind and nobody else uses.

    PlatformError without the rights it needs, and while its daemon runs: it would put
    everything back.
    """
    capability.require(capability.CAP_NET_ADMIN, "firewall rules and routes to remove")
    admin_socket = settings.admin_socket
    is_answering = admin_socket.is_socket() and not _is_stale(admin_socket)
    if is_answering or is_running(settings.instance):
        raise PlatformError(
            f"a daemon with --subnet-file {settings.subnet_file} runs: stop it first, or give the"
            " one of the network that is stopped"
        )
    cleaner = await _inspect(settings, is_dry_run=is_dry_run)
    are_rules_gone = await cleaner.remove_rules()
    await cleaner.remove_routes()
    cleaner.remove_files(are_rules_gone=are_rules_gone)
    cleaner.remove_sockets()
    cleaner.name_what_stays()
    return cleaner.done


async def _inspect(settings: Settings, *, is_dry_run: bool) -> _Cleaner:
    cache = LeaseCache(settings.state_dir, settings.instance)
    cached = cache.load(store_name(settings), cache.known_node_id())
    async with Netlink() as netlink:
        links = await netlink.links()
    # Which network it was, the cache tells whatever the store flags are now.
    config = _config_of(cached or cache.load(None, cache.known_node_id()))
    network = None if config is None else config.network
    port = DEFAULT_PORT if config is None else config.backend.peer_port
    owners = find_owners(
        port,
        links=links,
        processes=processes(),
        sockets=udp_sockets(port),
    )
    text = _read(settings.subnet_file)
    return _Cleaner(
        settings=settings,
        is_dry_run=is_dry_run,
        cache=cache,
        cached=cached,
        owners=owners,
        env_pair=_pair_of(text),
        cached_pair=None if cached is None or network is None else (network, cached.own_key.subnet),
        networks=_networks_of(text, config),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cleaner:
    settings: Settings
    is_dry_run: bool
    cache: LeaseCache
    cached: CachedLeases | None
    owners: list[Owner]
    env_pair: Pair | None
    """Of subnet.env, whoever wrote it."""
    cached_pair: Pair | None
    networks: list[firewall.Network]
    """Networks of subnet.env and of the lease cache."""
    done: Cleaned = field(default_factory=Cleaned)

    async def remove_rules(self) -> bool:
        """This instance's rules; those of flannel's own name only if nobody else uses them.

        Whether nothing is left that may be ours.
        """
        mark = self.settings.instance.chain_suffix
        networks = self.networks
        owners = "; ".join(owner.text for owner in self.owners)
        reason = self._chains_reason()
        act = firewall.leftovers if self.is_dry_run else firewall.remove_all
        if not reason:
            found = await act(networks, mark, spares_direct=bool(owners))
            self.done.removed.extend(found.removed)
            self.done.left.extend(f"{line}: {_OTHERS}" for line in found.kept)
            return True
        if mark:
            self.done.removed.extend((await act([], mark)).removed)
            return True
        there = await firewall.leftovers(networks, "")
        self.done.left.extend(f"{line}: {reason}" for line in (*there.removed, *there.kept))
        return not there.removed

    async def remove_routes(self) -> None:
        """Routes with our protocol number, of the networks that are known to be ours."""
        known = {prefix for pair in (self.env_pair, self.cached_pair) for prefix in pair or ()}
        async with Netlink() as netlink:
            for route in await netlink.list_routes(protocol=unreachable.PROTOCOL):
                if route.gateway is not None:
                    if any(
                        isinstance(network, IPv4Network) and route.destination.subnet_of(network)
                        for network in self.networks
                    ):
                        await self._remove_gateway_route(netlink, route)
                    continue
                if route.kind == "unicast" or route.metric != unreachable.METRIC:
                    continue
                line = f"route {route.kind} {route.destination}"
                if not known:
                    self.done.left.append(
                        f"{line}: of which network, nothing tells any more; ip route del"
                        f" {route.kind} {route.destination} proto {unreachable.PROTOCOL}"
                    )
                elif route.destination not in known:
                    continue  # another instance's
                elif self.is_dry_run or await unreachable.remove(
                    netlink, route.kind, route.destination
                ):
                    self.done.removed.append(line)

    async def _remove_gateway_route(self, netlink: Netlink, route: RouteEntry) -> None:
        """Remove a route to another node, which the host-gw backend left."""
        if not self.is_dry_run:
            failures = await netlink.change_routes(delete=[route])
            if any(failure.errno != errno.ESRCH for failure in failures):
                raise PlatformError(str(failures[0]), failures[0].errno)
        self.done.removed.append(f"route {route.destination} via {route.gateway}")

    def remove_files(self, *, are_rules_gone: bool) -> None:
        """Remove subnet.env with its lock, and the lease cache.

        The cache stays with rules that are left: it alone tells of which network they are.
        """
        path = self.settings.subnet_file
        is_ours = not self._foreign_reason()
        reason = self._env_reason()
        if reason and path.exists():
            self.done.left.append(f"file {path}: {reason}")
        else:
            self._remove(path)
        if not (reason and is_ours and path.exists()):
            self._remove(self.settings.instance.lock)  # else it goes on to say whose the file is
            if are_rules_gone:
                self._remove(self.cache.lease_file)

    def remove_sockets(self) -> None:
        """Admin sockets nobody listens on any more: of this daemon, and all in /run/tundp."""
        for path in sorted({self.settings.admin_socket, *RUN_DIRECTORY.glob("*.sock")}):
            if path.is_socket() and _is_stale(path):
                self._remove(path)

    def name_what_stays(self) -> None:
        """Say what a node keeps: its id, and its lease until it expires."""
        left = self.done.left
        if self.cache.known_node_id() and self.settings.state_dir is not None:
            left.append(
                f"file {self.settings.state_dir / 'node-id'}: the next start is the same node"
            )
        store = self.settings.store.path
        if store is not None and store.exists():
            left.append(f"file {store}: the store, which other nodes may use")
        if self.cached is not None:
            left.append(self._lease_line(self.cached))

    def _lease_line(self, cached: CachedLeases) -> str:
        name = str(cached.own_key)
        store = self.settings.store.path
        if store is not None:
            return f"lease {name}: in {store}"
        now = datetime.now().astimezone().timestamp()
        until = datetime.fromtimestamp(now - cached.age_s + self.settings.lease_ttl_s).astimezone()
        key = f"/{self.settings.etcd_prefix.strip('/')}/subnets/{name}"
        program = "ETCDCTL_API=2 etcdctl rm" if cached.api == "v2" else "etcdctl del"
        return (
            f"lease {name}: in etcd until {until:%Y-%m-%d %H:%M} at the latest; a next start"
            f" keeps it; to give it up now: {program} {key}"
        )

    def _chains_reason(self) -> str:
        """Why chains of flannel's own name are not ours alone; empty if they are.

        A flanneld before v0.20 uses none, though it runs and has written subnet.env since.
        """
        if self.owners:
            return "; ".join(owner.text for owner in self.owners if owner.uses_chains)
        return self._foreign_reason()

    def _env_reason(self) -> str:
        """Why subnet.env is not ours alone; empty if it is."""
        ours = identity(self.settings.subnet_file)
        is_default = not self.settings.instance.name
        users = [
            owner.text
            for owner in self.owners
            if (ours is not None and owner.subnet_file == ours)
            or (owner.subnet_file is None and is_default)
        ]
        return "; ".join(users) or self._foreign_reason()

    def _foreign_reason(self) -> str:
        """Why subnet.env is not known to be tundp's; empty if it is, or is not there."""
        path = self.settings.subnet_file
        if not path.exists():
            return ""
        match is_stamped(self.settings.instance):
            case True:
                return ""
            case False:
                return f"somebody else wrote {path} after tundp; remove it if no flannel uses it"
        if self.env_pair is not None and self.env_pair == self.cached_pair:
            return ""
        return f"{path} is not known to be tundp's; remove it if no flannel uses it"

    def _remove(self, path: Path | None) -> None:
        if path is None or not path.exists():
            return
        self.done.removed.append(f"{'socket' if path.is_socket() else 'file'} {path}")
        if self.is_dry_run:
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise PlatformError(f"cannot remove {path}: {error.strerror}", error.errno) from None


def _config_of(cached: CachedLeases | None) -> NetworkConfig | None:
    """The network config in the lease cache."""
    if cached is None:
        return None
    try:
        return parse_network_config(cached.network_config, "lease cache")
    except ConfigError:
        return None


def _networks_of(env_text: str, config: NetworkConfig | None) -> list[firewall.Network]:
    """Every network that subnet.env or the lease cache names."""
    found = [subnet_env.previous_network(env_text), subnet_env.previous_network6(env_text)]
    if config is not None:
        found += [config.network, config.network6]
    return list(dict.fromkeys(network for network in found if network is not None))


def _pair_of(text: str) -> Pair | None:
    network, key = subnet_env.previous_network(text), subnet_env.previous_key(text)
    return None if network is None or key is None else (network, key.subnet)


def _read(path: Path) -> str:
    try:
        return read_regular(path, most_len=SMALL_LEN)
    except FileNotFoundError:
        return ""
    except OSError as error:
        _log.warning(
            "cannot read %s: %s; rules and routes of the network it named may stay",
            path,
            error.strerror,
        )
        return ""


def _is_stale(path: Path) -> bool:
    """Whether nobody listens on a unix socket. A hung daemon listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
