"""`tundp run`, and `flanneld`: the daemon."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import tundp
from tundp import early
from tundp.cli.command import Command, Given
from tundp.cli.output import EXIT_FAILED, EXIT_OK, sandbox_words
from tundp.errors import LeaseLost, TundpError
from tundp.settings.declare import Flag, option
from tundp.settings.settings import FLAGS

_log = logging.getLogger("tundp")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What a start is, beside its settings."""

    replace: bool = option(
        default=False,
        help="take over from the daemon of this --subnet-file while its packets flow, with these"
        " flags in place of its own; a normal start if none runs. If one side refuses, the daemon"
        " that runs goes on and this one fails; see tundp upgrade",
        since="0.2.0",
    )


class RunCommand(Command[RunOptions]):
    """Takes the daemon's flags; help lists flannel's and tundp's own apart."""

    def flag_groups(self) -> list[tuple[str, Sequence[Flag]]]:
        """See Command."""
        return [
            ("flannel's flags", [flag for flag in FLAGS if flag.is_flannels]),
            (
                "tundp's own flags",
                [*self.own_flags, *(flag for flag in FLAGS if not flag.is_flannels)],
            ),
        ]


def run(given: Given[RunOptions]) -> int:
    """Be a node of the overlay until a signal; failed if the daemon ends by itself."""
    began = time.monotonic()
    start = early.begun()
    settings = given.settings()
    if settings.version:
        print(f"tundp {tundp.__version__}", file=sys.stderr)  # as flannel does
        return EXIT_OK
    from tundp.daemon import process

    store = process.open_store(settings)
    code = EXIT_OK
    try:
        process.serve(settings, store, start=start, is_successor=given.options.replace)
    except* LeaseLost as group:
        for lost in process.leaves(group):
            _log.error("%s: exiting with code 0, as flannel does (--on-lease-lost=exit)", lost)
    except* TundpError as group:
        for leaf in process.leaves(group):
            _log.error("%s", leaf)
        code = EXIT_FAILED
    except* (OSError, RuntimeError) as group:
        words = [sandbox_words(each) for each in process.leaves(group)]
        if not all(words):
            raise
        for text in words:
            _log.error("%s", text)
        code = EXIT_FAILED
    else:
        _leave(code)
    if code == EXIT_FAILED:
        process.pace(began)
    return code


def _leave(code: int) -> NoReturn:
    """End the process now that everything is closed and nobody reads the TUN.

    The interpreter's own end frees what exit(2) frees, module by module, in 0.1 s: so much sooner
    there is a successor. Lines of the log are written before.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


COMMAND = RunCommand(
    name="run",
    summary="be a node of the overlay",
    description="""\
Be a node of the overlay until SIGINT or SIGTERM. Flags may be written -flag value,
-flag=value, --flag value or --flag=value, booleans only with =. In brackets stands the
environment variable of each, used when the flag is not given; then comes the file of
--config, then the default.""",
    run=run,
    options=RunOptions,
    settings=FLAGS,
    examples=(
        ("tundp run --etcd-endpoints=http://192.0.2.9:2379 --iface=eth0", ""),
        ("tundp run --store=file:/var/lib/tundp/leases.json", "leases in a file, no etcd"),
        ("FLANNELD_IFACE=eth0 tundp run --config=/etc/tundp.toml", "flag, variable and file"),
        (
            "tundp run --etcd-prefix=/blue/network --subnet-file=/run/flannel/blue.env",
            "a second network on the same host",
        ),
    ),
    notes="""\
exit codes: 0 stopped by a signal, or another has taken over; 1 failed; 2 wrong usage (flannel:
0). A lost lease ends nothing (flannel: exit code 0; --on-lease-lost=exit).""",
)

FLANNELD = dataclasses.replace(
    COMMAND,
    name="flanneld",
    is_script=True,
    ignores_stray=True,
    summary="tundp run, with flannel's own tolerance for stray arguments",
    examples=(("flanneld -etcd-endpoints http://192.0.2.9:2379 -iface eth0 -ip-masq", ""),),
)
