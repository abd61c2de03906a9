"""The way of packets from the packet threads to the event loop: a pair of datagram sockets.

No packet filter stands in it, which a raw socket would be behind, and no packet thread waits.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from tundp.errors import PlatformError

_RECEIVES: Final = 64
"""Read at a time."""
PAUSE_S: Final = 0.01
"""Between two reads while there is more: a flood of forged packets costs no more than that."""


class HandOver:
    """Receives what an engine sends to `engine_fd`: what the pair has no room for is lost."""

    def __init__(self, what: str, length_max: int) -> None:
        """what: for the error. length_max: bytes of the longest one.

        PlatformError if the process may have no further socket.
        """
        self._length_max = length_max
        try:
            self._reader, self._writer = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
            )
        except OSError as error:
            raise PlatformError(
                f"no pair of sockets for {what}: {error.strerror}", error.errno
            ) from None
        self._take: Callable[[bytes], object] | None = None
        self._pause: asyncio.TimerHandle | None = None

    @property
    def engine_fd(self) -> int:
        """The end packets are sent to: not blocking, borrowed until `close`."""
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

    def receive(self) -> bool:
        """Take what is there, if anybody follows; never waits. Whether there may be more."""
        for _ in range(_RECEIVES):
            try:
                data = self._reader.recv(self._length_max)
            except OSError:
                return False
            if self._take is not None:
                self._take(data)
        return True

    def close(self) -> None:
        """Close both ends: no engine uses them any more. Harmless when repeated."""
        self._reader.close()
        self._writer.close()

    def _on_readable(self) -> None:
        if self.receive() and self._take is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._reader.fileno())
            self._pause = loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._reader.fileno(), self._on_readable)
