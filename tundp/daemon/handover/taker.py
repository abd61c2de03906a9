"""S's side of a handover: takes over from the daemon that runs, or ends and leaves it alone.

    ask()        before rights are dropped: connects, is refused by name or gets an Offer
    resources()  what of it this daemon's settings can use
    switch()     when all is ready but the engine's attaching: the only time nobody carries packets

See the package for the whole.

Why one room: one conversation, whose steps and ways back are read side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import tundp
from tundp.backend.base import Given
from tundp.backend.choose import parse_network_config
from tundp.daemon.handover import protocol
from tundp.daemon.handover.killer import Killer
from tundp.daemon.handover.protocol import (
    SCHEMA,
    Attached,
    BadMessage,
    Decoder,
    Gone,
    HeldLease,
    Hello,
    Message,
    Offer,
    Paused,
    Ready,
    Refuse,
    Withdrawn,
    read_counters,
)
from tundp.daemon.kept import Kept
from tundp.daemon.lock import is_running
from tundp.daemon.resources import Resources
from tundp.engine.counters import Counters
from tundp.engine.recorder import open_successor
from tundp.errors import PlatformError, TundpError
from tundp.lease.identity import Identity
from tundp.lease.network import NetworkConfig
from tundp.linux import fd_store
from tundp.linux.listeners import is_stopped, process_state
from tundp.linux.tun_device import device_of
from tundp.observe.codec import to_json
from tundp.printable import printable
from tundp.settings.settings import Settings
from tundp.subnet.base import Held

_log = logging.getLogger(__name__)

PATH: Final = "/v1/handover"
OFFER_S: Final = 10.0
"""P's event loop may be busy."""
PAUSE_S: Final = 10.0
"""From Ready to Paused: P ends its tasks meanwhile, and carries packets."""
GONE_S: Final = 2.0
STOPPED_S: Final = 0.3
"""Silent for so long, P is looked at: a process that is stopped carries no packets either."""
DEAD_S: Final = 5.0
"""A process that was killed is gone after so long, or it never goes."""
ATTEMPTS: Final = 3
_HEAD_MAX: Final = 1 << 14
_READ_LEN: Final = 1 << 16
_NO_DAEMON: Final = (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)


class Takeover:
    """What P has offered. Owned descriptors are in `resources()`; `close` what nobody took."""

    def __init__(self, conn: socket.socket, offer: Offer, fds: list[int], pid: int) -> None:
        self.offer = offer
        self.pid = pid
        """P's, by the kernel."""
        self.lease: HeldLease = offer.lease
        """P's own; final after `switch`."""
        self.base = read_counters(offer.counters)
        """What P has counted; final after `switch`. Filled in place: see EngineContext.base."""
        self.gap_ns: int | None = None
        """How long nobody carried packets; None before the switch, or after P's death."""
        self._conn = conn
        self._fds = dict(zip(offer.names, fds, strict=True))
        self._killer = Killer(pid)
        self._decoder = Decoder()
        self._is_over = False
        conn.setblocking(False)

    @property
    def identity(self) -> Identity:
        """Who this node is: P's identity and run, so that its lease need not be written again."""
        node = self.offer.node
        return Identity(node.node_id, node.host, node.run)

    @property
    def queues(self) -> int:
        """Of the TUN device, and as many sockets."""
        return sum(name.startswith("tun-") for name in self.offer.names)

    def held(self, network: NetworkConfig) -> Held:
        """P's lease as it last knew it. PlatformError if it does not fit the network config."""
        lease = self.lease.lease()
        before = parse_network_config(self.offer.network_config, f"process {self.pid}")
        changed = [
            name
            for name, ours, theirs in (
                ("Network", network.network, before.network),
                ("IPv6Network", network.network6, before.network6),
                ("SubnetLen, SubnetMin or SubnetMax", network.pool, before.pool),
                ("IPv6 subnets", network.pool6, before.pool6),
                ("Backend.Type", network.backend.name, before.backend.name),
            )
            if ours != theirs
        ]
        if changed:
            raise PlatformError(
                f"the network config has another {' and '.join(changed)} than the daemon before"
                " goes by, which cannot be taken over: restart it"
            )
        return Held(lease=lease, is_held=self.lease.is_held, expires_in_s=self.lease.expires_in_s)

    def firewall_memory(self) -> Mapping[str, Any]:
        """How P's firewall rules looked when they were made; empty if it has none to tell of."""
        try:
            found = json.loads(self.offer.firewall_memory)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def resources(self, settings: Settings) -> Resources:
        """The descriptors these settings can use, as a start is given them; others are closed.

        PlatformError names what P has not, or cannot be carried.
        """
        if settings.workers != self.queues:
            raise PlatformError(
                f"--workers={settings.workers} cannot be taken over: the TUN device has"
                f" {self.queues} queue{'s' * (self.queues != 1)}, which cannot be changed while"
                " packets flow. Keep the number, or restart the daemon: that makes another"
                " device, and packets of about a second are lost"
            )
        fds, self._fds = self._fds, {}
        # What P has is what it keeps in the store, if there is one.
        kept = Kept(fds)
        try:
            for name in ("lock", "admin"):
                if name not in fds:
                    raise PlatformError(f"the daemon before has no {name} to hand over: restart it")
            admin = socket.socket(fileno=fds.pop("admin"))
            found = Resources(lock=fds.pop("lock"), admin=admin, kept=kept)
            _require_name(fds["tun-0"], settings)
            tuns = [fds.pop(f"tun-{number}") for number in range(self.queues)]
            udp = [name for name in fds if name.startswith("udp-")]
            socks = [fds.pop(name) for name in sorted(udp, key=lambda each: int(each[4:]))]
            found.backend = Given(
                tun_fds=tuple(tuns),
                udp_socks=tuple(socket.socket(fileno=fd) for fd in socks),
                image_fd=fds.pop("image", None),
            )
            wanted = (settings.healthz_ip, settings.healthz_port)
            found.health = _listener(fds.pop("health", None), wanted if wanted[1] else None)
            found.metrics = _listener(fds.pop("metrics", None), settings.metrics_addr)
            with contextlib.suppress(PlatformError):
                found.recorder = open_successor(
                    settings.instance.recorder(settings.admin_socket), tundp.__version__
                )
        finally:
            protocol.close_all(list(fds.values()))
        return found

    def adopt_environment(self) -> None:
        """Tell P's systemd from now on; its watchdog waits for this process."""
        if self.offer.notify_socket and not os.environ.get("NOTIFY_SOCKET"):
            os.environ["NOTIFY_SOCKET"] = self.offer.notify_socket
        if self.offer.fd_store:
            os.environ["FDSTORE"] = self.offer.fd_store
        os.environ.pop("WATCHDOG_PID", None)
        if self.offer.watchdog_usec:
            os.environ["WATCHDOG_USEC"] = self.offer.watchdog_usec
            os.environ["WATCHDOG_PID"] = str(os.getpid())

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Tell P why, should the block fail before the switch is through."""
        try:
            yield
        except BaseException as error:
            self._refuse(str(error) or type(error).__name__)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Close what is still here. Harmless when repeated."""
        fds, self._fds = self._fds, {}
        protocol.close_all(list(fds.values()))
        self._killer.close()
        self._conn.close()

    async def switch(self, attach: Callable[[], None], detach: Callable[[], None]) -> None:
        """Attach when P has let go; TundpError, and not attached, if P goes on.

        P may say that it was too slow, and be asked again.
        """
        for _ in range(ATTEMPTS):
            if await self._try_switch(attach, detach):
                self._is_over = True
                self.close()
                return
        raise PlatformError(f"process {self.pid} could not be taken over from: it goes on")

    async def _try_switch(self, attach: Callable[[], None], detach: Callable[[], None]) -> bool:
        match await self._ask(Ready(), PAUSE_S):
            case Paused(counters=counters, lease=lease, since_ns=since_ns):
                _fill(self.base, read_counters(counters))
                self.lease = lease
                attach()
                self.gap_ns = time.monotonic_ns() - since_ns
            case Withdrawn(why=why):
                raise self._goes_on(why)
            case None:
                attach()
                return True
            case other:
                raise BadMessage(f"process {self.pid} says {type(other).__name__} for Paused")
        try:
            answer = await self._ask(Attached(gap_ns=self.gap_ns), GONE_S)
        except BaseException:
            detach()
            raise
        match answer:
            case Gone() | None:
                return True
            case Withdrawn(why=why, may_try_again=True):
                detach()
                _log.warning("process %d goes on (%s): trying again", self.pid, why)
                return False
        detach()
        if isinstance(answer, Withdrawn):
            raise self._goes_on(answer.why)
        raise BadMessage(f"process {self.pid} says {type(answer).__name__} for Gone")

    def _goes_on(self, why: str) -> PlatformError:
        self._is_over = True
        return PlatformError(f"the daemon before, process {self.pid}, goes on: {why}")

    async def _ask(self, message: Message, limit_s: float) -> Message | None:
        """Say something, and what P answers; None: P is dead by now, whatever it was before."""
        answer: Message | None = None
        try:
            await self._wait(self._say_and_hear(message), limit_s)
            answer = self._decoder.next()
        except TimeoutError:
            why = "is stopped" if is_stopped(self.pid) else f"does not answer within {limit_s:g} s"
            _log.warning("process %d %s: killing it", self.pid, why)
            self._killer.kill()
        except ConnectionError:
            # It may have said why before it closed its end.
            answer = self._last_words()
        if answer is None:
            await self._require_dead()
            if fd_store.is_there():
                raise PlatformError(
                    f"process {self.pid} has died, and is started again by who keeps its"
                    " descriptors: two would read the same queues"
                )
        return answer

    async def _say_and_hear(self, message: Message) -> None:
        """Return once a whole message is there, or P has closed its end."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._conn, protocol.encode(message))
        while not self._decoder.has_message():
            data = await loop.sock_recv(self._conn, _READ_LEN)
            if not data:
                break
            self._decoder.feed(data)

    async def _wait(self, exchange: Coroutine[Any, Any, None], limit_s: float) -> None:
        """Run it. TimeoutError after limit_s; sooner if P is stopped, which nothing will end."""
        task = asyncio.ensure_future(exchange)
        give_up_at = time.monotonic() + limit_s
        try:
            while not task.done():
                await asyncio.wait([task], timeout=STOPPED_S)
                if not task.done() and (time.monotonic() > give_up_at or is_stopped(self.pid)):
                    raise TimeoutError
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _last_words(self) -> Message | None:
        with contextlib.suppress(OSError):
            self._decoder.feed(self._conn.recv(_READ_LEN))
        return self._decoder.next()

    async def _require_dead(self) -> None:
        """Return once P is; PlatformError if it lives on, whatever it is about."""
        if not await asyncio.to_thread(self._killer.is_dead, DEAD_S):
            raise PlatformError(
                f"process {self.pid} has closed the connection and lives: is it the daemon, and"
                " of this version? Restart it"
            )
        _log.warning("process %d is gone: going on without it", self.pid)

    def _refuse(self, why: str) -> None:
        if not self._is_over:
            self._is_over = True
            with contextlib.suppress(OSError, TundpError):
                self._conn.send(protocol.encode(Refuse(why=printable(why, 1000))))


def ask(settings: Settings) -> Takeover | None:
    """Ask the daemon of these settings to hand over; None: none runs, a start is a normal one.

    Blocks. PlatformError if it refuses, or does not answer; it goes on then.
    """
    path = settings.admin_socket
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        conn.settimeout(OFFER_S)
        try:
            conn.connect(str(path))
        except _NO_DAEMON:
            conn.close()
            _require_none(settings)
            _log.info("--replace: no daemon runs here to take over from: a normal start")
            return None
        if (pid := _listening_pid(conn)) and not process_state(pid):
            # The socket lives on in a descriptor store.
            conn.close()
            _log.info("--replace: the daemon before, process %d, is gone: a normal start", pid)
            return None
        takeover = _offered(conn, path, settings)
    except TundpError:
        conn.close()
        raise
    except TimeoutError:
        pid = _listening_pid(conn)
        conn.close()
        why = f"its process {pid} is stopped: kill -CONT {pid}" if is_stopped(pid) else "it hangs"
        raise PlatformError(
            f"the daemon on {path} does not answer within {OFFER_S:g} s, {why}; nothing was"
            " changed. Restart it"
        ) from None
    except OSError as error:
        conn.close()
        raise PlatformError(f"cannot ask the daemon on {path}: {error}", error.errno) from None
    _log.info("taking over from process %d, tundp %s", takeover.pid, takeover.offer.version)
    return takeover


def _require_none(settings: Settings) -> None:
    if is_running(settings.instance):
        raise PlatformError(
            f"a daemon runs with --subnet-file {settings.subnet_file}, but nobody answers on"
            f" {settings.admin_socket}: name its --admin-socket, which cannot be another one"
        )


def _offered(conn: socket.socket, path: Path, settings: Settings) -> Takeover:
    hello = Hello(
        schema=SCHEMA, version=tundp.__version__, subnet_file=str(settings.subnet_file.absolute())
    )
    body = json.dumps(to_json(hello)).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: tundp\r\nConnection: Upgrade\r\nUpgrade: tundp-handover\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    conn.sendall(head.encode() + body)
    status = _read_status(conn)
    if status != HTTPStatus.SWITCHING_PROTOCOLS:
        raise PlatformError(_refusal(conn, path, status))
    return _read_offer(conn)


def _read_status(conn: socket.socket) -> int:
    """The answer's status. Reads up to the empty line, and not a byte of the messages behind it.

    They have descriptors, which come with the first byte.
    """
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        byte = conn.recv(1)
        if not byte or len(head) > _HEAD_MAX:
            raise PlatformError("what answers on the admin socket is no tundp, or has just ended")
        head += byte
    words = head.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def _refusal(conn: socket.socket, path: Path, status: int) -> str:
    body = bytearray()
    with contextlib.suppress(OSError):
        while len(body) < _HEAD_MAX and (data := conn.recv(_HEAD_MAX)):
            body += data
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        return (
            f"the daemon on {path} is of a version that cannot hand over: restart it (systemctl"
            " restart tundp, or stop it and start this one); packets of about a second are lost,"
            " none leaks"
        )
    try:
        why = str(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        why = f"HTTP status {status}"
    return f"the daemon on {path} does not hand over: {printable(why, 1000)}"


def _read_offer(conn: socket.socket) -> Takeover:
    decoder = Decoder()
    fds: list[int] = []
    pid = 0
    try:
        while (message := decoder.next()) is None:
            received = protocol.receive_with_fds(conn, _READ_LEN)
            fds += received.fds
            pid = pid or received.pid
            if not received.data:
                raise PlatformError("the daemon before ended while it was asked: start again")
            decoder.feed(received.data)
        if isinstance(message, Withdrawn):
            raise PlatformError(f"the daemon before does not hand over: {message.why}")
        if not isinstance(message, Offer):
            raise BadMessage(f"{type(message).__name__} for an Offer")
        if len(fds) != len(message.names):
            raise BadMessage(f"{len(message.names)} names for {len(fds)} descriptors")
        if not pid:
            # Its own number would be another process's here.
            raise PlatformError(
                "the daemon before is in another PID namespace, where it cannot be seen from here:"
                " start its successor in its container"
            )
        return Takeover(conn, message, fds, pid)
    except BaseException:
        protocol.close_all(fds)
        raise


def _listening_pid(conn: socket.socket) -> int:
    with contextlib.suppress(OSError):
        ucred = conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, protocol.UCRED.size)
        pid: int = protocol.UCRED.unpack(ucred)[0]
        return pid
    return 0


def _listener(fd: int | None, wanted: tuple[str, int] | None) -> socket.socket | None:
    """A listening socket that was given, if it is the one that is wanted; else it is closed."""
    if fd is None:
        return None
    sock = socket.socket(fileno=fd)
    if wanted is not None and sock.getsockname()[:2] == wanted:
        sock.setblocking(False)
        return sock
    sock.close()
    return None


def _require_name(tun_fd: int, settings: Settings) -> None:
    """Raise PlatformError unless the device has the name these settings ask for."""
    device = device_of(tun_fd)
    pattern = re.escape(settings.tun_name).replace("%d", r"\d+")
    if device is not None and not re.fullmatch(pattern, device.name):
        raise PlatformError(
            f"--tun-name={settings.tun_name} cannot be taken over: the device is {device.name}."
            " Restart the daemon"
        )


def _fill(base: Counters, final: Counters) -> None:
    """Make `base` what `final` is, in place."""
    for name in Counters.__slots__:
        setattr(base, name, getattr(final, name))


def report(takeover: Takeover) -> Mapping[str, Any]:
    """What `tundp upgrade` shows of it."""
    return {
        "pid": takeover.pid,
        "version": takeover.offer.version,
        "gap_ms": None if takeover.gap_ns is None else round(takeover.gap_ns / 1e6, 3),
        "at": time.time(),
    }
