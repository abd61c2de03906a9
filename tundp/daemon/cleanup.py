"""Removing what a stopped daemon left on purpose."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

from tundp.admin import fetch_status
from tundp.config import Config
from tundp.daemon.memory import Memory
from tundp.errors import PlatformError
from tundp.lease import subnet_env
from tundp.linux import fallback, firewall
from tundp.linux.netlink import Netlink


async def clean_up(config: Config, *, is_dry_run: bool) -> list[str]:
    """Remove (or only list) everything of this instance's; a line for each.

    PlatformError while its daemon runs: it would put everything back.
    """
    try:
        await fetch_status(config.admin_socket)
    except PlatformError:
        pass
    else:
        raise PlatformError(
            f"a daemon answers on {config.admin_socket}: stop it first, or give the flags of"
            " the one that is stopped (--subnet-file, --admin-socket)"
        )
    pair = _network_and_subnet(config)
    pairs = [] if pair is None else [pair]
    mark = firewall.mark_of(config.instance)
    done = await (
        firewall.leftovers(pairs, mark) if is_dry_run else firewall.remove_all(pairs, mark)
    )
    async with Netlink() as netlink:
        for route in await netlink.routes():
            if route.is_unicast or route.priority != fallback.METRIC:
                continue
            if pair is not None and route.destination not in pair:
                continue  # another instance's
            if is_dry_run or await fallback.remove(netlink, route.kind, route.destination):
                done.append(f"route {route.kind} {route.destination}")
    for path in (config.subnet_file, Memory(config.state_dir, config.instance).lease_file):
        if path is not None and path.exists():
            done.append(f"file {path}")
            if not is_dry_run:
                _unlink(path)
    return done


def _network_and_subnet(config: Config) -> tuple[IPv4Network, IPv4Network] | None:
    try:
        text = config.subnet_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    network, key = subnet_env.previous_network(text), subnet_env.previous_key(text)
    return None if network is None or key is None else (network, key.subnet)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise PlatformError(f"cannot remove {path}: {error.strerror}", error.errno) from None
