"""Removal of flannel's and our iptables rules, by both families' and both back ends' programs.

What goes is told by networks: see recognise.py. Programs that are not installed have nothing
to remove.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from tundp.linux.command import find, try_all
from tundp.linux.firewall.backend import BackEnd
from tundp.linux.firewall.iptables import FORWARD, MASQUERADE, Program, deletion, of_family
from tundp.linux.firewall.recognise import (
    Network,
    direct_rules,
    foreign_rules,
    names_of,
    own_rules,
)
from tundp.linux.firewall.settings import FirewallSettings, Removal

_log = logging.getLogger(__name__)

_LEGACY_TABLES: Final = (
    Path("/proc/thread-self/net/ip_tables_names"),
    Path("/proc/thread-self/net/ip6_tables_names"),
)
_NET: Final = Path("/proc/thread-self/net")
_NAMES: Final = (("ip", "iptables"), ("ip6", "ip6tables"))


async def remove(
    networks: Sequence[Network] | None,
    *,
    mark: str = "",
    is_dry_run: bool = False,
    spares_direct: bool = False,
) -> Removal:
    """Remove our chains and every jump to them, and flannel's direct rules for `networks`.

    Of a chain with flannel's own name, what other networks have in it stays; with `networks`
    None all of it goes. Direct rules stay if `spares_direct`. Both families, both back ends, as
    far as they are installed. PlatformError after everything was tried.
    """
    steps: list[Callable[[], Awaitable[Removal]]] = []
    for family, name in _NAMES:
        own = None if networks is None else of_family(networks, family)
        steps += [
            partial(
                _remove_with,
                program,
                own,
                mark,
                is_dry_run=is_dry_run,
                spares_direct=spares_direct,
            )
            for program in await installed(name)
        ]
    return Removal.of(await try_all(steps))


async def remove_others(
    settings: FirewallSettings, networks: Sequence[Network], binary: str
) -> Removal:
    """Remove for `networks` what `settings` do not ask for (any more).

    A chain that is not wanted, direct rules, and all of the back end that `binary` is not.
    PlatformError after everything was tried.
    """
    wanted = {overlay.family for overlay in settings.overlays}
    kept = frozenset(
        rules.marked(settings.mark).chain
        for rules, is_wanted in (
            (MASQUERADE, settings.is_masquerading),
            (FORWARD, settings.is_forwarding),
        )
        if is_wanted
    )
    steps: list[Callable[[], Awaitable[Removal]]] = []
    for family, name in _NAMES:
        own = Program(binary.replace("iptables", name, 1))
        back_end = None if find(own.name) is None else await own.works_on()
        for program in await installed(name, own.name):
            is_ours = family in wanted and await program.works_on() is back_end
            steps.append(
                partial(
                    _remove_with,
                    program,
                    of_family(networks, family),
                    settings.mark,
                    is_dry_run=False,
                    spared=kept if is_ours else frozenset(),
                )
            )
    return Removal.of(await try_all(steps))


async def installed(name: str, preferred: str = "") -> list[Program]:
    """The program of that name, and the one of the other back end, as far as they are installed.

    What counts is the back end of the programs used here, -save and -restore.
    preferred: a program that stands for its back end, e.g. iptables-legacy. A back end without
    a table is left out: asking the old one makes the kernel load it.
    """
    programs: dict[BackEnd, Program] = {}
    paths: set[str] = set()
    candidates = (preferred or name, name, f"{name}-nft", f"{name}-legacy")
    for candidate in dict.fromkeys(candidates):
        path = find(candidate)
        if path is None or find(f"{candidate}-save") is None:
            continue
        if os.path.realpath(path) in paths:
            continue
        if candidate.endswith("-legacy") and not has_legacy_tables():
            continue
        program = Program(candidate)
        back_end = await program.works_on()
        if back_end is None:
            _log.warning(
                "%s-save and -restore have two back ends, so neither is used to remove rules",
                candidate,
            )
            continue
        paths.add(os.path.realpath(path))
        if back_end is BackEnd.NFT or has_legacy_tables():
            programs.setdefault(back_end, program)
    return list(programs.values())


def has_legacy_tables() -> bool:
    """Whether this network namespace has tables of the old kind; True if it cannot be seen."""
    if not _NET.is_dir():
        return True
    for path in _LEGACY_TABLES:
        try:
            if path.read_text(encoding="ascii").strip():
                return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


async def _remove_with(
    program: Program,
    networks: Sequence[Network] | None,
    mark: str,
    *,
    is_dry_run: bool,
    spares_direct: bool = False,
    spared: frozenset[str] = frozenset(),
) -> Removal:
    """See `remove`. spared: chains to leave as they are."""
    saved = await program.save()
    payload: dict[str, list[str]] = {}
    done = Removal()
    for bare in (MASQUERADE, FORWARD):
        rules = bare.marked(mark)
        lines = saved.get(rules.table, [])
        where = f"{program.name} {rules.table}"
        commands: list[str] = []
        if rules.chain not in spared:
            own = None if mark else networks
            commands += _chain_removal(where, lines, rules.chain, own, done)
        if mark and own_rules(_inside(lines, bare.chain), networks or ()):
            # What a flannel with its one name for all networks made for ours.
            unmarked = Removal()
            commands += _chain_removal(where, lines, bare.chain, networks, unmarked)
            done.removed.extend(unmarked.removed)
        builtin = [line for line in lines if line.startswith(f"-A {rules.builtin} ")]
        direct = () if spares_direct else networks or ()
        if old := direct_rules(builtin, rules.table, direct):
            commands += map(deletion, old)
            done.removed.append(
                f"{where}: {len(old)} rules of a flannel before v0.20 in {rules.builtin}"
            )
        if commands:
            payload[rules.table] = commands
    if payload and not is_dry_run:
        await program.restore(payload)
    return done


def _chain_removal(
    where: str, lines: Sequence[str], chain: str, networks: Sequence[Network] | None, done: Removal
) -> list[str]:
    """Commands that remove a chain, or what is ours in it, and that in words."""
    if not any(line.startswith(f":{chain} ") for line in lines):
        return []
    inside = _inside(lines, chain)
    if networks is not None and (foreign := foreign_rules(inside, networks)):
        done.kept.append(f"{where}: chain {chain}, for {', '.join(names_of(foreign))}")
        ours = own_rules(inside, networks)
        if ours:
            done.removed.append(f"{where}: {len(ours)} rules of chain {chain}")
        return [deletion(line) for line in ours]
    # A chain can go only when nothing leads to it, whoever wrote that.
    jumps = [line for line in lines if re.search(rf" -[jg] {chain}$", line)]
    done.removed.append(f"{where}: chain {chain}, {len(inside)} rules, {len(jumps)} jumps to it")
    return [*map(deletion, jumps), f"-F {chain}", f"-X {chain}"]


def _inside(lines: Sequence[str], chain: str) -> list[str]:
    return [line for line in lines if line.startswith(f"-A {chain} ")]
