"""The settings of a daemon that runs, as its admin socket reports them."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tundp.errors import ConfigError, PlatformError
from tundp.files import SMALL_LEN, read_regular
from tundp.observe.status import Status
from tundp.settings.declare import Flag
from tundp.settings.settings import SETTABLE, Settings
from tundp.settings.sources import resolve_reported


def settings_of(status: Status, given: Mapping[str, Any]) -> Settings:
    """The daemon's settings with the flags `given` over them.

    PlatformError if a daemon answered that reports none. A secret is blank in the answer: it is
    read from where the daemon has it, its environment, its file or its command line; ConfigError
    if it is not there, or may not be read.
    """
    if not status.settings:
        raise PlatformError(
            f"the running daemon (pid {status.pid}, version {status.version}) does not report its"
            " settings: restart it with this version"
        )
    values = {name: each.value for name, each in status.settings.items()}
    origins = {name: each.origin for name, each in status.settings.items()}
    for flag in SETTABLE:
        if flag.is_secret and values.get(flag.name) and flag.name not in given:
            values[flag.name] = _secret(flag, origins[flag.name], status.pid)
    return resolve_reported(values, origins, given, f"running daemon, pid {status.pid}")


def _secret(flag: Flag, origin: str, pid: int) -> str:
    """The secret a daemon has from `origin`."""
    try:
        if origin == flag.variable:
            block = Path(f"/proc/{pid}/environ").read_bytes()
            variables = dict(line.partition(b"=")[::2] for line in block.split(b"\0"))
            return variables[flag.variable.encode()].decode()
        if origin.startswith("--"):
            return _argument(flag, Path(f"/proc/{pid}/cmdline").read_bytes())
        path = Path(f"/proc/{pid}/cwd") / origin
        return str(tomllib.loads(read_regular(path, most_len=SMALL_LEN, is_strict=True))[flag.name])
    except (OSError, ValueError, KeyError):
        pass
    raise ConfigError(
        f"the running daemon has its {flag.name} from {origin}, which cannot be read here: give"
        f" it again as --{flag.name}"
    )


def _argument(flag: Flag, command_line: bytes) -> str:
    """The value of a flag in a process's command line (proc(5)). ValueError if it has none."""
    words = command_line.decode().split("\0")
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == flag.name:
            return value if equals else following
    raise ValueError(f"no --{flag.name}")
