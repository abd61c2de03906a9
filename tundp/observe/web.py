"""What is served over TCP: flannel's /healthz and /readyz, and Prometheus metrics.

/healthz   200 `flanneld is running`, 503 `flanneld is not running` if a check fails
/readyz    200 `flanneld is ready`, 503 `flanneld is not ready yet`
           both with ?verbose: a line a check, as Kubernetes' own, with what was seen
           both with ?format=json or `Accept: application/json`: the same as JSON
/metrics   on --metrics-addr

Each connection gets one answer: see http_server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from aiohttp import web

from tundp.backoff import Outage
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict, failures
from tundp.observe.health import Health
from tundp.observe.http_server import BACKLOG, Handler, HttpServer, Shared, paced
from tundp.observe.metrics import CONTENT_TYPE, Metrics

_log = logging.getLogger(__name__)

STOP_S = 0.25
"""Answers under way get so long at the end: a successor is waiting for this process to be gone."""
REOPEN_S = 5.0
"""Between two tries to listen on a port that another program has."""
HEALTHY = ("flanneld is running", "flanneld is not running")
READY = ("flanneld is ready", "flanneld is not ready yet")
_MARKS = {
    Verdict.OK: ("[+]", "ok"),
    Verdict.FAIL: ("[-]", "failed"),
    Verdict.WARN: ("[!]", "warning"),
    Verdict.NOTE: ("[.]", "note"),
    Verdict.UNKNOWN: ("[?]", "unknown"),
}


@contextlib.asynccontextmanager
async def serve_health(sock: socket.socket | None, health: Health) -> AsyncIterator[None]:
    """Answer probes on a socket of `open_listener` until the block ends; None: not at all."""
    routes = {"/healthz": _answer(health.alive, HEALTHY), "/readyz": _answer(health.ready, READY)}
    async with _serve(routes, sock):
        yield


class MetricsServer:
    """Metrics on --metrics-addr, also when another program has the port at first."""

    def __init__(self, ip: str, port: int, sock: socket.socket | None, metrics: Metrics) -> None:
        """sock: of `open_listener`, owned from here on; None if it could not be opened."""
        self._where = (ip, port)
        self._sock = sock
        self._metrics = metrics
        self._outage = Outage(_log, "metrics")

    @property
    def error(self) -> str:
        """Why nobody can read the metrics; empty if anybody can."""
        return self._outage.error

    async def run(self) -> None:
        """Serve until cancelled, as soon as the port is free."""
        clock = asyncio.get_running_loop().time
        while self._sock is None:
            try:
                self._sock = open_listener(*self._where, "--metrics-addr")
            except PlatformError as error:
                self._outage.failed(error, now=clock())
                await asyncio.sleep(REOPEN_S)
        self._outage.ended(now=clock())
        async with serve_metrics(self._sock, self._metrics):
            await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serve_metrics(sock: socket.socket | None, metrics: Metrics) -> AsyncIterator[None]:
    """Answer Prometheus on a socket of `open_listener` until the block ends; None: not at all."""
    shared = Shared(paced(metrics.render))

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=await shared.get(), headers={"Content-Type": CONTENT_TYPE})

    async with _serve({"/metrics": answer}, sock):
        yield


def open_listener(ip: str, port: int, flag: str) -> socket.socket:
    """A listening TCP socket on ip:port. PlatformError names `flag`."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((ip, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        why = os.strerror(error.errno) if error.errno else str(error)
        raise PlatformError(
            f"cannot listen on {ip}:{port} ({flag}): {why}", error.errno or errno.EIO
        ) from None
    return sock


def _answer(checks: Callable[[], list[Finding]], words: tuple[str, str]) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        findings = checks()
        failing = failures(findings)
        status = 503 if failing else 200
        text = words[1] if failing else words[0]
        if _wants_json(request):
            body = {
                "ok": not failing,
                "status": text,
                "failing": [finding.id for finding in failing],
                "checks": [_as_check(finding) for finding in findings],
            }
            return web.json_response(body, status=status)
        if "verbose" in request.query:
            text = "\n".join([*map(_as_line, findings), text, ""])
        return web.Response(text=text, status=status)

    return answer


def _wants_json(request: web.Request) -> bool:
    accepted = request.headers.get("Accept", "")
    return request.query.get("format") == "json" or "application/json" in accepted


def _as_line(finding: Finding) -> str:
    """A check as Kubernetes' /readyz?verbose has it, and what was seen: `[+]lease ok: held`.

    Kubernetes knows `[+]` and `[-]`; what is neither has marks of its own.
    """
    mark, word = _MARKS[finding.verdict]
    seen = "; ".join(filter(None, (finding.evidence, finding.next_step)))
    return f"{mark}{finding.id} {word}: {' '.join(seen.split())}"


def _as_check(finding: Finding) -> dict[str, Any]:
    """A finding under the names this answer has always had."""
    return {
        "name": finding.id,
        "ok": not finding.is_failure,
        "verdict": finding.verdict.value,
        "detail": finding.evidence,
        "next_step": finding.next_step,
    }


@contextlib.asynccontextmanager
async def _serve(routes: Mapping[str, Handler], sock: socket.socket | None) -> AsyncIterator[None]:
    if sock is None:
        yield
        return
    server = HttpServer(routes, stop_s=STOP_S)
    await server.open()
    try:
        listening = await server.listen(sock)
        try:
            yield
        finally:
            listening.close()
    finally:
        await server.close()
