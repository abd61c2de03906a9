"""Host names of stores, looked up apart from whoever connects.

getaddrinfo(3) blocks, cannot be cancelled, and with a silent name server takes longer than
any connect may: an event loop's own getaddrinfo, given up by a timeout, fails later on its
own, and its thread holds up the end of the process. Here each name has a daemon thread;
whoever waits for a lookup may be cancelled, and the lookup goes on for the next one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from typing import Final

from tundp.blocking import BlockingThread

PATIENCE_S: Final = 2.0
"""How long a lookup may take before the addresses of the last one are used again."""
FRESH_S: Final = 10.0
"""How old a result may be that came when nobody waited any more."""

_log = logging.getLogger(__name__)


class Names:
    """Lookups of one store's host names, and the last addresses of each."""

    def __init__(self) -> None:
        self._lookups: dict[str, _Lookup] = {}
        self._blamed: dict[str, str] = {}

    async def addresses(self, host: str, limit_s: float) -> tuple[str, ...]:
        """IP addresses of `host`, in the resolver's order; of an IP address, itself.

        One that was blamed comes last. Those of the last lookup if the name server does not
        answer this one in time.
        socket.gaierror if there are none, or none within `limit_s`.
        """
        try:
            ipaddress.ip_address(host)
        except ValueError:
            lookup = self._lookups.setdefault(host, _Lookup(host))
            found = await lookup.result(limit_s)
            blamed = self._blamed.get(host)
            return tuple(sorted(found, key=lambda address: address == blamed))
        return (host,)

    def blame(self, host: str, address: str) -> None:
        """Note that `address` took a connection and did not answer: try the others first."""
        self._blamed[host] = address

    def close(self) -> None:
        """Give up all lookups. Does not wait for them."""
        for lookup in self._lookups.values():
            lookup.close()
        self._lookups.clear()


class _Lookup:
    """One name's lookup: at most one at a time, whoever asks for it."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._thread = BlockingThread(f"lookup {host}")
        self._task: asyncio.Task[tuple[str, ...]] | None = None
        self._last: tuple[str, ...] = ()
        self._waiting = 0
        self._unread: tuple[str, ...] = ()
        """A result nobody waited for."""
        self._found_at = 0.0

    async def result(self, limit_s: float) -> tuple[str, ...]:
        found, self._unread = self._unread, ()
        if found and time.monotonic() - self._found_at < FRESH_S:
            # Nobody waited any more when it came: a lookup may take longer than anybody waits.
            return found
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._thread.run(_look_up, self._host))
            self._task.add_done_callback(self._finished)
        task = self._task
        # Waiting does not cancel the task when it is cancelled itself, unlike asyncio.timeout.
        self._waiting += 1
        try:
            await asyncio.wait([task], timeout=min(limit_s, PATIENCE_S) if self._last else limit_s)
        finally:
            self._waiting -= 1
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is None:
                return task.result()
        else:
            error = socket.gaierror(
                socket.EAI_AGAIN, f"no name server answers for {self._host} in time"
            )
        if self._last and _is_temporary(error):
            _log.info("%s: %s: using %s, as before", self._host, error, ", ".join(self._last))
            return self._last
        raise error

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._thread.close()

    def _finished(self, task: asyncio.Task[tuple[str, ...]]) -> None:
        """Keep the addresses; mark a failure as retrieved, as perhaps nobody waits any more."""
        if not task.cancelled() and task.exception() is None:
            self._last = task.result()
            self._unread = () if self._waiting else self._last
            self._found_at = time.monotonic()


def _look_up(host: str) -> tuple[str, ...]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_temporary(error: BaseException) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
