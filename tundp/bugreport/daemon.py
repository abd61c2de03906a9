"""What a report holds of the daemon: its own answers, its flight recorder, its store, its start."""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Awaitable, Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import tundp
from tundp.admin import (
    LEASES_PATH,
    LEDGER_PATH,
    METRICS_PATH,
    fetch_document,
    fetch_text,
)
from tundp.bugreport.host import Found, Item, apart
from tundp.bugreport.redact import Redactor
from tundp.bugreport.settings_files import shown_config, shown_variables
from tundp.daemon import process
from tundp.daemon.check import check
from tundp.doctor.examine import examine
from tundp.engine.native import library
from tundp.engine.recorder import PREVIOUS, read_recorder
from tundp.errors import PlatformError, StoreError
from tundp.files import SMALL_LEN, read_regular
from tundp.instance import Instance
from tundp.lease.codec import encode_value
from tundp.observe.blackbox import document
from tundp.settings.settings import Settings
from tundp.settings.show import toml_lines

ANSWER_S: Final = 10.0
"""Deadline of one answer of the daemon."""
CHECKS_S: Final = 40.0
"""Deadline of tundp doctor, and of tundp config check."""
STORE_S: Final = 15.0
_CNI_DIR: Final = Path("/etc/cni/net.d")
_OS_RELEASE: Final = ("NAME", "VERSION", "ID", "VERSION_ID", "PRETTY_NAME")


def answer_items(path: Path, redactor: Redactor) -> Iterator[Item]:
    """What the daemon behind `path` answers; its status is fetched before."""

    async def metrics() -> Found:
        return Found(await fetch_text(path, METRICS_PATH, limit_s=ANSWER_S))

    yield Item(
        name="daemon/metrics.txt",
        about="the daemon's metrics, as Prometheus gets them",
        make=metrics,
        limit_s=ANSWER_S + 2,
    )
    for name, of, about in (
        ("ledger.json", LEDGER_PATH, "every lease and what became of it: tundp replay --leases"),
        ("leases.json", f"{LEASES_PATH}?since=0", "leases, and what happened to them since"),
    ):
        make = _document(path, of)
        yield Item(name=f"daemon/{name}", about=about, make=make, limit_s=ANSWER_S + 2)
    recorder = Instance.recorder(path)
    for name, file, whose in (
        ("blackbox.json", recorder, "the daemon that runs, or ran last"),
        ("blackbox-previous.json", recorder.with_name(recorder.name + PREVIOUS), "the one before"),
    ):
        about = f"flight recorder of {whose}, headers of packets only: tundp blackbox --file"
        yield Item(name=f"daemon/{name}", about=about, make=_blackbox(file, redactor))


def _document(path: Path, of: str) -> Callable[[], Awaitable[Found]]:
    async def make() -> Found:
        return Found(await fetch_document(path, of, limit_s=ANSWER_S))

    return make


def _blackbox(path: Path, redactor: Redactor) -> Callable[[], Awaitable[Found]]:
    async def make() -> Found:
        found = document(await apart(read_recorder, path))
        for drop in found["drops"]:
            drop["packet"] = redactor.packet(bytes.fromhex(drop["packet"])).hex()
        return Found(found)

    return make


def settings_items(settings: Settings, whose: str) -> Iterator[Item]:
    """The settings, and everything that looks at them."""

    async def show() -> Found:
        lines = [f"# settings {whose}", *toml_lines(settings, with_origin=True), ""]
        return Found("\n".join(lines))

    async def examined() -> Found:
        store = process.open_store(settings)
        found = await asyncio.to_thread(examine, settings, store, whose=whose, cni_dir=_CNI_DIR)
        return Found(found.to_json())

    async def checked() -> Found:
        found = await check(settings, process.open_store(settings), whose=whose)
        return Found([each.as_dict() for each in found])

    yield Item(name="config/settings.toml", about="settings and their origins", make=show)
    yield Item(
        name="doctor.json",
        about="what is wrong, by tundp doctor --json: read this first",
        make=examined,
        limit_s=CHECKS_S,
    )
    yield Item(
        name="config/check.json",
        about="what a start depends on, by tundp config check --json",
        make=checked,
        limit_s=CHECKS_S,
    )
    yield Item(
        name="store/leases.json",
        about="network config and leases as the store has them: tundp explain --store=file:FILE",
        make=lambda: _store(settings),
        limit_s=STORE_S,
    )


async def _store(settings: Settings) -> Found:
    """What the store holds, as a lease file."""
    store = process.open_store(settings)
    try:
        text = await store.network_config()
        snapshot = await store.snapshot()
        described = store.description
    except StoreError as error:
        raise PlatformError(f"the store does not answer: {error}") from None
    finally:
        await store.close()
    try:
        config: Any = json.loads(text)
    except ValueError:
        config = text
    leases = {str(each.key): json.loads(encode_value(each.attributes)) for each in snapshot.leases}
    bad = f", {len(snapshot.bad)} unreadable entries" if snapshot.bad else ""
    note = f"{described}, reachable, revision {snapshot.revision}, {len(leases)} leases{bad}"
    return Found({"config": config, "leases": leases, "revision": snapshot.revision}, note)


def origin_items(pid: int | None, env_file: Path, config: Path | None) -> Iterator[Item]:
    """Where the settings are from: the unit's variables, the file of --config, the command line."""
    for name, path, about, shown in (
        ("default-tundp.txt", env_file, "variables of the unit", shown_variables),
        ("config-file.txt", config, "the file of --config", shown_config),
    ):
        if path is not None:
            yield Item(
                name=f"config/{name}",
                about=f"{about}, values of what is no setting of tundp blanked: {path}",
                make=_settings_file(path, shown),
            )
    if pid is not None:
        yield Item(
            name="config/command-line.txt",
            about="the daemon's command line, an argument a line",
            make=lambda: _command_line(pid),
        )


def _settings_file(path: Path, shown: Callable[[str], str]) -> Callable[[], Awaitable[Found]]:
    async def make() -> Found:
        try:
            return Found(shown(await apart(_settings_text, path)))
        except OSError as error:
            raise PlatformError(f"cannot read {path}: {error.strerror}") from None

    return make


def _settings_text(path: Path) -> str:
    """Not of a FIFO, which would wait for a writer for ever."""
    return read_regular(path, most_len=SMALL_LEN)


async def _command_line(pid: int) -> Found:
    words = arguments_of(pid)
    if not words:
        raise PlatformError(f"process {pid} is gone, or its command line cannot be read")
    return Found("\n".join([*words, ""]))


def arguments_of(pid: int) -> list[str]:
    """The command line of a process; empty if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return text.decode(errors="replace").split("\0")[:-1]


def variables_of(pid: int) -> dict[str, str]:
    """The environment variables of a process; empty if they may not be read."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(each.partition("=")[::2] for each in text.split("\0") if each)


def versions() -> dict[str, Any]:
    """What this command and its host are: versions of program, ABI, kernel, libraries."""
    system = os.uname()
    return {
        "tundp": tundp.__version__,
        "native_abi": library.ABI,
        "native_module": _native_module(),
        "python": platform.python_version(),
        "kernel": f"{system.sysname} {system.release} {system.version}",
        "machine": system.machine,
        "host": system.nodename,
        "libc": " ".join(platform.libc_ver()),
        "cpus": os.cpu_count(),
        "distribution": _distribution(),
        "libraries": _libraries(),
    }


def _native_module() -> str:
    try:
        library.require()
    except PlatformError as error:
        return str(error)
    return "built, with this ABI"


def _distribution() -> dict[str, str]:
    try:
        found = platform.freedesktop_os_release()
    except OSError:
        return {}
    return {name: found[name] for name in _OS_RELEASE if name in found}


def _libraries() -> dict[str, str]:
    """What tundp depends on, with the versions in use."""
    found = {}
    try:
        wanted = metadata.requires("tundp") or []
    except metadata.PackageNotFoundError:
        return {}
    for each in wanted:
        if "extra ==" in each:
            continue
        name = each.split(";")[0]
        for sign in "<>=!~ [(":
            name = name.split(sign)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
