"""The admin socket: HTTP on a unix socket only root may open, server and client.

GET /v1/status    observe.status.Status as JSON, which `tundp status` shows
GET /v1/metrics   Prometheus text, whatever the flags
GET /v1/events    what happens to packets, from now on: observe/events.py
GET /v1/blackbox  the flight recorder as JSON: observe/blackbox.py
GET /v1/ledger    observe.ledger.Ledger as JSON: every lease, and what became of it;
                  ?address=A&address=B: only those that concern these
GET /v1/peers/    what other nodes say: admin_peers.py
GET /v1/leases    observe.leases.Leases as JSON; ?since=N: only events, from number N on

curl --unix-socket asks it as well. Each connection gets one answer, and all who ask while a
status is being made the next one: see observe.http_server. A stream of events lasts.

Why one room: server and client are the two halves of one protocol, and are read side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from http import HTTPStatus
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from aiohttp import (
    ClientError,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    StreamReader,
    UnixConnector,
    web,
)

import tundp
from tundp.admin_peers import ASK_PATH, TRACE_PATH, PeerDesk, serve_peers
from tundp.backoff import Contest, Outage
from tundp.engine.taps import Tap, TapRequest
from tundp.errors import FILES_STEP, PlatformError, TooManyReaders, Unsupported
from tundp.files import open_folder
from tundp.linux.listeners import is_stopped, listener
from tundp.observe.codec import Malformed
from tundp.observe.events import (
    BadQuery,
    EventStream,
    Hello,
    frames,
    subnets_by_address,
    tap_request,
)
from tundp.observe.http_server import BACKLOG, HttpServer, Shared, paced
from tundp.observe.leases import Leases
from tundp.observe.ledger import Ledger
from tundp.observe.status import STATUS_SCHEMA, Status
from tundp.printable import printable

_log = logging.getLogger(__name__)
T = TypeVar("T")

LeaseSource = Callable[[int | None], Callable[[], Leases] | None]
"""What makes the answer to a question for leases; None while there is no node."""

STATUS_PATH: Final = "/v1/status"
METRICS_PATH: Final = "/v1/metrics"
EVENTS_PATH: Final = "/v1/events"
BLACKBOX_PATH: Final = "/v1/blackbox"
LEDGER_PATH: Final = "/v1/ledger"
LEASES_PATH: Final = "/v1/leases"
SINCE: Final = {
    EVENTS_PATH: "0.2.0",
    BLACKBOX_PATH: "0.2.0",
    LEDGER_PATH: "0.2.0",
    LEASES_PATH: "0.2.0",
    ASK_PATH: "0.2.0",
    TRACE_PATH: "0.2.0",
    "/v1/chaos": "0.2.0",
}
"""The version of a daemon that answers a path first; the others every daemon does."""
STATUS_SINCE: Final = "0.2.0"
"""The version of a daemon whose status has the schema this version reads."""
ANSWER_S: Final = 30.0
"""Deadline for a daemon's answer: one with 65,000 peers takes seconds on a busy machine."""
SOON_S: Final = 1.0
"""Without an answer for so long, and then again, a process that is stopped is looked for."""
VERSION_S: Final = 3.0
"""Deadline for the version of a daemon that has refused."""
ASK_AGAIN_S: Final = 1.0
"""Between two requests for the peers' names."""
LOOK_S: Final = 5.0
"""Between two looks at the socket's path."""


@contextlib.asynccontextmanager
async def serve_admin(
    path: Path,
    status: Callable[[], Status],
    metrics: Callable[[], bytes],
    leases: LeaseSource | None = None,
    *,
    sock: socket.socket | None = None,
    looker: Looker | None = None,
    peers: PeerDesk | None = None,
    more: Callable[[HttpServer], object] = lambda _: None,
) -> AsyncIterator[AdminSocket]:
    """Answer on `path` until the block ends, then remove it.

    looker: who shows packets and past; peers: who asks other nodes; None: nobody does. more: adds
    paths of its own. sock: the listening socket, if it is open already; owned from here on. Yields
    the socket's keeper: a path that is removed is made again.
    """
    if sock is None:
        sock = await asyncio.to_thread(open_admin_socket, path)

    look = paced(status)

    async def make() -> bytes:
        # With tens of thousands of peers this takes a second, which the event loop cannot spare.
        return await asyncio.to_thread(_document, await look())

    shared, shared_metrics = Shared(make), Shared(paced(metrics))

    async def answer(_: web.Request) -> web.Response:
        body = await shared.get()
        return web.Response(body=body, content_type="application/json", charset="utf-8")

    async def answer_metrics(_: web.Request) -> web.Response:
        body = await shared_metrics.get()
        return web.Response(body=body, content_type="text/plain", charset="utf-8")

    async def answer_leases(request: web.Request) -> web.Response:
        since = request.query.get("since")
        if since is not None and not (since.isascii() and since.isdigit() and len(since) < 20):
            return web.json_response({"error": "since: not a number"}, status=400)
        make = None if leases is None else leases(None if since is None else int(since))
        if make is None:
            return web.json_response({"error": "the daemon has no lease yet"}, status=503)
        body = await asyncio.to_thread(_written, make)
        return web.Response(body=body, content_type="application/json", charset="utf-8")

    server = HttpServer(
        {STATUS_PATH: answer, METRICS_PATH: answer_metrics, LEASES_PATH: answer_leases},
        stop_s=0.25,
    )
    if looker is not None:
        server.add(EVENTS_PATH, functools.partial(_stream_events, looker, server.hold))
        server.add(BLACKBOX_PATH, functools.partial(_answer_blackbox, looker))
        server.add(LEDGER_PATH, functools.partial(_answer_ledger, looker))
    if peers is not None:
        serve_peers(server, peers)
    more(server)
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


class Looker(Protocol):
    """What a daemon lets be seen besides its status."""

    def open_tap(self, request: TapRequest) -> Tap:
        """A tap of its engine. Unsupported without an engine, TooManyReaders."""
        ...

    def hello(self) -> Hello:
        """What a reader of the tap must know."""
        ...

    def blackbox(self) -> Mapping[str, Any]:
        """The flight recorder's document; may block. Unsupported if there is none."""
        ...

    def ledger(self) -> Callable[[], Ledger]:
        """What makes the lease table, in any thread. Unsupported while there is none."""
        ...


async def _stream_events(
    looker: Looker, hold: Callable[[web.Request], object], request: web.Request
) -> web.StreamResponse:
    """Answer GET /v1/events until the client goes away."""
    try:
        tap = looker.open_tap(tap_request(request.query))
    except BadQuery as error:
        return web.json_response({"error": str(error), "position": error.position}, status=400)
    except TooManyReaders as error:
        return web.json_response({"error": str(error)}, status=503)
    except Unsupported as error:
        return web.json_response({"error": str(error)}, status=409)
    hold(request)
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    try:
        await response.prepare(request)
        async for frame in frames(tap, looker.hello()):
            # Waits while the client is slow: what the rings have no room for is lost meanwhile.
            await response.write(frame)
    except ConnectionError:
        pass
    finally:
        tap.close()
    return response


async def _answer_blackbox(looker: Looker, _: web.Request) -> web.Response:
    try:
        document = await asyncio.to_thread(looker.blackbox)
    except Unsupported as error:
        return web.json_response({"error": str(error)}, status=409)
    return web.json_response(document)


async def _answer_ledger(looker: Looker, request: web.Request) -> web.Response:
    try:
        about = [IPv4Address(each) for each in request.query.getall("address", [])]
        make = looker.ledger()
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    except Unsupported as error:
        return web.json_response({"error": str(error)}, status=409)

    def answer() -> str:
        table = make()
        return json.dumps((table.about(about) if about else table).to_json())

    # With tens of thousands of leases this takes a second, which the event loop cannot spare.
    return web.Response(text=await asyncio.to_thread(answer), content_type="application/json")


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


async def fetch_status(path: Path, *, limit_s: float | None = None) -> Status:
    """The status of the daemon behind `path`.

    PlatformError if none answers within limit_s (None: ANSWER_S), or one whose answer this version
    cannot read.
    """
    return read_status(path, await fetch_document(path, limit_s=limit_s))


def read_status(path: Path, document: dict[str, Any]) -> Status:
    """The answer of the daemon behind `path`; PlatformError if it cannot be read."""
    try:
        return Status.from_json(document)
    except Malformed as error:
        version, schema = document.get("version"), document.get("schema")
        if not isinstance(version, str) or not isinstance(schema, int) or schema == STATUS_SCHEMA:
            raise PlatformError(
                f"{path}: {error}; restart the daemon, or see what it says with tundp status --json"
            ) from None
    if schema > STATUS_SCHEMA:
        raise PlatformError(
            f"the daemon on {path} is tundp {version}, whose status (schema {schema}) this tundp"
            f" {tundp.__version__} (schema {STATUS_SCHEMA}) cannot read: use that version's command"
        )
    raise PlatformError(
        f"this needs tundp {STATUS_SINCE} on the daemon's side, it is {version} (status schema"
        f" {schema}, {STATUS_SCHEMA} is read): restart the daemon on {path} with this version; what"
        " it says: tundp status --json"
    )


async def fetch_ledger(path: Path, about: Collection[IPv4Address] = ()) -> Ledger:
    """The lease table of the daemon behind `path`. about: only what concerns these addresses.

    PlatformError if none answers, has none yet, or is of a version that does not show it.
    """
    query = "&".join(f"address={each}" for each in about)
    document = await fetch_document(path, f"{LEDGER_PATH}?{query}" if query else LEDGER_PATH)
    try:
        return Ledger.from_json(document)
    except Malformed as error:
        raise PlatformError(f"{path}: {error}; restart the daemon with this version") from None


async def fetch_blackbox(path: Path) -> dict[str, Any]:
    """The flight recorder's document of the daemon behind `path`: observe/blackbox.py.

    PlatformError if none answers, or one that has no flight recorder.
    """
    return await fetch_document(path, BLACKBOX_PATH)


async def fetch_leases(path: Path, since: int | None = None) -> Leases:
    """The leases of the daemon behind `path`; since: only events, from this number on.

    PlatformError if none answers, or one whose answer this version cannot read.
    """
    of = LEASES_PATH if since is None else f"{LEASES_PATH}?since={since}"
    document = await fetch_document(path, of)
    try:
        return Leases.from_json(document)
    except Malformed as error:
        why = document.get("error") if isinstance(document, dict) else None
        raise PlatformError(f"{path}: {why or error}") from None


async def fetch_document(
    path: Path, of: str = STATUS_PATH, *, limit_s: float | None = None
) -> dict[str, Any]:
    """An answer as the daemon sent it, members this version does not know included.

    PlatformError; BadQuery if the daemon does not understand what it is asked.
    """
    return await send_document(path, of, None, limit_s=limit_s)


async def send_document(
    path: Path, to: str, document: Mapping[str, Any] | None, *, limit_s: float | None = None
) -> dict[str, Any]:
    """The answer to a document sent by POST; None: by GET, without one."""
    text = await fetch_text(path, to, document, limit_s=limit_s)
    try:
        answer = json.loads(text)
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")  # noqa: TRY004
    except ValueError as error:
        raise _no_tundp(path, str(error)) from None
    return answer


async def fetch_text(
    path: Path,
    of: str,
    document: Mapping[str, Any] | None = None,
    *,
    limit_s: float | None = None,
) -> str:
    """The text of an answer, to a document by POST if there is one.

    PlatformError if none answers within limit_s, BadQuery.
    """
    limit_s = ANSWER_S if limit_s is None else limit_s

    async def fetch() -> str:
        timeout = ClientTimeout(total=None)
        connector = UnixConnector(str(path))
        async with (
            ClientSession(connector=connector, timeout=timeout) as session,
            session.request(
                "GET" if document is None else "POST", f"http://tundp{of}", json=document
            ) as response,
        ):
            if response.status != HTTPStatus.OK:
                raise await _refusal(path, of, response)
            return await response.text()

    try:
        return await _in_time(path, fetch(), limit_s)
    except (OSError, ClientError, TimeoutError, ValueError) as error:
        if isinstance(error, (PlatformError, BadQuery)):
            raise
        raise _no_answer(path, error) from None


async def _in_time(path: Path, answer: Coroutine[Any, Any, T], limit_s: float) -> T:
    """What a daemon answers. PlatformError after limit_s, sooner if its process is stopped."""
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + limit_s
    task = asyncio.ensure_future(answer)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=min(SOON_S, max(0.0, give_up_at - clock())))
            if task.done():
                break
            pid = await asyncio.to_thread(listener, path)
            if is_stopped(pid):
                raise PlatformError(
                    f"the daemon on {path} does not answer: its process {pid} is stopped by a"
                    f" signal, or by a debugger; kill -CONT {pid}"
                )
            if clock() >= give_up_at:
                who = f"process {pid}" if pid else "whoever listens there"
                raise PlatformError(
                    f"no daemon answers on {path} within {limit_s:g} s: {who} takes the question"
                    " and says nothing; tundp doctor names why, if it is a daemon"
                )
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _no_answer(path: Path, error: Exception) -> PlatformError:
    """Why nobody answered."""
    # aiohttp's texts speak of TLS; the errno says what happened.
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM):
        return PlatformError(f"only root may ask the daemon on {path}: run this as root", number)
    if isinstance(error, (ClientResponseError, ValueError)):
        return _no_tundp(path, getattr(error, "message", "") or str(error))
    why = os.strerror(number) if number else str(error) or type(error).__name__
    return PlatformError(
        f"no daemon answers on {path} ({why}): is tundp running, and with this --admin-socket?"
    )


def _no_tundp(path: Path, why: str) -> PlatformError:
    """For an answer that no daemon gives."""
    return PlatformError(
        f"what answers on {path} is no tundp ({printable(why.strip().splitlines()[0])}): name the"
        " daemon's socket with --admin-socket"
        if why.strip()
        else f"what answers on {path} is no tundp: name the daemon's socket with --admin-socket"
    )


async def ask_peer(
    path: Path, subnet: IPv4Network, what: str = "hello", start: int = 0
) -> dict[str, Any]:
    """What became of a question to the node that holds a subnet: admin_peers.py.

    PlatformError if no daemon answers, or one that cannot ask; the text says why.
    """
    query = f"subnet={subnet}&what={what}&start={start}"
    return await fetch_document(path, f"{ASK_PATH}?{query}")


@contextlib.asynccontextmanager
async def open_peer_trace(
    path: Path, subnet: IPv4Network, packets: str, seconds: float | None = None
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The objects of a trace on the node that holds a subnet, as they come: admin_peers.py.

    packets: the filter. BadQuery, and PlatformError if no daemon answers or it cannot ask.
    """
    query = {"subnet": str(subnet), "filter": packets}
    if seconds is not None:
        query["for"] = str(seconds)

    async def begin(content: StreamReader) -> StreamReader:
        return content

    async with _open_stream(path, TRACE_PATH, query, begin) as lines:

        async def objects() -> AsyncIterator[dict[str, Any]]:
            with contextlib.suppress(OSError, ClientError):
                async for line in lines:
                    yield json.loads(line)

        yield objects()


@contextlib.asynccontextmanager
async def open_events(path: Path, query: Mapping[str, str]) -> AsyncIterator[EventStream]:
    """What happens to packets of the daemon behind `path` from now on.

    query: `filter`, `stages`, `snap`, `size`; see observe.events. BadQuery, and PlatformError
    if nobody answers, or a daemon that cannot show packets.
    """

    async def begin(content: StreamReader) -> EventStream:
        async def read(length: int) -> bytes:
            try:
                return await content.readexactly(length)
            except (OSError, ClientError):
                raise asyncio.IncompleteReadError(b"", length) from None

        stream = EventStream(read, _Peers(path))
        await stream.begin()
        return stream

    async with _open_stream(path, EVENTS_PATH, query, begin) as stream:
        yield stream


@contextlib.asynccontextmanager
async def _open_stream(
    path: Path,
    of: str,
    query: Mapping[str, str],
    begin: Callable[[StreamReader], Coroutine[Any, Any, T]],
) -> AsyncIterator[T]:
    """What `begin` makes of an answer without an end. BadQuery, PlatformError."""
    async with contextlib.AsyncExitStack() as stack:
        timeout = ClientTimeout(total=None)
        session = await stack.enter_async_context(
            ClientSession(connector=UnixConnector(str(path)), timeout=timeout)
        )

        async def start() -> T:
            response = await stack.enter_async_context(
                session.get(f"http://tundp{of}", params=dict(query))
            )
            if response.status != HTTPStatus.OK:
                raise await _refusal(path, of, response)
            return await begin(response.content)

        try:
            begun = await _in_time(path, start(), ANSWER_S)
        except asyncio.IncompleteReadError:
            raise PlatformError(f"the daemon on {path} ended") from None
        except (OSError, ClientError, TimeoutError) as error:
            if isinstance(error, PlatformError):
                raise
            raise _no_answer(path, error) from None
        yield begun


async def _refusal(path: Path, of: str, response: ClientResponse) -> Exception:
    """What a daemon's refusal means."""
    try:
        answer = await response.json()
    except (ClientError, ValueError):
        answer = None
    if not isinstance(answer, dict):
        answer = {}
    if response.status == HTTPStatus.NOT_FOUND and "error" not in answer:
        return await _too_old(path, of.partition("?")[0])
    text = str(answer.get("error") or f"the daemon on {path} answers {response.status}")
    if response.status == HTTPStatus.BAD_REQUEST:
        return BadQuery(text, answer.get("position"))
    return PlatformError(text)


async def _too_old(path: Path, of: str) -> PlatformError:
    """For what a daemon has not got: the version it needs, and the one it is."""
    if of not in SINCE:
        return _no_tundp(path, f"it has no {of}")
    try:
        document = await fetch_document(path, limit_s=VERSION_S)
        version = printable(str(document.get("version", "of an unknown version")))
    except PlatformError:
        version = "of an unknown version"
    return PlatformError(
        f"this needs tundp {SINCE[of]} on the daemon's side, it is {version}: restart the daemon"
        f" on {path} with this version"
    )


class _Peers:
    """See observe.events.PeerNames: of the daemon's status, asked again for an unknown one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._subnets: dict[str, tuple[IPv4Network, ...]] = {}
        self._asked_at = -ASK_AGAIN_S

    async def subnets_of(self, address: IPv4Address) -> tuple[IPv4Network, ...]:
        """See PeerNames."""
        now = asyncio.get_running_loop().time()
        if str(address) not in self._subnets and now - self._asked_at >= ASK_AGAIN_S:
            self._asked_at = now
            with contextlib.suppress(PlatformError):
                document = await fetch_document(self._path)
                self._subnets = subnets_by_address(iter(document["peers"]))
        return self._subnets.get(str(address), ())


def _written(make: Callable[[], Leases]) -> bytes:
    return _document(make())


def _document(answer: Status | Leases) -> bytes:
    """The answer, encoded a peer at a time: one long call would keep the loop from running."""
    members = []
    for name, value in answer.to_json().items():
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
