"""`tundp status`: ask a running daemon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_json, print_parts
from tundp.errors import ConfigError, PlatformError
from tundp.instance import RUN_DIRECTORY
from tundp.settings.declare import option

if TYPE_CHECKING:
    from tundp.observe.status import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOptions:
    """What `tundp status` can be told."""

    all: bool = option(default=False, help="ask every daemon of this host, and print a line each")
    verbose: bool = option(
        default=False,
        help="print routine counters, too, such as why packets were written alone; also -v",
        since="0.2.0",
    )
    brief: bool = option(
        default=False,
        help="print one line for the whole node: subnet, device, peers, how many are silent",
        since="0.2.0",
    )
    dump: bool = option(
        default=False,
        help="print a line a peer for scripts, tab-separated; docs/debugging.md has the columns",
        since="0.2.0",
    )
    json: bool = option(default=False, help="print the whole answer as JSON")


def status(given: Given[StatusOptions]) -> int:
    """Print what the daemon answers."""
    from tundp.admin import fetch_document, read_status
    from tundp.observe import dump
    from tundp.show import brief_parts, status_parts

    if sum((given.options.brief, given.options.dump, given.options.json)) > 1:
        raise ConfigError("--brief, --dump and --json exclude each other: give one")
    if given.options.all:
        return _all(as_json=given.options.json)
    path = given.settings().admin_socket
    document = run_async(fetch_document(path))
    if given.options.json:
        print_json(document)
        return EXIT_OK
    answer = read_status(path, document)
    if given.options.dump:
        print("\n".join(dump.lines(answer)))
    elif given.options.brief:
        print_parts(brief_parts({str(path): answer}))
    else:
        print_parts(status_parts(answer, is_verbose=given.options.verbose))
    return EXIT_OK


def _all(*, as_json: bool) -> int:
    """Every socket in the directory daemons put theirs; failed unless all of them answer."""
    from tundp.admin import fetch_document, read_status
    from tundp.show import brief_parts

    documents: dict[str, dict[str, Any]] = {}
    statuses: dict[str, Status | str] = {}
    for path in sorted(RUN_DIRECTORY.glob("*.sock")):
        try:
            documents[str(path)] = run_async(fetch_document(path))
            statuses[str(path)] = read_status(path, documents[str(path)])
        except PlatformError as error:
            documents.setdefault(str(path), {"error": str(error)})
            statuses[str(path)] = str(error)
    if as_json:
        print_json(documents)
    else:
        print_parts(brief_parts(statuses))
    is_fine = statuses and not any(isinstance(each, str) for each in statuses.values())
    return EXIT_OK if is_fine else EXIT_FAILED


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-v is --verbose here, as elsewhere; the daemon's -v is a level."""
    return ["--verbose" if word == "-v" else word for word in arguments]


COMMAND = Command(
    name="status",
    summary="peers, packets, drops and their reasons, of a running daemon",
    description="""\
Ask a running daemon about its lease, its peers, its store, and every packet it moved or
dropped. Only root may ask.""",
    run=status,
    options=StatusOptions,
    settings=WHICH_DAEMON,
    rewrite=rewrite,
    examples=(
        ("tundp status", "the daemon with the default --subnet-file"),
        ("tundp status --subnet-file=/run/flannel/blue.env", "the daemon of another network"),
        ("tundp status --all", "all daemons of this host"),
        ("tundp status --brief", "one line"),
        ("tundp status --dump | awk -F'\\t' '$4 == \"silent\"'", "peers that do not answer"),
        ("tundp status --json | jq .counters.encap.drops", "for programs"),
    ),
    notes="exit codes: 0 the daemon answered, with --all every one; 1 none did; 2 wrong usage.",
)
