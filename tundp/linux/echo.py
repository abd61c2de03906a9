"""The way of echo replies from the packet threads to the event loop: a pair of datagram sockets.

No packet filter stands in it. A raw ICMP socket, which needs CAP_NET_RAW, gets a reply behind the
INPUT rules (net/ipv4/ip_input.c: NF_INET_LOCAL_IN, then raw_local_deliver), and those of ufw and
firewalld drop what conntrack calls invalid: the request left inside a datagram, unseen by it.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from typing import Final

from tundp.errors import PlatformError

_HEAD_LEN_MAX: Final = 84
"""Bytes of the longest IPv4 header, and of an ICMP message up to its cookie."""
_RECEIVES: Final = 64
"""Read at a time."""
PAUSE_S: Final = 0.01
"""Between two reads while there is more: a flood of forged replies costs no more than that."""


class EchoReplies:
    """Receives the heads of echo replies whose identifier is `identifier`, a random number.

    Who has `engine_fd` sends them: what the pair has no room for is lost, and nobody waits.
    """

    def __init__(self) -> None:
        """PlatformError if the process may have no further socket."""
        self.identifier = random.SystemRandom().getrandbits(16)
        try:
            self._reader, self._writer = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
            )
        except OSError as error:
            raise PlatformError(
                f"no pair of sockets for echo replies: {error.strerror}", error.errno
            ) from None
        self._take: Callable[[bytes], object] | None = None
        self._pause: asyncio.TimerHandle | None = None

    @property
    def engine_fd(self) -> int:
        """The end replies are sent to: not blocking, borrowed until `close`."""
        return self._writer.fileno()

    def follow(self, take: Callable[[bytes], object]) -> None:
        """Call `take` with each from now on, on the running loop."""
        self._take = take
        asyncio.get_running_loop().add_reader(self._reader.fileno(), self._on_readable)

    def unfollow(self) -> None:
        """Call nobody any more. On the same loop; harmless when repeated."""
        self._take = None
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        asyncio.get_running_loop().remove_reader(self._reader.fileno())

    def receive(self) -> None:
        """Take what is there, if anybody follows; never waits."""
        for _ in range(_RECEIVES):
            try:
                head = self._reader.recv(_HEAD_LEN_MAX)
            except OSError:
                return
            if self._take is not None:
                self._take(head)

    def close(self) -> None:
        """Close both ends: no engine uses them any more. Harmless when repeated."""
        self._reader.close()
        self._writer.close()

    def _on_readable(self) -> None:
        for _ in range(_RECEIVES):
            try:
                head = self._reader.recv(_HEAD_LEN_MAX)
            except OSError:
                return
            if self._take is not None:
                self._take(head)
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._reader.fileno())
        self._pause = loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._reader.fileno(), self._on_readable)
