"""Echo requests from our TUN address to peers', and the answers: who asks, and how often.

    ask       one datagram a size, to the endpoint of a peer: an ICMP echo request for its TUN
              address, which its kernel answers, be it tundp's or flanneld's
    answers   come through the overlay as any packet; engines hand over a copy (linux/echo.py)

A cookie that nobody can guess is in each request, so no stranger's answer counts. All who ask
share one rate.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tundp.errors import PlatformError
from tundp.lease.model import Peer
from tundp.linux.echo import EchoReplies
from tundp.linux.udp import open_sender, source_control
from tundp.wire import echo

_log = logging.getLogger(__name__)

RATE_PER_S: Final = 50.0
"""Echo requests to all peers together."""
BURST: Final = 50.0
MIN_LEN: Final = echo.MIN_REQUEST_LEN
"""Bytes of the smallest request, an inner packet."""
_SEND_BUFFER_LEN: Final = 96 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ProberSettings:
    """What holds for all paths, until the underlay's address or MTU changes."""

    source: IPv4Address
    """Our end of the underlay."""
    port: int
    """Source and destination port of our datagrams."""
    tun_address: IPv4Address
    full: int
    """The TUN's MTU."""


class RoundTrip(NamedTuple):
    """The last echo request to a peer that was answered."""

    rtt_s: float
    at: float
    """Unix time of the answer."""


class _Request(NamedTuple):
    """One that was sent, and whose answer counts."""

    peer: Peer
    size: int
    sent_at: float
    answered: Callable[[int], None]


class Echoes:
    """See the module."""

    def __init__(self) -> None:
        self._replies: EchoReplies | None = None
        self._settings: ProberSettings | None = None
        self._asked: dict[bytes, _Request] = {}
        """By cookie."""
        self.round_trips: dict[int, RoundTrip] = {}
        """By hop id."""
        self.replies: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """How many answers came from each hop; as long as `count_for` said."""
        self._tokens = BURST
        self._refilled_at = 0.0
        self.divert: Callable[[int, bytes], bool] = lambda _, __: False
        """Called with hop id and request; if true, the request was sent, the way packets go."""
        self.error = ""
        """Why nobody can be asked; empty if peers can."""
        self.sent = 0
        """Requests sent so far: no engine counts them."""
        try:
            self._replies = EchoReplies()
        except PlatformError as error:
            self.error = str(error)

    @property
    def can_ask(self) -> bool:
        """Whether answers would be received."""
        return self._replies is not None

    @property
    def echo_id(self) -> int | None:
        """Identifier of the echo requests, for wire.policy.Policy."""
        return None if self._replies is None else self._replies.identifier

    @property
    def echo_fd(self) -> int:
        """Where the engine sends answers to: EngineContext.echo_fd."""
        return -1 if self._replies is None else self._replies.engine_fd

    def start(self, settings: ProberSettings) -> None:
        """Ask from these addresses from now on."""
        self._settings = settings

    def close(self) -> None:
        """Close what answers come by: the engine is stopped."""
        if self._replies is not None:
            self._replies.close()

    def reset(self, settings: ProberSettings) -> None:
        """The underlay's address or the MTU is another."""
        self._settings = settings

    def count_for(self, hop_count: int) -> None:
        """Count replies of so many hops."""
        if (more := hop_count - len(self.replies)) > 0:
            self.replies = np.append(self.replies, np.zeros(more, np.int64))

    def restart(self, hop_id: int) -> None:
        """The hop stands for another endpoint from now on."""
        self.round_trips.pop(hop_id, None)
        if hop_id < len(self.replies):
            self.replies[hop_id] = 0

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Answers are taken as they come while the block runs, on the running loop."""
        if self._replies is None:
            yield
            return
        self._replies.follow(self._on_reply)
        try:
            yield
        finally:
            self._replies.unfollow()

    def may_ask(self, now: float) -> bool:
        """Whether the rate leaves room for one more peer. now: the loop's time."""
        self._tokens = min(BURST, self._tokens + (now - self._refilled_at) * RATE_PER_S)
        self._refilled_at = now
        return self._tokens > 0

    def spend(self, count: int) -> None:
        """So many datagrams are sent to peers by another socket, within the rate."""
        self._tokens -= count
        self.sent += count

    def ask(
        self, peer: Peer, sizes: Sequence[int], answered: Callable[[int], None]
    ) -> list[bytes] | None:
        """Send requests of these sizes; their cookies, for `forget`. None: no socket to be had.

        answered: called with the size for each answer. The burst of one call may leave the rate
        below zero: the others wait for it. By a socket of their own: what waits for one peer
        takes no other's room. What is refused stays unanswered: EMSGSIZE is the device's word,
        for one.
        """
        assert self._settings is not None and self._replies is not None
        if not sizes:
            return []
        self._tokens -= len(sizes)
        endpoint = peer.endpoint
        control = source_control(self._settings.source)
        try:
            sender = open_sender(self._settings.port, _SEND_BUFFER_LEN, is_probing=True)
        except OSError as error:
            _log.debug("%s is not asked: %s", endpoint.address, error)
            return None
        cookies = []
        with sender:
            for size in sizes:
                cookie = secrets.token_bytes(echo.COOKIE_LEN)
                packet = echo.build_request(
                    size,
                    source=int(self._settings.tun_address),
                    destination=int(peer.subnet.network_address),
                    identifier=self._replies.identifier,
                    cookie=cookie,
                )
                self._asked[cookie] = _Request(peer, size, time.monotonic(), answered)
                cookies.append(cookie)
                if self.divert(peer.hop_id, packet):
                    self.sent += 1
                    continue
                with contextlib.suppress(OSError):
                    sender.sendmsg([packet], control, 0, (str(endpoint.address), endpoint.port))
                    self.sent += 1
        return cookies

    def forget(self, cookies: Iterable[bytes]) -> None:
        """Answers to these count no more."""
        for cookie in cookies:
            self._asked.pop(cookie, None)

    def receive(self) -> None:
        """Take the answers that are there; never waits."""
        if self._replies is not None:
            self._replies.receive()

    def _on_reply(self, head: bytes) -> None:
        reply = echo.read_reply(head)
        asked = None if reply is None else self._asked.get(reply.cookie)
        if reply is None or asked is None:
            return
        if reply.source == int(asked.peer.subnet.network_address):
            self._count(asked)
            asked.answered(asked.size)

    def _count(self, asked: _Request) -> None:
        hop_id = asked.peer.hop_id
        rtt_s = time.monotonic() - asked.sent_at
        self.round_trips[hop_id] = RoundTrip(rtt_s, time.time())
        self.count_for(hop_id + 1)
        self.replies[hop_id] += 1
