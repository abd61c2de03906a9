"""Which back end an iptables program talks to: asked of the program, as the one that will run.

Names say nothing: distributions link, users wrap. `iptables --version` names the back end since
1.8.0; whatever is older has the legacy one only.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from enum import Enum, unique
from typing import Final

from tundp.errors import PlatformError
from tundp.linux import capability
from tundp.linux.command import environment, find, run

PACKAGE: Final = "iptables"
ASK_S: Final = 5.0
"""Timeout of `--version`, which asks the kernel nothing."""
_VERSION: Final = re.compile(
    r"^\s*ip6?tables\S*\s+v(\d+)\.(\d+)(?:\.(\d+))?(?:[^\n(]*\(([a-z_]+)\))?", re.MULTILINE
)


@unique
class BackEnd(Enum):
    """The kernel's side; the value is its name in `iptables --version`."""

    LEGACY = "legacy"
    NFT = "nf_tables"

    @property
    def capabilities(self) -> tuple[int, ...]:
        """What the program needs: the legacy one opens a raw socket."""
        if self is BackEnd.LEGACY:
            return (capability.CAP_NET_ADMIN, capability.CAP_NET_RAW)
        return (capability.CAP_NET_ADMIN,)


@dataclass(frozen=True, slots=True)
class Version:
    """What a program says of itself."""

    numbers: tuple[int, int, int]
    back_end: BackEnd

    def __str__(self) -> str:
        return f"v{'.'.join(map(str, self.numbers))} ({self.back_end.value})"


def parse_version(text: str) -> Version | None:
    """Read the answer to `--version`, whatever a wrapper prints around it; None without one."""
    found = _VERSION.search(text)
    if found is None:
        return None
    major, minor, patch = (int(part or 0) for part in found.groups()[:3])
    back_end = BackEnd.NFT if found[4] == BackEnd.NFT.value else BackEnd.LEGACY
    return Version((major, minor, patch), back_end)


async def ask(name: str) -> Version:
    """The version of a program. PlatformError if it does not run or names none."""
    finished = await run(name, "--version", package=PACKAGE, timeout_s=ASK_S)
    version = parse_version(finished.stdout)
    if version is None:
        raise PlatformError(f"{name} --version names no version: {finished.stdout.strip()!r}")
    return version


async def save(name: str, back_end: BackEnd) -> str:
    """All rules as the program's -save lists them; it makes no table. PlatformError."""
    argv = (f"{name}-save",)
    return (await run(*argv, package=PACKAGE, capabilities=back_end.capabilities)).stdout


def needs_raw_sockets(names: tuple[str, ...] = ("iptables", "ip6tables")) -> bool:
    """Whether any of these programs, with its -save and -restore, needs CAP_NET_RAW.

    Blocks: for before the event loop. True if a program that is installed does not answer.
    """
    return any(
        _may_be_legacy(f"{name}{suffix}") for name in names for suffix in ("", "-save", "-restore")
    )


def _may_be_legacy(name: str) -> bool:
    path = find(name)
    if path is None:
        return False
    try:
        answer = subprocess.run(  # noqa: S603  (found on root's own path)
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_S,
            env=environment(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    version = parse_version(answer.stdout)
    return version is None or version.back_end is BackEnd.LEGACY
