"""`tundp hold`: keeps what a daemon has open, and starts it again, where no systemd does."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tundp
from tundp.cli.command import Command, Given
from tundp.errors import ConfigError, PlatformError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_int

_BECOMES: Final = """\
import sys
sys.path.append(sys.argv.pop(1))
from tundp.hold.holder import hold
sys.exit(hold(sys.argv[1:]))
"""
"""The holder's whole program: no packages (-S) and nothing of its user's (-I)."""


_LONGEST_S: Final = 86_400


def parse_watchdog(text: str) -> int:
    """Seconds, 0 for none."""
    seconds = parse_int(text)
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError(f"is out of range: seconds, 0 to {_LONGEST_S}")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldOptions:
    """What `tundp hold` can be told."""

    watchdog: int = option(
        default=30,
        parse=parse_watchdog,
        metavar="SECONDS",
        help="once the command has been ready, abort and restart it if it does not report to be"
        " alive for so long; 0: never",
        since="0.2.0",
    )


class HoldCommand(Command[HoldOptions]):
    """What follows its flags is a command line of its own, flags and all."""

    @property
    def operand_words(self) -> str:
        """See Command."""
        return "[--] COMMAND [ARGUMENT...]"

    @property
    def usage(self) -> str:
        """One line: its flags come first."""
        return f"usage: {self.full_name} [flags] {self.operand_words}"


def hold(given: Given[HoldOptions]) -> int:
    """Become the holder, a program that needs little memory; returns only if that cannot be."""
    if not given.ignored:
        raise ConfigError(f"COMMAND is missing: {COMMAND.usage}")
    arguments = [
        *(sys.executable, "-I", "-S", "-c", _BECOMES, str(Path(tundp.__file__).parents[1])),
        *(str(given.options.watchdog), *given.ignored),
    ]
    sys.stdout.flush()
    try:
        os.execv(sys.executable, arguments)  # noqa: S606
    except OSError as error:
        raise PlatformError(f"cannot run {sys.executable}: {error.strerror}") from None


COMMAND = HoldCommand(
    name="hold",
    summary="keep a daemon's device and sockets over its restarts",
    description="""\
Start COMMAND, keep the TUN device and sockets it has open, and start it again with them when it
fails: packets wait in their queues meanwhile, and none leaves by the default route.
What systemd does for tundp.service, for containers and other supervisors. The command is started
again when it is killed or ends with a code other than 0, 2 (wrong usage) and 127 (no such
command); with those the holder ends, too, and the device goes. SIGHUP starts it again: with the
version that is installed now. SIGTERM and SIGINT end both. SIGUSR1 and SIGUSR2 are passed on.
It is fit to be the first process of a container: it takes leave of orphans.""",
    run=hold,
    options=HoldOptions,
    ignores_stray=True,
    examples=(
        ("tundp hold -- tundp run --store=file:/leases.json", "as the command of a container"),
        ("tundp hold --watchdog=10 tundp run --iface=eth0", ""),
    ),
    notes="""\
NOTIFY_SOCKET, READY and STATUS: the command's go on to the supervisor of `tundp hold`, if that
has one; WATCHDOG_USEC: it is told that the holder lives. Both are as in sd_notify(3).
exit codes: the command's last one; 128 and the number of the signal that ended it (only TERM, INT,
HUP, PIPE); after SIGTERM 0, or 1 if the command did not end well.""",
)
