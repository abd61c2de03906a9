"""Which rule of legacy iptables drops packets: nftables' trace says nothing of them.

Legacy rules count the packets they meet. The rules and policies that drop, and whose counts grew
between two looks, are what may have dropped a packet in between: evidence, no proof.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import command
from tundp.linux.firewall.backend import BackEnd, ask

TABLES: Final = Path("/proc/thread-self/net/ip_tables_names")
"""The legacy tables that exist. To list one that does not would make it."""
LARGEST: Final = 8_000_000
"""Bytes of a listing that is read."""
_RULE: Final = re.compile(r"\[(\d+):\d+\] (-A .*)", re.ASCII)
_POLICY: Final = re.compile(r":(\S+) (\S+) \[(\d+):\d+\]", re.ASCII)
_QUOTED: Final = re.compile(r'"(?:\\.|[^"\\])*"')
"""A comment of a rule, which may hold anything."""
_DROPS: Final = re.compile(r" -[jg] (DROP|REJECT|TARPIT|NFQUEUE|QUEUE)\b")


@dataclass(frozen=True, slots=True)
class LegacyRule:
    """A rule that drops, or a chain whose policy is to drop."""

    table: str
    text: str
    """`-A FORWARD -s 10.5.1.2/32 -j DROP`, or `-P FORWARD DROP`."""
    program: str
    """What to type to change it."""
    place: int = 0
    """Which one of those with this text."""

    @property
    def mend(self) -> str:
        """The command that lets packets pass here."""
        words = self.text.split(" ", 2)
        change = f"-P {words[1]} ACCEPT" if words[0] == "-P" else f"-D {self.text[3:]}"
        return f"{self.program} -t {self.table} {change}"

    def __str__(self) -> str:
        return f"{self.table}: {self.text}"


Counts = Mapping[LegacyRule, int]
"""Packets by rule, of those that drop."""


async def counts() -> tuple[Counts, int]:
    """Packets by each rule that drops, and how many rules and dropping policies there are at all.

    No rules where there are no legacy tables. PlatformError if there are, and they cannot be read.
    """
    try:
        tables = TABLES.read_text(encoding="ascii").split()
    except FileNotFoundError:
        tables = []
    except OSError as error:
        raise PlatformError(f"{TABLES}: {error.strerror}", error.errno) from None
    if not tables:
        return {}, 0
    program = await _program()
    done = await command.run(f"{program}-save", "-c", package="iptables")
    if len(done.stdout) > LARGEST:
        raise PlatformError(f"{program}-save: a listing of {len(done.stdout) / 1e6:.0f} MB")
    return parse(done.stdout, program)


async def _program() -> str:
    """The iptables program whose back end is the legacy one."""
    try:
        if (await ask("iptables")).back_end is BackEnd.LEGACY:
            return "iptables"
    except PlatformError:
        pass
    if command.find("iptables-legacy-save") is None:
        raise PlatformError("iptables-legacy is not installed")
    return "iptables-legacy"


def parse(text: str, program: str) -> tuple[Counts, int]:
    """`iptables-save -c`: packets by each rule that drops; rules and dropping policies in all."""
    found: dict[LegacyRule, int] = {}
    table, total = "", 0
    seen: dict[tuple[str, str], int] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif match := _POLICY.match(line):
            if match[2] == "DROP":
                total += 1
                found[LegacyRule(table, f"-P {match[1]} DROP", program)] = int(match[3])
        elif match := _RULE.match(line):
            total += 1
            if _DROPS.search(_QUOTED.sub("", match[2])):
                place = seen[table, match[2]] = seen.get((table, match[2]), -1) + 1
                found[LegacyRule(table, match[2], program, place)] = int(match[1])
    return found, total


def moved(before: Counts, after: Counts) -> Iterator[LegacyRule]:
    """The rules that dropped something in between."""
    for rule, count in after.items():
        if count > before.get(rule, 0):
            yield rule
