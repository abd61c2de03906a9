"""The admin socket: a running daemon answers questions about itself in JSON over HTTP.

`GET /v1/status` on a unix socket only root may open. `tundp status` asks it; so can
curl --unix-socket. The schema number in the answer changes when a field changes meaning
or goes; new fields come without notice. `GET /v1/metrics` is Prometheus text, served here
whatever the flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web

from tundp.errors import PlatformError
from tundp.observe.codec import Malformed
from tundp.observe.status import Status

STATUS_PATH: Final = "/v1/status"
METRICS_PATH: Final = "/v1/metrics"
_PROBE_S: Final = 1.0


@contextlib.asynccontextmanager
async def serve_admin(
    path: Path, status: Callable[[], Status], metrics: Callable[[], bytes]
) -> AsyncIterator[None]:
    """Answer on `path` until the block ends; a stale socket of a dead daemon is replaced."""

    async def answer(_: web.Request) -> web.Response:
        # Tens of thousands of peers take a second, which the event loop has not.
        text = await asyncio.to_thread(_document, status())
        return web.Response(text=text, content_type="application/json")

    async def answer_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get(STATUS_PATH, answer)
    app.router.add_get(METRICS_PATH, answer_metrics)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await asyncio.to_thread(_make_room, path)
        previous = os.umask(0o177)
        try:
            await web.UnixSite(runner, str(path)).start()
        finally:
            os.umask(previous)
        made = _identity(path)
    except PlatformError:
        await runner.cleanup()
        raise
    except OSError as error:
        await runner.cleanup()
        raise PlatformError(
            f"cannot listen on admin socket {path}: {error.strerror or error};"
            " name another with --admin-socket",
            error.errno,
        ) from None
    try:
        yield
    finally:
        await runner.cleanup()
        if _identity(path) == made:
            path.unlink(missing_ok=True)


async def fetch_status(path: Path) -> Status:
    """What the daemon behind `path` says of itself.

    PlatformError if none answers, or one whose answer this version cannot read.
    """
    return read_status(path, await fetch_document(path))


def read_status(path: Path, document: dict[str, Any]) -> Status:
    """The answer of the daemon behind `path`; PlatformError if it cannot be read."""
    try:
        return Status.from_json(document)
    except Malformed as error:
        raise PlatformError(
            f"{path}: {error}; restart the daemon, or see what it says with tundp status --json"
        ) from None


async def fetch_document(path: Path) -> dict[str, Any]:
    """The same as the daemon sent it, members this version does not know included."""
    try:
        async with (
            ClientSession(
                connector=UnixConnector(str(path)), timeout=ClientTimeout(total=5)
            ) as session,
            session.get(f"http://tundp{STATUS_PATH}") as response,
        ):
            answer: dict[str, Any] = await response.json()
            return answer
    except (OSError, ClientError, TimeoutError) as error:
        # aiohttp's texts speak of TLS; the errno says what happened.
        number = getattr(error, "errno", None)
        if number in (errno.EACCES, errno.EPERM):
            raise PlatformError(
                f"only root may ask the daemon on {path}: run this as root", number
            ) from None
        why = os.strerror(number) if number else str(error) or type(error).__name__
        raise PlatformError(
            f"no daemon answers on {path} ({why}): is tundp running, and with this --admin-socket?"
        ) from None


def _document(status: Status) -> str:
    return json.dumps(status.to_json())


def _make_room(path: Path) -> None:
    """Remove the socket of a daemon that is no more; refuse to remove anything else."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not path.exists():
        return
    if not path.is_socket():
        raise PlatformError(f"{path} is there and no socket: name another --admin-socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A daemon that is stopped accepts nothing, but is one.
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass
    raise PlatformError(f"another tundp answers on admin socket {path}: use --admin-socket")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
