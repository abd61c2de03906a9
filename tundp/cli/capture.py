"""`tundp capture`: packets of a running daemon, on both sides of it, into a file or as text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique
from pathlib import Path
from typing import Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_OK, print_line
from tundp.errors import ConfigError, FilterError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_count, parse_duration, parse_int

_LETTERS: Final = {
    "-w": "--write",
    "-c": "--count",
    "-C": "--file-size",
    "-W": "--files",
    "-s": "--snaplen",
    "-B": "--buffer-size",
    "-o": "--output",
}
"""tcpdump's, and -o of other tools."""
_SNAP_MIN, _SNAP_MAX = 20, 0xFFFF
_BUFFER_MIN, _BUFFER_MAX = 256, 65536


@unique
class CaptureFormat(Enum):
    """What a capture prints."""

    TEXT = "text"
    JSON = "json"


def _parse_files(text: str) -> int:
    value = parse_count(text)
    if value > 1_000_000:
        raise ValueError("is out of range: at most 1,000,000 files")
    return value


def _parse_snaplen(text: str) -> int:
    value = parse_int(text)
    if value and not _SNAP_MIN <= value <= _SNAP_MAX:
        raise ValueError(f"is out of range: bytes from {_SNAP_MIN} to {_SNAP_MAX}, 0 for all")
    return value or _SNAP_MAX


def _parse_buffer(text: str) -> int:
    value = parse_int(text)
    if not _BUFFER_MIN <= value <= _BUFFER_MAX:
        raise ValueError(f"is out of range: KiB from {_BUFFER_MIN} to {_BUFFER_MAX}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """What `tundp capture` can be told."""

    write: str = option(
        since="0.2.0",
        default="",
        metavar="FILE",
        takes_file=True,
        help="write pcapng to a file, a FIFO or, with -, to standard output; also -w",
    )
    drops: bool = option(
        since="0.2.0",
        default=False,
        help="packets that were dropped, too, each with its reason in its comment",
    )
    inner: bool = option(
        since="0.2.0",
        default=False,
        help="only what pods see: packets read from the TUN and written to it",
    )
    outer: bool = option(
        since="0.2.0",
        default=False,
        help="only what peers see: datagrams sent and received, made again",
    )
    wire: bool = option(
        since="0.2.0",
        default=False,
        help="cut super-packets into the packets they stand for, checksums completed",
    )
    snaplen: int | None = option(
        since="0.2.0",
        default=None,
        parse=_parse_snaplen,
        metavar="BYTES",
        default_text="all; 256 for lines of text alone",
        help="bytes of each inner packet to keep, 0 for all; also -s",
    )
    buffer_size: int = option(
        since="0.2.0",
        default=8192,
        parse=_parse_buffer,
        metavar="KIB",
        help="room in the daemon, for each packet thread, for what was not read yet; also -B",
    )
    count: int | None = option(
        since="0.2.0",
        default=None,
        parse=parse_count,
        metavar="N",
        help="end after N packets, one seen at two stages being two; also -c",
    )
    for_: float | None = option(
        "for",
        since="0.2.0",
        default=None,
        parse=parse_duration,
        metavar="TIME",
        help="end after 30s, 5m, 2h",
    )
    file_size: int = option(
        since="0.2.0",
        default=0,
        parse=parse_count,
        metavar="MB",
        default_text="no limit",
        help="begin a next file after so many million bytes: FILE, FILE1, FILE2; also -C",
    )
    files: int = option(
        since="0.2.0",
        default=0,
        parse=_parse_files,
        metavar="N",
        default_text="no limit",
        help="with --file-size: keep the last N files, FILE0 to FILE(N-1); also -W",
    )
    output: CaptureFormat | None = option(
        since="0.2.0",
        default=None,
        choice=CaptureFormat,
        default_text="text without --write",
        help="print a line for each packet, as text or as a JSON object; also -o",
    )
    text: bool = option(since="0.2.0", default=False, help="the same as --output=text")
    install_wireshark: str = option(
        since="0.2.0",
        default="",
        metavar="DIR",
        takes_file=True,
        help="only write into DIR what lets Wireshark and tshark list tundp among interfaces",
    )
    extcap_interfaces: bool = option(
        since="0.2.0", default=False, help="for Wireshark: list the daemons"
    )
    extcap_version: str = option(
        since="0.2.0", default="", help="for Wireshark: its version, which is ignored"
    )
    extcap_interface: str = option(
        since="0.2.0", default="", metavar="NAME", help="for Wireshark: which daemon"
    )
    extcap_dlts: bool = option(
        since="0.2.0", default=False, help="for Wireshark: print the link type"
    )
    extcap_config: bool = option(
        since="0.2.0", default=False, help="for Wireshark: print the options"
    )
    extcap_capture_filter: str = option(
        since="0.2.0", default="", metavar="FILTER", help="for Wireshark: the filter"
    )
    capture: bool = option(since="0.2.0", default=False, help="for Wireshark: capture into --fifo")
    fifo: str = option(
        since="0.2.0",
        default="",
        metavar="FILE",
        takes_file=True,
        help="for Wireshark: where it reads",
    )


def capture(given: Given[CaptureOptions]) -> int:
    """Do what the options ask: install, answer Wireshark, or capture."""
    options = given.options
    if options.install_wireshark:
        from tundp.cli.wireshark import install

        for line in install(Path(options.install_wireshark)):
            print_line(line)
        return EXIT_OK
    from tundp.cli import extcap

    if answer := extcap.answer(options, given.settings):
        print("\n".join(answer))
        return EXIT_OK
    admin_socket = given.settings().admin_socket
    text = " ".join(given.operands)
    if options.fifo:
        admin_socket = extcap.socket_of(options.extcap_interface, admin_socket)
        text = options.extcap_capture_filter
    elif options.capture or options.extcap_interface:
        if options.extcap_capture_filter and not options.capture:
            return _judge_filter(options.extcap_capture_filter)
        raise ConfigError("--capture needs --fifo: Wireshark gives both; people want --write FILE")
    _require_sense(options)
    from tundp.wire.filter import parse

    parse(text)  # FilterError before anything is opened
    from tundp.cli.capture_session import Session

    try:
        return run_async(Session(options, admin_socket, text).run())
    except BrokenPipeError:
        return EXIT_OK  # whoever reads has enough


def _judge_filter(text: str) -> int:
    """Answer Wireshark whether a filter is right: nothing is printed for one that is."""
    from tundp.wire.filter import parse

    try:
        parse(text)
    except FilterError as error:
        print_line(str(error))
    return EXIT_OK


def _require_sense(options: CaptureOptions) -> None:
    """ConfigError for options that contradict each other."""
    if "\0" in options.write:
        raise ConfigError(f"--write {options.write!r} is no path of a file")
    if options.files and not options.file_size:
        raise ConfigError("--files needs --file-size: how long each of them becomes")
    if options.file_size and options.write in ("", "-"):
        raise ConfigError("--file-size needs --write with the name of a file")
    if options.text and options.output is CaptureFormat.JSON:
        raise ConfigError("--text and --output=json contradict each other")
    if options.write == "-":
        if options.text or options.output is not None:
            raise ConfigError("standard output has --write: print no lines beside it")
        if sys.stdout.isatty():
            raise ConfigError(
                "--write - would write a binary file to this terminal: name a file, pipe it into"
                " tshark -r -, or use --text"
            )


def rewrite(arguments: Sequence[str]) -> list[str]:
    """The letters of tcpdump are flags of their own here."""
    found: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            return [*found, word, *rest]
        letter, equals, text = word.partition("=")
        found.append(f"{_LETTERS.get(letter, letter)}{equals}{text}")
    return found


COMMAND = Command(
    name="capture",
    summary="packets on both sides of a running daemon, into Wireshark or as text",
    description="""\
Capture what a running daemon moves and, with --drops, what it drops: inner packets at the TUN
and outer datagrams at the UDP socket, with one clock, and one packet id for both. FILTER is
matched against inner packets by the packet threads: `tcp port 443`, `src net 10.5.2.0/24`,
`peer 192.0.2.2`, `reason no_route and not icmp`. Without --write each packet is a line. In a
file every packet's comment says what was decided of it, why it was dropped, and how long it
took. Outer headers are made again from what the daemon knows of them: where it does not, as
of the IP ID, they are 0. Costs nothing while it does not run; what nobody reads in time is
lost to the capture, and counted, and never keeps a packet waiting. Only root may ask.""",
    run=capture,
    options=CaptureOptions,
    settings=WHICH_DAEMON,
    more_operands="FILTER",
    rewrite=rewrite,
    examples=(
        ("tundp capture", "a line for each packet"),
        ("tundp capture --drops 'net 10.5.2.0/24'", "also those that were dropped, and why"),
        ("tundp capture -w - --drops | wireshark -k -i -", "in Wireshark, while it runs"),
        ("tundp capture -w out.pcapng -C 100 -W 10 tcp", "the last gigabyte of TCP"),
        ("tundp capture -o json -c 10 'port 53'", "for programs"),
        (
            "tundp capture --install-wireshark ~/.config/wireshark",
            "lets Wireshark list tundp as an interface",
        ),
    ),
    notes="""\
exit codes: 0 ended by a limit, a signal, or because nobody reads any more; 1 no daemon, it
ended, or the file cannot be written; 2 wrong usage, or a wrong filter.""",
)
