"""Checks of the lease store: whether its endpoints can be reached, and what keeps them away."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from typing import Final
from urllib.parse import urlsplit

from tundp.doctor.context import Context, finding
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.netlink import Netlink

CONNECT_S: Final = 1.5
"""Deadline of a TCP connection to one endpoint."""
_PORTS: Final = {"http": 80, "https": 443}
_NO_WAY: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES})


async def check_endpoints(context: Context) -> AsyncIterator[Finding]:
    """A TCP connection to each etcd endpoint; nothing is sent."""
    settings, status = context.inspection.settings, context.status
    if settings.store.path is not None:
        if status is not None and status.store is not None and not status.store.is_answering:
            yield finding("store.away", Verdict.FAIL, f"{status.store.description} cannot be read")
        else:
            yield finding("store.endpoints", Verdict.OK, "the store is a file")
        return
    answers = await asyncio.gather(
        *(_connect(context.inspection.netlink, url) for url in settings.etcd_endpoints)
    )
    failed = [each for each in answers if each is not None]
    # One that answers is enough; the default names two ports of which one is older than etcd 2.
    verdict = Verdict.FAIL if len(failed) == len(answers) else Verdict.NOTE
    for finding_id, evidence, command, on, words in failed:
        yield finding(finding_id, verdict, evidence, command=command, on=on, words=words)
    if status is not None and status.store is not None and not status.store.is_answering:
        age = "" if status.store.age_s is None else f", leases are {status.store.age_s} s old"
        yield finding(
            "store.away",
            Verdict.FAIL,
            f"the daemon gets no answer from {status.store.description}{age}: peers stay as they"
            " were, and changes of others are not seen",
            words="" if failed else "its log tells what it meets: tundp status, journalctl",
        )
    elif len(failed) < len(answers):
        yield finding("store.endpoints", Verdict.OK, f"{len(answers) - len(failed)} connect")


Failure = tuple[str, str, str, str, str]
"""Id, evidence, command, the host it is for, words."""


async def _connect(netlink: Netlink, url: str) -> Failure | None:
    parts = urlsplit(url)
    name = parts.hostname or ""
    port = parts.port or _PORTS.get(parts.scheme, 2379)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(name, port)
    except TimeoutError:
        return (
            "store.filtered",
            f"{url} does not answer a connection within {CONNECT_S} s: down, or a firewall drops",
            "",
            "",
            f"can it be pinged: ping {name}; a firewall there has to let TCP {port} in from here",
        )
    except socket.gaierror as error:
        return "store.name", f"{url}: {error.strerror}", "", "", "see /etc/resolv.conf, /etc/hosts"
    except OSError as error:
        return await _explained(netlink, url, name, port, error)
    writer.close()
    return None


async def _explained(netlink: Netlink, url: str, name: str, port: int, error: OSError) -> Failure:
    text = f"{url}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno == errno.ECONNREFUSED:
        there = "" if name in ("localhost", "127.0.0.1", "::1") else name
        return (
            "store.refused",
            f"{text}: nothing listens there",
            "systemctl start etcd",
            there,
            "",
        )
    if error.errno in _NO_WAY and (command := await _route_remedy(netlink, name)):
        return "store.route", f"{text}: no route leads there", command, "", ""
    if error.errno == errno.EPERM:
        return (
            "store.forbidden",
            f"{text}: a local firewall rule refuses it",
            "",
            "",
            (f"see the OUTPUT chain for TCP {port}"),
        )
    return "store.route", text, "", "", f"ip route get {name}"


async def _route_remedy(netlink: Netlink, name: str) -> str:
    """What deletes the route that rejects packets to an address; empty if there is none."""
    try:
        to = IPv4Address(name)
        routes = await netlink.routes()
    except (ValueError, PlatformError):
        return ""
    fitting = [each for each in routes if to in each.destination]
    best = max(fitting, key=lambda each: each.destination.prefixlen, default=None)
    if best is None or best.is_unicast:
        return ""
    return f"ip route del {best.kind} {best.destination}"
