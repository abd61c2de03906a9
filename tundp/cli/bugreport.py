"""`tundp bugreport`: everything about one node, in one archive without secrets."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tundp.cli.command import DAEMON_FLAGS, Command, Given
from tundp.cli.config import UNIT_FILE, WhoseOptions, which_settings
from tundp.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, leave, print_error
from tundp.errors import ConfigError, Interrupted, PlatformError, TundpError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_duration

if TYPE_CHECKING:
    from tundp.bugreport.archive import Report
    from tundp.settings.settings import Settings

_LETTERS: Final = {"-w": "--write"}
_CAPTURE_MAX_S: Final = 600.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPED_S: Final = 3.0
"""How long a daemon is asked for its settings."""


def _capture_time(text: str) -> float:
    value = parse_duration(text)
    if value > _CAPTURE_MAX_S:
        raise ValueError("is out of range: at most 10m")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class BugreportOptions(WhoseOptions):
    """What `tundp bugreport` can be told."""

    write: str = option(
        default="",
        metavar="FILE",
        takes_file=True,
        help="the archive to write, or - for standard output; also -w",
        default_text="tundp-bugreport-TIME.tar.gz here",
        since="0.2.0",
    )
    capture: bool = option(
        default=True,
        help="headers of packets for the time of --for; false: none. --no-capture is the same",
        since="0.2.0",
    )
    for_: float = option(
        "for",
        default=10.0,
        parse=_capture_time,
        default_text="10s",
        metavar="TIME",
        help="how long packets are captured: 5s, 1m",
        since="0.2.0",
    )
    redact_addresses: bool = option(
        default=False,
        help="pseudonyms for addresses and host names, in texts, documents and captures",
        since="0.2.0",
    )


def bugreport(given: Given[BugreportOptions]) -> int:
    """Collect, redact, write; say what was left out."""
    options = given.options
    if options.write == "-" and sys.stdout.isatty():
        raise ConfigError("--write - would write an archive to this terminal: name a file")
    if "\0" in options.write:
        raise ConfigError(f"--write {options.write!r} is no path of a file")
    try:
        with _ended_by_signals():
            code = _write(given)
    except (Interrupted, PlatformError) as error:
        print_error(error)
        code = EXIT_INTERRUPTED if isinstance(error, Interrupted) else EXIT_FAILED
    return leave(code)


def _write(given: Given[BugreportOptions]) -> int:
    options = given.options
    settings, whose = _settings(given)
    report, data = _made(given, settings, whose)
    if options.write == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        where = "standard output"
    else:
        from tundp.bugreport.archive import write_private

        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(report.made_at))
        path = Path(options.write or f"tundp-bugreport-{stamp}.tar.gz")
        write_private(path, data)
        where = str(path)
    _say(f"{where}: {len(report.members)} files, {len(data)} bytes, readable for you alone")
    if report.missing:
        _say(f"left out: {len(report.missing)}, MISSING.txt in it names each and why:")
        for each in sorted(report.missing, key=lambda each: each.name):
            _say(f"  {each.name}: {each.reason}")
    _say("no secrets are in it that are known as such; look through it before you give it away")
    return EXIT_OK


def _made(given: Given[BugreportOptions], settings: Settings, whose: str) -> tuple[Report, bytes]:
    from tundp.bugreport.collect import Request, collect
    from tundp.bugreport.readme import readme
    from tundp.daemon import logs
    from tundp.doctor.deadline import run_within

    options = given.options
    for_s = options.for_ if options.capture else 0.0
    logs.set_up(-1, username=settings.etcd_username, password=settings.etcd_password)
    capturing = f", headers of packets for {for_s:g} s" if for_s else ""
    _say(f"collecting what is known of this node{capturing}; Ctrl-C ends it, with nothing written")
    request = Request(
        settings=settings,
        whose=whose,
        env_file=options.env_file or UNIT_FILE,
        arguments=sys.argv[1:],
        variables=dict(os.environ),
        for_s=for_s,
        is_anonymous=options.redact_addresses,
    )
    made: list[tuple[Report, bytes]] = []

    async def make() -> None:
        report, redactor = await collect(request)
        made.append((report, report.pack(redactor.text(readme(report)))))

    # Not run_async, which waits for every thread, and is deaf to signals while the loop is held.
    run_within(threading.TIMEOUT_MAX, make)
    return made[0]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals raise Interrupted here, whatever the threads do: programs that run are ended."""

    def end(*_: object) -> None:
        raise Interrupted("ended by a signal: no report was written")

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _settings(given: Given[BugreportOptions]) -> tuple[Settings, str]:
    """The settings that are meant; the defaults of the daemon named, if they cannot be read."""
    from dataclasses import replace

    from tundp.linux.listeners import listener
    from tundp.settings.sources import resolve

    options = given.options
    path = given.settings().admin_socket
    if listener(path) is None and not given.flags and UNIT_FILE.exists() and not options.running:
        options = replace(options, env_file=options.env_file or UNIT_FILE)
    try:
        return which_settings(options, given, limit_s=_STOPPED_S)
    except TundpError as error:
        if given.options.running or given.options.env_file is not None:
            raise
        # A report of a node whose settings are wrong is wanted most.
        print_error(f"the daemon's settings cannot be had, those given here are taken: {error}")
        given_here = resolve(given.flags, os.environ)
        return given_here, f"given here; the daemon's cannot be had: {error}"


def _say(text: str) -> None:
    """A word to the operator: standard output may be the archive."""
    print_error(text)


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-w is --write, --no-capture is --capture=false."""
    found = []
    for word in arguments:
        name, equals, text = word.partition("=")
        if word in ("--no-capture", "-no-capture"):
            found.append("--capture=false")
        else:
            found.append(f"{_LETTERS.get(name, name)}{equals}{text}")
    return found


COMMAND = Command(
    name="bugreport",
    summary="one archive with all that is known of this node, without secrets",
    description="""\
Write a tar.gz with what somebody else needs to find a fault of this node: versions, settings,
status, metrics, tundp doctor and config check, leases and their history, flight recorder, log,
what the store holds, links, routes, rules, sockets, kernel counters and settings, limits, and for
--for the headers of packets. README.txt in it says what is what, MISSING.txt what was left out and
why. Passwords, tokens and keys are never in it, nor is a packet's payload; key files are not read.
--redact-addresses gives addresses and host names pseudonyms: the same one for the same address,
subnets kept together. Works without a daemon, with an older or a hung one, and without root, as
far as each of them lets it. Nothing is changed; peers get the harmless packets of tundp doctor.""",
    run=bugreport,
    options=BugreportOptions,
    settings=DAEMON_FLAGS,
    rewrite=rewrite,
    examples=(
        ("tundp bugreport", "tundp-bugreport-TIME.tar.gz in this folder"),
        ("tundp bugreport --redact-addresses -w report.tar.gz", "for somebody outside"),
        ("tundp bugreport --no-capture -w - | ssh me@desk 'cat > report.tar.gz'", ""),
        ("tundp bugreport --subnet-file=/run/flannel/blue.env", "of the daemon of another network"),
    ),
    notes="exit codes: 0 written, however much was left out; 1 it cannot be written; 2 wrong usage;"
    " 130 ended\nby a signal, with nothing written.",
)
