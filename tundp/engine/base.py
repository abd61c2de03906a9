"""What every engine offers."""

from __future__ import annotations

from typing import Protocol

from tundp.engine.counters import Counters
from tundp.lease.fib import Fib
from tundp.linux.tun import Tun, TunMode


class Dataplane(Protocol):
    """An engine. Called from the event loop's thread only; never blocks it for long.

    The engine borrows the TUN and the socket: whoever made them closes them, after
    `detach` or `stop`.
    """

    @property
    def name(self) -> str:
        """What `--engine` calls it."""
        ...

    @property
    def tun_mode(self) -> TunMode:
        """How the TUN it will be given must be opened."""
        ...

    def describe(self) -> str:
        """What it uses and what it does without, for the log and `tundp status`."""
        ...

    def attach(self, tun: Tun) -> None:
        """Begin to carry packets between `tun` and the socket; counters go on."""
        ...

    def detach(self) -> None:
        """Stop reading the current TUN, e.g. because it was deleted."""
        ...

    def rebound(self) -> None:
        """The sockets' descriptors lead to new sockets now; called while detached.

        The new ones are as `linux.udp.open_udp` makes them, maybe at another address. What
        was learnt of paths was the old address's, and is forgotten; counters go on.
        """
        ...

    def install(self, fib: Fib) -> None:
        """Consult `fib` from the next packet on."""
        ...

    async def tun_lost(self) -> None:
        """Returns when the attached TUN turns out to be deleted."""
        ...

    def counters(self) -> Counters:
        """The counters now; the caller must not change them."""
        ...

    def pulse(self) -> tuple[int, ...]:
        """Turns each running packet thread has made; () without one, and while detached.

        Asking has each of them make one more soon, however idle it is: a number that is the
        same a second later is that of a thread that is stuck.
        """
        ...

    def stop(self) -> None:
        """Detach from everything."""
        ...
