"""Who else of this host uses what tundp and flannel have in common.

A stock flannel has the same chains, the same subnet.env and the same device as a tundp
with default flags. What is to be removed must be ours alone.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.instance import SUBNET_FILE, Instance
from tundp.linux.netlink import Link
from tundp.linux.processes import Process

_LOCK: Final = re.compile(r".*/\.[^/]+\.lock")
_TUN_NAME: Final = re.compile(r"flannel\d+")
"""What flannel's udp backend calls its device, and tundp by default. It goes with its process."""
_KINDS: Final = frozenset({"vxlan", "wireguard", "ipip"})
"""What flannel's other backends make, under names that begin with `flannel`. The devices
stay when flannel ends, and pods go on to use them."""


_WITH_FLANNEL_INSIDE: Final = "k3s"
_CHAIN: Final = b"FLANNEL-POSTRTG"
_BUILT_IN_CHAIN: Final = b"POSTROUTING"


@dataclass(frozen=True, slots=True)
class Owner:
    """Somebody who uses flannel's firewall rules, and a subnet.env."""

    text: str
    """Who it is, and what shows it."""
    subnet_file: tuple[int, int] | None
    """Device and inode of its subnet.env; None if that is not known."""
    uses_chains: bool = True
    """False for a flanneld before v0.20, which has no chain of its own."""


def find_owners(
    port: int,
    *,
    links: Sequence[Link],
    processes: Iterable[Process],
    sockets: frozenset[int],
) -> list[Owner]:
    """Those who use flannel's own chains and subnet.env, but for a tundp with our lock.

    A tundp with another subnet.env has chains of its own name, and is none.

    sockets: inodes of the UDP sockets bound to `port`.
    """
    found: list[Owner] = []
    explained: set[str] = set()
    is_port_explained = False
    for process in processes:
        tuns = sorted(filter(_TUN_NAME.fullmatch, process.tuns))
        holds_port = bool(process.sockets & sockets)
        explained |= process.tuns
        is_port_explained |= holds_port
        who = f"{process.name} (pid {process.pid})"
        # A tundp's program is the interpreter, also of its script `flanneld`.
        if "flannel" in process.program:
            found.append(Owner(f"{who} runs", _subnet_file_of(process), _uses_chains(process)))
        elif process.program.startswith(_WITH_FLANNEL_INSIDE):
            if not _is_without_flannel(process):
                text = f"{who} runs, with a flannel inside"
                found.append(Owner(text, _subnet_file_of(process)))
        elif is_tundp(process):
            if str(Instance().lock) in process.files:
                found.append(Owner(f"{who} runs, a tundp of another file system", None))
        elif tuns:
            found.append(Owner(f"{who} runs and holds {tuns[0]}", _subnet_file_of(process)))
        elif holds_port:
            found.append(Owner(f"{who} runs on udp port {port}", _subnet_file_of(process)))
    for link in links:
        is_tun = link.kind == "tun" and _TUN_NAME.fullmatch(link.name)
        if is_tun and link.name not in explained:
            found.append(Owner(f"device {link.name} is there, of a process not seen here", None))
        elif link.kind in _KINDS and link.name.startswith("flannel") and link.is_up:
            found.append(Owner(f"{link.kind} device {link.name} is up", None))
    if sockets and not is_port_explained:
        found.append(Owner(f"udp port {port} is bound, by a process not seen here", None))
    return found


def is_tundp(process: Process) -> bool:
    """Whether it holds the lock of a subnet.env, as only a tundp does."""
    return any(_LOCK.fullmatch(path) for path in process.files)


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, whatever path or mount leads to it; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _uses_chains(process: Process) -> bool:
    """Whether a flanneld has chains of its own, by the names in its program.

    Before v0.20 only those of the built-in chains are there. One that holds neither name is
    packed, or cannot be read.
    """
    has_chain, has_built_in = process.program_holds(_CHAIN, _BUILT_IN_CHAIN)
    return has_chain or not has_built_in


def _is_without_flannel(process: Process) -> bool:
    """Whether a k3s was told by a flag to run no flannel."""
    words = " ".join(process.arguments()).replace("=", " ").split()
    return ("--flannel-backend", "none") in itertools.pairwise(words)


def _subnet_file_of(process: Process) -> tuple[int, int] | None:
    """Of a flanneld: its -subnet-file, FLANNELD_SUBNET_FILE, or the default."""
    name = process.variable("FLANNELD_SUBNET_FILE") or str(SUBNET_FILE)
    arguments = process.arguments()
    for number, argument in enumerate(arguments):
        flag, is_assigned, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == "subnet-file":
            name = value if is_assigned else "".join(arguments[number + 1 : number + 2])
    return identity(process.root / os.path.normpath(name).lstrip("/"))
