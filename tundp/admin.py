"""The admin socket: HTTP on a unix socket only root may open, server and client.

GET /v1/status    observe.status.Status as JSON, which `tundp status` shows
GET /v1/metrics   Prometheus text, whatever the flags

curl --unix-socket asks it as well. Each connection gets one answer, and all who ask while a
status is being made the next one: see observe.http_server.
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
from tundp.observe.http_server import BACKLOG, HttpServer, Shared
from tundp.observe.status import Status

_log = logging.getLogger(__name__)

STATUS_PATH: Final = "/v1/status"
METRICS_PATH: Final = "/v1/metrics"
ANSWER_S: Final = 30.0
"""Deadline for a daemon's answer: one with 65,000 peers takes seconds on a busy machine."""
LOOK_S: Final = 5.0
"""Between two looks at the socket's path."""


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
    keeper: a path that is removed is made again.
    """
    if sock is None:
        sock = await asyncio.to_thread(open_admin_socket, path)

    async def make() -> bytes:
        # With tens of thousands of peers this takes a second, which the event loop cannot spare.
        return await asyncio.to_thread(_document, status())

    shared = Shared(make)

    async def answer(_: web.Request) -> web.Response:
        body = await shared.get()
        return web.Response(body=body, content_type="application/json", charset="utf-8")

    async def answer_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), content_type="text/plain", charset="utf-8")

    server = HttpServer({STATUS_PATH: answer, METRICS_PATH: answer_metrics}, stop_s=1.0)
    await server.open()
    keeper = AdminSocket(path, sock, server)
    try:
        await keeper.serve()
        watch = asyncio.ensure_future(keeper.keep())
        try:
            yield keeper
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
    finally:
        keeper.stop()
        await server.close()
        keeper.close()


class AdminSocket:
    """The admin socket and its path while the daemon runs."""

    def __init__(self, path: Path, sock: socket.socket, server: HttpServer) -> None:
        self._path = path
        self._sock = sock
        self._server = server
        self._listening: asyncio.AbstractServer | None = None
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
        self._listening = await self._server.listen(self._sock)

    async def keep(self) -> None:
        """Make the path again whenever it leads to another socket or nowhere."""
        clock = asyncio.get_running_loop().time
        await asyncio.to_thread(self._keep_name)
        while True:
            await asyncio.sleep(LOOK_S)
            if _identity(self._path) == self._made:
                continue
            try:
                sock = await asyncio.to_thread(self._make_again)
            except OSError as error:
                self._outage.failed(error, now=clock())
                continue
            if sock is not None:
                before, self._sock = self._sock, sock
                self._made = _identity(self._path)
                self.stop()
                await self.serve()
                before.close()
                await asyncio.to_thread(self._keep_name)
            self._outage.ended(now=clock())
            self._contest.undone(f"admin socket {self._path} was removed: made again", now=clock())

    @property
    def _kept(self) -> Path:
        """A second name of the socket, by which it gets its first one back.

        In a sandbox there is no new socket: what can be bound could also be connected, to others.
        """
        return self._path.with_name(f".{self._path.name}")

    def _keep_name(self) -> None:
        with contextlib.suppress(OSError):
            if self._kept.is_socket():
                self._kept.unlink()
            os.link(self._path, self._kept, follow_symlinks=False)

    def _make_again(self) -> socket.socket | None:
        """Give the socket its path back; a new one, listening, if that cannot be. OSError."""
        if _identity(self._kept) != self._made:
            return self._open_another()
        _make_room(self._path)
        os.link(self._kept, self._path, follow_symlinks=False)
        if _identity(self._path) != self._made:
            # In a folder that others may write, one was exchanged for theirs meanwhile.
            self._path.unlink(missing_ok=True)
            raise PlatformError(f"admin socket {self._path} was exchanged while it was made again")
        return None

    def _open_another(self) -> socket.socket:
        try:
            return open_admin_socket(self._path)
        except PlatformError as error:
            if error.errno != errno.EPERM:
                raise
            raise PlatformError(
                f"admin socket {self._path} and {self._kept.name} beside it were removed, and"
                " --sandbox refuses a new one: restart tundp",
                errno.EPERM,
            ) from None

    def stop(self) -> None:
        """Accept no more connections; those there are stay."""
        if self._listening is not None:
            self._listening.close()

    def close(self) -> None:
        """Remove the path, if it is still ours."""
        self._sock.close()
        for path in (self._path, self._kept):
            if _identity(path) == self._made:
                path.unlink(missing_ok=True)


def open_admin_socket(path: Path) -> socket.socket:
    """A listening unix socket at `path` that only root may connect to. Blocks for the disk.

    A stale socket of a dead daemon is replaced. PlatformError if a daemon has it, if it is no
    socket, or if the directory cannot be written.
    """
    sock: socket.socket | None = None
    try:
        _make_room(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        previous = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(previous)
        sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        if isinstance(error, PlatformError):
            raise
        step = "name another with --admin-socket"
        if error.errno == errno.EMFILE:
            step = FILES_STEP
        raise PlatformError(
            f"cannot listen on admin socket {path}: {error.strerror or error}; {step}",
            error.errno,
        ) from None
    return sock


async def fetch_status(path: Path) -> Status:
    """The status of the daemon behind `path`.

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
                connector=UnixConnector(str(path)), timeout=ClientTimeout(total=ANSWER_S)
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


def _document(status: Status) -> bytes:
    """The answer, encoded a peer at a time: one long call would keep the loop from running."""
    members = []
    for name, value in status.to_json().items():
        text = (
            f"[{', '.join(map(json.dumps, value))}]"
            if isinstance(value, list)
            else json.dumps(value)
        )
        members.append(f"{json.dumps(name)}: {text}")
    return f"{{{', '.join(members)}}}".encode()


def _make_room(path: Path) -> None:
    """Remove the socket of a dead daemon. PlatformError if it is alive, or no socket."""
    os.close(open_folder(path.parent, makes=True))
    if not path.exists():
        return
    if not path.is_socket():
        raise PlatformError(f"{path} exists and is no socket: name another --admin-socket")
    # Not a stream: a daemon stopped by a signal answers none, a sandbox allows none, and the
    # kernel finds out all the same (unix(7); net/unix/af_unix.c, unix_find_bsd).
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
    raise PlatformError(f"another tundp answers on admin socket {path}: use --admin-socket")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
