"""The admin socket: HTTP on a unix socket only root may open, server and client.

GET /v1/status    observe.status.Status as JSON, which `tundp status` shows
GET /v1/metrics   Prometheus text, whatever the flags

curl --unix-socket asks it as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web

from tundp.backoff import Contest, Outage
from tundp.errors import FILES_STEP, PlatformError
from tundp.files import open_folder
from tundp.observe.codec import Malformed
from tundp.observe.status import Status

_log = logging.getLogger(__name__)

STATUS_PATH: Final = "/v1/status"
METRICS_PATH: Final = "/v1/metrics"
ANSWER_S: Final = 30.0
"""Deadline for a daemon's answer: one with 65,000 peers takes seconds on a busy machine."""
LOOK_S: Final = 5.0
"""Between two looks at the socket's path."""
_PROBE_S: Final = 1.0
_BACKLOG: Final = 128


@contextlib.asynccontextmanager
async def serve_admin(
    path: Path,
    status: Callable[[], Status],
    metrics: Callable[[], bytes],
    *,
    sock: socket.socket | None = None,
) -> AsyncIterator[AdminSocket]:
    """Answer on `path` until the block ends, then remove it.

    sock: the listening socket, if it is open already; owned from here on. Yields the socket's
    keeper: a socket whose path is removed is made again.
    """
    if sock is None:
        sock = await asyncio.to_thread(open_admin_socket, path)

    async def answer(_: web.Request) -> web.Response:
        # With tens of thousands of peers this takes a second, which the event loop cannot spare.
        text = await asyncio.to_thread(_document, status())
        return web.Response(text=text, content_type="application/json")

    async def answer_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get(STATUS_PATH, answer)
    app.router.add_get(METRICS_PATH, answer_metrics)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    keeper = AdminSocket(path, sock, runner)
    try:
        await keeper.serve()
        watch = asyncio.ensure_future(keeper.keep())
        try:
            yield keeper
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
    finally:
        await runner.cleanup()
        keeper.close()


class AdminSocket:
    """The admin socket and its path while the daemon runs."""

    def __init__(self, path: Path, sock: socket.socket, runner: web.AppRunner) -> None:
        self._path = path
        self._sock = sock
        self._runner = runner
        self._site: web.SockSite | None = None
        self._made = _identity(path)
        self._outage = Outage(_log, "admin socket")
        self._contest = Contest(_log)

    @property
    def error(self) -> str:
        """Why nobody can ask the daemon, or who keeps removing its socket; empty if all is well."""
        now = asyncio.get_running_loop().time()
        return self._outage.error or self._contest.words(now=now)

    async def serve(self) -> None:
        """Answer on the socket of now."""
        self._site = web.SockSite(self._runner, self._sock)
        await self._site.start()

    async def keep(self) -> None:
        """Make the socket again whenever its path leads to another one or nowhere."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(LOOK_S)
            if _identity(self._path) == self._made:
                continue
            try:
                sock = await asyncio.to_thread(open_admin_socket, self._path)
            except OSError as error:
                self._outage.failed(error, now=clock())
                continue
            before, self._sock = (self._site, self._sock), sock
            self._made = _identity(self._path)
            await self.serve()
            if before[0] is not None:
                await before[0].stop()
            before[1].close()
            self._outage.ended(now=clock())
            self._contest.undone(f"admin socket {self._path} was removed: made again", now=clock())

    def close(self) -> None:
        """Remove the path, if it is still ours."""
        self._sock.close()
        if _identity(self._path) == self._made:
            self._path.unlink(missing_ok=True)


def open_admin_socket(path: Path) -> socket.socket:
    """A listening unix socket at `path` that only root may connect to; blocks up to a second.

    A stale socket of a dead daemon is replaced. PlatformError if a daemon has it, if it is no
    socket, or if the directory cannot be written.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _make_room(path)
        previous = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(previous)
        sock.listen(_BACKLOG)
    except PlatformError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        step = "name another with --admin-socket"
        if error.errno == errno.EMFILE:
            step = FILES_STEP
        raise PlatformError(
            f"cannot listen on admin socket {path}: {error.strerror or error}; {step}",
            error.errno,
        ) from None
    return sock


async def fetch_status(path: Path, *, limit_s: float = ANSWER_S) -> Status:
    """The status of the daemon behind `path`.

    PlatformError if none answers within limit_s, or one whose answer this version cannot read.
    """
    return read_status(path, await fetch_document(path, limit_s=limit_s))


def read_status(path: Path, document: dict[str, Any]) -> Status:
    """The answer of the daemon behind `path`; PlatformError if it cannot be read."""
    try:
        return Status.from_json(document)
    except Malformed as error:
        raise PlatformError(
            f"{path}: {error}; restart the daemon, or see what it says with tundp status --json"
        ) from None


async def fetch_document(path: Path, *, limit_s: float = ANSWER_S) -> dict[str, Any]:
    """The same as the daemon sent it, members this version does not know included."""
    try:
        async with (
            ClientSession(
                connector=UnixConnector(str(path)), timeout=ClientTimeout(total=limit_s)
            ) as session,
            session.get(f"http://tundp{STATUS_PATH}") as response,
        ):
            answer: dict[str, Any] = await response.json()
            return answer
    except (OSError, ClientError, TimeoutError, ValueError) as error:
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
    """The answer, encoded a peer at a time: one long call would keep the loop from running."""
    members = []
    for name, value in status.to_json().items():
        text = (
            f"[{', '.join(map(json.dumps, value))}]"
            if isinstance(value, list)
            else json.dumps(value)
        )
        members.append(f"{json.dumps(name)}: {text}")
    return f"{{{', '.join(members)}}}"


def _make_room(path: Path) -> None:
    """Remove the socket of a dead daemon. PlatformError if it is alive, or no socket."""
    os.close(open_folder(path.parent, makes=True))
    if not path.exists():
        return
    if not path.is_socket():
        raise PlatformError(f"{path} exists and is no socket: name another --admin-socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A daemon stopped by a signal does not answer, but is alive.
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
