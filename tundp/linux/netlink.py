"""Links, addresses and routes, through pyroute2.

pyroute2's own event loop machinery does not run under uvloop (its socket setup is
refused) nor inside any running loop, so everything here runs on one private thread with
a plain selector loop; callers on any loop await the result. pyroute2's NetlinkError is
not an OSError: it becomes a PlatformError here, and nothing above sees it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any, Final, TypeVar

from pyroute2 import AsyncIPRoute, NetlinkError, netns
from pyroute2.netlink.rtnl import rt_type

from tundp.blocking import BlockingThread
from tundp.errors import PlatformError
from tundp.linux import uapi
from tundp.linux.route_table import Route as Route
from tundp.linux.route_table import RouteEntry, RouteFailure, RouteTable

T = TypeVar("T")

_log = logging.getLogger(__name__)
_NO_WAY: Final = {
    errno.ENETUNREACH: "the host has no route that leads there (ip route)",
    errno.EHOSTUNREACH: 'an "unreachable" route covers it (ip route)',
    errno.EACCES: 'a "prohibit" route covers it (ip route)',
    errno.EINVAL: 'a "blackhole" route covers it (ip route)',
}
"""Reason for a failed route lookup, by errno (fib_props in net/ipv4/fib_semantics.c)."""
_THREAD_ENDED: Final = "the netlink thread was ended by a bug"
_RTMGRP: Final = uapi.RTMGRP_LINK | uapi.RTMGRP_IPV4_IFADDR | uapi.RTMGRP_IPV4_ROUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network interface."""

    index: int
    name: str
    mtu: int
    is_up: bool
    is_loopback: bool = False
    kind: str | None = None
    """The driver's name for it (IFLA_INFO_KIND): "bridge", "tun", "vxlan"; None for hardware."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One IPv4 address of a link."""

    index: int
    interface: IPv4Interface
    is_permanent: bool
    is_deprecated: bool
    is_temporary: bool = False
    """IFA_F_TEMPORARY, which for IPv4 is the same bit as IFA_F_SECONDARY, and means that."""
    scope: int = 0
    """rtnetlink.h's RT_SCOPE_: 0 universe, 253 link, 254 host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteLookup:
    """The kernel's routing decision for one destination."""

    index: int
    """The outgoing link; loopback's if the address is this host's own."""
    source: IPv4Address | None
    """The source address chosen; None if the host has none for it."""


@dataclass(frozen=True, slots=True)
class Change:
    """Notification that a link, an address or a route changed; its new state has to be queried."""

    index: int
    """The link concerned, 0 if none is (a blackhole route)."""
    destination: IPv4Network | None
    """Of a route, None for links and addresses."""


class Netlink:
    """Query and configure one network namespace: the caller's, or one named under /run/netns."""

    def __init__(self, namespace: str | None = None) -> None:
        self._namespace = namespace
        self._is_started = False
        self._prepare()
        self._table: RouteTable | None = None
        self._table_thread = BlockingThread("netlink-routes")

    async def __aenter__(self) -> Netlink:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the thread and open the socket. PlatformError if the namespace is gone."""
        if self._namespace is not None and not os.path.exists(f"/run/netns/{self._namespace}"):
            raise PlatformError(f"network namespace {self._namespace} does not exist", errno.ENOENT)
        self._thread.start()
        self._is_started = True
        await self._run(self._open())

    async def stop(self) -> None:
        """Close everything; harmless if it was never started."""
        if self._table is not None:
            await self._table_thread.run(self._table.close)
            self._table = None
        self._table_thread.close()
        self._is_started = False
        if self._thread.is_alive():
            await self._run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.to_thread(self._thread.join)
        self._loop.close()

    async def links(self) -> list[Link]:
        """All links, by index."""
        return [_to_link(m) for m in await self._dump("list links", lambda r: r.get_links())]

    async def addresses(self) -> list[Address]:
        """All IPv4 addresses, in the kernel's order."""
        messages = await self._dump("list addresses", lambda r: r.get_addr(family=2))
        return [_to_address(m) for m in messages]

    async def routes(self) -> list[Route]:
        """The IPv4 routes of the main table, in the kernel's order."""
        return await self._table_thread.run(lambda: self._open_table().routes())

    async def change_routes(
        self,
        *,
        delete: Iterable[RouteEntry] = (),
        replace: Iterable[RouteEntry] = (),
        add: Iterable[RouteEntry] = (),
    ) -> list[RouteFailure]:
        """Change thousands of IPv4 routes; see RouteTable.change."""
        return await self._table_thread.run(
            lambda: self._open_table().change(delete=delete, replace=replace, add=add)
        )

    async def list_routes(
        self, *, index: int = 0, protocol: int = 0, table: int = uapi.RT_TABLE_MAIN
    ) -> list[RouteEntry]:
        """IPv4 routes of one table, of one link or protocol if given; see RouteTable.entries."""
        return await self._table_thread.run(
            lambda: self._open_table().entries(index=index, protocol=protocol, table=table)
        )

    async def route_to(self, address: IPv4Address) -> RouteLookup:
        """Look up the route to `address`. PlatformError says why there is none."""
        what = f"find the route to {address}"
        if address.is_unspecified:
            # The kernel would take it for this host.
            raise PlatformError(f"cannot {what}: it is no host's address", errno.EINVAL)
        try:
            (message,) = await self._do(what, "route", "get", dst=str(address))
        except PlatformError as error:
            reason = _NO_WAY.get(error.errno or 0)
            if reason is None:
                raise
            raise PlatformError(f"cannot {what}: {reason}", error.errno) from None
        index, source = message.get("oif"), message.get("prefsrc")
        if rt_type.get(message["type"]) not in ("unicast", "local") or not index:
            raise PlatformError(f"cannot {what}: it is no single host's address", errno.EINVAL)
        return RouteLookup(index=index, source=None if source is None else IPv4Address(source))

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
        """Yield a function that waits for changes of links, IPv4 addresses and routes.

        It returns all that came since the call before, at least one; nothing from the
        moment the block is entered is missed. PlatformError from it when changes were
        lost (the kernel's buffer was full): look at everything, and watch again.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        ready: asyncio.Future[None] = loop.create_future()

        def post(function: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed already
                loop.call_soon_threadsafe(function, *arguments)

        def mark_ready() -> None:
            if not ready.done():
                ready.set_result(None)

        def finish(_: object) -> None:
            post(queue.put_nowait, None)
            post(mark_ready)

        monitor = self._submit(
            self._monitor(
                lambda: post(mark_ready),
                lambda change: post(queue.put_nowait, change),
            )
        )
        monitor.add_done_callback(finish)

        async def changes() -> list[Change]:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            if None in found:
                why = _THREAD_ENDED if monitor.cancelled() else monitor.exception()
                raise PlatformError(f"netlink changes were lost: {why}")
            return [change for change in found if change is not None]

        try:
            await ready
            yield changes
        finally:
            monitor.cancel()

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

    async def _monitor(self, ready: Callable[[], None], put: Callable[[Change], None]) -> None:
        async with AsyncIPRoute() as route:
            await route.bind(groups=_RTMGRP)
            ready()
            while True:
                async for message in route.get():
                    put(_to_change(message))

    def _prepare(self) -> None:
        """Make a loop and its thread, not started, in place of those before."""
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

    def _open_table(self) -> RouteTable:
        """Open the route table's socket on its thread, after entering the namespace."""
        if self._table is None:
            if self._namespace is not None:
                enter_namespace(self._namespace)
            self._table = RouteTable()
        return self._table

    async def _open(self) -> AsyncIPRoute:
        """The socket for requests, opened if it is not."""
        if self._route is None:
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
        if self._is_started and not self._thread.is_alive():
            self._prepare()
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _dump(self, what: str, ask: Callable[[Any], Any]) -> list[Any]:
        async def collect() -> list[Any]:
            async with self._turn:
                with _translated(what):
                    return [message async for message in await ask(await self._open())]

        return await self._run(collect())

    async def _do(self, what: str, object_: str, command: str, **arguments: Any) -> list[Any]:
        async def request() -> list[Any]:
            async with self._turn:
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
def _tolerate(code: int) -> Any:
    try:
        yield
    except PlatformError as error:
        if error.errno != code:
            raise


def _to_link(message: Any) -> Link:
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        mtu=message.get("mtu") or 0,
        is_up=bool(message["flags"] & uapi.IFF_UP),
        is_loopback=bool(message["flags"] & uapi.IFF_LOOPBACK),
        kind=message.get(("linkinfo", "kind")),
    )


def _to_address(message: Any) -> Address:
    flags = message.get("flags") or 0
    # IFA_LOCAL is the address itself; on point-to-point links IFA_ADDRESS is the far end.
    local = message.get("local") or message.get("address")
    return Address(
        index=message["index"],
        interface=IPv4Interface(f"{local}/{message['prefixlen']}"),
        is_permanent=bool(flags & uapi.IFA_F_PERMANENT),
        is_deprecated=bool(flags & uapi.IFA_F_DEPRECATED),
        is_temporary=bool(flags & uapi.IFA_F_TEMPORARY),
        scope=message["scope"],
    )


def _to_route(message: Any) -> Route:
    destination = message.get("dst")
    gateway = message.get("gateway")
    multipath = message.get("multipath") or ()
    single = message.get("oif")
    return Route(
        destination=IPv4Network(f"{destination or '0.0.0.0'}/{message['dst_len']}"),
        indexes=(single,) if single else tuple(hop["oif"] for hop in multipath),
        gateway=IPv4Address(gateway) if gateway else None,
        priority=message.get("priority") or 0,
        kind=rt_type.get(message["type"], str(message["type"])),
    )


def _to_change(message: Any) -> Change:
    if "dst_len" in message:
        route = _to_route(message)
        return Change(route.indexes[0] if route.indexes else 0, route.destination)
    return Change(message.get("index") or 0, None)
