"""Links, addresses and routes, through pyroute2.

pyroute2's own event loop machinery does not run under uvloop (its socket setup is
refused) nor inside any running loop, so everything here runs on one private thread with
a plain selector loop; callers on any loop await the result. pyroute2's NetlinkError is
not an OSError: it becomes a PlatformError here, and nothing above sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any, Final, TypeVar

from pyroute2 import AsyncIPRoute, NetlinkError, netns

from tundp.errors import PlatformError

T = TypeVar("T")

RT_TABLE_MAIN: Final = 254
RTPROT_BOOT: Final = 3
RTN_UNICAST: Final = 1
IFF_UP: Final = 0x1
IFA_F_DEPRECATED: Final = 0x20
IFA_F_PERMANENT: Final = 0x80
_SCOPE_GLOBAL: Final = 0
_SCOPE_LINK: Final = 253
_RTMGRP: Final = 0x1 | 0x10 | 0x40
"""rtnetlink.h groups: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One network interface."""

    index: int
    name: str
    mtu: int
    is_up: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One IPv4 address of a link."""

    index: int
    interface: IPv4Interface
    is_link_scope: bool
    is_permanent: bool
    is_deprecated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One IPv4 unicast route of the main table; several `indexes` for a multipath route."""

    destination: IPv4Network
    indexes: tuple[int, ...]
    gateway: IPv4Address | None
    priority: int


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """Something about the link `index` changed: itself, an address, or a route over it."""

    index: int


class Netlink:
    """Asks and configures one network namespace: the caller's, or one named under /run/netns."""

    def __init__(self, namespace: str | None = None) -> None:
        self._namespace = namespace
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._serve, name="netlink", daemon=True)
        self._route: AsyncIPRoute | None = None

    async def __aenter__(self) -> Netlink:
        self._thread.start()
        await self._run(self._open())
        return self

    async def __aexit__(self, *_: object) -> None:
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
        """The IPv4 unicast routes of the main table, in the kernel's order."""
        messages = await self._dump(
            "list routes", lambda r: r.get_routes(family=2, table=RT_TABLE_MAIN)
        )
        return [_to_route(m) for m in messages if m["type"] == RTN_UNICAST]

    async def set_link(self, index: int, **attributes: Any) -> None:
        """Set link attributes in rtnetlink's names: `mtu`, `txqlen`, `state`, `ifname`, ..."""
        await self._do(
            f"set {attributes} on link {index}", "link", "set", index=index, **attributes
        )

    async def ensure_address(self, index: int, interface: IPv4Interface) -> None:
        """Give the link the address, scope global, no broadcast; harmless if it has it."""
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
        """Send `destination` to the link: table main, proto boot, scope global.

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
                table=RT_TABLE_MAIN,
                proto=RTPROT_BOOT,
                scope=_SCOPE_GLOBAL,
            )
        except PlatformError as error:
            if error.errno != errno.EEXIST:
                raise
            await self._check_route(index, destination)

    async def changes(self) -> AsyncIterator[LinkEvent]:
        """Every change of links, IPv4 addresses and routes from now on, until closed."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[LinkEvent] = asyncio.Queue()
        ready: asyncio.Future[None] = loop.create_future()
        monitor = asyncio.run_coroutine_threadsafe(self._monitor(loop, events, ready), self._loop)
        try:
            await ready
            while True:
                yield await events.get()
        finally:
            monitor.cancel()

    async def call(self, what: str, object_: str, command: str, **arguments: Any) -> list[Any]:
        """Any rtnetlink request by pyroute2's names; `what` is for the error."""
        return await self._do(what, object_, command, **arguments)

    async def _check_route(self, index: int, destination: IPv4Network) -> None:
        for route in await self.routes():
            if route.destination == destination and route.priority == 0:
                if route.indexes == (index,):
                    return
                names = {link.index: link.name for link in await self.links()}
                over = ", ".join(names.get(i, str(i)) for i in route.indexes)
                raise PlatformError(
                    f"a route for {destination} over {over} is already there, so packets would"
                    f" not reach the overlay: delete it (ip route del {destination}),"
                    " or choose another Network",
                    errno.EEXIST,
                )

    async def _monitor(
        self,
        loop: asyncio.AbstractEventLoop,
        events: asyncio.Queue[LinkEvent],
        ready: asyncio.Future[None],
    ) -> None:
        async with AsyncIPRoute() as route:
            await route.bind(groups=_RTMGRP)
            loop.call_soon_threadsafe(ready.set_result, None)
            while True:
                async for message in route.get():
                    for index in _indexes_of(message):
                        loop.call_soon_threadsafe(events.put_nowait, LinkEvent(index))

    def _serve(self) -> None:
        # A namespace belongs to a thread: this one's sockets open there, nobody else's do.
        if self._namespace is not None:
            enter_namespace(self._namespace)
        self._loop.run_forever()

    async def _open(self) -> None:
        self._route = await AsyncIPRoute().__aenter__()

    async def _close(self) -> None:
        assert self._route is not None
        await self._route.__aexit__(None, None, None)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    async def _dump(self, what: str, ask: Callable[[Any], Any]) -> list[Any]:
        async def collect() -> list[Any]:
            with _translated(what):
                return [message async for message in await ask(self._route)]

        return await self._run(collect())

    async def _do(self, what: str, object_: str, command: str, **arguments: Any) -> list[Any]:
        async def request() -> list[Any]:
            with _translated(what):
                answer = await getattr(self._route, object_)(command, **arguments)
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
        is_up=bool(message["flags"] & IFF_UP),
    )


def _to_address(message: Any) -> Address:
    flags = message.get("flags") or 0
    # IFA_LOCAL is the address itself; on point-to-point links IFA_ADDRESS is the far end.
    local = message.get("local") or message.get("address")
    return Address(
        index=message["index"],
        interface=IPv4Interface(f"{local}/{message['prefixlen']}"),
        is_link_scope=message["scope"] == _SCOPE_LINK,
        is_permanent=bool(flags & IFA_F_PERMANENT),
        is_deprecated=bool(flags & IFA_F_DEPRECATED),
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
    )


def _indexes_of(message: Any) -> tuple[int, ...]:
    if "index" in message:
        return (message["index"],)
    oif = message.get("oif")
    return (oif,) if oif else ()
