"""`tundp status`: ask a running daemon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_json
from tundp.errors import PlatformError
from tundp.settings.declare import option
from tundp.settings.instance import RUN_DIRECTORY


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOptions:
    """What `tundp status` can be told."""

    all: bool = option(default=False, help="ask every daemon of this host, and print a line each")
    json: bool = option(default=False, help="print the whole answer as JSON")


def status(given: Given[StatusOptions]) -> int:
    """Print what the daemon answers."""
    from tundp.admin import fetch_status
    from tundp.show import print_status

    if given.options.all:
        return _all(as_json=given.options.json)
    answer = run_async(fetch_status(given.settings().admin_socket))
    if given.options.json:
        print_json(answer)
    else:
        print_status(answer)
    return EXIT_OK


def _all(*, as_json: bool) -> int:
    """Every socket in the directory daemons put theirs; failed unless all of them answer."""
    from tundp.admin import fetch_status
    from tundp.show import print_brief

    async def ask() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(RUN_DIRECTORY.glob("*.sock")):
            try:
                found[str(path)] = await fetch_status(path)
            except PlatformError as error:
                found[str(path)] = {"error": str(error)}
        return found

    found = run_async(ask())
    if as_json:
        print_json(found)
    else:
        print_brief(found)
    is_fine = found and not any("error" in answer for answer in found.values())
    return EXIT_OK if is_fine else EXIT_FAILED


COMMAND = Command(
    name="status",
    summary="peers, packets, drops and their reasons, of a running daemon",
    description="""\
Ask a running daemon about its lease, its peers, its store, and every packet it moved or
dropped. Only root may ask.""",
    run=status,
    options=StatusOptions,
    settings=WHICH_DAEMON,
    examples=(
        ("tundp status", "the daemon with the default --subnet-file"),
        ("tundp status --subnet-file=/run/flannel/blue.env", "the daemon of another network"),
        ("tundp status --all", "all daemons of this host"),
        ("tundp status --json | jq .counters.encap.drops", "for programs"),
    ),
    notes="exit codes: 0 the daemon answered, with --all every one; 1 none did; 2 wrong usage.",
)
