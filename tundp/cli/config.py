"""`tundp config show`, `check` and `example`: the daemon's settings, before and while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tundp.cli.command import DAEMON_FLAGS, WHICH_DAEMON, Command, Given, NoOptions, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_error, print_json, print_parts
from tundp.errors import ConfigError, PlatformError
from tundp.settings.declare import option
from tundp.settings.parsers import parse_path
from tundp.settings.settings import DEFAULT, Settings
from tundp.settings.show import example_lines, toml_lines
from tundp.settings.sources import read_environment_file, resolve, variable_warnings

if TYPE_CHECKING:
    from tundp.observe.status import Status

ANSWER_S: Final = 30.0
"""How long a daemon is waited for that --running insists on: as tundp.admin does."""
MAYBE_S: Final = 5.0
"""The same of one that would be meant if it answered."""
UNIT_FILE: Final = Path("/etc/default/tundp")
"""The EnvironmentFile= of the shipped unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhoseOptions:
    """Whose settings are meant."""

    running: bool = option(
        default=False,
        help="the running daemon's settings; also without this, if a daemon answers and no setting"
        " is given",
        since="0.2.0",
    )
    env_file: Path | None = option(
        parse=parse_path,
        default=None,
        metavar="FILE",
        takes_file=True,
        help="take variables from this file, as the unit does, and not from the environment",
        default_text=f"none; the shipped unit's is {UNIT_FILE}",
        since="0.2.0",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions(WhoseOptions):
    """What `tundp config show` can be told."""

    origin: bool = option(default=False, help="also print where each value came from")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions(WhoseOptions):
    """What `tundp config check` can be told."""

    json: bool = option(default=False, help="print the findings as JSON")


def show(given: Given[ShowOptions]) -> int:
    """Print every setting, and whose they are."""
    settings, whose = which_settings(given.options, given)
    print(f"# settings {whose}")
    for line in toml_lines(settings, with_origin=given.options.origin):
        print(line)
    return EXIT_OK


def check(given: Given[CheckOptions]) -> int:
    """Print what a start depends on; failed if anything would fail."""
    settings, whose = which_settings(given.options, given)
    from tundp.daemon import logs, process
    from tundp.daemon.check import check as find
    from tundp.show import finding_parts

    store = process.open_store(settings)
    logs.set_up(-1, username=settings.etcd_username, password=settings.etcd_password)
    findings = run_async(find(settings, store, whose=whose))
    if given.options.json:
        print_json([finding.as_dict() for finding in findings])
    else:
        print_parts(finding_parts(findings))
    return EXIT_FAILED if any(finding.is_failure for finding in findings) else EXIT_OK


def example(_: Given[NoOptions]) -> int:
    """Print a file for --config."""
    print("\n".join(example_lines()))
    return EXIT_OK


def which_settings(
    options: WhoseOptions, given: Given[Any], *, limit_s: float | None = None
) -> tuple[Settings, str]:
    """The settings that are meant, and words that tell whose they are.

    limit_s: how long a running daemon is waited for; None for what the options make of it. One
    that does not answer by then is in these words.
    """
    if options.env_file is not None:
        if options.running:
            raise ConfigError("--running and --env-file exclude each other")
        environment = read_environment_file(options.env_file)
        _warn_of_unknown(environment)
        origin = str(options.env_file)
        settings = resolve(given.flags, environment, variables_origin=origin)
        return settings, f"of {origin}" + (", and the flags given" if given.flags else "")
    settings = given.settings()
    _warn_of_unknown(None)
    which = {flag.name for flag in WHICH_DAEMON if flag.is_settable}
    is_bare = all(
        origin == DEFAULT for name, origin in settings.origins.items() if name not in which
    )
    silence = ""
    if options.running or (is_bare and _is_there(settings.admin_socket)):
        if limit_s is None:
            limit_s = ANSWER_S if options.running else MAYBE_S
        answer = _asked(settings.admin_socket, limit_s)
        if not isinstance(answer, PlatformError):
            return _running(answer, given)
        if options.running:
            raise answer
        from tundp.linux.listeners import listener

        # A socket that a dead daemon left says nothing of whose settings these are.
        silence = str(answer) if listener(settings.admin_socket) is not None else ""
    whose = "given here: flags, environment and --config"
    if is_bare:
        whose = "by default: none was given"
    if silence:
        whose += f"; not the running daemon's: {silence}"
    elif _is_there(settings.admin_socket):
        whose += f"; the daemon's on {settings.admin_socket}: --running"
    elif _is_there(UNIT_FILE):
        whose += f"; the unit's are in {UNIT_FILE}: --env-file={UNIT_FILE}"
    return settings, whose


def _is_there(path: Path) -> bool:
    """Whether a path leads to something; not, if this user may not know."""
    try:
        return path.exists()
    except OSError:
        return False


def _asked(path: Path, limit_s: float) -> Status | PlatformError:
    """The status of the daemon on that socket, or why there is none within limit_s."""
    from tundp.admin import fetch_status

    try:
        return run_async(fetch_status(path, limit_s=limit_s))
    except PlatformError as error:
        return error


def _running(status: Status, given: Given[Any]) -> tuple[Settings, str]:
    """The settings of a running daemon, and whose they are."""
    from tundp.daemon.running import settings_of

    settings = settings_of(status, given.flags)
    more = ", and the flags given" if given.flags else ""
    return settings, f"of the running daemon, pid {status.pid}{more}"


def _warn_of_unknown(environment: dict[str, str] | None) -> None:
    import os

    for sentence in variable_warnings(os.environ if environment is None else environment):
        print_error(sentence)


SHOW = Command(
    name="config show",
    summary="every setting in force, and where it came from",
    description="""\
Print every setting, as a file for --config, secrets blanked. The first line tells whose
settings they are: the running daemon's if one answers and no setting is given here; else
those of flags, environment and --config.""",
    run=show,
    options=ShowOptions,
    settings=DAEMON_FLAGS,
    examples=(
        ("tundp config show --origin", "the running daemon's, or the defaults"),
        ("tundp config show --env-file=/etc/default/tundp", "the unit's"),
        ("tundp config show --ip-masq --v=1", "what these flags would mean"),
    ),
)

CHECK = Command(
    name="config check",
    summary="everything a start depends on, looked at without starting",
    description="""\
Look at what a start depends on: settings, rights, files, store, network config, interface,
the lease it would take, ports, routes, firewall, and what the kernel would drop or divert.
Nothing is changed. The first finding
tells whose settings these are: the running daemon's if one answers and no setting is given
here; else those of flags, environment and --config. Needs root.""",
    run=check,
    options=CheckOptions,
    settings=DAEMON_FLAGS,
    examples=(
        ("tundp config check", "the running daemon's settings, or the defaults"),
        ("tundp config check --env-file=/etc/default/tundp", "before systemctl start tundp"),
        ("tundp config check --store=file:/var/lib/tundp/leases.json", ""),
    ),
    notes="exit codes: 0 nothing would fail; 1 something would; 2 wrong usage.",
)

EXAMPLE = Command(
    name="config example",
    summary="a file for --config: every setting, what it does, its default",
    description="Print a TOML file for --config with every setting commented out at its default.",
    run=example,
    options=NoOptions,
    examples=(("tundp config example > /etc/tundp.toml", ""),),
)
