"""Masquerade and forward rules through nft: flannel's tables, rule for rule.

ip  flannel-ipv4   chain postrtg  nat hook postrouting, priority srcnat   (--ip-masq)
ip6 flannel-ipv6   chain forward  filter hook forward, priority filter    (--iptables-forward-rules)

Both tables are always made. All of it changes in one transaction: chains are emptied and
filled again, and no packet meets half of them.

The rules are flannel's with their quirks: the mark is compared whole, not under a mask,
and the fourth rule leaves the last one nothing to do, so that a host's own packets into
the overlay keep their address. An accept here does not overrule a drop in another table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from tundp.linux.command import Finished, find, run
from tundp.linux.firewall.recognise import Network, are_elsewhere, widest
from tundp.linux.firewall.settings import FirewallSettings, Overlay, Removal

PACKAGE: Final = "nftables"
PROGRAM: Final = "nft"
FAMILIES: Final = ("ip", "ip6")
KUBE_PROXY_MARK: Final = "0x4000"
_PROBE_CHAIN: Final = "masqueradeTest"
_ADDRESSES: Final = re.compile(r"ip6? [sd]addr (?:!= )?(\S+)")
_FLANNELS: Final = re.compile(
    r"(ip6? [sd]addr (!= )?\S+ ){1,2}(return|accept|masquerade( fully-random| random)?)"
)
"""What flannel writes: it signs no rule here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A base chain of ours."""

    name: str
    hook: str
    comment: str


POSTROUTING: Final = Chain(
    name="postrtg",
    hook="type nat hook postrouting priority 100 ;",
    comment="chain to manage traffic masquerading by flannel",
)
FORWARD: Final = Chain(
    name="forward",
    hook="type filter hook forward priority 0 ;",
    comment="chain to accept flannel traffic",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What this nft and this kernel understand."""

    has_comments: bool
    """On tables and chains: nft >= 0.9.7, kernel >= 5.10."""
    has_fully_random: bool


def table_of(family: str, mark: str) -> str:
    """The name of our table; see FirewallSettings.mark."""
    name = "flannel-ipv4" if family == "ip" else "flannel-ipv6"
    return f"{name}-{mark}" if mark else name


def make_script(
    settings: FirewallSettings,
    features: Features,
    foreign: Mapping[tuple[str, str], Sequence[str]] = MappingProxyType({}),
) -> str:
    """The whole transaction, for `nft -f`. foreign: rules to keep, by family and chain."""
    mark = settings.mark
    lines = [_table(family, mark, features) for family in FAMILIES]
    for overlay in settings.overlays:
        if settings.is_masquerading:
            is_random = settings.is_random_fully and features.has_fully_random
            rules = masquerade_rules(overlay, is_random_fully=is_random)
            rules += foreign.get((overlay.family, POSTROUTING.name), ())
            lines += _chain(overlay.family, mark, POSTROUTING, rules, features)
        if settings.is_forwarding:
            rules = forward_rules(overlay)
            rules += foreign.get((overlay.family, FORWARD.name), ())
            lines += _chain(overlay.family, mark, FORWARD, rules, features)
    return "\n".join(lines) + "\n"


def masquerade_rules(overlay: Overlay, *, is_random_fully: bool) -> list[str]:
    """What leaves the overlay gets the host's address."""
    family, network, subnet = overlay.family, overlay.network, overlay.subnet
    masquerade = "masquerade fully-random" if is_random_fully else "masquerade"
    return [
        f"meta mark {KUBE_PROXY_MARK} return",
        f"{family} saddr {subnet} {family} daddr {network} return",
        f"{family} saddr {network} {family} daddr {subnet} return",
        f"{family} saddr != {subnet} {family} daddr {network} return",
        f"{family} saddr {network} {family} daddr != {overlay.multicast} {masquerade}",
        f"{family} saddr != {network} {family} daddr {network} {masquerade}",
    ]


def forward_rules(overlay: Overlay) -> list[str]:
    """The overlay's packets pass, as far as this table is concerned."""
    return [f"{overlay.family} {field} {overlay.network} accept" for field in ("saddr", "daddr")]


class Nftables:
    """flannel's nftables rules for one overlay."""

    name: Final = "nftables"

    def __init__(self, settings: FirewallSettings) -> None:
        self._settings = settings
        self._script = ""
        self._networks: Sequence[Network] = ()
        # As printed right after the rules were made, not as we spell them.
        self._lines: dict[str, list[str]] = {}

    async def install(self, networks: Sequence[Network]) -> None:
        """Put everything in place, in one transaction. PlatformError with nft's complaint.

        What a flannel of a network that is none of `networks` has in our chains stays in them.
        """
        self._lines = {}
        self._networks = networks
        features = await probe()
        mark = self._settings.mark
        foreign = {
            (family, chain): foreign_rules(rules, networks)
            for family in FAMILIES
            for chain, rules in rules_of(await list_table(family, mark) or []).items()
        }
        self._script = make_script(self._settings, features, foreign)
        await self._load()

    async def repair(self) -> list[str]:
        """Redo all if anything is not as `install` left it; two processes if all is well."""
        if not self._lines:
            await self.install(self._networks)
            return ["nftables: everything (could not be set up before)"]
        damages = []
        for family in FAMILIES:
            table = table_of(family, self._settings.mark)
            lines = await list_table(family, self._settings.mark)
            if lines is None:
                damages.append(f"nftables: table {family} {table} (was gone)")
            elif missing := _missing(self._lines[family], lines):
                damages.append(f"nftables: {missing} of table {family} {table}")
        if damages:
            await self.install(self._networks)
        return damages

    async def is_blind(self) -> bool:
        """See Firewall."""
        return False

    def memory(self) -> dict[str, Any]:
        """See Firewall."""
        return {"lines": self._lines, "script": self._script}

    def recall(self, memory: Mapping[str, Any], networks: Sequence[Network]) -> None:
        """See Flavour."""
        self._networks = networks
        self._lines = {family: list(map(str, memory["lines"][family])) for family in FAMILIES}
        self._script = str(memory["script"])

    async def _load(self) -> None:
        await run(PROGRAM, "-f", "-", package=PACKAGE, stdin=self._script)
        mark = self._settings.mark
        self._lines = {family: await list_table(family, mark) or [] for family in FAMILIES}


async def list_table(family: str, mark: str) -> list[str] | None:
    """Our table of a family as nft prints it, None if it is not there.

    Cheap even where others have many rules, unlike `nft list tables`.
    """
    argv = [PROGRAM, "list", "table", family, table_of(family, mark)]
    finished = await run(*argv, package=PACKAGE, is_checked=False)
    if finished.code == 0:
        return finished.stdout.splitlines()
    if "No such file or directory" in finished.stderr:
        return None
    raise finished.error()


def rules_of(listed: Sequence[str]) -> dict[str, list[str]]:
    """The rules of each chain in a listed table, as nft prints them."""
    chains: dict[str, list[str]] = {}
    chain = ""
    for line in map(str.strip, listed):
        if line.startswith("chain "):
            chain = line.split()[1]
            chains[chain] = []
        elif line == "}":
            chain = ""
        elif chain and line and not line.startswith(("type ", "comment ")):
            chains[chain].append(line)
    return chains


def foreign_rules(rules: Sequence[str], networks: Sequence[Network]) -> list[str]:
    """Those rules of flannel's form that name a network outside `networks`."""
    return [
        rule
        for rule in rules
        if _FLANNELS.fullmatch(rule) and are_elsewhere(_ADDRESSES.findall(rule), networks)
    ]


async def remove(
    networks: Sequence[Network] | None, *, mark: str = "", is_dry_run: bool = False
) -> Removal:
    """Remove our tables with all in them; nothing where there is no nft.

    In a table of flannel's own name, rules of other networks than `networks` stay, with their
    chain; with None the whole table goes.
    """
    done = Removal()
    if find(PROGRAM) is None:
        return done
    script = ""
    if mark:
        script += await _table_removal(mark, None, done)
        script += await _unmarked_removal(networks or (), done)
    else:
        script += await _table_removal("", networks, done)
    if script and not is_dry_run:
        await run(PROGRAM, "-f", "-", package=PACKAGE, stdin=script)
    return done


async def remove_unwanted(settings: FirewallSettings, networks: Sequence[Network]) -> Removal:
    """Remove our chains that `settings` do not ask for (any more), but for other networks' rules.

    Both tables stay, as flannel always makes both; without a rule to make they go.
    """
    if not settings.is_wanted:
        return await remove(networks, mark=settings.mark)
    done = Removal()
    script = await _unmarked_removal(networks, done) if settings.mark else ""
    wanted = {overlay.family for overlay in settings.overlays}
    for family in FAMILIES:
        table = table_of(family, settings.mark)
        chains = rules_of(await list_table(family, settings.mark) or [])
        for chain, is_wanted in (
            (POSTROUTING, settings.is_masquerading),
            (FORWARD, settings.is_forwarding),
        ):
            if chain.name in chains and not (is_wanted and family in wanted):
                script += _chain_removal(family, table, chain.name, chains[chain.name], networks)
                done.removed.append(f"nftables: chain {chain.name} of table {family} {table}")
    if script:
        await run(PROGRAM, "-f", "-", package=PACKAGE, stdin=script)
    return done


async def _unmarked_removal(networks: Sequence[Network], done: Removal) -> str:
    """A script for what a flannel with its one name for all networks made for ours, if it did."""
    unmarked = Removal()
    for family in FAMILIES:
        chains = rules_of(await list_table(family, "") or [])
        if any(_ours(rules, networks) for rules in chains.values()):
            script = await _table_removal("", networks, unmarked)
            done.removed.extend(unmarked.removed)
            return script
    return ""


async def _table_removal(mark: str, networks: Sequence[Network] | None, done: Removal) -> str:
    """A script that removes our tables, or what is ours in them, and that in words."""
    tables = {family: await list_table(family, mark) for family in FAMILIES}
    chains = {family: rules_of(lines or []) for family, lines in tables.items()}
    foreign: dict[str, list[str]] = {}
    if networks is not None:
        for family, found in chains.items():
            foreign[family] = foreign_rules(
                [rule for each in found.values() for rule in each], networks
            )
    is_shared = any(foreign.values())
    script = ""
    for family, lines in tables.items():
        if lines is None:
            continue
        table = table_of(family, mark)
        where = f"nftables: table {family} {table}"
        if not is_shared or networks is None:
            script += f"delete table {family} {table}\n"
            done.removed.append(where)
            continue
        named = widest(name for rule in foreign[family] for name in _ADDRESSES.findall(rule))
        done.kept.append(f"{where}, for {', '.join(named) or 'the other family'}")
        for chain, rules in chains[family].items():
            if count := len(_ours(rules, networks)):
                script += _chain_removal(family, table, chain, rules, networks)
                done.removed.append(f"{where}: {count} rules of chain {chain}")
    return script


def _chain_removal(
    family: str, table: str, chain: str, rules: Sequence[str], networks: Sequence[Network]
) -> str:
    """A script that removes a chain, or all but what another network's flannel needs of it."""
    where = f"{family} {table} {chain}"
    if not foreign_rules(rules, networks):
        return f"flush chain {where}\ndelete chain {where}\n"
    ours = _ours(rules, networks)
    kept = "".join(f"add rule {where} {rule}\n" for rule in rules if rule not in ours)
    return f"flush chain {where}\n{kept}"


def _ours(rules: Sequence[str], networks: Sequence[Network]) -> list[str]:
    return [
        rule
        for rule in rules
        if (named := _ADDRESSES.findall(rule)) and not are_elsewhere(named, networks)
    ]


async def probe() -> Features:
    """Ask nft and the kernel by dry runs; a lack of permission looks like a lack of features."""
    table = table_of("ip", "")
    commented = Features(has_comments=True, has_fully_random=False)
    chain = f"chain ip {table} {_PROBE_CHAIN}"
    random = (
        f"add table ip {table}\nadd {chain} {{ {POSTROUTING.hook} }}\n"
        f"add rule ip {table} {_PROBE_CHAIN} masquerade fully-random\n"
    )
    return Features(
        has_comments=(await _check(_table("ip", "", commented) + "\n")).code == 0,
        has_fully_random=(await _check(random)).code == 0,
    )


async def try_table() -> None:
    """Have nft and the kernel check a table of ours without making it. PlatformError."""
    bare = Features(has_comments=False, has_fully_random=False)
    script = _table("ip", "", bare) + "\n"
    await run(PROGRAM, "--check", "-f", "-", package=PACKAGE, stdin=script)


async def _check(script: str) -> Finished:
    return await run(PROGRAM, "--check", "-f", "-", package=PACKAGE, stdin=script, is_checked=False)


def _table(family: str, mark: str, features: Features) -> str:
    table = table_of(family, mark)
    comment = f' {{ comment "rules for {table}" ; }}' if features.has_comments else ""
    return f"add table {family} {table}{comment}"


def _chain(
    family: str, mark: str, chain: Chain, rules: Sequence[str], features: Features
) -> list[str]:
    where = f"{family} {table_of(family, mark)} {chain.name}"
    comment = f' comment "{chain.comment}" ;' if features.has_comments else ""
    return [
        f"add chain {where} {{ {chain.hook}{comment} }}",
        f"flush chain {where}",
        *(f"add rule {where} {rule}" for rule in rules),
    ]


def _missing(wanted: Sequence[str], lines: Sequence[str]) -> str:
    """What is missing in words, empty if nothing; lines somebody added are no damage."""
    count = sum(line not in lines for line in wanted if line.strip("\t}"))
    if count:
        return f"{count} lines"
    rest = iter(lines)
    return "" if all(line in rest for line in wanted) else "the order"
