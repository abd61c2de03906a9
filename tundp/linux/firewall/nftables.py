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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tundp.linux.command import Finished, find, run
from tundp.linux.firewall.settings import FirewallSettings, NetworkPair, Overlay

PACKAGE: Final = "nftables"
PROGRAM: Final = "nft"
FAMILIES: Final = ("ip", "ip6")
KUBE_PROXY_MARK: Final = "0x4000"
_PROBE_CHAIN: Final = "masqueradeTest"


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


def make_script(settings: FirewallSettings, features: Features) -> str:
    """The whole transaction, for `nft -f`."""
    mark = settings.mark
    lines = [_table(family, mark, features) for family in FAMILIES]
    for overlay in settings.overlays:
        if settings.is_masquerading:
            is_random = settings.is_random_fully and features.has_fully_random
            rules = masquerade_rules(overlay, is_random_fully=is_random)
            lines += _chain(overlay.family, mark, POSTROUTING, rules, features)
        if settings.is_forwarding:
            rules = forward_rules(overlay)
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
        # As printed right after the rules were made, not as we spell them.
        self._lines: dict[str, list[str]] = {}

    async def install(self, pairs: Sequence[NetworkPair] = ()) -> None:
        """Put everything in place, in one transaction. PlatformError with nft's complaint.

        flannel v0.11 made iptables' rules only: there are none of `pairs` here.
        """
        self._lines = {}
        self._script = make_script(self._settings, await probe())
        await self._load()

    async def repair(self) -> list[str]:
        """Redo all if anything is not as `install` left it; two processes if all is well."""
        if not self._lines:
            await self.install()
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
            await self._load()
        return damages

    async def is_blind(self) -> bool:
        """See Firewall."""
        return False

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


async def remove(*, mark: str = "", is_dry_run: bool = False) -> list[str]:
    """Remove our tables with all in them; what that was. Nothing where there is no nft."""
    if find(PROGRAM) is None:
        return []
    there = {f: table_of(f, mark) for f in FAMILIES if await list_table(f, mark) is not None}
    if there and not is_dry_run:
        script = "".join(f"delete table {family} {table}\n" for family, table in there.items())
        await run(PROGRAM, "-f", "-", package=PACKAGE, stdin=script)
    return [f"nftables: table {family} {table}" for family, table in there.items()]


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
