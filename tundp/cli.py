"""The command line: parsing, printing and exit codes. Nothing below here prints or exits."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import tundp
from tundp.errors import ConfigError, LeaseLost, PlatformError, TundpError
from tundp.settings.options import ADMIN_SOCKET, OPTIONS, RUN_DIRECTORY, Option
from tundp.settings.settings import (
    NOT_IN_FILE,
    Settings,
    admin_socket_of,
    load_settings,
    unknown_variables,
)

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

_log = logging.getLogger("tundp")

_DESCRIPTION: Final = """\
flannel's UDP backend done right: every node holds one subnet of a flat network, and
each IP packet for another node's subnet travels as the payload of one UDP datagram.
"""

_EXAMPLES: Final = """\
examples:
  tundp demo                           two nodes and their pods on this machine, in a minute
  tundp run --etcd-endpoints=http://192.0.2.9:2379 --iface=eth0
  tundp run --store=file:/etc/tundp/leases.json
  tundp status                         peers, packets, drops and their reasons
  tundp config check                   everything a start depends on, before the start
  tundp cleanup                        remove rules and routes a stopped daemon left
  tundp probe                          what this kernel has, and which engine that means
  tundp bench --out=report             what it costs, against kernel VXLAN, in 3 minutes

exit codes: 0 done, or stopped by a signal; 1 failed; 2 wrong usage. Unlike flannel's, a
wrong flag is 2 (flannel: 0) and a lost lease ends nothing (flannel: 0; --on-lease-lost=exit).
The script `flanneld` is `tundp run` with flannel's own tolerance for stray arguments.
"""

_RUN_DESCRIPTION: Final = """\
Be a node of the overlay until SIGINT or SIGTERM. Flags may be written -flag value,
-flag=value, --flag value or --flag=value; each has an environment variable, used when
the flag is not given.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["run"]:
            return _run(arguments[1:])
        if arguments[:1] == ["config"]:
            return _config(arguments[1:])
        if arguments[:1] == ["cleanup"]:
            return _cleanup(arguments[1:])
        if arguments[:1] == ["docker-opts"]:
            return _docker_opts(arguments[1:])
        parsed = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = parsed.command
        return command(parsed)
    except TundpError as error:
        print(f"tundp: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `tundp status | head`: nobody reads any more, which is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def flanneld(arguments: Sequence[str] | None = None) -> int:
    """The script of that name: a stock command line, unchanged."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(arguments, is_flanneld=True)
    except TundpError as error:
        print(f"flanneld: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tundp",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tundp {tundp.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_parser("run", help="be a node of the overlay", add_help=False)
    commands.add_parser("config", help="show or check the settings of a daemon", add_help=False)
    commands.add_parser("cleanup", help="remove what a daemon left behind", add_help=False)
    commands.add_parser(
        "docker-opts", help="subnet.env as options of dockerd, as mk-docker-opts.sh", add_help=False
    )

    status = commands.add_parser("status", help="ask a running daemon how it is")
    status.add_argument(
        "--admin-socket",
        type=Path,
        default=ADMIN_SOCKET,
        metavar="FILE",
        help="the daemon's --admin-socket (default: %(default)s)",
    )
    status.add_argument(
        "--subnet-file",
        type=Path,
        metavar="FILE",
        help="of the daemon to ask, instead of its --admin-socket: each network has its own",
    )
    status.add_argument("--all", action="store_true", help="every daemon of this host, a line each")
    status.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    status.set_defaults(command=_status)

    demo = commands.add_parser(
        "demo",
        help="two nodes with pods in network namespaces, checked end to end",
        description="Build two nodes with a pod each, run a daemon on both, and verify what"
        " crosses the overlay. Needs root; touches nothing outside its own namespaces.",
    )
    demo.add_argument(
        "--keep", action="store_true", help="leave it all running and print commands to look around"
    )
    demo.add_argument("--clean", action="store_true", help="remove what an earlier --keep left")
    demo.add_argument(
        "--store",
        choices=("auto", "etcd", "file"),
        default="auto",
        help="where the leases live; auto is etcd when installed (default: %(default)s)",
    )
    demo.add_argument(
        "--megabytes",
        type=int,
        default=256,
        metavar="N",
        help="how much TCP payload to move and verify (default: %(default)s)",
    )
    demo.set_defaults(command=_demo)
    _add_bench(commands)

    probe = commands.add_parser(
        "probe",
        help="what this kernel offers, what tundp uses of it, and what it does without",
        description="Ask the kernel by doing: a TUN device in a namespace of the probe's own,"
        " sockets on its loopback. Nothing on the host changes.",
    )
    probe.add_argument("--json", action="store_true", help="print it as JSON")
    probe.set_defaults(command=_probe)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure what the overlay costs, against kernel VXLAN",
        description="Build a lab of namespaces, run every path it can on the same work,"
        " interleaved, verify the traffic, tear down, and write results.json, report.md and"
        " report.html. Needs root and a quiet machine.",
        epilog="`tundp bench diff A.json B.json` compares two; exit code 1 if anything got worse.",
    )
    bench.add_argument(
        "diff", nargs="*", metavar="diff A.json B.json", help="compare two results instead"
    )
    bench.add_argument(
        "--profile",
        choices=("quick", "default", "full"),
        default="quick",
        help="quick: under 3 minutes; default: half an hour; full: hours (default: %(default)s)",
    )
    bench.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME,...",
        help="rows, workloads or labs to restrict to; VXLAN is always measured; repeatable",
    )
    bench.add_argument("--rounds", type=_at_least_one, metavar="N", help="interleaved rounds")
    bench.add_argument("--seconds", type=_positive, metavar="S", help="of each measurement")
    bench.add_argument(
        "--topology",
        choices=("host", "pods"),
        default="host",
        help="traffic between the nodes, or between pods behind bridges (default: %(default)s)",
    )
    bench.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="measure tundp with these flags of `tundp run`, too; repeatable",
    )
    bench.add_argument(
        "--ladder",
        action="store_true",
        help="measure engine gso with one offload more on each rung, too",
    )
    bench.add_argument("--flanneld", metavar="PATH", help="a stock flanneld binary to measure too")
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("tundp-bench"),
        metavar="DIR",
        help="where the reports go (default: %(default)s)",
    )
    bench.add_argument("--clean", action="store_true", help="remove what a killed bench left")
    bench.set_defaults(command=_bench)


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text}: seconds above 0, at most an hour")
    return value


def _run(arguments: list[str], *, is_flanneld: bool = False) -> int:
    program = "flanneld" if is_flanneld else "tundp"
    try:
        settings = load_settings(arguments, os.environ, ignores_stray=is_flanneld)
        if settings.help:
            print(_run_parser(program).format_help().rstrip())
            return EXIT_OK
        if settings.version:
            print(f"tundp {tundp.__version__}", file=sys.stderr)
            return EXIT_OK
        from tundp.daemon import process

        store = process.open_store(settings)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return EXIT_USAGE
    code = EXIT_OK
    try:
        process.serve(settings, store)
    except* LeaseLost as group:
        for leaf in process.leaves(group):
            _log.error("%s: exiting with code 0, as flannel does (--on-lease-lost=exit)", leaf)
    except* TundpError as group:
        for leaf in process.leaves(group):
            _log.error("%s", leaf)
        code = EXIT_FAILED
    return code


def _config(arguments: list[str]) -> int:
    usage = (
        "usage: tundp config show [--origin] [flags of tundp run]\n"
        "       tundp config example\n"
        "       tundp config check [--json] [flags of tundp run]\n\n"
        "show prints every setting in force, with --origin where each came from.\n"
        "example prints a file for --config: every setting, what it does, its default.\n"
        "check looks at what a start depends on: settings, rights, files, store, network config,\n"
        "interface, the lease it would take, ports, routes, firewall; exit code 1 if anything\n"
        "would fail. Nothing is changed."
    )
    if arguments == ["example"]:
        print_example()
        return EXIT_OK
    is_asked = bool({"-h", "-help", "--help"} & set(arguments))
    if arguments[:1] not in (["show"], ["check"]) or is_asked:
        print(usage, file=sys.stdout if is_asked else sys.stderr)
        return EXIT_OK if is_asked else EXIT_USAGE
    command, *rest = arguments
    word = "--origin" if command == "show" else "--json"
    flags = [argument for argument in rest if argument != word]
    try:
        settings = load_settings(flags, os.environ)
    except ConfigError as error:
        print(f"tundp: {error}", file=sys.stderr)
        return EXIT_USAGE
    for name in unknown_variables(os.environ):
        print(f"tundp: variable {name} is set, but tundp does not know it", file=sys.stderr)
    if command == "show":
        print_settings(settings, with_origin=word in rest)
        return EXIT_OK
    return _config_check(settings, as_json=word in rest)


def print_settings(settings: Settings, *, with_origin: bool) -> None:
    """Every setting as TOML that --config would take, passwords blanked."""
    for option in _settable():
        line = f"{option.name} = {_toml(settings, option)}"
        print(f"{line:<60} # {settings.origins[option.name]}" if with_origin else line)


def print_example() -> None:
    """A file for --config with every setting commented out at its default."""
    defaults = load_settings([], {})
    print("# For `tundp run --config=FILE`. Flags and variables of the same name win over it.")
    for is_flannels, title in ((True, "flannel's settings"), (False, "tundp's own")):
        print(f"\n# {title}\n")
        for option in _settable():
            if option.is_flannels is is_flannels:
                text = f"{option.help} [{option.variable}]".replace("%%", "%")
                for line in textwrap.wrap(text, 90):
                    print(f"# {line}")
                print(f"#{option.name} = {_toml(defaults, option)}\n")


def _settable() -> list[Option]:
    return [option for option in OPTIONS if option.name not in NOT_IN_FILE]


def _toml(settings: Settings, option: Option) -> str:
    value = getattr(settings, option.field)
    if option.is_secret and value:
        return '"***"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if option.is_repeatable:
        return f"[{', '.join(_toml_text(str(item)) for item in value)}]"
    return _toml_text(settings.show(option))


def _toml_text(text: str) -> str:
    """A basic string: JSON's, but with no surrogate pairs, and DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _config_check(settings: Settings, *, as_json: bool) -> int:
    from tundp.daemon import logs, process
    from tundp.daemon.check import check
    from tundp.show import print_findings

    try:
        store = process.open_store(settings)
    except ConfigError as error:
        print(f"tundp: {error}", file=sys.stderr)
        return EXIT_USAGE
    logs.set_up(-1, username=settings.etcd_username, password=settings.etcd_password)
    findings = asyncio.run(check(settings, store))
    if as_json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        print_findings([finding.as_dict() for finding in findings])
    return EXIT_FAILED if any(finding.is_failure for finding in findings) else EXIT_OK


def _docker_opts(arguments: list[str]) -> int:
    from tundp import docker_opts

    try:
        settings = docker_opts.parse_arguments(arguments)
        asyncio.run(docker_opts.write(settings, os.environ))
    except (ConfigError, PlatformError) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _cleanup(arguments: list[str]) -> int:
    usage = (
        "usage: tundp cleanup [--dry-run] [flags of tundp run]\n\n"
        "Removes what a stopped daemon leaves on purpose, so that nothing leaks and nothing\n"
        "breaks while it restarts: firewall rules of both flavours (flannel v0.11's for this\n"
        "network, too), unreachable routes, subnet.env, the lease cache, and sockets of daemons\n"
        "that were killed. What a stock flannel uses or may have written is left and named, as\n"
        "are the node's id and its lease, which stays in the store until it expires. Give the\n"
        "flags the daemon was given: --subnet-file and --state-dir say where to look. Refused\n"
        "while the daemon runs."
    )
    if {"-h", "-help", "--help"} & set(arguments):
        print(usage)
        return EXIT_OK
    from tundp.daemon.cleanup import clean_up

    try:
        settings = load_settings([a for a in arguments if a != "--dry-run"], os.environ)
    except ConfigError as error:
        print(f"tundp: {error}", file=sys.stderr)
        return EXIT_USAGE
    is_dry_run = "--dry-run" in arguments
    cleaned = asyncio.run(clean_up(settings, is_dry_run=is_dry_run))
    for line in cleaned.removed:
        print(f"{'would remove' if is_dry_run else 'removed'} {line}")
    if not cleaned.removed:
        print("nothing to remove")
    for line in cleaned.left:
        print(f"left {line}")
    return EXIT_OK


def _run_parser(program: str) -> argparse.ArgumentParser:
    """Only for its help text: `config` reads the flags, as Go's flag package would."""
    name = "flanneld" if program == "flanneld" else "tundp run"
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} [flags]",
        description=_RUN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    flannels = parser.add_argument_group("flannel's flags")
    own = parser.add_argument_group("tundp's own flags")
    for option in OPTIONS:
        group = flannels if option.is_flannels else own
        text = option.help
        if option.shown_default or option.default not in ("", (), None, False):
            text += f" (default: {_default_text(option)})"
        if option.name not in ("help", "version"):
            text += f" [{option.variable}]"
        if option.is_boolean:
            group.add_argument(f"--{option.name}", action="store_true", help=text)
        else:
            group.add_argument(f"--{option.name}", metavar=option.metavar, help=text)
    return parser


def _status(parsed: argparse.Namespace) -> int:
    from tundp.admin import fetch_status
    from tundp.show import print_status

    if parsed.all:
        return _status_of_all(as_json=parsed.json)
    path = parsed.admin_socket
    if parsed.subnet_file is not None:
        path = admin_socket_of(parsed.subnet_file)
    status: dict[str, Any] = asyncio.run(fetch_status(path))
    if parsed.json:
        print(json.dumps(status, indent=2))
    else:
        print_status(status)
    return EXIT_OK


def _status_of_all(*, as_json: bool) -> int:
    """Every socket in the directory daemons put theirs; exit code 1 if one does not answer."""
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

    found = asyncio.run(ask())
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_brief(found)
    return EXIT_FAILED if any("error" in status for status in found.values()) else EXIT_OK


def _probe(parsed: argparse.Namespace) -> int:
    from tundp.engine.choose import probe_machine
    from tundp.show import print_probe

    found = probe_machine()
    if parsed.json:
        print(json.dumps(found, indent=2))
    else:
        print_probe(found)
    return EXIT_OK


def _demo(parsed: argparse.Namespace) -> int:
    from tundp.demo import DemoSettings, clean_demo, run_demo

    if parsed.clean:
        return EXIT_OK if asyncio.run(clean_demo()) else EXIT_FAILED
    if parsed.megabytes < 1:
        print("tundp: --megabytes must be at least 1", file=sys.stderr)
        return EXIT_USAGE
    settings = DemoSettings(
        store=parsed.store, payload_len=parsed.megabytes << 20, is_kept=parsed.keep
    )
    return EXIT_OK if asyncio.run(run_demo(settings)) else EXIT_FAILED


def _bench(parsed: argparse.Namespace) -> int:
    from tundp.bench import command
    from tundp.bench.run import BenchSettings

    if parsed.clean:
        asyncio.run(command.clean())
        return EXIT_OK
    if parsed.diff:
        if len(parsed.diff) != 3 or parsed.diff[0] != "diff":
            print("usage: tundp bench diff A.json B.json", file=sys.stderr)
            return EXIT_USAGE
        is_fine = command.compare(Path(parsed.diff[1]), Path(parsed.diff[2]))
        return EXIT_OK if is_fine else EXIT_FAILED
    settings = BenchSettings(
        profile=parsed.profile,
        only=tuple(name for text in parsed.only for name in text.split(",") if name),
        rounds=parsed.rounds,
        seconds=parsed.seconds,
        topology=parsed.topology,
        flanneld=parsed.flanneld,
        rows=tuple(parsed.row),
        has_ladder=parsed.ladder,
    )
    return EXIT_OK if asyncio.run(command.bench(settings, parsed.out)) else EXIT_FAILED


def _default_text(option: Option) -> str:
    value = option.shown_default or option.default
    if value is True:
        value = "true"
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return text.replace("%", "%%")
