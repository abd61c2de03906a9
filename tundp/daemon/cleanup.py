"""Removing what a stopped daemon left on purpose."""

from __future__ import annotations

import logging
from ipaddress import IPv4Network
from pathlib import Path

from tundp.daemon.lock import is_running
from tundp.errors import PlatformError
from tundp.lease import subnet_env
from tundp.linux import unreachable
from tundp.linux.firewall import choose as firewall
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings
from tundp.subnet.lease_cache import LeaseCache

_log = logging.getLogger(__name__)


async def clean_up(settings: Settings, *, is_dry_run: bool) -> list[str]:
    """Remove (or only list) everything of this instance's; a line for each.

    PlatformError while its daemon runs: it would put everything back.
    """
    if is_running(settings.instance):
        raise PlatformError(
            f"a daemon with --subnet-file {settings.subnet_file} runs: stop it first, or give the"
            " one of the network that is stopped"
        )
    pair = _network_and_subnet(settings)
    pairs = [] if pair is None else [pair]
    mark = settings.instance.chain_suffix
    done = await (
        firewall.leftovers(pairs, mark) if is_dry_run else firewall.remove_all(pairs, mark)
    )
    async with Netlink() as netlink:
        for route in await netlink.routes():
            if route.is_unicast or route.priority != unreachable.METRIC:
                continue
            if route.destination not in (pair or ()):
                continue  # another instance's, or nobody's we know of
            if is_dry_run or await unreachable.remove(netlink, route.kind, route.destination):
                done.append(f"route {route.kind} {route.destination}")
    if pair is None:
        _log.warning(
            "no network and subnet in %s: which fallback routes are this instance's is not"
            " known, and none is removed (ip route shows them: proto 85)",
            settings.subnet_file,
        )
    cache = LeaseCache(settings.state_dir, settings.instance)
    for path in (settings.instance.lock, settings.subnet_file, cache.lease_file):
        if path is not None and path.exists():
            done.append(f"file {path}")
            if not is_dry_run:
                _unlink(path)
    return done


def _network_and_subnet(settings: Settings) -> tuple[IPv4Network, IPv4Network] | None:
    try:
        text = settings.subnet_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    network, key = subnet_env.previous_network(text), subnet_env.previous_key(text)
    return None if network is None or key is None else (network, key.subnet)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise PlatformError(f"cannot remove {path}: {error.strerror}", error.errno) from None
