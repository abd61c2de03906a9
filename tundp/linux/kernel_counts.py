"""Counts the kernel keeps of a network namespace: /proc/net/snmp, netstat and stat/nf_conntrack."""

from __future__ import annotations

from pathlib import Path
from typing import Final

NET: Final = Path("/proc/self/net")
"""Of the namespace of the calling process."""
_CONNTRACK: Final = "nf_conntrack"


def namespace_counts(net: Path = NET) -> dict[str, int]:
    """Every count by `Group.Name`, as nstat and RFC 4293 name them, since the namespace was made.

    `nf_conntrack.drop` and its kin are sums over CPUs. A file that is not there, or not to be read,
    has no counts here: without the module nf_conntrack the kernel has none of its.
    """
    found: dict[str, int] = {}
    for name in ("snmp", "netstat"):
        found |= _pairs(_lines(net / name))
    return found | _table(_lines(net / "stat" / _CONNTRACK))


def _lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return []
    return [line.split() for line in text.splitlines()]


def _pairs(lines: list[list[str]]) -> dict[str, int]:
    """Two lines a group, both beginning with `Group:`: names, then decimal values."""
    found: dict[str, int] = {}
    names: list[str] = []
    for line in lines:
        if not line:
            continue
        if names[:1] != line[:1]:
            names = line
            continue
        group = line[0].removesuffix(":")
        for name, value in zip(names[1:], line[1:], strict=False):
            if value.removeprefix("-").isdecimal():
                found[f"{group}.{name}"] = int(value)
        names = []
    return found


def _table(lines: list[list[str]]) -> dict[str, int]:
    """A line of names, then one of hexadecimal values for each CPU."""
    found: dict[str, int] = {}
    for line in lines[1:]:
        for name, value in zip(lines[0], line, strict=False):
            try:
                found[f"{_CONNTRACK}.{name}"] = found.get(f"{_CONNTRACK}.{name}", 0) + int(
                    value, 16
                )
            except ValueError:
                continue
    return found
