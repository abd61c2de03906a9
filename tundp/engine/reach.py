"""Whether a peer answers, and what the kernel knows of the way to it: facts, and how they are told.

A peer is silent if packets were sent to it, nothing came from it since, and not even an echo
request to its TUN address was answered, several times. Traffic in one direction is no silence:
whoever receives it answers echo requests. `Unanswered` finds who has to be asked, the daemon asks
(backend/udp/peer_watch.py), `Reach` is what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique
from ipaddress import IPv4Address
from typing import Final

import numpy as np
import numpy.typing as npt

from tundp.engine.base import HopActivity

_PORT_UNREACHABLE: Final = "port unreachable"


@unique
class Standing(Enum):
    """What is known of a peer's answers; the value is its name in status and metrics."""

    ANSWERS = "answers"
    """Packets came from it since the last one was sent, or it answered an echo request."""
    ONE_WAY = "one-way"
    """Packets go to it and none comes back; it answers echo requests."""
    UNHEARD = "unheard"
    """Packets go to it and none comes back; nobody could ask it."""
    WAITING = "waiting"
    """Packets go to it, none came back yet, and it is being asked."""
    SILENT = "silent"
    """Packets go to it, none comes back, and echo requests are not answered."""
    REFUSED = "refused"
    """The kernel of this node refuses to send to it."""

    @property
    def is_trouble(self) -> bool:
        """Whether an operator should look."""
        return self in (Standing.SILENT, Standing.REFUSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """ICMP errors about datagrams to a peer (RFC 792 type 3). Anybody can forge them."""

    text: str
    """`port unreachable`, `host unreachable`, ..."""
    said_by: IPv4Address
    count: int
    last: float
    """Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What the kernel would do with a datagram to a peer."""

    device: str = ""
    gateway: IPv4Address | None = None
    """None: the peer is on the device's own network."""
    is_default: bool = False
    """Whether it is the default route that leads there."""
    neighbour: str = ""
    """State of the next hop in the neighbour table: `reachable`, `failed`, ...; empty: no entry."""
    trouble: str = ""
    """Why there is no route; empty if there is one."""

    @property
    def has_no_neighbour(self) -> bool:
        """Whether the next hop does not answer ARP."""
        return self.neighbour in ("failed", "incomplete")

    def words(self) -> str:
        """`eth0`, `192.0.2.254 on eth0 (default route)`."""
        via = f"{self.gateway} on {self.device}" if self.gateway is not None else self.device
        return f"{via} (default route)" if self.is_default and via else via


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What is known of one hop's answers."""

    standing: Standing
    since: float
    """Unix time: of the first packet without an answer; of the answer, if it answers."""
    sent: int = 0
    """Packets sent to it since then."""
    asked: int = 0
    """Echo requests sent to it since then."""
    missed: int = 0
    """The last so many of them are unanswered."""
    rtt_s: float | None = None
    """Of the last echo request that was answered."""
    way: Way | None = None
    """Looked up for those that do not answer."""
    unreachable: Unreachable | None = None
    last_errno: str | None = None
    """Of the sends refused since then."""

    def evidence(self, now: float) -> str:
        """What was seen, in a sentence without the peer's name; empty if it answers."""
        age = f"{max(0, now - self.since):.0f} s"
        match self.standing:
            case Standing.ANSWERS:
                return ""
            case Standing.REFUSED:
                return f"sends are refused for {age} ({self.last_errno}){self._way_words()}"
            case Standing.ONE_WAY:
                rtt = "" if self.rtt_s is None else f" within {self.rtt_s * 1e3:.2f} ms"
                return (
                    f"{self.sent:,} packets sent in {age}, none came back, but it answers echo"
                    f" requests{rtt}"
                )
        asked = f", {self.missed} echo requests unanswered" if self.missed else ""
        if self.last_errno:
            asked += f", sends are refused ({self.last_errno})"
        text = f"{self.sent:,} packets sent in {age}, nothing came back{asked}"
        return f"{text}{self._error_words(now)}{self._way_words()}"

    def next_step(self, peer: str, port: int | None) -> str:
        """What that means, and what to do; peer: its address."""
        way = self.way or Way()
        match self.standing:
            case Standing.ANSWERS | Standing.WAITING:
                return ""
            case Standing.REFUSED:
                return _REFUSED_STEPS.get(self.last_errno or "", "see the drops by reason")
            case Standing.UNHEARD:
                return (
                    "traffic in one direction only, or lost; nobody can ask it without a socket"
                    f" for answers: tundp status on {peer}"
                )
            case Standing.ONE_WAY:
                return (
                    "traffic in one direction only, or what it answers, its pods or its rules for"
                    f" forwarding drop: tundp status on {peer}"
                )
        if step := _REFUSED_STEPS.get(self.last_errno or ""):
            return step
        if self._is_refused_by(peer):
            return f"no daemon listens there: systemctl status tundp (or flanneld) on {peer}"
        if way.trouble:
            return f"there is no route: ip route get {peer}"
        if way.has_no_neighbour and way.gateway is not None:
            return f"the gateway {way.gateway} does not answer ARP on {way.device}"
        if way.has_no_neighbour:
            return (
                f"no such host on {way.device}: is {peer} up? If it is gone for good, delete its"
                " lease"
            )
        if way.gateway is not None:
            return (
                f"is {peer} an address that nodes can reach (--iface, --public-ip there)? Else a"
                f" firewall drops UDP {port} on the way: tundp config check on {peer}"
            )
        return (
            f"a firewall drops UDP {port} there or on the way, or its daemon hangs: tundp status"
            f" and tundp config check on {peer}"
        )

    def _is_refused_by(self, peer: str) -> bool:
        error = self.unreachable
        return error is not None and error.text == _PORT_UNREACHABLE and str(error.said_by) == peer

    def _error_words(self, now: float) -> str:
        if (error := self.unreachable) is None:
            return ""
        times = "once" if error.count == 1 else f"{error.count:,} times"
        age = f"{max(0, now - error.last):.0f} s"
        return f"; {error.text}, says {error.said_by}, {times}, the last {age} ago"

    def _way_words(self) -> str:
        if (way := self.way) is None:
            return ""
        if way.trouble:
            return f"; {way.trouble}"
        state = f", neighbour {way.neighbour.upper()}" if way.neighbour else ""
        return f"; by {way.words()}{state}" if way.device else ""


_REFUSED_STEPS: Final = {
    "EPERM": "a firewall of this node drops them in its output chains: tundp config check",
    "ENETUNREACH": "there is no route: ip route",
    "EHOSTUNREACH": "there is no route, or its neighbour answers no ARP: ip route, ip neigh",
    "EINVAL": "the route to it takes no datagrams from our address: ip route get",
    "EACCES": "a route of type prohibit is in the way: ip route get",
}


_COLUMNS: Final = (
    *("since", "tried_at", "out_before"),
    *("_out", "_own_in", "_refused", "_refused_before"),
)


class Unanswered:
    """Which hops were sent packets that nothing came back for. Numpy passes, however many."""

    def __init__(self) -> None:
        self.since = np.zeros(0)
        """By hop id, the time of the caller's clock; 0: nothing is unanswered."""
        self.tried_at = np.zeros(0)
        """When the last packet was sent or refused."""
        self.out_before: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """packets_out when `since` was set."""
        self._out: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._own_in: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._refused: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._refused_before: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """_refused when `since` was set."""

    def look(
        self, activity: HopActivity, replies: npt.NDArray[np.int64], now: float
    ) -> npt.NDArray[np.int64]:
        """Compare with the last look; hop ids with something unanswered.

        replies: echo replies each hop has sent us, which say nothing of anybody's traffic; read
        after `activity`, at least as long.
        """
        count = len(activity.packets_out)
        self._grow(count)
        out = activity.packets_out.astype(np.int64)
        own_in = activity.packets_in.astype(np.int64) - replies[:count]
        refused = activity.last_refused_ns.astype(np.int64)
        is_heard = own_in > self._own_in
        is_tried = (out > self._out) | (refused > self._refused)
        begins = is_tried & ~is_heard & (self.since == 0)
        self.since[is_heard] = 0
        self.since[begins] = now
        self.out_before[begins] = self._out[begins]
        self._refused_before[begins] = self._refused[begins]
        self.tried_at[is_tried] = now
        self._own_in = np.maximum(self._own_in, own_in)
        self._out, self._refused = out, refused
        return np.flatnonzero(self.since)

    def forget(self, hop_id: int) -> None:
        """The hop stands for another endpoint, or what is unanswered is too old to matter."""
        if hop_id < len(self.since):
            self.since[hop_id] = 0

    def restart(self, hop_id: int) -> None:
        """The hop stands for another endpoint from now on: it has counted nothing."""
        if hop_id < len(self.since):
            self.since[hop_id] = self.tried_at[hop_id] = 0
            self._out[hop_id] = self._own_in[hop_id] = 0

    def is_waiting(self, hop_id: int) -> bool:
        """Whether the hop was sent something, or was to be, that nothing came back for."""
        return hop_id < len(self.since) and self.since[hop_id] > 0

    def is_refused(self, hop_id: int) -> bool:
        """Whether the kernel refused to send something to the hop since the last answer."""
        return bool(self._refused[hop_id] > self._refused_before[hop_id])

    def sent(self, hop_id: int) -> int:
        """Packets sent to the hop since the last answer."""
        return int(self._out[hop_id] - self.out_before[hop_id])

    def _grow(self, count: int) -> None:
        """Room for so many hops. There may be fewer than before: those come back."""
        if (more := count - len(self.since)) == 0:
            return
        for name in _COLUMNS:
            column = getattr(self, name)
            resized = (
                column[:count] if more < 0 else np.append(column, np.zeros(more, column.dtype))
            )
            setattr(self, name, resized)
