"""The programs `tundp` and `flanneld`: which command is meant, and what its end is worth."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import tundp
from tundp.cli import (
    bench,
    bench_restart,
    blackbox,
    bugreport,
    capture,
    chaos,
    cleanup,
    completion,
    config,
    demo,
    docker_opts,
    doctor,
    drops,
    explain,
    hold,
    leases,
    matrix,
    metrics,
    ping,
    probe,
    replay,
    run,
    status,
    top,
    trace,
    upgrade,
)
from tundp.cli.command import Command, example_lines
from tundp.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    flushed,
    forget_output,
    print_error,
    print_filter_error,
    reserve_streams,
    sandbox_words,
)
from tundp.errors import ConfigError, FilterError, Interrupted, TundpError

COMMANDS: Final[tuple[Command[Any], ...]] = (
    run.COMMAND,
    hold.COMMAND,
    upgrade.COMMAND,
    status.COMMAND,
    top.COMMAND,
    doctor.COMMAND,
    ping.COMMAND,
    matrix.COMMAND,
    drops.COMMAND,
    trace.COMMAND,
    capture.COMMAND,
    blackbox.COMMAND,
    explain.COMMAND,
    replay.COMMAND,
    leases.COMMAND,
    leases.HISTORY,
    chaos.COMMAND,
    chaos.LIST,
    chaos.STOP,
    metrics.RULES,
    metrics.DASHBOARD,
    bugreport.COMMAND,
    config.SHOW,
    config.CHECK,
    config.EXAMPLE,
    cleanup.COMMAND,
    docker_opts.COMMAND,
    probe.COMMAND,
    demo.COMMAND,
    bench.COMMAND,
    bench.DIFF,
    bench_restart.COMMAND,
    completion.COMMAND,
)
GROUPS: Final = {
    "config": "show or check the settings of a daemon",
    "metrics": "alert rules and a dashboard for what a daemon exports",
}
"""First words that are no command by themselves."""

DESCRIPTION: Final = """\
flannel's UDP backend done right: every node holds one subnet of a flat network, and
each IP packet for another node's subnet travels as the payload of one UDP datagram."""
EXAMPLES: Final = (
    ("tundp demo", "two nodes and their pods on this machine, in a minute"),
    ("tundp run --etcd-endpoints=http://192.0.2.9:2379 --iface=eth0", ""),
    ("tundp run --store=file:/var/lib/tundp/leases.json", "without etcd"),
    ("tundp status", "peers, packets, drops and their reasons"),
    ("tundp top", "packets and bits a second, live: by peer, by flow"),
    ("tundp drops", "what was dropped, why, and what to look at next"),
    ("tundp explain 10.5.1.2 10.5.2.3", "what would become of such a packet"),
    ("tundp doctor", "what keeps pods apart, and the command that mends it"),
    ("tundp bugreport", "one archive for whoever is to find the fault"),
    ("tundp ping 192.0.2.2", "whether that peer answers, layer by layer"),
    ("tundp matrix", "whether every peer does, and the peers among them"),
    ("tundp config check", "everything a start depends on, before the start"),
    ("tundp cleanup", "remove rules and routes a stopped daemon left"),
    ("tundp probe", "what this kernel has, and which engine that means"),
    ("tundp bench --out=report", "what it costs, against kernel VXLAN, in 3 minutes"),
)
NOTES: Final = """\
exit codes: 0 done, or a daemon stopped by a signal; 1 failed; 2 wrong usage; 130 a demo or
bench interrupted. Unlike flannel's, a wrong flag is 2 (flannel: 0) and a lost lease ends
nothing (flannel: 0; --on-lease-lost=exit). The script `flanneld` is `tundp run` with flannel's
own tolerance for stray arguments."""
_HELP: Final = frozenset({"help", "-h", "-help", "--help"})
_VERSION: Final = frozenset({"-version", "--version"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    has_output = reserve_streams()
    if not has_output and arguments[:1] != [run.COMMAND.name]:
        print_error("standard output is closed: give it a file, or /dev/null")
        return EXIT_FAILED
    return flushed(_main(arguments))


def _main(arguments: Sequence[str]) -> int:
    command = None
    try:
        if not arguments:
            # Nothing was asked for and nothing done: a script shall notice.
            print("\n".join(help_lines()), file=sys.stderr)
            return EXIT_USAGE
        if arguments[0] in _HELP:
            return _help(arguments[1:])
        if arguments[0] in _VERSION:
            print(f"tundp {tundp.__version__}")
            return EXIT_OK
        command, rest = find(arguments)
        if command is None:
            return _group(arguments[0], rest)
        return command.main(rest)
    except FilterError as error:
        print_filter_error(error)
        return EXIT_USAGE
    except ConfigError as error:
        print_error(error)
        return EXIT_USAGE if command is None else command.exit_usage
    except Interrupted as error:
        print_error(error)
        return EXIT_INTERRUPTED
    except TundpError as error:
        print_error(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `tundp status | head`: nobody reads any more, which is no error of ours.
        forget_output()
        return EXIT_OK
    except (OSError, RuntimeError) as error:
        return _end_in_sandbox(error)


def flanneld(arguments: Sequence[str] | None = None) -> int:
    """The script of that name: a stock command line, unchanged."""
    try:
        return run.FLANNELD.main(sys.argv[1:] if arguments is None else arguments)
    except TundpError as error:
        print_error(error, "flanneld")
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (OSError, RuntimeError) as error:
        return _end_in_sandbox(error, "flanneld")


def _end_in_sandbox(error: OSError | RuntimeError, program: str = "tundp") -> int:
    """Name what a sandbox refused; its exit code. The error itself is raised if it is a bug."""
    if text := sandbox_words(error):
        print_error(text, program)
        return EXIT_FAILED
    raise error


def find(words: Sequence[str]) -> tuple[Command[Any] | None, Sequence[str]]:
    """The command `words` begin with, and what follows its name; None for a group's name.

    ConfigError if there is none.
    """
    by_name = {command.name: command for command in COMMANDS}
    for count in (2, 1):
        if command := by_name.get(" ".join(words[:count])):
            return command, words[count:]
    if words[0] in GROUPS:
        return None, words[1:]
    close = difflib.get_close_matches(words[0], [*by_name, *GROUPS], n=1, cutoff=0.5)
    hint = f"did you mean tundp {close[0]}?" if close else "tundp help lists the commands"
    raise ConfigError(f"unknown command {words[0]!r}: {hint}")


def _help(words: Sequence[str]) -> int:
    if not words:
        print("\n".join(help_lines()))
        return EXIT_OK
    command, _ = find(words)
    print("\n".join(_group_lines(words[0]) if command is None else command.help_lines()))
    return EXIT_OK


def _group(name: str, rest: Sequence[str]) -> int:
    is_asked = bool(rest) and rest[0] in _HELP
    print("\n".join(_group_lines(name)), file=sys.stdout if is_asked else sys.stderr)
    return EXIT_OK if is_asked else EXIT_USAGE


def help_lines() -> Iterator[str]:
    """What `tundp --help` prints."""
    yield "usage: tundp COMMAND [flags]"
    yield ""
    yield DESCRIPTION
    yield ""
    yield "commands:"
    for command in COMMANDS:
        yield f"  {command.name:<18}{command.summary}"
    yield f"  {'help [COMMAND]':<18}this, or what a command takes; also tundp COMMAND --help"
    yield "  --version         the version"
    yield ""
    yield "examples:"
    yield from example_lines(EXAMPLES)
    yield ""
    yield NOTES


def _group_lines(group: str) -> Iterator[str]:
    members = [command for command in COMMANDS if command.name.startswith(f"{group} ")]
    yield f"usage: tundp {group} {'|'.join(each.name.split()[1] for each in members)} [flags]"
    yield ""
    for command in members:
        yield f"  tundp {command.name:<18}{command.summary}"
    yield ""
    yield f"tundp help {group} {members[0].name.split()[1]} tells more."
