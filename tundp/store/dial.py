"""Connecting to one of several: addresses of a name, endpoints of a store; and how long it takes.

Attempts begin one after another and go on beside each other, as in RFC 8305 (Happy Eyeballs,
version 2): the next one begins when the one before has failed, or has not succeeded within a
stagger. The first to succeed counts. So a dead address or endpoint costs its stagger, and a
slow one that is alone still has all the time there is.

Every deadline of a store is computed here, from how many parts there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from tundp.store.access import REQUEST_TIMEOUT_S

T = TypeVar("T")

CONNECT_S: Final = REQUEST_TIMEOUT_S
"""Limit of connecting to one endpoint: name lookup, all addresses, TLS and the first answer."""
ADDRESS_STAGGER_S: Final = 0.25
"""Between the attempts at two addresses of a name (RFC 8305, section 5)."""
ENDPOINT_STAGGER_S: Final = 1.0
"""Between the attempts at two endpoints: what is only slow, or lost one packet, comes first."""


def address_stagger_s(count: int, limit_s: float) -> float:
    """Between the attempts at `count` addresses: the last one, too, gets half of `limit_s`."""
    return min(ADDRESS_STAGGER_S, limit_s / 2 / max(count, 1))


def connect_round_s(endpoints: int) -> float:
    """Limit of connecting to whichever of so many endpoints takes a connection."""
    return CONNECT_S + ENDPOINT_STAGGER_S * (endpoints - 1)


def round_s(endpoints: int) -> float:
    """Limit of one request at so many endpoints, each tried once.

    Each may take a connection late, a login and the request, and answer neither.
    """
    return endpoints * (CONNECT_S + ENDPOINT_STAGGER_S + 2 * REQUEST_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Winner(Generic[T]):
    """The attempt that succeeded, by its number, its result, and what is known of those before."""

    number: int
    result: T
    failures: dict[int, Exception]
    """Of attempts that failed, and TimeoutError of those before it that were too slow."""


class NoneSucceededError(Exception):
    """All attempts failed; `failures` has the reason of each, in order."""

    def __init__(self, failures: Sequence[Exception]) -> None:
        super().__init__("; ".join(str(failure) or type(failure).__name__ for failure in failures))
        self.failures = tuple(failures)


async def first(
    attempts: Sequence[Callable[[], Awaitable[T]]],
    *,
    stagger_s: float,
    discard: Callable[[T], object],
) -> Winner[T]:
    """Await the first of `attempts` that succeeds; cancel the others, and wait for their end.

    discard: closes the result of another one that succeeded at the same moment. An attempt has
    its own limit, and fails by an Exception. NoneSucceededError if all do.
    """
    tasks: list[asyncio.Task[T]] = []
    winner: asyncio.Task[T] | None = None
    try:
        while winner is None:
            if len(tasks) < len(attempts):
                tasks.append(asyncio.ensure_future(_run(attempts[len(tasks)])))
            pending = [task for task in tasks if not task.done()]
            if pending:
                is_last = len(tasks) == len(attempts)
                await asyncio.wait(
                    pending,
                    timeout=None if is_last else stagger_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            winner = next((task for task in tasks if _has_succeeded(task)), None)
            if winner is None and len(tasks) == len(attempts) and all(t.done() for t in tasks):
                raise NoneSucceededError([_failure(task) for task in tasks])
        number = tasks.index(winner)
        failures = {n: _failure(task) for n, task in enumerate(tasks) if task is not winner}
        return Winner(number, winner.result(), failures)
    finally:
        losers = [task for task in tasks if task is not winner]
        for task in losers:
            task.cancel()
        await asyncio.gather(*losers, return_exceptions=True)
        for task in losers:
            if _has_succeeded(task):
                discard(task.result())


async def _run(attempt: Callable[[], Awaitable[T]]) -> T:
    return await attempt()


def _has_succeeded(task: asyncio.Task[T]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _failure(task: asyncio.Task[T]) -> Exception:
    """Why an attempt failed; TimeoutError if it was slower than another."""
    error = task.exception() if task.done() and not task.cancelled() else None
    return error if isinstance(error, Exception) else TimeoutError()
