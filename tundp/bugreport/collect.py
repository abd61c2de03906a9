"""Collects a report: everything at the same time, each item with a deadline, then redacts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import tomllib
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from time import monotonic, time
from typing import Any, Final

from tundp.admin import fetch_document
from tundp.bugreport import daemon, host
from tundp.bugreport.archive import Member, Report
from tundp.bugreport.capture import headers_captured
from tundp.bugreport.host import Found, Item, apart
from tundp.bugreport.pseudonyms import Pseudonyms
from tundp.bugreport.redact import Redactor
from tundp.bugreport.secrets import SECRET_FLAGS, Secrets, is_secret_name
from tundp.daemon.unit import DIRECTORIES
from tundp.errors import ConfigError, TundpError
from tundp.files import SMALL_LEN, read_regular
from tundp.linux.listeners import listener
from tundp.settings.settings import Settings
from tundp.settings.sources import read_environment_file

AT_ONCE: Final = 6
"""Items that are made at a time."""
STATUS_S: Final = 10.0
FILES_S: Final = 5.0
"""How long settings files and units are read for secrets."""
_STATUS: Final = "daemon/status.json"
_CAPTURES: Final = ("capture/packets.pcapng", "capture/drops.pcapng")
_HOST_NAMES: Final = frozenset({"host", "hostname", "TundpHost", "node_name"})
"""Members of documents that hold a host's name."""
_ASSIGNED: Final = re.compile(r"""^[ \t]*"?Environment[ \t]*=(.*)$""", re.MULTILINE)
_SUBNET_ENV: Final = re.compile(r"^FLANNEL_(NETWORK|SUBNET)=([\d./]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a report is to be made of."""

    settings: Settings
    whose: str
    """In words, whose settings these are."""
    env_file: Path
    """The EnvironmentFile= of the unit."""
    arguments: Collection[str]
    """This command's own command line, and its variables: what is secret there is not shown."""
    variables: Mapping[str, str]
    for_s: float
    """Seconds of capture; 0 for none."""
    is_anonymous: bool
    """Whether addresses and host names are replaced by pseudonyms."""


async def collect(request: Request) -> tuple[Report, Redactor]:
    """Make the report. Nothing that fails keeps the rest from it: it is named as missing."""
    path = request.settings.admin_socket
    # 0 is one that listens and cannot be seen.
    pid = await asyncio.to_thread(listener, path)
    redactor = Redactor()
    has_learnt = await _learn_secrets(redactor.secrets, request, pid)
    status = await _status(path)
    if request.is_anonymous:
        redactor.pseudonyms = _pseudonyms(request.settings, status)
        redactor.pseudonyms.add_hosts(_host_names(status))
    report = Report(made_at=int(time()), head=_head(request, status, pid))
    if not has_learnt:
        why = f"no answer within {FILES_S:g} s: a secret that is only there is known by its place"
        report.miss("secrets of settings files and units", why)
    raw = await _make_all(_items(request, redactor, status, pid), report)
    if isinstance(status, dict):
        raw.append((_status_item(), Found(status), 0.0))
    else:
        report.miss(_STATUS, status)
    if redactor.pseudonyms is not None:
        for _, found, _ in raw:
            redactor.pseudonyms.add_hosts(_host_names(found.content))
    for item, found, took_s in raw:
        report.members.append(_member(item, found, took_s, redactor))
    report.missing = [replace(each, reason=redactor.text(each.reason)) for each in report.missing]
    report.head = redactor.value(report.head)
    return report, redactor


def _status_item() -> Item:
    async def never() -> Found:
        raise AssertionError

    about = "all the daemon says of itself: tundp status --json"
    return Item(name=_STATUS, about=about, make=never)


async def _status(path: Path) -> dict[str, Any] | str:
    """The daemon's status document, or why there is none."""
    try:
        return await fetch_document(path, limit_s=STATUS_S)
    except (TundpError, ValueError) as error:
        return str(error)


def _head(request: Request, status: dict[str, Any] | str, pid: int | None) -> dict[str, Any]:
    """What stands first in the manifest."""
    running = "none answers"
    if isinstance(status, dict):
        running = f"tundp {status.get('version')}, pid {status.get('pid')}"
    elif pid is not None:
        running = f"{f'process {pid}' if pid else 'one'} listens and does not answer"
    return {
        "made": _stamp(),
        "versions": daemon.versions(),
        "daemon": running,
        "admin_socket": str(request.settings.admin_socket),
        "user_id": os.geteuid(),
        "has_pseudonyms": request.is_anonymous,
        "capture_s": request.for_s,
    }


def _stamp() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")


def _items(
    request: Request, redactor: Redactor, status: dict[str, Any] | str, pid: int | None
) -> Iterator[Item]:
    """Everything but the status, in no order."""
    settings = request.settings
    path = settings.admin_socket
    if isinstance(status, dict):
        yield from _captures(path, redactor, request.for_s)
    yield from daemon.answer_items(path, redactor)
    yield from daemon.settings_items(settings, request.whose)
    yield from daemon.origin_items(pid or None, request.env_file, settings.config)
    yield from host.host_items(lambda: _devices(status))
    yield from host.log_items(pid or None)
    if pid:
        yield from host.process_items(pid)


def _captures(path: Path, redactor: Redactor, for_s: float) -> Iterator[Item]:
    if not for_s:
        return
    abouts = ("headers of packets, both sides of the daemon", "headers of dropped packets")
    for name, about, is_drops in zip(_CAPTURES, abouts, (False, True), strict=True):

        async def make(*, is_drops: bool = is_drops) -> Found:
            return await headers_captured(path, redactor, for_s=for_s, is_drops=is_drops)

        words = f"{about}: tundp replay, tshark"
        yield Item(name=name, about=words, make=make, limit_s=for_s + 15)


async def _make_all(items: Iterable[Item], report: Report) -> list[tuple[Item, Found, float]]:
    """What each item is made of; what cannot be made is named in the report."""
    made: list[tuple[Item, Found, float]] = []
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(item: Item) -> None:
        # Captures wait for their seconds, and keep nobody from a turn.
        async with contextlib.nullcontext() if item.name in _CAPTURES else turn:
            began = monotonic()
            try:
                async with asyncio.timeout(item.limit_s):
                    found = await item.make()
            except TimeoutError:
                report.miss(item.name, f"it took longer than {item.limit_s:g} s")
            except (TundpError, OSError) as error:
                report.miss(item.name, str(error))
            except Exception as error:  # noqa: BLE001  (named in the report)
                report.miss(item.name, f"a bug, please report it: {error!r}")
            else:
                made.append((item, found, monotonic() - began))

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(one(item))
    return made


def _member(item: Item, found: Found, took_s: float, redactor: Redactor) -> Member:
    content = found.content
    if isinstance(content, bytes):
        data = content  # a capture, redacted packet by packet
    elif isinstance(content, str):
        data = redactor.text(content).encode(errors="replace")
    else:
        data = f"{json.dumps(redactor.value(content), indent=1)}\n".encode()
    return Member(
        name=item.name,
        about=redactor.text(item.about),
        data=data,
        note=redactor.text(found.note),
        took_s=took_s,
    )


async def _learn_secrets(secrets: Secrets, request: Request, pid: int | None) -> bool:
    """Whatever holds a secret here, so that it is not in the report; whether all was read."""
    secrets.add_settings(request.settings)
    secrets.add_arguments(request.arguments)
    secrets.add_variables(request.variables)
    if pid:
        secrets.add_variables(daemon.variables_of(pid))
        secrets.add_arguments(daemon.arguments_of(pid))
    try:
        async with asyncio.timeout(FILES_S):
            variables, texts = await apart(_in_files, request)
    except TimeoutError:
        return False
    for each in variables:
        secrets.add_variables(each)
    for text in texts:
        secrets.add_url(text)
    return True


def _in_files(request: Request) -> tuple[list[dict[str, str]], list[str]]:
    """Variables of the settings files and the units, and texts of the units."""
    variables, texts = [], []
    with contextlib.suppress(ConfigError):
        variables.append(read_environment_file(request.env_file))
    if request.settings.config is not None:
        variables.append(_toml_secrets(request.settings.config))
    for directory in DIRECTORIES:
        for path in (directory / "tundp.service", *directory.glob("tundp.service.d/*.conf")):
            with contextlib.suppress(OSError):
                texts.append(read_regular(path, most_len=SMALL_LEN))
                variables.append(_assigned(texts[-1]))
    return variables, texts


def _toml_secrets(path: Path) -> dict[str, str]:
    """Texts of a --config file by the variables that mean the same."""
    try:
        document = tomllib.loads(read_regular(path, most_len=SMALL_LEN))
    except (OSError, ValueError):
        return {}
    names = {flag.name: flag.variable for flag in SECRET_FLAGS}
    return {
        names.get(name, name): value
        for name, value in document.items()
        if isinstance(value, str) and (name in names or is_secret_name(name) or "@" in value)
    }


def _assigned(text: str) -> dict[str, str]:
    """Variables of a unit's Environment= lines (systemd.exec(5))."""
    import shlex

    found = {}
    for line in _ASSIGNED.findall(text.replace("\\\n", " ")):
        with contextlib.suppress(ValueError):
            for word in shlex.split(line):
                name, equals, value = word.partition("=")
                if equals:
                    found[name] = value
    return found


def _pseudonyms(settings: Settings, status: dict[str, Any] | str) -> Pseudonyms:
    """Pseudonyms with a key that only this process knows."""
    network, subnet = _overlay(settings, status)
    endpoints = (urllib.parse.urlsplit(each).hostname for each in settings.etcd_endpoints)
    nodename = os.uname().nodename
    return Pseudonyms(
        os.urandom(32),
        overlay=network,
        subnet_len=24 if subnet is None else subnet.prefixlen,
        hosts=[
            nodename,
            nodename.partition(".")[0],
            *(each for each in endpoints if each and not re.fullmatch(r"[\d.]+|.*:.*", each)),
        ],
    )


def _overlay(
    settings: Settings, status: dict[str, Any] | str
) -> tuple[IPv4Network | None, IPv4Network | None]:
    """The overlay's network and this node's subnet, of the daemon or of subnet.env."""
    found: dict[str, Any] = {}
    if isinstance(status, dict):
        found = {name: status.get(name) for name in ("network", "subnet")}
    if not found.get("network"):
        with contextlib.suppress(OSError):
            text = read_regular(settings.subnet_file, most_len=SMALL_LEN)
            found = {name.lower(): value for name, value in _SUBNET_ENV.findall(text)}
    try:
        network = IPv4Network(found["network"]) if found.get("network") else None
        subnet = IPv4Interface(found["subnet"]).network if found.get("subnet") else None
    except ValueError:
        return None, None
    return network, subnet


def _host_names(value: Any) -> Iterator[str]:
    """Names of hosts in a document, by the names of their members."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name in _HOST_NAMES and isinstance(each, str):
                yield each
            else:
                yield from _host_names(each)
    elif isinstance(value, list):
        for each in value:
            yield from _host_names(each)


def _devices(status: dict[str, Any] | str) -> tuple[str, ...]:
    """The TUN and the uplink by the daemon's word; else the device of the default route."""
    found = []
    if isinstance(status, dict):
        backend = status.get("backend") or {}
        for name in ("device", "interface"):
            part = backend.get(name) or {}
            if isinstance(part, dict) and part.get("name"):
                found.append(str(part["name"]))
    if not found:
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
                words = line.split()
                if words[1] == "00000000" and words[7] == "00000000":
                    found.append(words[0])
    return tuple(dict.fromkeys(found))
