"""What hosts on the way last said of datagrams to each address, and how they are made to speak."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Final

from tundp.engine.reach import Unreachable
from tundp.errors import PlatformError
from tundp.lease.model import Endpoint
from tundp.linux.icmp_errors import IcmpErrors

_log = logging.getLogger(__name__)

KEPT: Final = 256
"""Addresses, of which something was said last."""


class Refusals:
    """ICMP errors by the address that was not reached; the latest last. Shown, never believed."""

    def __init__(self) -> None:
        self._errors = IcmpErrors()
        self._said: dict[IPv4Address, Unreachable] = {}

    def open(self, source: IPv4Address) -> None:
        """Ask from `source` from now on; where that cannot be, nothing is heard."""
        try:
            self._errors.open(source)
        except PlatformError as error:
            _log.debug("ICMP errors are not read: %s", error)

    def close(self) -> None:
        """Close what was opened. Harmless when repeated."""
        self._errors.close()

    def clear(self) -> None:
        """Forget what was said."""
        self._said.clear()

    def of(self, address: IPv4Address) -> Unreachable | None:
        """What was said of an address last."""
        return self._said.get(address)

    def hear(self) -> None:
        """Take in what was said since the last time."""
        now = time.time()
        for text, said_by, about in self._errors.receive():
            before = self._said.pop(about, None)
            if before is None or (before.text, before.said_by) != (text, said_by):
                before = Unreachable(text=text, said_by=said_by, count=0, last=now)
            self._said[about] = replace(before, count=before.count + 1, last=now)
        while len(self._said) > KEPT:
            del self._said[next(iter(self._said))]

    def ask(self, endpoint: Endpoint) -> None:
        """Send an empty datagram, of which something may be said."""
        self._errors.provoke(endpoint.address, endpoint.port)

    def ask_within(self, seconds: float, endpoint: Endpoint) -> None:
        """Send it at a chance moment of the next `seconds`.

        Linux hosts say one thing a second, of what comes first when that is due. Packets that are
        sent at a fixed pace would always be first; a chance moment has its share.
        """
        asyncio.get_running_loop().call_later(random.uniform(0, seconds), self.ask, endpoint)
