"""Shell commands that start a daemon, start it anew with another flag, or mend its store."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from pathlib import Path
from typing import Final

from tundp.daemon.unit import installed_unit
from tundp.observe.status import Status
from tundp.settings.settings import DEFAULT, SETTABLE, Settings
from tundp.settings.show import reported

UNITS: Final = ("tundp.service", "flanneld.service")
_SECRETS: Final = frozenset(flag.name for flag in SETTABLE if flag.is_secret)
_VARIABLES: Final = frozenset(flag.variable for flag in SETTABLE)
_SECRET_VARIABLES: Final = frozenset(flag.variable for flag in SETTABLE if flag.is_secret)
_DETACHED: Final = "setsid -f"
_QUIET: Final = "</dev/null >/dev/null 2>&1"
TERM_S: Final = 10.0
"""How long a daemon may take to end at SIGTERM, which one that hangs never reads: then SIGKILL."""


def start(settings: Settings) -> str:
    """The command that starts a daemon with these settings: by its unit if there is one.

    Empty if it would show a secret.
    """
    if (unit := installed_unit(UNITS)) is not None:
        return f"systemctl start {unit.name.removesuffix('.service')}"
    if any(getattr(settings, flag.field) for flag in SETTABLE if flag.is_secret):
        return ""
    told = reported(settings)
    repeatable = {flag.name: flag for flag in SETTABLE if flag.is_repeatable}
    words = ["tundp", "run"]
    for name, origin in settings.origins.items():
        if origin == DEFAULT or name not in told:
            continue
        if name in repeatable:
            words += [f"--{name}={each}" for each in getattr(settings, repeatable[name].field)]
        else:
            words.append(f"--{name}={told[name]}")
    return f"{_DETACHED} {shlex.join(words)} {_QUIET}"


def restart(pid: int, *flags: str) -> str:
    """The command that ends the daemon and starts it as it was, with `flags` at the end.

    As it was: with its variables and in its folder. A secret variable is taken over unseen. Empty
    if its command line cannot be read or shows a secret, or if systemd would start it at the same
    time: then its unit, or the command of `tundp hold`, is what has to be changed.
    """
    if unit_of(pid):
        return f"systemctl restart {unit_of(pid)}" if not flags else ""
    if holder := holder_of(pid):
        return f"kill -HUP {holder}" if not flags else ""
    words = _command_line(pid)
    if not words or any(_is_secret(word) for word in words):
        return ""
    log = _log_of(pid)
    # Not kill -0, which a process that ended and was not waited for answers, too.
    turns = f"$((waited_{pid}+=1))"
    wait = (
        f"while grep -q . /proc/{pid}/cmdline 2>/dev/null; do sleep 0.1;"
        f" [ {turns} -lt {TERM_S * 10:.0f} ] || kill -9 {pid}; done"
    )
    keep, variables = _environment(pid)
    line = " ".join(filter(None, (*variables, _DETACHED, shlex.join([*words, *flags]))))
    where = f"</dev/null >>{shlex.quote(log)} 2>&1" if log else _QUIET
    return f"{keep}kill {pid}; {wait}; {_folder(pid)}{line} {where}"


def unit_of(pid: int) -> str:
    """The name of the systemd service a process belongs to; empty if to none."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        last = line.rpartition("/")[2]
        if last.endswith(".service") and last.startswith(("tundp", "flannel")):
            return last.removesuffix(".service")
    return ""


def holder_of(pid: int) -> int:
    """The `tundp hold` that keeps a process' descriptors and starts it again; 0 for none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        (parent,) = re.findall(r"(?m)^PPid:\s*(\d+)", status)
        name = Path(f"/proc/{parent}/comm").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return 0
    return int(parent) if name.strip() == "tundp hold" else 0


def delete_lease(settings: Settings, status: Status, key: str) -> str:
    """The command that deletes a lease's key in etcd; empty for another store."""
    described = "" if status.store is None else status.store.description
    if not described.startswith("etcd") or not settings.etcd_endpoints:
        return ""
    path = f"{settings.etcd_prefix.rstrip('/')}/subnets/{key}"
    words = [f"--endpoints={','.join(settings.etcd_endpoints)}"]
    is_v2 = described.startswith("etcd v2")
    for flag, value in (
        ("--ca-file" if is_v2 else "--cacert", settings.etcd_cafile),
        ("--cert-file" if is_v2 else "--cert", settings.etcd_certfile),
        ("--key-file" if is_v2 else "--key", settings.etcd_keyfile),
        ("--username" if is_v2 else "--user", settings.etcd_username),
    ):
        if value:
            words.append(f"{flag}={value}")
    words += ["rm" if is_v2 else "del", path]
    return f"ETCDCTL_API={2 if is_v2 else 3} etcdctl {shlex.join(words)}"


def _command_line(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in text.split(b"\0")[:-1]]


def _environment(pid: int) -> tuple[str, list[str]]:
    """What a shell does first, and assignments for one command: the daemon's own variables."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        block = Path(f"/proc/{pid}/environ").read_bytes()
        found = dict(os.fsdecode(line).partition("=")[::2] for line in block.split(b"\0"))
    keep, assignments = "", []
    for variable in sorted(_VARIABLES & found.keys()):
        if variable in _SECRET_VARIABLES:
            keep += (
                f"kept_{variable}=$(tr '\\0' '\\n' </proc/{pid}/environ"
                f" | sed -n 's/^{variable}=//p'); "
            )
            assignments.append(f'{variable}="$kept_{variable}"')
        else:
            assignments.append(f"{variable}={shlex.quote(found[variable])}")
    return keep, assignments


def _folder(pid: int) -> str:
    """A change to the folder a process has, whose paths may be relative to it; or nothing."""
    try:
        folder = Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return ""
    return f"cd {shlex.quote(str(folder))} && " if folder.is_dir() else ""


def _log_of(pid: int) -> str:
    """The file a process writes its stderr to; empty if that is none."""
    try:
        path = Path(f"/proc/{pid}/fd/2").readlink()
    except OSError:
        return ""
    return str(path) if path.is_file() else ""


def _is_secret(word: str) -> bool:
    return word.startswith("-") and word.lstrip("-").partition("=")[0] in _SECRETS
