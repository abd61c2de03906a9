"""`tundp doctor`: what keeps pods from reaching each other, and the command that mends it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tundp.cli.command import DAEMON_FLAGS, Command, Given, run_async
from tundp.cli.config import UNIT_FILE, WhoseOptions, which_settings
from tundp.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    leave,
    print_error,
    print_json,
    print_line,
    print_parts,
)
from tundp.errors import ConfigError
from tundp.finding import Verdict
from tundp.settings.declare import option
from tundp.settings.parsers import parse_path

if TYPE_CHECKING:
    from tundp.doctor.diagnosis import Diagnosis, Named

AGAIN_S: Final = 10.0
"""How long a mend may take to show."""
STOPPED_S: Final = 0.1
"""How long a daemon that is stopped by a signal is asked for its settings."""
RUN_S: Final = 120.0
"""How long a mend may run: systemd gives 90 s to a service that hangs (TimeoutStopSec)."""
_TIMED_OUT: Final = 124
"""The exit code timeout(1) has then."""
_PAUSE_S: Final = 0.5
EXIT_BLIND: Final = 4
"""Nothing worse than what could not be looked at."""
_CNI_DIR: Final = Path("/etc/cni/net.d")


def _parse_ids(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (each.strip() for each in text.split(","))))


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions(WhoseOptions):
    """What `tundp doctor` can be told."""

    json: bool = option(default=False, help="print the diagnosis as JSON", since="0.2.0")
    only: tuple[str, ...] = option(
        parse=_parse_ids,
        default=(),
        metavar="ID,...",
        help="look for these ids only: whole (peer.refused), their beginning (obstacle) or a check",
        since="0.2.0",
    )
    fix: str = option(
        default="",
        metavar="ID",
        help="run the command of the first finding with this id, after asking, and look again",
        since="0.2.0",
    )
    yes: bool = option(default=False, help="with --fix: do not ask", since="0.2.0")
    verbose: bool = option(default=False, help="print what is fine, too", since="0.2.0")
    cni_dir: Path = option(
        parse=parse_path,
        default=_CNI_DIR,
        metavar="DIR",
        help="where the kubelet looks for network configs (k3s has one of its own)",
        since="0.2.0",
    )


def doctor(given: Given[DoctorOptions]) -> int:
    """Print the diagnosis, or run the one command asked for."""
    options = given.options
    if options.yes and not options.fix:
        raise ConfigError("--yes goes with --fix=ID")
    if options.fix:
        return leave(_fix(given))
    found = _examine(given, options.only)
    if options.json:
        print_json(found.to_json())
    else:
        from tundp.doctor.show import diagnosis_parts

        print_parts(diagnosis_parts(found, is_verbose=options.verbose))
    return leave(found.exit_code)


def _examine(given: Given[DoctorOptions], only: Collection[str]) -> Diagnosis:
    began = time.monotonic()
    from tundp.daemon import logs, process
    from tundp.doctor.context import STATUS_S, ask_daemon
    from tundp.doctor.examine import chosen, examine
    from tundp.linux.listeners import listener
    from tundp.observe.status import Status

    chosen(only)  # wrong usage comes first
    options, path = given.options, given.settings().admin_socket
    pid = listener(path)
    if pid is None and not given.flags and UNIT_FILE.exists() and not options.running:
        # What the daemon had, and would have: nobody else tells.
        options = replace(options, env_file=options.env_file or UNIT_FILE)
    # A daemon that does not answer is waited for once.
    asked = run_async(ask_daemon(path, pid))
    limit_s = STATUS_S if isinstance(asked, Status) else STOPPED_S
    settings, whose = which_settings(options, given, limit_s=limit_s)
    store = process.open_store(settings)
    logs.set_up(-1, username=settings.etcd_username, password=settings.etcd_password)
    return examine(
        settings,
        store,
        whose=whose,
        cni_dir=options.cni_dir,
        only=only,
        began=began,
        asked=asked if settings.admin_socket == path else None,
    )


def _fix(given: Given[DoctorOptions]) -> int:
    """Run the command of one finding, at most one, and look again."""
    wanted = given.options.fix
    looked = _examine(given, [wanted])
    found = [each for each in looked.findings if each.id == wanted]
    wrong = [each for each in found if each.command]
    if not wrong:
        if not found and (blind := _blind(looked, wanted)):
            print_line(f"{wanted}: not found so far: {'; '.join(blind.values())}")
            return EXIT_BLIND
        seen = "; ".join(each.next_step or each.evidence for each in found)
        print_line(
            f"{wanted}: not found" if not found else f"{wanted}: no command mends it: {seen}"
        )
        return EXIT_OK if not found else EXIT_FAILED
    each = wrong[0]
    print_line(f"{each.id}: {each.evidence}")
    if each.on:
        print_line(f"this is for {each.on}: {each.command}")
        return EXIT_FAILED
    print_line(f"  {each.command}")
    if not (given.options.yes or _agrees()):
        print_line("nothing was done")
        return EXIT_FAILED
    code = _run(each.command)
    if code:
        print_error(f"the command failed with exit code {code}")
        return EXIT_FAILED
    same = sum(other.verdict is each.verdict for other in found)
    return _again(given, each, same, _blind(looked, wanted))


def _blind(looked: Diagnosis, wanted: str) -> dict[str, str]:
    """What the checks that find `wanted` could not look at, or not to the end: why, by id."""
    from tundp.doctor.cases import check_of

    checks = {wanted, *check_of(wanted)}
    return {
        each.id: each.evidence
        for each in looked.findings
        if each.check in checks and each.verdict is Verdict.UNKNOWN
    }


def _agrees() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("--fix asks before it runs the command, and there is nobody: --yes")
    return input("run it? [y/N] ").strip().lower() in ("y", "yes")


def _run(command: str) -> int:
    """The exit code of a shell command; its output is ours."""
    from tundp.linux.command import environment

    # What was shown, and agreed to.
    argv = ["/bin/sh", "-c", command]
    try:
        return subprocess.run(argv, env=environment(), timeout=RUN_S, check=False).returncode  # noqa: S603
    except subprocess.TimeoutExpired:
        print_error(f"the command did not end within {RUN_S:.0f} s")
        return _TIMED_OUT


def _again(
    given: Given[DoctorOptions], mended: Named, count: int, blind_before: Collection[str]
) -> int:
    """Whether what was found is gone within AGAIN_S, by a look that sees what the first one saw.

    count: how many of its id and verdict there were. Figures in its command may be others now.
    """
    deadline = time.monotonic() + AGAIN_S
    while True:
        looked = _examine(given, [mended.id])
        found = [
            each
            for each in looked.findings
            if each.id == mended.id and each.verdict is mended.verdict
        ]
        left = [each for each in found if each.command == mended.command]
        if len(found) >= count:
            left = left or found
        blind = _blind(looked, mended.id)
        unseen = [why for name, why in blind.items() if name not in blind_before]
        if not left and not unseen:
            more = f"; {len(found)} more of {mended.id}" if found else ""
            print_line(f"mended: looked again, and it is gone{more}")
            return EXIT_OK
        if time.monotonic() > deadline:
            if left:
                print_line(f"still there after {AGAIN_S:.0f} s: {left[0].evidence}")
                return EXIT_FAILED
            print_line(f"the command ran; whether it mended this is not known: {unseen[0]}")
            return EXIT_BLIND
        time.sleep(_PAUSE_S)


COMMAND = Command(
    name="doctor",
    summary="what keeps pods from reaching each other, and the command that mends it",
    description="""\
Look for every known cause of lost packets: the daemon, its lease and store, device, routes,
firewall rules, peers, bridge, MTUs, CNI configs, and what is dropped right now. Each finding has
an id that stays, what was seen, and the one command that mends it. Works without a daemon, too,
as far as this host shows alone, and says which checks could not look. Peers are asked by harmless
packets: echo requests, and one byte to the port of one that is silent. Nothing is changed but by
--fix. Needs root.""",
    run=doctor,
    options=DoctorOptions,
    settings=DAEMON_FLAGS,
    examples=(
        ("tundp doctor", "everything"),
        ("tundp doctor --only=peer,mtu", "what is wrong with peers"),
        ("tundp doctor --fix=obstacle.forwarding", "shows the command, asks, runs it, looks again"),
        ("tundp doctor --json | jq -r '.findings[].id'", "for programs"),
    ),
    notes="exit codes: 0 nothing wrong; 1 something fails; 2 wrong usage; 3 warnings only;"
    " 4 nothing worse\nthan what could not be looked at, or not to the end: the answer is there"
    " within 10 s.\nThe ids, their causes and commands: docs/debugging.md.",
)
