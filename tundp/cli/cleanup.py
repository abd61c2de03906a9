"""`tundp cleanup`: remove what a stopped daemon left."""

from __future__ import annotations

from dataclasses import dataclass

from tundp.cli.command import DAEMON_FLAGS, Command, Given, run_async
from tundp.cli.output import EXIT_OK, print_line
from tundp.settings.declare import option


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupOptions:
    """What `tundp cleanup` can be told."""

    dry_run: bool = option(default=False, help="only list what would be removed")


def cleanup(given: Given[CleanupOptions]) -> int:
    """Remove, and print a line for each thing removed, and for each one left."""
    settings = given.settings()
    from tundp.daemon.cleanup import clean_up

    is_dry_run = given.options.dry_run
    cleaned = run_async(clean_up(settings, is_dry_run=is_dry_run))
    for line in cleaned.removed:
        print_line(f"{'would remove' if is_dry_run else 'removed'} {line}")
    if not cleaned.removed:
        print("nothing to remove")
    for line in cleaned.left:
        print_line(f"left {line}")
    return EXIT_OK


COMMAND = Command(
    name="cleanup",
    summary="remove rules, routes and files a stopped daemon left",
    description="""\
Remove what a stopped daemon leaves on purpose, so that nothing leaks and nothing breaks
while it restarts: firewall rules of both flavours (any flannel's for this network, too),
unreachable and blackhole routes, subnet.env, the lease cache, and sockets of daemons that
were killed. What a stock flannel uses or may have written is left and named, as are the
node's id and its lease, which stays in the store until it expires. Give the flags the
daemon was given: --subnet-file and --state-dir tell where to look. Refused while the
daemon runs. Needs root.""",
    run=cleanup,
    options=CleanupOptions,
    settings=DAEMON_FLAGS,
    examples=(
        ("tundp cleanup --dry-run", "what would be removed"),
        (
            "tundp cleanup --subnet-file=/run/flannel/blue.env",
            "after the daemon of another network",
        ),
    ),
    notes="exit codes: 0 removed, or nothing there; 1 failed, or the daemon runs; 2 wrong usage.",
)
