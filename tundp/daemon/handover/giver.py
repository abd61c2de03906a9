"""P's side of a handover: gives everything away, and takes it back until the last moment.

See the package for the whole. One handover at a time; a client's bytes can do no more than keep
that one place for START_S, while packets flow and tasks run as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import tundp
from tundp.backend.base import Given
from tundp.daemon.handover import protocol
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
    write_counters,
)
from tundp.errors import TundpError
from tundp.lease import codec
from tundp.lease.claim import LeaseState
from tundp.linux import notify
from tundp.settings.settings import Settings

if TYPE_CHECKING:
    from tundp.daemon.node import Node

_log = logging.getLogger(__name__)

START_S: Final = 120.0
"""A successor may take so long to be ready: its store may be slow."""
FREEZE_S: Final = 5.0
"""P's own tasks get so long to end. Packets flow meanwhile."""
SWITCH_S: Final = 0.25
"""From P's last packet to S's first: the queues must hold what comes meanwhile."""
ATTEMPTS: Final = 3
_READ_LEN: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What the daemon has beside its node, for the successor."""

    settings: Settings
    lock: int | None
    listeners: Callable[[], Mapping[str, socket.socket | None]]
    """By their names in an Offer; None, or closed: there is none."""
    stop_serving: Callable[[], None]
    """Accept no more connections: the successor does."""


class Giver:
    """See the module; asked by tundp.admin_handover."""

    def __init__(self, node: Callable[[], Node | None], holdings: Holdings) -> None:
        """node: None while there is none."""
        self._node = node
        self._holdings = holdings
        self._task: asyncio.Task[None] | None = None
        self._is_taken = False
        """Whether a successor has the one place there is."""
        self._last: dict[str, Any] = {}
        self.taken_over: Mapping[str, Any] | None = None
        """What this daemon itself took over, if it did: for whoever asks how that went."""

    def report(self) -> Mapping[str, Any]:
        """Who this is, what it took over, and how the last handover of its own ended."""
        node = self._node()
        return {
            "pid": os.getpid(),
            "version": tundp.__version__,
            "schema": SCHEMA,
            "is_running": node is not None and node.is_running,
            "taken_over": self.taken_over,
            "last": self._last or None,
        }

    def accept(self, document: Any) -> str:
        """See HandoverDesk; the place is taken if there is nothing against it. BadMessage."""
        why = self._refusal(protocol.read_hello(document))
        if not why:
            self._is_taken = True
        return why

    def _refusal(self, hello: Hello) -> str:
        """Why nothing is handed over to this one, by name; empty if it may be."""
        node = self._node()
        settings = self._holdings.settings
        if hello.schema != SCHEMA:
            return (
                f"tundp {hello.version} hands over by schema {hello.schema}, this"
                f" {tundp.__version__} by {SCHEMA}: restart the daemon instead"
            )
        if Path(hello.subnet_file).absolute() != settings.subnet_file.absolute():
            return (
                f"this is the daemon of --subnet-file {settings.subnet_file}, not of"
                f" {hello.subnet_file}: name its --admin-socket"
            )
        if self._is_taken:
            return "another handover is under way: wait for its end"
        if os.getpid() == 1:
            return (
                "it is the first process of its container, which ends with it: start it below"
                " `tundp hold --` for that, or restart the container"
            )
        if node is None or not node.is_running:
            return "it has not started itself yet: try again when tundp status says so"
        if node.backend.engine is None:
            return (
                f"the backend {node.backend.name} has no descriptors to hand over: the kernel"
                " carries its packets, and a plain restart loses none"
            )
        if not node.backend.device_index:
            return "its TUN device is gone, and being made again: try again in a moment"
        return ""

    def abandon(self) -> None:
        """See HandoverDesk."""
        self._is_taken = False

    def begin(self, conn: socket.socket, document: Any) -> None:
        """See HandoverDesk."""
        node = self._node()
        assert node is not None, "accept() comes first"
        self._task = asyncio.ensure_future(self._run(conn, protocol.read_hello(document), node))

    async def close(self) -> None:
        """End a handover under way; the successor is told."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, conn: socket.socket, hello: Hello, node: Node) -> None:
        session = _Session(conn, node, self._holdings)
        ended, why = "failed", ""
        try:
            why = await session.run()
            ended = "refused" if why else "handed over"
        except asyncio.CancelledError:
            why = "the daemon is stopping"
            raise
        except ConnectionError:
            why = session.went_away
        except (OSError, TundpError) as error:
            why = str(error) or "it, or a task of ours, was silent for too long"
        except Exception as error:  # noqa: BLE001  (a bug costs this handover, not the daemon)
            why = f"bug: {error!r}"
            _log.exception("bug in a handover; please report this:")
        finally:
            if why:
                try:
                    session.withdraw(why)
                except (OSError, TundpError):
                    _log.exception("after a handover that failed; please report this:")
                _log.warning("handover to process %d: %s; going on", session.pid, why)
            self._last = {
                "pid": session.pid,
                "version": hello.version,
                "result": ended,
                "why": why,
                "at": time.time(),
            }
            conn.close()
            self._is_taken = not why


class _Session:
    """One handover. `run` returns why nothing came of it; empty: P has to go."""

    def __init__(self, conn: socket.socket, node: Node, holdings: Holdings) -> None:
        conn.setblocking(False)
        self._conn = conn
        self._node = node
        self._holdings = holdings
        self._decoder = Decoder()
        self.pid = _peer_pid(conn)
        self._is_frozen = self._is_paused = self._is_over = False

    async def run(self) -> str:
        _log.info("process %d asks to take over", self.pid)
        identity = self._offer()
        for attempt in range(1, ATTEMPTS + 1):
            match await self._receive(START_S):
                case Ready():
                    pass
                case Refuse(why=why):
                    return f"it refuses: {why}"
                case None:
                    return self.went_away
            if identity != self._node.backend.descriptors():
                return "the TUN device or a socket was replaced meanwhile: run it again"
            async with asyncio.timeout(FREEZE_S):
                self._is_frozen = True
                await self._node.freeze()
            if await self._switch() and self._commit():
                return ""
            why = f"it did not carry packets within {SWITCH_S:g} s"
            self.take_back()
            if attempt < ATTEMPTS:
                self._say(Withdrawn(why=why, may_try_again=True))
        return why

    @property
    def went_away(self) -> str:
        """What it means that S has closed its end."""
        what = "carried packets for good" if self._is_paused else "was ready"
        return f"it went away before it {what}"

    def withdraw(self, why: str) -> None:
        """Go on as if nothing had happened, and say so. Harmless when all is over."""
        self.take_back()
        if not self._is_over:
            self._is_over = True
            with contextlib.suppress(OSError):
                self._say(Withdrawn(why=why))

    def take_back(self) -> None:
        """Carry packets and run tasks again, if they do not."""
        if self._is_over:
            return
        # S may have set another mode of the device, or of the sockets.
        try:
            self._node.backend.resume(is_paused=self._is_paused)
            self._is_paused = False
        finally:
            if self._is_frozen:
                self._node.thaw()
                self._is_frozen = False

    def _offer(self) -> tuple[int, ...]:
        """Send the Offer; what the descriptors in it are, to be compared."""
        node = self._node
        assert node.backend.engine is not None
        given = node.backend.give()
        try:
            names, fds = _named(given, self._holdings)
            offer = Offer(
                version=tundp.__version__,
                pid=os.getpid(),
                node=protocol.Node(
                    node_id=node.identity.node_id, host=node.identity.host, run=node.identity.run
                ),
                network_config=node.manager.network_text,
                firewall=node.firewall.wanted,
                firewall_memory=json.dumps(node.firewall.memory()),
                lease=held_lease(node),
                counters=write_counters(node.backend.engine.counters()),
                notify_socket=os.environ.get("NOTIFY_SOCKET", ""),
                watchdog_usec=os.environ.get("WATCHDOG_USEC", ""),
                fd_store=os.environ.get("FDSTORE", ""),
                names=names,
            )
            protocol.send_offer(self._conn, offer, fds)
        finally:
            given.close()
        return node.backend.descriptors()

    async def _switch(self) -> bool:
        """Stop, and wait for S to carry packets; whether it does."""
        message: Message | None
        engine = self._node.backend.engine
        assert engine is not None
        lease = held_lease(self._node)
        since_ns = time.monotonic_ns()
        self._is_paused = True
        self._node.backend.pause()
        counters = write_counters(engine.counters())
        self._say(Paused(counters=counters, lease=lease, since_ns=since_ns))
        try:
            message = await self._receive(SWITCH_S)
        except TimeoutError:
            # P itself may have been late: what has come in time counts.
            message = self._have_received()
        match message:
            case Attached(gap_ns=gap_ns) if not self._is_at_end():
                _log.info("process %d carries packets after %.1f ms", self.pid, gap_ns / 1e6)
                return True
            case Refuse(why=why):
                raise BadMessage(f"it refuses: {why}")
            case Attached() | None:
                if self._is_at_end():
                    raise BadMessage(self.went_away)
        return False

    def _commit(self) -> bool:
        """Make S the daemon; False if it died meanwhile, or if systemd cannot be told.

        S tells systemd that it is ready once it has read Gone, which takes that only from the main
        process: so that one comes first.
        """
        if self.pid and not notify.notify(f"MAINPID={self.pid}") and notify.is_wanted():
            return False
        try:
            self._say(Gone())
        except OSError:
            notify.notify(f"MAINPID={os.getpid()}")
            return False
        self._is_over = True
        self._holdings.stop_serving()
        self._node.hand_over()
        _log.info("handed over to process %d: exiting", self.pid)
        return True

    def _say(self, message: Message) -> None:
        """Send; what does not fit a socket buffer that S does not read is an error. OSError."""
        frame = protocol.encode(message)
        if self._conn.send(frame) != len(frame):
            raise OSError("the successor does not read")

    async def _receive(self, limit_s: float) -> Ready | Refuse | Attached | None:
        """The next message that a P can use; None: S has closed. TimeoutError, BadMessage."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limit_s):
            while True:
                while (message := self._decoder.next()) is not None:
                    if isinstance(message, (Ready, Refuse)) or (
                        isinstance(message, Attached) and self._is_paused
                    ):
                        return message
                    if not isinstance(message, Attached):  # late, of a switch that was given up
                        raise BadMessage(f"a successor says no {type(message).__name__}")
                data = await loop.sock_recv(self._conn, _READ_LEN)
                if not data:
                    return None
                self._decoder.feed(data)

    def _have_received(self) -> Message | None:
        """What came until now, without waiting."""
        with contextlib.suppress(OSError):
            self._decoder.feed(self._conn.recv(_READ_LEN))
        return self._decoder.next()

    def _is_at_end(self) -> bool:
        """Whether S has closed its end, as the kernel does for a dead process."""
        try:
            return self._conn.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


def held_lease(node: Node) -> HeldLease:
    """The node's own lease as its claim has it."""
    lease, state = node.manager.own_lease(), node.manager.state()
    return HeldLease(
        key=str(lease.key),
        value=codec.encode_value(lease.attributes),
        revision=lease.revision,
        is_held=state.state is LeaseState.HELD,
        is_reservation=lease.is_reservation,
        expires_in_s=state.expires_in_s,
    )


def _named(given: Given, holdings: Holdings) -> tuple[list[str], list[int]]:
    """Names and numbers of everything that is handed over."""
    found = {f"tun-{number}": fd for number, fd in enumerate(given.tun_fds)}
    found |= {f"udp-{number}": sock.fileno() for number, sock in enumerate(given.udp_socks)}
    if given.image_fd is not None:
        found["image"] = given.image_fd
    listeners = holdings.listeners().items()
    found |= {name: sock.fileno() for name, sock in listeners if sock is not None}
    if holdings.lock is not None:
        found["lock"] = holdings.lock
    found = {name: fd for name, fd in found.items() if fd >= 0}
    return list(found), list(found.values())


def _peer_pid(conn: socket.socket) -> int:
    """The pid of who connected, by the kernel (unix(7), SO_PEERCRED); 0 if it is not to be seen."""
    ucred = conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, protocol.UCRED.size)
    pid: int = protocol.UCRED.unpack(ucred)[0]
    return pid
