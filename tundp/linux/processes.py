"""Processes of our network namespace, and what of the network each holds open, out of proc(5)."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError

_PROC: Final = Path("/proc")
_DELETED: Final = " (deleted)"
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
_TUN: Final = "/dev/net/tun"
_UDP_TABLES: Final = ("net/udp", "net/udp6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, as far as it may be looked at."""

    pid: int
    name: str
    """As ps(1) shows it (comm): of a script, the script's."""
    program: str
    """The file name of its executable: of a script, the interpreter's; empty if not known."""
    tuns: frozenset[str] = field(default_factory=frozenset)
    """TUN devices it holds a descriptor of."""
    sockets: frozenset[int] = field(default_factory=frozenset)
    """Inodes of its sockets, as in /proc/net/udp."""
    files: frozenset[str] = field(default_factory=frozenset)
    """Paths of its other open files, in its own mount namespace's words."""

    @property
    def root(self) -> Path:
        """Its root directory, through which its files can be reached from here."""
        return _PROC / str(self.pid) / "root"

    def arguments(self) -> list[str]:
        """Its command line; empty once it is gone."""
        try:
            text = (_PROC / str(self.pid) / "cmdline").read_bytes()
        except OSError:
            return []
        return text.decode(errors="replace").split("\0")[:-1]

    def program_holds(self, *texts: bytes) -> list[bool]:
        """Whether its executable holds each of these texts; all False if it cannot be read."""
        try:
            with (
                (_PROC / str(self.pid) / "exe").open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                return [content.find(text) >= 0 for text in texts]
        except (OSError, ValueError):
            return [False] * len(texts)

    def variable(self, name: str) -> str:
        """A variable of the environment it was started with; empty if it has none."""
        try:
            text = (_PROC / str(self.pid) / "environ").read_bytes()
        except OSError:
            return ""
        for item in text.decode(errors="replace").split("\0"):
            key, _, value = item.partition("=")
            if key == name:
                return value
        return ""


def processes() -> Iterator[Process]:
    """All processes of our network namespace but this one. Those that end meanwhile are left out.

    Without CAP_SYS_PTRACE only our own user's can be looked at; those of another process
    namespace are not seen at all. PlatformError where there is no /proc to see them in.
    """
    try:
        ours = os.stat("/proc/self/ns/net")
    except OSError as error:
        raise PlatformError(
            f"cannot see other processes, such as a flannel that runs: {error.filename}:"
            f" {error.strerror}; mount -t proc proc /proc",
            error.errno,
        ) from None
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            theirs = os.stat(entry / "ns/net")
            if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
                continue
            process = _look_at(entry)
        except OSError:
            continue
        yield process


def udp_sockets(port: int) -> frozenset[int]:
    """Inodes of the UDP sockets of our network namespace bound to `port`."""
    found = set()
    for name in _UDP_TABLES:
        try:
            lines = (_PROC / "self" / name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            # sl local_address rem_address st tx:rx tr:tm retrnsmt uid timeout inode ...
            columns = line.split()
            if int(columns[1].rpartition(":")[2], 16) == port:
                found.add(int(columns[9]))
    return frozenset(found)


def _look_at(entry: Path) -> Process:
    try:
        program = os.path.basename(os.readlink(entry / "exe").removesuffix(_DELETED))
    except OSError:
        program = ""
    tuns, sockets, files = set(), set(), set()
    for descriptor in (entry / "fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if found := _SOCKET.fullmatch(target):
            sockets.add(int(found[1]))
        elif target == _TUN:
            tuns |= _tuns_of(entry / "fdinfo" / descriptor.name)
        elif target.startswith("/"):
            files.add(target.removesuffix(_DELETED))
    return Process(
        pid=int(entry.name),
        name=(entry / "comm").read_text(encoding="utf-8", errors="replace").rstrip("\n"),
        program=program,
        tuns=frozenset(tuns),
        sockets=frozenset(sockets),
        files=frozenset(files),
    )


def _tuns_of(fdinfo: Path) -> set[str]:
    """The device behind a descriptor of /dev/net/tun: the line `iff:` (drivers/net/tun.c)."""
    try:
        text = fdinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {line.split()[1] for line in text.splitlines() if line.startswith("iff:\t")}
