"""Wireshark's extcap protocol (its Developer's Guide, chapter 8.2): `tundp capture --extcap-...`.

Wireshark runs the entry that `tundp capture --install-wireshark` writes: first with
--extcap-interfaces, then for an interface with --extcap-dlts and --extcap-config, at last with
--capture and a FIFO it reads pcapng from. Answers are lines of `word {key=value}...`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import tundp
from tundp.errors import ConfigError
from tundp.instance import RUN_DIRECTORY
from tundp.wire.capture_file import LINKTYPE_IPV4

if TYPE_CHECKING:
    from tundp.cli.capture import CaptureOptions
    from tundp.settings.settings import Settings

NAME: Final = "tundp"
"""The interface of the daemon that flags and variables name; others have `tundp-` before theirs."""
_ARGUMENTS: Final = (
    ("--drops", "Dropped packets, too", "boolflag", "true", "With the reason in the comment"),
    ("--wire", "Packets as on the wire", "boolflag", "false", "Super-packets are cut into packets"),
    ("--inner", "Only inner packets", "boolflag", "false", "What pods see, at the TUN"),
    ("--outer", "Only outer datagrams", "boolflag", "false", "What peers see, at the socket"),
    ("--snaplen", "Bytes of each packet", "unsigned", "0", "0 for all"),
)
"""Call, display, type, default and tooltip of what can be set in Wireshark."""


def answer(options: CaptureOptions, settings: Callable[[], Settings]) -> list[str]:
    """What Wireshark is told; empty if it did not ask, but wants packets."""
    if options.extcap_interfaces:
        return list(_interfaces(settings().admin_socket))
    if options.extcap_dlts or options.extcap_config:
        if not options.extcap_interface:
            raise ConfigError("--extcap-interface is missing: of which interface?")
        if options.extcap_dlts:
            return [f"dlt {{number={LINKTYPE_IPV4}}}{{name=IPV4}}{{display=IPv4 packets}}"]
        return list(_configuration())
    return []


def socket_of(interface: str, chosen: Path) -> Path:
    """The admin socket of an interface. ConfigError for a name that is none of ours.

    chosen: the one that flags and variables name.
    """
    if interface in ("", NAME):
        return chosen
    name = interface.removeprefix(f"{NAME}-")
    if name == interface or "/" in name or not name:
        raise ConfigError(f"--extcap-interface {interface!r}: --extcap-interfaces lists them")
    return RUN_DIRECTORY / f"{name}.sock"


def _interfaces(chosen: Path) -> Iterator[str]:
    yield f"extcap {{version={tundp.__version__}}}{{display=tundp}}"
    yield _interface(NAME, chosen)
    for path in sorted(RUN_DIRECTORY.glob("*.sock")):
        if path != chosen and _plain(path.stem) == path.stem:
            yield _interface(f"{NAME}-{path.stem}", path)


def _interface(name: str, path: Path) -> str:
    return f"interface {{value={_plain(name)}}}{{display=tundp overlay ({_plain(str(path))})}}"


def _configuration() -> Iterator[str]:
    for number, (call, display, kind, default, tip) in enumerate(_ARGUMENTS):
        limits = "{range=0,65535}" if kind == "unsigned" else ""
        yield (
            f"arg {{number={number}}}{{call={call}}}{{display={display}}}{{type={kind}}}"
            f"{{default={default}}}{limits}{{tooltip={tip}}}"
        )


def _plain(text: str) -> str:
    """A name without what would end a value."""
    return "".join(each if each.isprintable() and each not in "{}" else "_" for each in text)
