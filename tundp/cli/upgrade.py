"""`tundp upgrade`: the installed version takes over from the daemon that runs."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_OK, print_line
from tundp.settings.declare import option


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise ValueError("is not between 0 and 3600")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeOptions:
    """What `tundp upgrade` can be told."""

    timeout: float = option(
        parse=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the new daemon",
        since="0.2.0",
    )
    json: bool = option(default=False, help="print a JSON object", since="0.2.0")


def upgrade(given: Given[UpgradeOptions]) -> int:
    """Replace the daemon, and print what became of it."""
    settings = given.settings()
    from tundp.daemon.handover.upgrade import upgrade as replace

    options = given.options
    done = run_async(replace(settings.admin_socket, limit_s=options.timeout))
    if options.json:
        print(json.dumps(done.to_json()))
        return EXIT_OK
    gap = "" if done.gap_ms is None else f"; packets waited {done.gap_ms:.1f} ms"
    print_line(
        f"tundp {done.version} (process {done.pid}) has taken over from {done.before_version}"
        f" (process {done.before_pid}) in {done.took_s:.1f} s{gap}"
    )
    for name, count in done.packets.items():
        print_line(f"{name.replace('_', ' ')}: {done.packets_before.get(name, 0):,} -> {count:,}")
    return EXIT_OK


COMMAND = Command(
    name="upgrade",
    summary="let the installed version take over from the running daemon",
    description="""\
Start the installed tundp with the arguments and the environment of the daemon that runs, let it
take over (tundp run --replace), and wait for the end of it. No packet is lost: packets wait in
queues while one process lets go and the other begins. Lease, device, firewall rules, subnet.env
and counters stay as they are. If one side refuses, the daemon that runs goes on, and this says
why. A daemon of a systemd unit is replaced from inside the unit: this runs systemctl reload.
For other settings run tundp run --replace with them. Needs root.""",
    run=upgrade,
    options=UpgradeOptions,
    settings=WHICH_DAEMON,
    examples=(
        ("tundp upgrade", "after a new version was installed"),
        ("tundp upgrade --subnet-file=/run/flannel/blue.env", "the daemon of another network"),
        ("tundp upgrade --json --timeout=30", "for scripts"),
    ),
    notes="""\
exit codes: 0 the new daemon runs; 1 the one before goes on, or nobody can tell within --timeout;
2 wrong usage.""",
)
