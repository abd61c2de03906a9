"""What is served over TCP: flannel's /healthz and /readyz, and Prometheus metrics.

/healthz   200 `flanneld is running`, 503 `flanneld is not running` naming the check
/readyz    200 `flanneld is ready`, 503 `flanneld is not ready yet`
           with ?verbose JSON: every check, its state and a word why
/metrics   on --metrics-addr
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from tundp.errors import PlatformError
from tundp.observe.health import Check, Health
from tundp.observe.metrics import CONTENT_TYPE, Metrics

_log = logging.getLogger(__name__)

CONNECTIONS = 64
"""At a time, of each server."""
HEALTHY = ("flanneld is running", "flanneld is not running")
READY = ("flanneld is ready", "flanneld is not ready yet")


@contextlib.asynccontextmanager
async def serve_health(ip: str, port: int, health: Health) -> AsyncIterator[None]:
    """Answer probes on ip:port until the block ends; port 0: not at all."""
    app = web.Application()
    app.router.add_get("/healthz", _answer(health.alive, HEALTHY))
    app.router.add_get("/readyz", _answer(health.ready, READY))
    async with _serve(app, ip, port, "--healthz-ip and --healthz-port"):
        yield


@contextlib.asynccontextmanager
async def serve_metrics(address: tuple[str, int] | None, metrics: Metrics) -> AsyncIterator[None]:
    """Answer Prometheus on `address` until the block ends; None: not at all."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/metrics", answer)
    ip, port = address or ("", 0)
    async with _serve(app, ip, port, "--metrics-addr"):
        yield


def _answer(
    look: Callable[[], list[Check]], words: tuple[str, str]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        checks = look()
        is_ok = all(check.is_ok for check in checks)
        status = 200 if is_ok else 503
        text = words[0] if is_ok else words[1]
        if "verbose" in request.query:
            body = {
                "ok": is_ok,
                "status": text,
                "failing": [check.name for check in checks if not check.is_ok],
                "checks": [check.as_dict() for check in checks],
            }
            return web.json_response(body, status=status)
        return web.Response(text=text, status=status)

    return answer


@contextlib.asynccontextmanager
async def _serve(app: web.Application, ip: str, port: int, flag: str) -> AsyncIterator[None]:
    if not port:
        yield
        return
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=3.0)
    await runner.setup()
    try:
        handlers = runner.server
        assert handlers is not None

        def accept() -> asyncio.Protocol:
            # Whoever opens connections and is silent must not take the descriptors of the
            # overlay: the oldest go first, and a probe always gets its answer.
            for idle in handlers.connections[: 1 - CONNECTIONS]:
                idle.force_close()
            return handlers()

        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(accept, ip, port, reuse_address=True)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise PlatformError(
                f"cannot listen on {ip}:{port} ({flag}): {why}", error.errno or errno.EIO
            ) from None
        try:
            yield
        finally:
            server.close()
    finally:
        await runner.cleanup()
