"""Everything netfilter has for IPv4, listed by the programs that can: both iptables, and nft."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import capability
from tundp.linux.command import Finished, find, run
from tundp.linux.firewall.backend import BackEnd, ask
from tundp.linux.obstacles import nft, xtables
from tundp.linux.obstacles.rules import Table

LEGACY_TABLES: Final = Path("/proc/thread-self/net/ip_tables_names")
"""The legacy tables that exist. To list one that does not would make it."""
LARGEST: Final = 8_000_000
"""Bytes of a listing that is read. Parsing takes a tenth of a second for as much."""


MOST_TABLES: Final = 32
"""Tables of nft that are listed."""


@dataclass(slots=True)
class Rulesets:
    """The tables, and what could not be read."""

    tables: list[Table] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """What was not looked at, and why."""


async def read() -> Rulesets:
    """List everything, one program after the other. Never fails: see `Rulesets.unread`."""
    found = Rulesets()
    listed = await _read_iptables(found)
    await _read_nft(found, listed)
    return found


async def read_back_end(name: str) -> BackEnd | None:
    """The back end of an iptables program; None if it is not installed or does not answer."""
    try:
        return (await ask(name)).back_end
    except PlatformError:
        return None


async def _read_iptables(found: Rulesets) -> frozenset[tuple[str, str]]:
    """Read both back ends; returns the nft tables iptables has listed."""
    default = await read_back_end("iptables")
    listed: set[tuple[str, str]] = set()
    for back_end, name in ((BackEnd.NFT, "iptables-nft"), (BackEnd.LEGACY, "iptables-legacy")):
        is_legacy = back_end is BackEnd.LEGACY
        there = _legacy_tables(found) if is_legacy else ""
        if is_legacy and not there:
            continue
        if is_legacy and capability.CAP_NET_RAW not in capability.held():
            found.unread.append(
                f"tables of legacy iptables ({there}), for lack of CAP_NET_RAW:"
                " tundp config check, run by root, looks at them"
            )
            continue
        program = "iptables" if default is back_end else name
        if find(f"{program}-save") is None:
            if is_legacy:
                found.unread.append(f"the tables {there} of legacy iptables: no {name} here")
            continue
        finished = await _list(found, f"rules of {program}", f"{program}-save")
        if finished is not None:
            try:
                tables = await asyncio.to_thread(xtables.parse, finished.stdout, program)
            except ValueError as error:
                found.unread.append(f"rules of {program}: {error!r} in the answer of its -save")
                continue
            found.tables += tables
            if not is_legacy:
                listed |= {(table.family, table.name) for table in tables}
    return frozenset(listed)


async def _read_nft(found: Rulesets, listed: frozenset[tuple[str, str]]) -> None:
    """Read nft's tables but those `listed`, one by one: most rules are in iptables' own."""
    if find("nft") is None:
        found.unread.append("rules of nftables: no nft here")
        return
    what = "rules of nftables"
    finished = await _list(found, what, "nft", "-j", "list", "tables")
    if finished is None:
        return
    try:
        names = [each for each in nft.table_names(finished.stdout) if each not in listed]
        for family, name in names[:MOST_TABLES]:
            where = f"{what}, table {family} {name}"
            answer = await _list(found, where, "nft", "-j", "list", "table", family, name)
            if answer is not None:
                tables = await asyncio.to_thread(nft.parse, answer.stdout)
                found.tables += [await _with_devices(found, each) for each in tables]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found.unread.append(f"{what}: {error!r} in the answer of nft -j")
        return
    if len(names) > MOST_TABLES:
        found.unread.append(f"{what}: {len(names) - MOST_TABLES} tables more than {MOST_TABLES}")


async def _with_devices(found: Rulesets, table: Table) -> Table:
    """The table with the devices of its chains, where nft's JSON leaves them out."""
    chains = dict(table.chains)
    unnamed = [
        each for each in chains.values() if each.hook in ("ingress", "egress") and not each.devices
    ]
    if unnamed:
        where = f"devices of nft table {table.family} {table.name}"
        answer = await _list(found, where, "nft", "list", "table", table.family, table.name)
        named = nft.devices_of("" if answer is None else answer.stdout)
        for chain in unnamed:
            chains[chain.name] = replace(chain, devices=named.get(chain.name, ()))
    return replace(table, chains=chains)


async def _list(found: Rulesets, what: str, *argv: str) -> Finished | None:
    try:
        finished = await run(*argv, package=argv[0])
    except PlatformError as error:
        found.unread.append(f"{what}: {error}")
        return None
    if len(finished.stdout) > LARGEST:
        found.unread.append(f"{what}: a listing of {len(finished.stdout) / 1e6:.0f} MB")
        return None
    return finished


def _legacy_tables(found: Rulesets) -> str:
    try:
        return " ".join(LEGACY_TABLES.read_text(encoding="ascii").split())
    except OSError as error:
        # A kernel that has not loaded them has no such file.
        if error.errno != errno.ENOENT or not LEGACY_TABLES.parent.is_dir():
            found.unread.append(f"tables of legacy iptables: {LEGACY_TABLES}: {error.strerror}")
        return ""


async def rule_text(table: Table, chain: str, handle: int) -> str | None:
    """One rule as nft prints it; None if it is gone."""
    try:
        argv = ("nft", "-a", "list", "chain", table.family, table.name, chain)
        finished = await run(*argv, package="nftables")
    except PlatformError:
        return None
    for line in finished.stdout.splitlines():
        text, _, number = line.partition(" # handle ")
        if number.strip() == str(handle):
            return text.strip()
    return None
