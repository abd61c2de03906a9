"""Masquerade and forward rules through iptables: flannel's chains, rule for rule.

nat     POSTROUTING --jump, last--> FLANNEL-POSTRTG   (--ip-masq)
filter  FORWARD     --jump, last--> FLANNEL-FWD       (--iptables-forward-rules)

Everything of a table changes in one iptables-restore transaction: the chain is emptied
and filled again, the jump moves to the end of the built-in chain, and flannel v0.11's
rules, which had no chain of their own, go. No packet meets half of it. Both back ends
(nf_tables and legacy) do; both remark "legacy tables present" on stderr, which means nothing.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from tundp.linux.command import Finished, find, run, try_all
from tundp.linux.firewall import backend
from tundp.linux.firewall.backend import PACKAGE, BackEnd, Version
from tundp.linux.firewall.settings import FirewallSettings, NetworkPair, Overlay

KUBE_PROXY_MARK: Final = "0x4000/0x4000"
"""Packets with this mark are masqueraded by kube-proxy already."""
WAIT_SINCE: Final = (1, 6, 2)
"""First version whose iptables-restore knows --wait, and MASQUERADE --random-fully."""
_MASQUERADE: Final = " -j MASQUERADE"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """A chain of ours and the jump to it; rules in the form `iptables -S` prints them."""

    table: str
    builtin: str
    chain: str
    comment: str
    rules: tuple[str, ...] = ()

    def marked(self, mark: str) -> RuleSet:
        """The same for another instance of the host; see FirewallSettings.mark."""
        return replace(self, chain=f"{self.chain}-{mark}") if mark else self

    @property
    def jump(self) -> str:
        """The rule of the built-in chain that leads to ours."""
        return f'-A {self.builtin} -m comment --comment "{self.comment}" -j {self.chain}'


MASQUERADE: Final = RuleSet(
    table="nat", builtin="POSTROUTING", chain="FLANNEL-POSTRTG", comment="flanneld masq"
)
FORWARD: Final = RuleSet(
    table="filter", builtin="FORWARD", chain="FLANNEL-FWD", comment="flanneld forward"
)


def masquerade_rules(overlay: Overlay, mark: str = "") -> RuleSet:
    """Masquerade packets that leave the overlay, or enter it from this host's other addresses."""
    network, subnet = overlay.network, overlay.subnet
    return _filled(
        MASQUERADE.marked(mark),
        (f"-m mark --mark {KUBE_PROXY_MARK}", "RETURN"),
        (f"-s {subnet} -d {network}", "RETURN"),
        (f"-s {network} -d {subnet}", "RETURN"),
        (f"! -s {network} -d {subnet}", "RETURN"),
        (f"-s {network} ! -d {overlay.multicast}", "MASQUERADE"),
        (f"! -s {network} -d {network}", "MASQUERADE"),
    )


def forward_rules(overlay: Overlay, mark: str = "") -> RuleSet:
    """Accept the overlay's packets, whatever the policy of FORWARD."""
    return _filled(
        FORWARD.marked(mark),
        (f"-s {overlay.network}", "ACCEPT"),
        (f"-d {overlay.network}", "ACCEPT"),
    )


def v011_rules(listed: Sequence[str], table: str, pairs: Iterable[NetworkPair]) -> list[str]:
    """Those lines of a built-in chain that flannel v0.11 wrote for these networks.

    It marked its rules by nothing, and somebody else may have written one like them: they
    count as flannel's only where all of them stand one after the other, as it appends
    them. Of a subnet given up alone, it forgets one rule, which nobody else would write.
    """
    ours: set[str] = set()
    for network, subnet in pairs:
        if table == FORWARD.table:
            wholes = [[f"-A FORWARD -{letter} {network} -j ACCEPT" for letter in "sd"]]
        else:
            stale = f"-A POSTROUTING ! -s {network} -d {subnet} -j RETURN"
            ours.add(stale)
            wholes = [
                [
                    f"-A POSTROUTING -s {network} -d {network} -j RETURN",
                    f"-A POSTROUTING -s {network} ! -d 224.0.0.0/4 -j MASQUERADE{random}",
                    stale,
                    f"-A POSTROUTING ! -s {network} -d {network} -j MASQUERADE{random}",
                ]
                for random in ("", " --random-fully")
            ]
        for whole in wholes:
            if any(listed[i : i + len(whole)] == whole for i in range(len(listed))):
                ours.update(whole)
    return [line for line in listed if line in ours]


class Program:
    """The iptables of one family, with its -restore and -save."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._version: Version | None = None

    async def is_modern(self) -> bool:
        """Whether it knows --wait for restore, and --random-fully."""
        return (await self.version()).numbers >= WAIT_SINCE

    async def version(self) -> Version:
        """What the program says of itself, asked once."""
        if self._version is None:
            self._version = await backend.ask(self.name)
        return self._version

    async def _run(self, *argv: str, stdin: str = "", is_checked: bool = True) -> Finished:
        return await run(
            *argv,
            package=PACKAGE,
            stdin=stdin,
            is_checked=is_checked,
            capabilities=(await self.version()).back_end.capabilities,
        )

    async def list_chain(self, table: str, chain: str) -> list[str] | None:
        """The lines of `-S chain`, None if there is no such chain."""
        wait = ["--wait"] if await self.is_modern() else []
        argv = [self.name, *wait, "-t", table, "-S", chain]
        finished = await self._run(*argv, is_checked=False)
        if finished.code == 0:
            # A wrapper may print lines of its own.
            return [line for line in finished.stdout.splitlines() if line.startswith("-")]
        # The nf_tables back end says of a chain that is not there: incompatible. One that
        # really is incompatible makes the restore fail, which says so better than we could.
        if "No chain" in finished.stderr or "is incompatible" in finished.stderr:
            return None
        raise finished.error()

    async def restore(self, payload: dict[str, list[str]]) -> None:
        """Carry out commands, each table's in one transaction, and leave all else alone."""
        wait = ["--wait"] if await self.is_modern() else []
        lines: list[str] = []
        for table, commands in payload.items():
            lines += [f"*{table}", *commands, "COMMIT"]
        stdin = "\n".join(lines) + "\n"
        await self._run(f"{self.name}-restore", "--noflush", *wait, stdin=stdin)

    async def save(self) -> dict[str, list[str]]:
        """All lines by table. Unlike -S it makes no table that is not there yet."""
        tables: dict[str, list[str]] = defaultdict(list)
        table = ""
        for line in (await self._run(f"{self.name}-save")).stdout.splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith((":", "-A ")):
                tables[table].append(line)
        return tables


class Iptables:
    """flannel's iptables rules for one overlay; `binary` names a back end, e.g. iptables-legacy."""

    name: Final = "iptables"

    def __init__(self, settings: FirewallSettings, *, binary: str = "iptables") -> None:
        self._settings = settings
        self._programs = {
            "ip": Program(binary),
            "ip6": Program(binary.replace("iptables", "ip6tables", 1)),
        }
        self._parts: list[_Part] = []

    async def install(self, pairs: Sequence[NetworkPair]) -> None:
        """Put everything in place; v0.11's rules for `pairs` go.

        What failed does not keep the rest from being tried: PlatformError tells at the end.
        """
        settings = self._settings
        self._parts = []
        steps: list[Callable[[], Awaitable[None]]] = []
        for overlay in settings.overlays:
            program = self._programs[overlay.family]
            old = pairs if overlay.family == "ip" else ()
            for rules, is_wanted in (
                (masquerade_rules(overlay, settings.mark), settings.is_masquerading),
                (forward_rules(overlay, settings.mark), settings.is_forwarding),
            ):
                part = _Part(program, rules, old, is_random_fully=settings.is_random_fully)
                if is_wanted:
                    self._parts.append(part)
                steps.append(part.install if is_wanted else part.remove_v011)
        await try_all(steps)

    async def repair(self) -> list[str]:
        """Redo what is not as `install` left it; four processes a family if all is well."""
        found = await try_all([part.repair for part in self._parts])
        return [damage for damage in found if damage]

    async def is_blind(self) -> bool:
        """See Firewall: of the legacy back end's changes the kernel tells nobody."""
        versions = [await program.version() for program in self._used()]
        return any(version.back_end is BackEnd.LEGACY for version in versions)

    def _used(self) -> list[Program]:
        return [self._programs[overlay.family] for overlay in self._settings.overlays]


class _Part:
    """One chain with its jump, and how it looked when all was well."""

    def __init__(
        self,
        program: Program,
        rules: RuleSet,
        pairs: Sequence[NetworkPair],
        *,
        is_random_fully: bool,
    ) -> None:
        self._program = program
        self._rules = rules
        self._pairs = pairs
        self._is_random_fully = is_random_fully
        # As this version of iptables printed them right after they were made.
        self._chain_lines: list[str] = []
        self._jump_lines: list[str] = []

    async def install(self) -> None:
        rules = self._rules
        random = " --random-fully"
        if not (self._is_random_fully and await self._program.is_modern()):
            random = ""
        listed = await self._listed(rules.builtin)
        doomed = [*self._jumps(listed), *v011_rules(listed, rules.table, self._pairs)]
        await self._program.restore(
            {
                rules.table: [
                    f":{rules.chain} - [0:0]",  # made, or emptied
                    *(_deletion(line) for line in doomed),
                    rules.jump,
                    *(
                        f"{rule}{random}" if rule.endswith(_MASQUERADE) else rule
                        for rule in rules.rules
                    ),
                ]
            }
        )
        self._jump_lines = self._jumps(await self._listed(rules.builtin))
        self._chain_lines = await self._listed(rules.chain)

    async def remove_v011(self) -> None:
        """No chain is wanted here: one from an earlier run stays, as flannel lets it."""
        if not self._pairs or find(self._program.name) is None:
            return
        table = self._rules.table
        # Not by -S: legacy would make a nat table for it, and track all connections from then on.
        saved = (await self._program.save()).get(table, [])
        listed = [line for line in saved if line.startswith(f"-A {self._rules.builtin} ")]
        if doomed := v011_rules(listed, table, self._pairs):
            await self._program.restore({table: [_deletion(line) for line in doomed]})

    async def repair(self) -> str | None:
        damage = await self._damage()
        if damage:
            await self.install()
        return damage and f"{self._program.name} {self._rules.table}: {damage}"

    async def _damage(self) -> str | None:
        rules = self._rules
        if not self._chain_lines or not self._jump_lines:
            return f"chain {rules.chain} (could not be set up before)"
        chain = await self._listed(rules.chain)
        if not chain:
            return f"chain {rules.chain} (was gone)"
        damages = []
        if missing := [line for line in self._chain_lines if line not in chain]:
            damages.append(f"{len(missing)} of {len(rules.rules)} rules of {rules.chain}")
        elif not is_subsequence(self._chain_lines, chain):
            damages.append(f"order of {rules.chain}")
        builtin = await self._listed(rules.builtin)
        if any(line not in builtin for line in self._jump_lines):
            damages.append(f"jump from {rules.builtin} to {rules.chain}")
        return ", ".join(damages) or None

    async def _listed(self, chain: str) -> list[str]:
        return await self._program.list_chain(self._rules.table, chain) or []

    def _jumps(self, listed: Sequence[str]) -> list[str]:
        """Jumps with our comment; one without it is an administrator's and stays."""
        end = f"-j {self._rules.chain}"
        return [line for line in listed if line.endswith(end) and self._rules.comment in line]


async def remove(
    pairs: Sequence[NetworkPair], *, mark: str = "", is_dry_run: bool = False
) -> list[str]:
    """Remove our chains, every jump to them, and v0.11's rules for `pairs`; what that was.

    Both families, both back ends, as far as they are installed. PlatformError after
    everything was tried.
    """
    found = await try_all(
        [
            *(
                partial(_remove_with, program, pairs, mark, is_dry_run=is_dry_run)
                for program in installed("iptables")
            ),
            *(
                partial(_remove_with, program, (), mark, is_dry_run=is_dry_run)
                for program in installed("ip6tables")
            ),
        ]
    )
    return [line for lines in found for line in lines]


def installed(name: str) -> list[Program]:
    """The program of that name, and the back ends it is not."""
    programs: dict[str, Program] = {}
    for candidate in (name, f"{name}-nft", f"{name}-legacy"):
        path = find(candidate)
        if path is not None and find(f"{candidate}-save") is not None:
            programs.setdefault(os.path.realpath(path), Program(candidate))
    return list(programs.values())


async def _remove_with(
    program: Program, pairs: Sequence[NetworkPair], mark: str, *, is_dry_run: bool
) -> list[str]:
    saved = await program.save()
    payload: dict[str, list[str]] = {}
    removed: list[str] = []
    for rules in (MASQUERADE.marked(mark), FORWARD.marked(mark)):
        table, chain = rules.table, rules.chain
        lines = saved.get(table, [])
        commands: list[str] = []
        if any(line.startswith(f":{chain} ") for line in lines):
            # A chain can go only when nothing leads to it, whoever wrote that.
            jumps = [line for line in lines if re.search(rf" -[jg] {chain}$", line)]
            count = sum(line.startswith(f"-A {chain} ") for line in lines)
            commands += [*map(_deletion, jumps), f"-F {chain}", f"-X {chain}"]
            removed.append(
                f"{program.name} {table}: chain {chain}, {count} rules, {len(jumps)} jumps to it"
            )
        builtin = [line for line in lines if line.startswith(f"-A {rules.builtin} ")]
        if old := v011_rules(builtin, table, pairs):
            commands += map(_deletion, old)
            removed.append(f"{program.name} {table}: {len(old)} rules of flannel v0.11")
        if commands:
            payload[table] = commands
    if payload and not is_dry_run:
        await program.restore(payload)
    return removed


def is_subsequence(wanted: Iterable[str], lines: Iterable[str]) -> bool:
    """Whether all of `wanted` occur in `lines`, in that order, whatever is between them."""
    rest = iter(lines)
    return all(line in rest for line in wanted)


def _filled(bare: RuleSet, *rules: tuple[str, str]) -> RuleSet:
    return replace(
        bare,
        rules=tuple(
            f'-A {bare.chain} {match} -m comment --comment "{bare.comment}" -j {target}'
            for match, target in rules
        ),
    )


def _deletion(line: str) -> str:
    return "-D" + line.removeprefix("-A")
