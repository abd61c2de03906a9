"""Several endpoints of one etcd: which one is asked, who comes next, and how all of them failed.

Both APIs go through their endpoints in the same way: the one that answered last is asked
first; one that fails goes to the end of the list; a request is tried at each endpoint at
most once, and at no second one if it must not run twice and may have run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tundp.errors import StoreUnavailable
from tundp.store.access import Endpoint

_log = logging.getLogger(__name__)


class Endpoints:
    """The endpoints of one connection, in the order they are asked next."""

    def __init__(self, endpoints: Sequence[Endpoint], what: str) -> None:
        """`what` tells connections apart in the log: `etcd v2 watch`."""
        self._order = list(endpoints)
        self._what = what
        self._answered: Endpoint | None = None
        self._why = ""
        self.urls = ",".join(endpoint.url for endpoint in endpoints)

    @property
    def current(self) -> Endpoint:
        """The one to ask."""
        return self._order[0]

    @property
    def order(self) -> tuple[Endpoint, ...]:
        """All of them, in the order they are asked."""
        return tuple(self._order)

    def rotate(self) -> None:
        """Ask the next one from now on."""
        self._order.append(self._order.pop(0))

    def attempts(self, *, once: bool) -> Attempts:
        """Begin a request. once: it must not run twice."""
        return Attempts(self, len(self._order), once=once)

    def failed(self, endpoint: Endpoint, why: str) -> None:
        """Keep why the one that answered so far does not: the log says it with its successor."""
        if endpoint is self._answered:
            self._why = why

    def answered(self, endpoint: Endpoint) -> None:
        """Note who answers; the log says so when it is another one than before."""
        before, self._answered = self._answered, endpoint
        if before is not None and before is not endpoint:
            _log.info(
                "%s: %s answers, in place of %s (%s)",
                self._what,
                endpoint.url,
                before.url,
                self._why or "its connection was given up",
            )
        self._why = ""


class Attempts:
    """One request's way through the endpoints: each of them at most once."""

    def __init__(self, endpoints: Endpoints, count: int, *, once: bool) -> None:
        self._endpoints = endpoints
        self.left = count
        """Endpoints that may still be asked."""
        self._once = once
        self._failures: list[str] = []

    @property
    def may_go_on(self) -> bool:
        """Whether there is an endpoint left to ask."""
        return self.left > 0

    def failed(self, endpoint: Endpoint, why: str, *, may_have_run: bool) -> None:
        """One endpoint failed. The caller rotates, as it knows whether somebody else has."""
        self._failures.append(f"{endpoint.url}: {why}")
        self._endpoints.failed(endpoint, why)
        self.left = 0 if self._once and may_have_run else self.left - 1

    def error(self) -> StoreUnavailable:
        """What to raise when there is nobody left to ask."""
        return StoreUnavailable(f"etcd does not answer: {'; '.join(self._failures)}")
