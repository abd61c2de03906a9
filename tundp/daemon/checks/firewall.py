"""Checks of the firewall: whether ours can be made, and what is in the way of packets."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tundp.daemon.checks.inspection import Inspection
from tundp.daemon.unit import installed_unit
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.command import find
from tundp.linux.firewall import backend, nftables
from tundp.linux.firewall.backend import BackEnd
from tundp.linux.obstacles.look import look
from tundp.linux.obstacles.scene import PeerPlace, Scene

PEERS = 256
"""Peers whose addresses are compared with rules."""


async def check_firewall(inspection: Inspection) -> AsyncIterator[Finding]:
    """Whether the programs that make the wanted rules run, and may."""
    settings, config = inspection.settings, inspection.network_config
    if not (settings.ip_masq or settings.iptables_forward_rules):
        yield Finding(id="firewall", verdict=Verdict.OK, evidence="no rules of ours are wanted")
        return
    is_nftables = config is not None and config.enable_nftables
    try:
        if is_nftables:
            evidence = await _try_nft()
        else:
            has_ipv6 = config is not None and config.network6 is not None
            evidence = await _try_iptables(has_ipv6=has_ipv6)
    except PlatformError as error:
        tool = "nft" if is_nftables else "iptables"
        other = ""
        if not is_nftables and find("nft") is not None:
            other = '; nft is there: "EnableNFTables": true in the network config uses it'
        yield Finding(
            id="firewall",
            verdict=Verdict.WARN,
            evidence=f"{error}: no"
            f" {'masquerading and no ' if settings.ip_masq else ''}forward rules",
            next_step=f"make {tool} work, or say --iptables-forward-rules=false{other}",
        )
        return
    yield Finding(id="firewall", verdict=Verdict.OK, evidence=evidence)
    if not is_nftables and (lacking := await _lacking_in_unit()):
        yield lacking


async def _lacking_in_unit() -> Finding | None:
    """Whether the installed unit takes from the daemon what this host's iptables needs."""
    unit = installed_unit(["tundp.service", "tundp@.service"])
    if unit is None or unit.capabilities is None or "CAP_NET_RAW" in unit.capabilities:
        return None
    version = await backend.ask("iptables")
    if version.back_end is not BackEnd.LEGACY:
        return None
    return Finding(
        id="firewall.unit",
        verdict=Verdict.WARN,
        evidence=f"iptables is {version}, which needs CAP_NET_RAW, and {unit.name} leaves the"
        " daemon without it: there will be no rules",
        next_step=f"CapabilityBoundingSet=CAP_NET_RAW in a drop-in: systemctl edit {unit.name}",
    )


async def _try_iptables(*, has_ipv6: bool) -> str:
    """Run every program that will be run, changing nothing. PlatformError."""
    seen = []
    for name in ("iptables", "ip6tables") if has_ipv6 else ("iptables",):
        versions = {
            f"{name}{suffix}": await backend.ask(f"{name}{suffix}")
            for suffix in ("", "-save", "-restore")
        }
        first = versions[name]
        for program, version in versions.items():
            if version.back_end is not first.back_end:
                raise PlatformError(
                    f"{name} is {first}, but {program} is {version}: what one makes the other"
                    " does not see"
                )
        rules = await backend.save(name, first.back_end)
        count = sum(line.startswith("-A ") for line in rules.splitlines())
        seen.append(f"{name} {first}, -save and -restore run; it lists {count} rules")
    return "; ".join(seen)


async def _try_nft() -> str:
    """Have nft check a table of ours without making it. PlatformError."""
    await nftables.try_table()
    return f"{find('nft')} may make tables (checked, not done)"


async def check_obstacles(inspection: Inspection) -> AsyncIterator[Finding]:
    """What the kernel would drop or divert: see linux/obstacles."""
    scene = _scene(inspection)
    if scene is None:
        return
    looked = await look(inspection.netlink, scene)
    for finding in looked.findings:
        yield finding
    yield looked.summary


def _scene(inspection: Inspection) -> Scene | None:
    config, chosen, status = (
        inspection.network_config,
        inspection.interface,
        inspection.node,
    )
    if config is None or chosen is None:
        return None
    port = config.backend.peer_port or None
    device = chosen.link.name
    if port:
        device = inspection.settings.tun_name.replace("%d", "0")
        if status is not None and status.backend is not None and status.backend.device is not None:
            device = status.backend.device.name or device
    subnet = inspection.subnet if status is None else status.subnet
    leases = () if inspection.snapshot is None else inspection.snapshot.leases
    peers = [
        PeerPlace(lease.key.subnet, lease.attributes.public_ip)
        for lease in leases
        if lease.key.subnet != subnet
        and lease.attributes.public_ip != chosen.public_ip
        and not lease.attributes.public_ip.is_unspecified
    ]
    return Scene(
        network=config.network,
        subnet=subnet or config.network,
        device=device,
        is_open=status is not None and status.backend is not None,
        is_tunnel=port is not None,
        uplink=chosen.link.name,
        address=chosen.address,
        port=port,
        peers=tuple(peers[:PEERS]),
        peer_count=len(peers),
        accepts=inspection.settings.iptables_forward_rules and not config.enable_nftables,
        pid=None if status is None else status.pid,
    )
