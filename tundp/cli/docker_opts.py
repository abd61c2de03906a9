"""`tundp docker-opts`: a drop-in for flannel's mk-docker-opts.sh."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tundp.cli.command import WHICH_DAEMON, Command, Given, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK
from tundp.errors import ConfigError
from tundp.settings.declare import option

_SHORT: Final = {
    "f": "subnet-file",
    "d": "docker-file",
    "i": "individual",
    "c": "combined",
    "m": "no-ip-masq",
    "k": "key",
    "h": "help",
    "?": "help",
}
_TAKES_VALUE: Final = frozenset("fdk")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def _variable_name(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        raise ValueError("is no name of a variable")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerOptsOptions:
    """What `tundp docker-opts` can be told."""

    docker_file: Path = option(
        parse=Path,
        default=Path("/run/docker_opts.env"),
        metavar="FILE",
        takes_file=True,
        help="where to write; also -d",
    )
    individual: bool = option(
        default=False,
        help="one variable for each option only, such as DOCKER_OPT_MTU; also -i. Neither or both"
        " of --individual and --combined: both kinds",
    )
    combined: bool = option(default=False, help="the combined variable only; also -c")
    no_ip_masq: bool = option(default=False, help="leave dockerd's --ip-masq out; also -m")
    key: str = option(
        parse=_variable_name,
        default="DOCKER_OPTS",
        metavar="NAME",
        help="name of the combined variable; also -k",
    )


def rewrite(arguments: Sequence[str]) -> list[str]:
    """mk-docker-opts.sh's command line, with short options as getopts(1) reads them, in long ones.

    Words that are long flags already are kept. ConfigError names an option there is not.
    """
    long = {each.name for each in COMMAND.flags}
    queue = list(arguments)
    found: list[str] = []
    while queue:
        word = queue.pop(0)
        name = word.removeprefix("-").removeprefix("-").partition("=")[0]
        if word.startswith("--") or name in long or not word.startswith("-") or word == "-":
            found.append(word)
            flag = next((each for each in COMMAND.flags if each.name == name), None)
            if flag is not None and not flag.is_boolean and "=" not in word and queue:
                found.append(queue.pop(0))
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter not in _SHORT:
                raise ConfigError(f"unknown option -{letter}: {COMMAND.usage}")
            if letter in _TAKES_VALUE:
                if not letters and not queue:
                    raise ConfigError(f"option -{letter} needs an argument: {COMMAND.usage}")
                found.append(f"--{_SHORT[letter]}={letters or queue.pop(0)}")
                break
            found.append(f"--{_SHORT[letter]}")
    return found


def docker_opts(given: Given[DockerOptsOptions]) -> int:
    """Write the file."""
    from tundp import docker_opts as writer

    options = given.options
    settings = writer.DockerOptsSettings(
        subnet_file=given.settings().subnet_file,
        docker_file=options.docker_file,
        is_individual=options.individual,
        is_combined=options.combined,
        has_ip_masq=not options.no_ip_masq,
        key=options.key,
    )
    run_async(writer.write(settings, os.environ))
    return EXIT_OK


COMMAND = Command(
    name="docker-opts",
    summary="write subnet.env as options of dockerd, as mk-docker-opts.sh does",
    description="""\
Write the subnet and MTU of subnet.env as options of dockerd, for an EnvironmentFile= of its
unit. A drop-in for flannel's mk-docker-opts.sh: -f FILE, -d FILE, -i, -c, -m and -k NAME are
taken as getopts(1) reads them.""",
    run=docker_opts,
    options=DockerOptsOptions,
    settings=tuple(each for each in WHICH_DAEMON if each.name != "admin-socket"),
    examples=(
        ("tundp docker-opts", "/run/flannel/subnet.env to /run/docker_opts.env"),
        ("tundp docker-opts -k DOCKER_NETWORK_OPTIONS -d /run/flannel/docker", ""),
        ("tundp docker-opts --combined --docker-file=/dev/stdout", "print it"),
    ),
    notes="""\
exit codes, mk-docker-opts.sh's: 0 written; 1 wrong usage or value, or a route via a gateway
has the subnet already.""",
    rewrite=rewrite,
    exit_usage=EXIT_FAILED,
)
