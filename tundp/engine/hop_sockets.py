"""Send sockets of single hops, for those who found the shared one full.

All hops share the engine's UDP socket until that has no room (EAGAIN): then somebody's datagrams
wait in the kernel, for ARP or in a queue of a slow path. The hop that met the refusal gets a
socket of its own, at once, so that what waits for one peer takes no room from others. Its
datagrams look the same on the wire. hop_slots.py decides who has one; this file is the
specification of native/src/hop_sockets.c, which does the same for each C worker.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import resource
import socket
import struct
import termios
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from tundp.engine import hop_slots
from tundp.engine.hop_slots import HopSlot
from tundp.linux.udp import open_sender, source_control

DESCRIPTORS_LEFT: Final = 64
"""To the rest of the process, at least."""
SWEEP_NS: Final = 1_000_000_000

Endpoint = tuple[str, int]


@dataclass(slots=True)
class _HopSocket:
    hop_id: int
    endpoint: Endpoint
    sock: socket.socket
    slot: HopSlot

    def queued(self) -> int:
        """Bytes of its datagrams the kernel still holds, as it accounts for them (SIOCOUTQ)."""
        found = fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("=i", found)[0])


class HopSockets:
    """Sends datagrams: by `shared`, or by the hop's own socket. Nothing waits here."""

    def __init__(self, shared: socket.socket) -> None:
        self._shared = shared
        self._own: list[_HopSocket] = []
        self._control: list[tuple[int, int, bytes]] = []
        self._closed_until: dict[int, int] = {}
        self._looked_ns = -hop_slots.LOOK_NS
        self._swept_ns = 0
        self.opened = 0
        """How often a hop got one."""

    def __len__(self) -> int:
        return len(self._own)

    def send(
        self, packet: memoryview | bytes, hop_id: int, endpoint: Endpoint, now_ns: int
    ) -> None:
        """Send one datagram to a hop. OSError as of sendto; BlockingIOError: its queue is full."""
        own = self._find(hop_id, endpoint, now_ns) if self._own else None
        if own is None:
            with contextlib.suppress(BlockingIOError):
                self._shared.sendto(packet, endpoint)
                return
            own = self._open(hop_id, endpoint, now_ns)
        if own is None:
            raise BlockingIOError(errno.EAGAIN, "no socket has room for this hop")
        is_taken = False
        try:
            own.sock.sendmsg([packet], self._control, 0, endpoint)
            is_taken = True
        finally:
            hop_slots.use(own.slot, now_ns, is_taken=is_taken)

    def sweep(self, now_ns: int) -> None:
        """Close, once a second at most, what hops no longer need."""
        if not self._own or now_ns - self._swept_ns < SWEEP_NS:
            return
        self._swept_ns = now_ns
        for own in list(self._own):
            if hop_slots.may_return(own.slot, own.queued(), now_ns):
                self._close(own)

    def close(self) -> None:
        """Close all of them; what was sent by them leaves all the same."""
        for own in list(self._own):
            self._close(own)
        self._closed_until.clear()

    def _find(self, hop_id: int, endpoint: Endpoint, now_ns: int) -> _HopSocket | None:
        """The hop's own socket, None for the shared one; BlockingIOError if the hop is closed."""
        own = next((each for each in self._own if each.hop_id == hop_id), None)
        if own is None:
            if self._closed_until.get(hop_id, now_ns) > now_ns:
                raise BlockingIOError(errno.EAGAIN, "this hop's queue was stuck")
            self._closed_until.pop(hop_id, None)
            return None
        queued = own.queued()
        if own.endpoint != endpoint or hop_slots.may_return(own.slot, queued, now_ns):
            self._close(own)
            return None
        hop_slots.look(own.slot, queued, now_ns)
        return own

    def _open(self, hop_id: int, endpoint: Endpoint, now_ns: int) -> _HopSocket | None:
        """A socket of the hop's own, None if there is none to be had."""
        sock = self._make() if len(self._own) < hop_slots.SOCKETS_MAX else None
        if sock is None and now_ns - self._looked_ns >= hop_slots.LOOK_NS:
            sock = self._take(now_ns)
            # Only a look counts: those who ask in between must not put off the next one.
            if sock is None:
                self._looked_ns = now_ns
        if sock is None:
            return None
        own = _HopSocket(hop_id, endpoint, sock, hop_slots.new_slot(now_ns))
        self._own.append(own)
        self.opened += 1
        return own

    def _take(self, now_ns: int) -> socket.socket | None:
        """A socket from another hop, if one can do without."""
        for each in self._own:
            hop_slots.look(each.slot, each.queued(), now_ns)
        picked = hop_slots.pick([each.slot for each in self._own], now_ns)
        if picked is None:
            return None
        own = self._own.pop(picked.number)
        if not picked.is_stuck:
            return own.sock
        # What waits in it stays with the kernel, so its hop needs no other just now.
        self._closed_until[own.hop_id] = now_ns + hop_slots.CLOSED_NS
        own.sock.close()
        return self._make()

    def _make(self) -> socket.socket | None:
        address, port = self._shared.getsockname()
        limit = resource.RLIM_INFINITY
        with contextlib.suppress(OSError):  # a seccomp filter
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            sock = open_sender(port, hop_slots.SEND_BUFFER_LEN)
        except OSError:
            return None
        if limit != resource.RLIM_INFINITY and sock.fileno() > limit - DESCRIPTORS_LEFT:
            sock.close()
            return None
        self._control = source_control(IPv4Address(address))
        return sock

    def _close(self, own: _HopSocket) -> None:
        self._own.remove(own)
        own.sock.close()
