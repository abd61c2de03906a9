"""The messages of a handover on the wire: length-prefixed JSON, descriptors beside the first.

    frame   4 bytes length, big-endian; so many bytes of a JSON object, MESSAGE_MAX at most
            {"type": "offer", ...}; members nobody knows are passed over, missing ones refused
    Offer   has its descriptors as one SCM_RIGHTS message (unix(7)), FDS_MAX at most, in the
            order of `names`; no other message has any

Whatever else comes is BadMessage, which names it. No clock here, and no decisions.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from tundp.engine.counter_base import from_document
from tundp.engine.counters import Counters
from tundp.errors import LeaseFormatError, TundpError
from tundp.lease import codec as lease_codec
from tundp.lease.model import TTL_UNKNOWN, Lease
from tundp.observe.codec import AS_IT_IS, Malformed, from_json, to_json

SCHEMA: Final = 1
"""Of messages and their order: another one is refused, whatever the versions."""
MESSAGE_MAX: Final = 1 << 18
"""Bytes of a message; a network config may be long."""
FDS_MAX: Final = 160
"""Descriptors of an Offer; the kernel takes 253 (SCM_MAX_FD, include/net/scm.h)."""
_LENGTH: Final = struct.Struct("!I")
UCRED: Final = struct.Struct("=iII")
"""struct ucred: pid, uid, gid (unix(7))."""

M = TypeVar("M")


class BadMessage(TundpError):  # noqa: N818
    """What the other side said cannot be: it is no tundp, or one of another version."""


def _raw() -> Any:
    """A str that programs read back: not made printable."""
    return field(metadata={AS_IT_IS: True})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """S introduces itself: the body of the request."""

    schema: int
    version: str
    subnet_file: str = _raw()
    """Which daemon of the host it is to replace: see tundp.instance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLease:
    """P's own lease as it last knew it."""

    key: str
    value: str = _raw()
    """As lease.codec writes it."""
    revision: int
    is_held: bool
    is_reservation: bool
    expires_in_s: float | None
    """None: it never does, or nobody knows."""

    def lease(self) -> Lease:
        """The lease; BadMessage if it is none."""
        try:
            return Lease(
                key=lease_codec.parse_key(self.key),
                attributes=lease_codec.parse_value(self.value),
                revision=self.revision,
                lease_ttl_s=None if self.is_reservation else TTL_UNKNOWN,
            )
        except (LeaseFormatError, ValueError) as error:
            raise BadMessage(f"its lease cannot be read: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Who P is for the other nodes: lease.identity.Identity. S goes on under the same run."""

    node_id: str
    host: str
    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What P is, and has."""

    version: str
    pid: int
    node: Node
    network_config: str = _raw()
    """The text it goes by."""
    firewall: str = _raw()
    """The rules it keeps, in words that are equal for equal rules."""
    firewall_memory: str = _raw()
    """How they looked when they were made, as JSON: linux.firewall.choose.Firewall.memory."""
    lease: HeldLease
    counters: str = _raw()
    """As of now, by `write_counters`: final ones come with Paused."""
    notify_socket: str = _raw()
    """$NOTIFY_SOCKET, empty for none; watchdog_usec likewise."""
    watchdog_usec: str
    fd_store: str
    """$FDSTORE, as sd_pid_notify_with_fds(3) has it; empty: no descriptor is kept."""
    names: Sequence[str]
    """Of the descriptors: `tun-0` .., `udp-0` .., `lock`, `admin`, `health`, `metrics`,
    `image`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """S could attach at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """S cannot go on from what it was offered, and ends."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """P writes and carries nothing any more."""

    counters: str = _raw()
    lease: HeldLease
    since_ns: int
    """CLOCK_MONOTONIC when its engine began to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """S carries packets."""

    gap_ns: int
    """From `Paused.since_ns`, for the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """P has let go: S is the daemon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """P goes on: S detaches at once."""

    why: str
    may_try_again: bool = False
    """Whether S may say Ready once more."""


Message = Offer | Ready | Refuse | Paused | Attached | Gone | Withdrawn
_KINDS: Final[Mapping[str, type[Any]]] = {
    kind.__name__.lower(): kind
    for kind in (Offer, Ready, Refuse, Paused, Attached, Gone, Withdrawn)
}


def read_hello(document: Any) -> Hello:
    """The body of a request; BadMessage."""
    return _record(Hello, document)


def encode(message: Message) -> bytes:
    """A frame."""
    document = {"type": type(message).__name__.lower(), **to_json(message)}
    text = json.dumps(document).encode()
    if len(text) > MESSAGE_MAX:
        raise BadMessage(f"a message of {len(text)} bytes: {MESSAGE_MAX} are the most")
    return _LENGTH.pack(len(text)) + text


class Decoder:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """What was received."""
        self._buffer += data

    def has_message(self) -> bool:
        """Whether `next` has one, or refuses what there is."""
        if len(self._buffer) < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(self._buffer)
        return bool(length > MESSAGE_MAX or len(self._buffer) >= _LENGTH.size + length)

    def next(self) -> Message | None:
        """The next whole message; None if more bytes are needed. BadMessage, and all is over."""
        if not self.has_message():
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MESSAGE_MAX:
            raise BadMessage(f"a message of {length} bytes: {MESSAGE_MAX} are the most")
        text = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
        del self._buffer[: _LENGTH.size + length]
        return _decode(text)


def _decode(text: bytes) -> Message:
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise TypeError("no object")
        name = document.get("type")
    except (ValueError, TypeError, RecursionError) as error:
        raise BadMessage(f"a message that is no JSON object: {error}") from None
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BadMessage(f"a message of the unknown type {str(name)[:40]!r}")
    message: Message = _record(kind, document)
    if isinstance(message, Offer) and len(message.names) > FDS_MAX:
        raise BadMessage(f"{len(message.names)} descriptors: {FDS_MAX} are the most")
    return message


def _record(kind: type[M], document: Any) -> M:
    try:
        return from_json(kind, document)
    except Malformed as error:
        raise BadMessage(str(error)) from None


def write_counters(counters: Counters) -> str:
    """For Offer and Paused: JSON."""
    return json.dumps(counters.as_dict())


def read_counters(text: str) -> Counters:
    """The same back. BadMessage if they cannot be read.

    What another version counts beyond this one's is left out, what it does not count is 0.
    """
    try:
        return from_document(json.loads(text))
    except (ValueError, OverflowError, RecursionError) as error:
        raise BadMessage(f"its counters cannot be read: {error!r}") from None


def send_offer(sock: socket.socket, offer: Offer, fds: Sequence[int]) -> None:
    """Send an Offer and its descriptors, which stay the caller's. OSError.

    The frame fits an empty socket buffer: a partial write is an error, as is one that would block.
    """
    frame = encode(offer)
    sent = socket.send_fds(sock, [frame], list(fds))
    if sent != len(frame):
        raise OSError(f"{sent} of {len(frame)} bytes were taken")


@dataclass(slots=True)
class Received:
    """What one receive brought: descriptors are the caller's to close."""

    data: bytes
    fds: list[int]
    pid: int
    """Of the sender, by the kernel (SCM_CREDENTIALS, unix(7)); 0 if it does not say."""


def receive_with_fds(sock: socket.socket, length: int) -> Received:
    """Receive up to `length` bytes, descriptors and the sender's pid. OSError, BadMessage.

    The socket needs SO_PASSCRED for the pid. Descriptors are close-on-exec.
    """
    room = socket.CMSG_SPACE(FDS_MAX * 4) + socket.CMSG_SPACE(UCRED.size)
    data, ancillary, flags, _ = sock.recvmsg(length, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    pid = 0
    for level, kind, content in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        elif kind == socket.SCM_CREDENTIALS and len(content) >= UCRED.size:
            pid = UCRED.unpack_from(content)[0]
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise BadMessage(f"more than {FDS_MAX} descriptors, or more than this process may open")
    return Received(data, list(fds), pid)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors; one that is closed already is passed over."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
