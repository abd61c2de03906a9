"""What the installed systemd unit lets the daemon do: what works in a shell may not there.

Reads unit files and drop-ins as systemd.unit(5) finds them; systemd itself is not asked, so this
also holds before `systemctl daemon-reload` and without systemd running.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.files import SMALL_LEN, read_regular

DIRECTORIES: Final = tuple(
    Path(text)
    for text in (
        "/etc/systemd/system",
        "/run/systemd/system",
        "/usr/local/lib/systemd/system",
        "/usr/lib/systemd/system",
        "/lib/systemd/system",
    )
)
"""Highest precedence first."""
_BASES: Final = {
    "RuntimeDirectory": Path("/run"),
    "StateDirectory": Path("/var/lib"),
    "CacheDirectory": Path("/var/cache"),
    "LogsDirectory": Path("/var/log"),
}
_KERNEL: Final = (Path("/dev"), Path("/proc"), Path("/sys"))
"""ProtectSystem= leaves these alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """An installed unit, as far as it says what can be written and which capabilities are left."""

    name: str
    is_strict: bool
    """ProtectSystem=strict: the whole file system is read-only but for `writable`."""
    writable: tuple[Path, ...]
    capabilities: frozenset[str] | None = None
    """CapabilityBoundingSet=, by name; None if it is not set, or by what it leaves out."""

    def may_write(self, directory: Path) -> bool:
        """Whether the daemon can make files in `directory`."""
        if not self.is_strict:
            return True
        return any(directory.is_relative_to(each) for each in (*self.writable, *_KERNEL))


def installed_unit(names: Sequence[str], directories: Iterable[Path] = DIRECTORIES) -> Unit | None:
    """The first of `names` that is installed, with its drop-ins; None if none is."""
    directories = tuple(directories)
    for name in names:
        for directory in directories:
            lines = _lines(directory / name)
            if lines is not None:
                for path in _drop_ins(name, directories):
                    lines += _lines(path) or []
                return _read(name, lines)
    return None


def _drop_ins(name: str, directories: Iterable[Path]) -> Iterator[Path]:
    """By file name, whatever directory they are in; of equal names the first directory's."""
    found: dict[str, Path] = {}
    for directory in directories:
        for path in (directory / f"{name}.d").glob("*.conf"):
            found.setdefault(path.name, path)
    for _, path in sorted(found.items()):
        yield path


def _lines(path: Path) -> list[str] | None:
    """The lines of [Service]; None if there is no such file."""
    try:
        text = read_regular(path, most_len=SMALL_LEN)
    except OSError:
        return None
    section = ""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()  # noqa: PLW2901
        if line.startswith("["):
            section = line
        elif section == "[Service]" and not line.startswith(("#", ";")):
            found.append(line)
    return found


def _read(name: str, lines: Iterable[str]) -> Unit:
    is_strict = False
    capabilities: frozenset[str] | None = None
    lists: dict[str, list[str]] = {}
    for line in lines:
        key, _, value = line.partition("=")
        key, value = key.strip(), value.strip()
        if key == "ProtectSystem":
            is_strict = value == "strict"
        elif key == "CapabilityBoundingSet":
            is_readable = not value.startswith("~")
            named = frozenset(value.upper().split())
            capabilities = (capabilities or frozenset()) | named if is_readable and named else None
        elif key == "ReadWritePaths" or key in _BASES:
            # An empty assignment forgets the ones before it.
            lists[key] = [*lists.get(key, ()), *value.split()] if value else []
    writable = [Path(text.lstrip("-+")) for text in lists.get("ReadWritePaths", ())]
    for key, base in _BASES.items():
        writable += [base / text.partition(":")[0] for text in lists.get(key, ())]
    return Unit(name=name, is_strict=is_strict, writable=tuple(writable), capabilities=capabilities)
