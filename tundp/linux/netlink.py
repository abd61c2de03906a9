"""Links, addresses and routes: asked for over a socket of ours, changed through pyroute2.

What the daemon asks for while it runs must cost little on a host with thousands of links and
routes (linux/rtnl.py). What it changes is rare, and pyroute2 spells it.

pyroute2's own event loop machinery does not run under uvloop (its socket setup is
refused) nor inside any running loop, so it runs on one private thread with
a plain selector loop; callers on any loop await the result. pyroute2's NetlinkError is
not an OSError: it becomes a PlatformError here, and nothing above sees it.

Why one room: one class around two threads; what they decode is in changes.py, route_table.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any, Final, TypeVar

from pyroute2 import AsyncIPRoute, NetlinkError, netns

from tundp.blocking import BlockingThread, start_thread
from tundp.errors import PlatformError
from tundp.linux import links, neighbour_states, uapi
from tundp.linux.changes import AddressChange as AddressChange
from tundp.linux.changes import Change as Change
from tundp.linux.changes import ChangeSocket
from tundp.linux.changes import LinkChange as LinkChange
from tundp.linux.changes import RouteChange as RouteChange
from tundp.linux.changes import RuleChange as RuleChange
from tundp.linux.links import Address as Address
from tundp.linux.links import Link as Link
from tundp.linux.lookups import Flow as Flow
from tundp.linux.lookups import NoRoute as NoRoute
from tundp.linux.lookups import RouteLookup as RouteLookup
from tundp.linux.lookups import look_up
from tundp.linux.neighbour_states import NextHop as NextHop
from tundp.linux.route_table import Route as Route
from tundp.linux.route_table import (
    RouteEntry,
    RouteFailure,
    RouteTable,
)
from tundp.linux.rtnl import RtnlSocket, decode_error

T = TypeVar("T")

_log = logging.getLogger(__name__)
_NO_WAY: Final = {
    errno.ENETUNREACH: "the host has no route that leads there (ip route)",
    errno.EHOSTUNREACH: 'an "unreachable" route covers it (ip route)',
    errno.EACCES: 'a "prohibit" route covers it (ip route)',
    errno.EINVAL: 'a "blackhole" route covers it (ip route)',
}
"""Reason for a failed route lookup, by errno (fib_props in net/ipv4/fib_semantics.c)."""
_TRIES: Final = 3
"""Dumps of what changes meanwhile, before the last one is taken as it is."""
_THREAD_ENDED: Final = "the netlink thread was ended by a bug"


class Netlink:
    """Query and configure one network namespace: the caller's, or one named under /run/netns."""

    def __init__(self, namespace: str | None = None) -> None:
        self._namespace = namespace
        self._socket: RtnlSocket | None = None
        self._socket_thread = BlockingThread("netlink-socket")
        self._requests = 0
        self.busy_s = 0.0
        """Time spent with the kernel's answers so far, seconds: what looking costs."""
        self._is_started = False
        self._watchers: set[Callable[[PlatformError], None]] = set()
        """Whoever watches changes, to be told that the thread has ended."""
        self._prepare()

    async def __aenter__(self) -> Netlink:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the thread and open the socket. PlatformError if the namespace is gone."""
        if self._namespace is not None and not os.path.exists(f"/run/netns/{self._namespace}"):
            raise PlatformError(f"network namespace {self._namespace} does not exist", errno.ENOENT)
        try:
            start_thread(self._thread)
        except PlatformError:
            # Nobody will stop what never began.
            self._loop.close()
            raise
        self._is_started = True
        await self._run(self._open())

    async def stop(self) -> None:
        """Close everything; harmless if it was never started."""
        if self._socket is not None:
            await self._socket_thread.run(self._socket.close)
            self._socket = None
        self._socket_thread.close()
        self._is_started = False
        if self._thread.is_alive():
            await self._run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)
        self._loop.close()

    @property
    def requests(self) -> int:
        """Messages sent to the kernel so far, dumps apart."""
        return self._requests + (0 if self._socket is None else self._socket.requests)

    @property
    def dumps(self) -> int:
        """Lists asked of the kernel so far, filtered by it or not."""
        return 0 if self._socket is None else self._socket.dumps

    async def links(self) -> list[Link]:
        """All links, by index."""
        return await self.dump("list links", links.links_request(), links.decode_link)

    async def link(self, index: int) -> Link | None:
        """One link, without a dump; None if there is none of this index."""

        def ask(sock: RtnlSocket) -> Link | None:
            (answer,) = sock.exchange([links.link_request(index)])
            if answer.kind != uapi.NLMSG_ERROR:
                return links.decode_link(answer.body)
            code, reason = decode_error(answer.flags, answer.body)
            if code == errno.ENODEV:
                return None
            raise PlatformError(f"cannot look at link {index}: {reason}", code)

        if index <= 0:
            return None
        with _os_errors(f"look at link {index}"):
            return await self._on_socket(ask)

    async def addresses(self, index: int = 0) -> list[Address]:
        """All IPv4 addresses, of one link if given, in the kernel's order."""
        request = links.addresses_request(index)
        found = await self.dump("list addresses", request, links.decode_address)
        # Before Linux 4.20 the kernel gives those of every link.
        return [each for each in found if index in (0, each.index)]

    async def routes(self) -> list[Route]:
        """The IPv4 routes of the main table, in the kernel's order."""
        return await self._on_table(RouteTable.routes)

    async def prefixes(self, index: int) -> list[IPv4Network]:
        """The destinations of the IPv4 routes over one link, of all tables."""
        return await self._on_table(lambda table: table.prefixes(index))

    async def change_routes(
        self,
        *,
        delete: Iterable[RouteEntry] = (),
        replace: Iterable[RouteEntry] = (),
        add: Iterable[RouteEntry] = (),
    ) -> list[RouteFailure]:
        """Change thousands of IPv4 routes; see RouteTable.change."""
        return await self._on_table(
            lambda table: table.change(delete=delete, replace=replace, add=add)
        )

    async def list_routes(
        self, *, index: int = 0, protocol: int = 0, table: int = uapi.RT_TABLE_MAIN
    ) -> list[RouteEntry]:
        """IPv4 routes of one table, of one link or protocol if given; see RouteTable.entries."""
        return await self._on_table(
            lambda routes: routes.entries(index=index, protocol=protocol, table=table)
        )

    async def lookups(
        self,
        addresses: Iterable[IPv4Address],
        flow: Flow | None = None,
        *,
        of_routes: bool = False,
    ) -> dict[IPv4Address, RouteLookup | NoRoute]:
        """The kernel's routing decision for each address; see lookups.look_up."""
        wanted = tuple(addresses)
        found = await self._on_socket(lambda sock: look_up(sock, wanted, flow, of_routes=of_routes))
        return dict(zip(wanted, found, strict=True))

    async def neighbour_states(self, hops: Iterable[NextHop]) -> dict[NextHop, str]:
        """The state of each in the kernel's table; see neighbour_states.ask."""
        wanted = tuple(hops)
        states = await self._on_socket(lambda sock: neighbour_states.ask(sock, wanted))
        return dict(zip(wanted, states, strict=True))

    async def route_to(self, address: IPv4Address) -> RouteLookup:
        """Look up the route to `address`. PlatformError says why there is none."""
        what = f"find the route to {address}"
        if address.is_unspecified:
            # The kernel would take it for this host.
            raise PlatformError(f"cannot {what}: it is no host's address", errno.EINVAL)
        found = (await self.lookups([address]))[address]
        if isinstance(found, NoRoute):
            reason = _NO_WAY.get(found.errno, os.strerror(found.errno))
            raise PlatformError(f"cannot {what}: {reason}", found.errno)
        if found.kind not in ("unicast", "local") or not found.index:
            raise PlatformError(f"cannot {what}: it is no single host's address", errno.EINVAL)
        return found

    async def set_link(self, index: int, **attributes: Any) -> None:
        """Set link attributes in rtnetlink's names: `mtu`, `txqlen`, `state`, `ifname`, ..."""
        await self._do(
            f"set {attributes} on link {index}", "link", "set", index=index, **attributes
        )

    async def ensure_address(self, index: int, interface: IPv4Interface) -> None:
        """Add the address to the link, scope global, no broadcast; no error if it is there."""
        with _tolerate(errno.EEXIST):
            await self._do(
                f"add address {interface} to link {index}",
                "addr",
                "add",
                index=index,
                address=str(interface.ip),
                prefixlen=interface.network.prefixlen,
            )

    async def ensure_route(self, index: int, destination: IPv4Network) -> None:
        """Add a route to `destination` over the link: table main, proto boot, scope global.

        A route for the same prefix over another link is not replaced: PlatformError
        says so (flannel ignores it, and the overlay silently goes elsewhere).
        """
        try:
            await self._do(
                f"add route {destination} over link {index}",
                "route",
                "add",
                dst=str(destination),
                oif=index,
                table=uapi.RT_TABLE_MAIN,
                proto=uapi.RTPROT_BOOT,
                scope=uapi.RT_SCOPE_UNIVERSE,
            )
        except PlatformError as error:
            if error.errno != errno.EEXIST:
                raise
            await self._check_route(index, destination)

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[Callable[[], Awaitable[list[Change]]]]:
        """Yield a function that waits for changes of links, IPv4 addresses, routes and rules.

        It returns all that came since the call before, at least one; nothing from the
        moment the block is entered is missed. PlatformError from it when changes were
        lost (the kernel's buffer was full): look at everything, and watch again.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[list[Change] | PlatformError] = asyncio.Queue()

        def tell(news: list[Change] | PlatformError) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed already
                loop.call_soon_threadsafe(queue.put_nowait, news)

        def receive() -> None:
            """Pass on what came: on the netlink thread."""
            try:
                if news := sock.receive():
                    tell(news)
            except PlatformError as error:
                self._loop.remove_reader(sock.fileno())
                tell(error)

        async def start() -> ChangeSocket:
            return ChangeSocket()

        async def listen() -> None:
            self._loop.add_reader(sock.fileno(), receive)
            self._watchers.add(tell)

        async def stop() -> None:
            self._watchers.discard(tell)
            self._loop.remove_reader(sock.fileno())
            sock.close()

        async def changes() -> list[Change]:
            found: list[Change] = []
            while not found or not queue.empty():
                news = await queue.get()
                if isinstance(news, PlatformError):
                    raise news
                found += news
            return found

        with _os_errors("watch for netlink changes"):
            sock = await self._run(start())
        await self._run(listen())
        try:
            yield changes
        finally:
            await asyncio.shield(self._run(stop()))

    async def call(self, what: str, object_: str, command: str, **arguments: Any) -> list[Any]:
        """Send any rtnetlink request, in pyroute2's names; `what` is for the error."""
        return await self._do(what, object_, command, **arguments)

    async def _check_route(self, index: int, destination: IPv4Network) -> None:
        there = [
            route
            for route in await self.routes()
            if route.destination == destination and route.priority == 0
        ]
        if any(route.is_unicast and route.indexes == (index,) for route in there):
            return
        names = {link.index: link.name for link in await self.links()}
        what = "a route"
        for route in there:
            over = ", ".join(names.get(i, str(i)) for i in route.indexes)
            what = f"a route over {over}" if route.is_unicast else "a blackhole or reject route"
        raise PlatformError(
            f"{what} for {destination} is already there, so packets would not reach the"
            f" overlay: delete it (ip route del {destination}), or choose another Network",
            errno.EEXIST,
        )

    def _prepare(self) -> None:
        """Make a loop and its thread, not started, in place of those before."""
        with _os_errors("open an event loop for netlink"):
            self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._serve, name="netlink", daemon=True)
        self._route: AsyncIPRoute | None = None
        # The kernel takes one dump at a time from a socket, and answers EBUSY to another.
        self._turn = asyncio.Lock()

    def _serve(self) -> None:
        # Network namespaces are per thread: only sockets opened by this thread are in it.
        if self._namespace is not None:
            enter_namespace(self._namespace)
        try:
            self._loop.run_forever()
        except BaseException:  # noqa: BLE001  (logged)
            # Calls under way are cancelled, nothing stays open; the next call starts another.
            _log.exception(_THREAD_ENDED)
            self._loop.run_until_complete(self._close())
            self._loop.close()
            for tell in tuple(self._watchers):
                tell(PlatformError(f"netlink changes were lost: {_THREAD_ENDED}"))

    def _open_socket(self) -> RtnlSocket:
        """Open the socket on its thread, after entering the namespace."""
        if self._socket is None:
            if self._namespace is not None:
                enter_namespace(self._namespace)
            with _os_errors("open a netlink socket"):
                self._socket = RtnlSocket()
        return self._socket

    async def _on_socket(self, call: Callable[[RtnlSocket], T]) -> T:
        def timed() -> T:
            began = time.monotonic()
            try:
                return call(self._open_socket())
            finally:
                self.busy_s += time.monotonic() - began

        return await self._socket_thread.run(timed)

    async def _on_table(self, call: Callable[[RouteTable], T]) -> T:
        return await self._on_socket(lambda sock: call(RouteTable(sock)))

    async def dump(
        self, what: str, request: tuple[int, bytes], decode: Callable[[memoryview], T | None]
    ) -> list[T]:
        """List what `decode` makes of each answer; the last reading, if it keeps changing."""

        def ask(sock: RtnlSocket) -> list[T]:
            found: list[T] = []
            for _ in range(_TRIES):
                found, is_consistent = sock.dump(what, request, decode)
                if is_consistent:
                    break
            return found

        return await self._on_socket(ask)

    async def _open(self) -> AsyncIPRoute:
        """The socket for requests, opened if it is not."""
        if self._route is None:
            with _os_errors("open a netlink socket"):
                self._route = await AsyncIPRoute().__aenter__()
        return self._route

    async def _close(self) -> None:
        if self._route is not None:
            await self._route.__aexit__(None, None, None)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        call = self._submit(coroutine)
        try:
            return await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise PlatformError(_THREAD_ENDED) from None

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run on the thread, or on another one if it has ended by a bug."""
        if self._is_started and (self._loop.is_closed() or not self._thread.is_alive()):
            self._prepare()
            start_thread(self._thread)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _do(self, what: str, object_: str, command: str, **arguments: Any) -> list[Any]:
        async def request() -> list[Any]:
            async with self._turn:
                self._requests += 1
                with _translated(what):
                    answer = await getattr(await self._open(), object_)(command, **arguments)
                    return list(answer) if answer else []

        return await self._run(request())


def enter_namespace(name: str) -> None:
    """Move the calling thread, and it alone, into the network namespace /run/netns/`name`."""
    try:
        netns.setns(name, flags=os.O_RDONLY)
    except OSError as error:
        raise PlatformError(
            f"cannot enter network namespace {name}: {error.strerror}", error.errno
        ) from None


@contextlib.contextmanager
def _translated(what: str) -> Any:
    try:
        yield
    except NetlinkError as error:
        hint = "; this needs CAP_NET_ADMIN: run as root" if error.code == errno.EPERM else ""
        raise PlatformError(f"cannot {what}: {os.strerror(error.code)}{hint}", error.code) from None


@contextlib.contextmanager
def _os_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, PlatformError):
            raise
        raise PlatformError(f"cannot {what}: {error.strerror or error}", error.errno) from None


@contextlib.contextmanager
def _tolerate(code: int) -> Any:
    try:
        yield
    except PlatformError as error:
        if error.errno != code:
            raise
