"""`tundp blackbox`: what a daemon, running or dead, dropped and did last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tundp.cli.command import WHICH_DAEMON, Command, Given
from tundp.cli.output import EXIT_OK, print_json, print_line
from tundp.settings.declare import option


@dataclass(frozen=True, slots=True, kw_only=True)
class BlackboxOptions:
    """What `tundp blackbox` can be told."""

    previous: bool = option(default=False, help="of the daemon before this one", since="0.2.0")
    file: Path | None = option(
        default=None,
        parse=Path,
        metavar="FILE",
        help="a copy of such a file, or what --json printed, as in a bug report, rather than the"
        " daemon's own",
        takes_file=True,
        since="0.2.0",
    )
    json: bool = option(default=False, help="print it as JSON", since="0.2.0")


def blackbox(given: Given[BlackboxOptions]) -> int:
    """Read the file, which is there whether a daemon runs or not."""
    from tundp.engine.recorder import PREVIOUS
    from tundp.instance import Instance
    from tundp.observe.blackbox import lines, read

    path = given.options.file
    if path is None:
        path = Instance.recorder(given.settings().admin_socket)
        if given.options.previous:
            path = path.with_name(path.name + PREVIOUS)
    found = read(path)
    if given.options.json:
        print_json(found)
        return EXIT_OK
    for line in lines(found):
        print_line(line)
    return EXIT_OK


COMMAND = Command(
    name="blackbox",
    summary="what was dropped and what happened last, also after a crash",
    description="""\
Show the flight recorder: the last eight packets dropped in each direction for each reason (at
most one a millisecond of each), and the last 512 log lines and changes of leases, by time. It is
a file beside the admin socket that a running daemon writes and a dead one leaves behind; the
daemon after it keeps it as the previous one. A reboot empties it.""",
    run=blackbox,
    options=BlackboxOptions,
    settings=WHICH_DAEMON,
    examples=(
        ("tundp blackbox", "of the daemon that runs, or ran last"),
        ("tundp blackbox --previous", "of the one before: it crashed, and systemd started another"),
        ("tundp blackbox --json | jq .drops", "for programs; packets in hex"),
    ),
    notes="exit codes: 0 shown; 1 there is none, or it cannot be read; 2 wrong usage.",
)
