"""Masquerade and forward rules through iptables: flannel's chains, rule for rule.

nat     POSTROUTING --jump--> FLANNEL-POSTRTG   (--ip-masq)
filter  FORWARD     --jump--> FLANNEL-FWD       (--iptables-forward-rules)

Everything of a table changes in one iptables-restore transaction: the chain is emptied and
filled again, and the direct rules of flannel before v0.20 go (see recognise.py). There is one
jump: where the first jump or direct rule stood, at the end where none did. A place before
somebody's DROP is kept so. What a flannel of another network put into the chain stays in it.
No packet meets half of it. Both back ends (nf_tables and legacy) do; both remark "legacy
tables present" on stderr, which means nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tundp.errors import PlatformError
from tundp.linux.command import Finished, run, try_all
from tundp.linux.firewall import backend
from tundp.linux.firewall.backend import PACKAGE, BackEnd, Version
from tundp.linux.firewall.recognise import (
    FORWARD_COMMENT,
    MASQUERADE_COMMENT,
    Network,
    direct_rules,
    foreign_rules,
)
from tundp.linux.firewall.settings import FirewallSettings, Overlay

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
    table="nat", builtin="POSTROUTING", chain="FLANNEL-POSTRTG", comment=MASQUERADE_COMMENT
)
FORWARD: Final = RuleSet(
    table="filter", builtin="FORWARD", chain="FLANNEL-FWD", comment=FORWARD_COMMENT
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

    async def is_legacy(self) -> bool:
        """Whether its rules are those of the kernel's old tables, whatever the file is called."""
        return (await self.version()).back_end is BackEnd.LEGACY

    async def works_on(self) -> BackEnd | None:
        """The back end of its -save and -restore; None if they have two.

        It may be another than the program's own, where somebody wrapped that alone.
        """
        own = (await self.version()).back_end
        found = set()
        for suffix in ("-save", "-restore"):
            try:
                found.add((await backend.ask(f"{self.name}{suffix}")).back_end)
            except PlatformError:  # before 1.8 they name no version
                found.add(own)
        return found.pop() if len(found) == 1 else None

    async def list_chain(self, table: str, chain: str) -> list[str] | None:
        """The lines of `-S chain`, None if there is no such chain."""
        wait = ["--wait"] if await self.is_modern() else []
        argv = [self.name, *wait, "-t", table, "-S", chain]
        finished = await self._run(*argv, is_checked=False)
        if finished.code == 0:
            # A wrapper may print lines of its own; iptables 1.4 ends some lines with a space.
            return [line.rstrip() for line in finished.stdout.splitlines() if line.startswith("-")]
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
        text = (await self._run(f"{self.name}-save")).stdout
        for line in map(str.rstrip, text.splitlines()):
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

    async def install(self, networks: Sequence[Network]) -> None:
        """Put everything in place; direct rules of flannel's for `networks` go.

        What failed does not keep the rest from being tried: PlatformError tells at the end.
        """
        self._make_parts(networks)
        await try_all([part.install for part in self._parts])

    def _make_parts(self, networks: Sequence[Network]) -> None:
        settings = self._settings
        self._parts = []
        for overlay in settings.overlays:
            program = self._programs[overlay.family]
            wanted = (
                (masquerade_rules(overlay, settings.mark), settings.is_masquerading),
                (forward_rules(overlay, settings.mark), settings.is_forwarding),
            )
            self._parts += [
                _Part(
                    program,
                    rules,
                    of_family(networks, overlay.family),
                    is_random_fully=settings.is_random_fully,
                )
                for rules, is_wanted in wanted
                if is_wanted
            ]

    def memory(self) -> dict[str, Any]:
        """See Firewall."""
        return {"parts": [part.lines for part in self._parts]}

    def recall(self, memory: Mapping[str, Any], networks: Sequence[Network]) -> None:
        """See Flavour."""
        self._make_parts(networks)
        for part, (chain, jump) in zip(self._parts, memory["parts"], strict=True):
            part.lines = (list(map(str, chain)), list(map(str, jump)))

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
        networks: Sequence[Network],
        *,
        is_random_fully: bool,
    ) -> None:
        self._program = program
        self._rules = rules
        self._networks = networks
        self._is_random_fully = is_random_fully
        # As this version of iptables printed them right after they were made.
        self._chain_lines: list[str] = []
        self._jump_lines: list[str] = []

    @property
    def lines(self) -> tuple[list[str], list[str]]:
        """Of the chain and of its jump, as they were printed; empty: not set up."""
        return self._chain_lines, self._jump_lines

    @lines.setter
    def lines(self, lines: tuple[list[str], list[str]]) -> None:
        self._chain_lines, self._jump_lines = lines

    async def install(self) -> None:
        rules = self._rules
        random = " --random-fully"
        if not (self._is_random_fully and await self._program.is_modern()):
            random = ""
        listed = await self._listed(rules.builtin)
        foreign = foreign_rules(await self._listed(rules.chain), self._networks)
        await self._program.restore(
            {
                rules.table: [
                    f":{rules.chain} - [0:0]",  # made, or emptied
                    *self._jump_commands(listed),
                    *(
                        f"{rule}{random}" if rule.endswith(_MASQUERADE) else rule
                        for rule in rules.rules
                    ),
                    *foreign,
                ]
            }
        )
        self._jump_lines = self._jumps(await self._listed(rules.builtin))
        self._chain_lines = await self._listed(rules.chain)

    def _jump_commands(self, listed: Sequence[str]) -> list[str]:
        """Commands that leave one jump and no direct rule, the jump where the first of them was."""
        rules = self._rules
        jumps = self._jumps(listed)
        direct = direct_rules(listed, rules.table, self._networks)
        body = [line for line in listed if line.startswith("-A ")]
        first = next((line for line in body if line in jumps or line in direct), None)
        if first is None:
            return [rules.jump]
        if jumps == [first]:
            return [deletion(line) for line in direct]
        # By what they say, not by number: somebody may change the chain meanwhile.
        return [
            *(deletion(line) for line in (*jumps, *direct)),
            rules.jump.replace(
                f"-A {rules.builtin}", f"-I {rules.builtin} {body.index(first) + 1}", 1
            ),
        ]

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
        elif len(self._jumps(builtin)) > 1:
            damages.append(f"more than one jump from {rules.builtin} to {rules.chain}")
        if direct := direct_rules(builtin, rules.table, self._networks):
            damages.append(f"{len(direct)} rules of an old flannel in {rules.builtin}")
        return ", ".join(damages) or None

    async def _listed(self, chain: str) -> list[str]:
        return await self._program.list_chain(self._rules.table, chain) or []

    def _jumps(self, listed: Sequence[str]) -> list[str]:
        """Jumps with our comment; one without it is an administrator's and stays."""
        end = f"-j {self._rules.chain}"
        return [line for line in listed if line.endswith(end) and self._rules.comment in line]


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


def deletion(line: str) -> str:
    """The command that deletes the first rule equal to a line of `iptables -S`."""
    return "-D" + line.removeprefix("-A")


def of_family(networks: Iterable[Network], family: str) -> list[Network]:
    """The networks of `ip` or `ip6`."""
    return [network for network in networks if (network.version == 4) == (family == "ip")]
