"""Asks one peer layer by layer: its host, its port, its TUN, its daemon, its bridge.

Harmless packets of this process only: ICMP echo requests by a raw socket, empty datagrams, and one
question by the running daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from shlex import quote
from typing import Final, Protocol, TypeVar

from tundp.admin import fetch_status
from tundp.doctor import peers
from tundp.doctor.conclusion import Facts, conclude
from tundp.doctor.hello import Hello, ask_hello
from tundp.doctor.home import STATUS_S, Home
from tundp.doctor.path_size import largest_that_arrives
from tundp.doctor.probes import SMALL, Asker, Echo, Question, asking
from tundp.doctor.whom import Whom
from tundp.errors import PlatformError
from tundp.linux.icmp_errors import IcmpErrors
from tundp.linux.netlink import Netlink, RouteLookup
from tundp.observe.ping import (
    Answer,
    Layer,
    LayerId,
    Outcome,
    PathSize,
    Ping,
    RoundTrips,
    Series,
)
from tundp.observe.status import ChaosStatus

T = TypeVar("T")

PORT_TRIES: Final = 3
PORT_WAIT_S: Final = 0.35
"""After each empty datagram."""
_POLL_S: Final = 0.02
_PROHIBITED: Final = "prohibited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked for on the command line."""

    count: int = 5
    """Echo requests of the series; 0: without end."""
    interval_s: float = 0.2
    packet_len: int = 84
    wait_s: float = 1.0


class Told(Protocol):
    """What is called while it goes on."""

    def layers(self, layers: Sequence[Layer]) -> None:
        """Every layer was asked."""
        ...

    def echo(self, each: Echo) -> None:
        """One echo request of the series is decided."""
        ...


async def ping(
    netlink: Netlink,
    home: Home,
    whom: Whom,
    wish: Wish,
    *,
    stop: asyncio.Event,
    told: Told,
) -> Ping:
    """Ask the peer until the series is over, or `stop` is set.

    PlatformError without CAP_NET_RAW.
    """
    return await _Pinger(netlink, home, whom, stop, told).run(wish)


class _Pinger:
    """One `tundp ping` while it runs."""

    def __init__(
        self, netlink: Netlink, home: Home, whom: Whom, stop: asyncio.Event, told: Told
    ) -> None:
        self._netlink, self._home = netlink, home
        self._whom, self._peer = whom, whom.peer
        self._stop, self._told = stop, told
        self._hello: Hello | None = None
        self._notes: list[str] = []
        self._began = time.time()

    async def run(self, wish: Wish) -> Ping:
        async with contextlib.AsyncExitStack() as stack:
            outer = await stack.enter_async_context(asking(self._home.address))
            inner = None
            if self._home.tun_address is not None:
                inner = await stack.enter_async_context(asking(self._home.tun_address))
            layers = await self._layers(outer, inner, wish.wait_s)
            self._told.layers(list(layers.values()))
            series, path = None, None
            tun = layers.get(LayerId.TUN)
            if inner is not None and tun is not None and not self._stop.is_set():
                if tun.answer is Answer.ANSWERED:
                    path = await self._unless_stopped(self._path_size(inner, wish.wait_s))
                if tun.answer is Answer.ANSWERED or not wish.count:
                    series = await self._series(inner, wish)
                    layers[LayerId.TUN] = _with_series(tun, series)
        return await self._conclude(layers, series, path)

    # Layers

    async def _layers(
        self, outer: Asker, inner: Asker | None, wait_s: float
    ) -> dict[LayerId, Layer]:
        """All layers, most at the same time; what `stop` ended is not asked."""
        subnet = self._peer.subnet
        tun, bridge = subnet.network_address, subnet.network_address + 1
        asked: dict[LayerId, Awaitable[Layer]] = {
            LayerId.UNDERLAY: _echo(outer, LayerId.UNDERLAY, self._peer.public_ip, wait_s),
        }
        if self._peer.port is not None:
            asked[LayerId.PORT] = self._port(self._peer.port)
        if inner is not None:
            asked[LayerId.TUN] = _echo(inner, LayerId.TUN, tun, wait_s)
            asked[LayerId.CONTROL] = control = asyncio.ensure_future(self._control())
            asked[LayerId.BRIDGE] = _echo_after(control, inner, LayerId.BRIDGE, bridge, wait_s)
        elif not self._home.daemon:
            asked[LayerId.BRIDGE] = _echo(outer, LayerId.BRIDGE, bridge, wait_s)
        tasks = {layer: asyncio.ensure_future(each) for layer, each in asked.items()}
        try:
            await self._unless_stopped(asyncio.wait(tasks.values()))
            found = {
                layer: task.result() if task.done() else _interrupted(layer)
                for layer, task in tasks.items()
            }
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return _explained(found, self._peer.port)

    async def _port(self, port: int) -> Layer:
        """What is said of empty datagrams to the peer's port."""
        there = self._peer.public_ip
        layer = Layer(id=LayerId.PORT, asked=f"UDP {there}:{port}", answer=Answer.SILENT)
        errors = IcmpErrors()
        try:
            errors.open(self._home.address)
            for _ in range(PORT_TRIES):
                refusal = errors.provoke(there, port)
                deadline = time.monotonic() + PORT_WAIT_S
                while time.monotonic() < deadline:
                    for error in errors.receive():
                        text = f"{error.text}, says {error.said_by}"
                        if _PROHIBITED in error.text:
                            return replace(layer, answer=Answer.PROHIBITED, evidence=text)
                        if error.text == "port unreachable" and error.said_by == there:
                            return replace(layer, answer=Answer.REFUSED, evidence=text)
                        return replace(layer, answer=Answer.UNREACHABLE, evidence=text)
                    await asyncio.sleep(_POLL_S)
                if refusal:
                    why = os.strerror(refusal)
                    return replace(layer, answer=Answer.NOT_SENT, evidence=why)
        except PlatformError as error:
            return replace(layer, answer=Answer.NOT_ASKED, evidence=str(error))
        finally:
            errors.close()
        return layer

    async def _control(self) -> Layer:
        self._hello = await ask_hello(self._home.path, self._peer.subnet)
        return self._hello.layer

    # Through the overlay

    async def _series(self, inner: Asker, wish: Wish) -> Series:
        """The series, until it is over or stopped."""
        trips = RoundTrips()
        to = self._peer.subnet.network_address

        async def run() -> None:
            async for each in inner.series(
                to,
                wish.packet_len,
                count=wish.count,
                interval_s=wish.interval_s,
                wait_s=wish.wait_s,
            ):
                trips.add(each.rtt_s)
                self._told.echo(each)

        await self._unless_stopped(run())
        return trips.series(wish.packet_len)

    async def _path_size(self, inner: Asker, wait_s: float) -> PathSize:
        """The largest packet that arrives, by echo requests with DF set."""
        status = self._home.status
        assert status is not None and status.backend is not None
        assert status.backend.device is not None
        full = status.backend.device.mtu
        to = self._peer.subnet.network_address

        async def ask(sizes: Collection[int]) -> set[int]:
            found = await inner.ask([Question(to, size) for size in sizes], wait_s=wait_s)
            return {each.packet_len for each in found}

        largest, tried = await largest_that_arrives(full, SMALL, ask)
        path = self._peer.path
        if largest is not None and largest < full and (path is None or path.inner_mtu is None):
            # The daemon may have learnt of it by these very packets.
            with contextlib.suppress(PlatformError):
                fresh = await fetch_status(self._home.path, limit_s=STATUS_S)
                path = next((p.path for p in fresh.peers if p.subnet == self._peer.subnet), path)
        return PathSize(
            device_mtu=full,
            largest=largest,
            tried=tried,
            daemon_mtu=None if path is None else path.inner_mtu,
            daemon_origin=None if path is None else path.mtu_origin,
        )

    # The end

    async def _conclude(
        self, layers: Mapping[LayerId, Layer], series: Series | None, path: PathSize | None
    ) -> Ping:
        tun = layers.get(LayerId.TUN)
        is_answering = tun is not None and tun.answer is Answer.ANSWERED
        peer = self._whom.pinged("" if self._hello is None else self._hello.implementation)
        heard = None if is_answering else await self._heard()
        chaos = self._chaos()
        facts = Facts(
            peer=peer,
            layers=layers,
            uplink=self._home.uplink,
            has_tun=self._home.tun_address is not None,
            ours=("", "") if is_answering else await self._ours(),
            look=await self._look(layers),
            is_heard=heard is not None and heard >= self._began,
            series=series,
            path=path,
            daemon=self._home.daemon,
            chaos=chaos,
        )
        found = conclude(facts)
        if chaos is not None and not found.text.startswith(chaos.on_purpose):
            self._notes.insert(0, f"{chaos.on_purpose}; {chaos.stop} ends it")
        is_early = self._stop.is_set() and tun is not None and tun.answer is Answer.NOT_ASKED
        return Ping(
            node="" if self._home.subnet is None else str(self._home.subnet),
            daemon=self._home.daemon,
            peer=peer,
            layers=list(layers.values()),
            series=series,
            path=path,
            clock=None if self._hello is None else self._hello.clock,
            outcome=Outcome.INTERRUPTED if is_early else found.outcome,
            conclusion="ended before the overlay had time to answer" if is_early else found.text,
            next_step="" if is_early else found.next_step,
            notes=self._notes,
        )

    def _chaos(self) -> ChaosStatus | None:
        """What this node's chaos does to packets to the peer; as of the beginning."""
        status = self._home.status
        return None if status is None else status.chaos_to(self._peer.public_ip, self._peer.port)

    async def _look(self, layers: Mapping[LayerId, Layer]) -> peers.Look | None:
        """The kernel's way to the peer; None, and a note, if it is not told."""
        try:
            (look,) = await peers.look_up(
                self._netlink,
                await self._netlink.links(),
                [self._peer],
                source=self._home.address,
                port=self._peer.port or 0,
            )
            await peers.add_neighbours(self._netlink, [look])
        except PlatformError as error:
            self._notes.append(f"route and neighbour not looked at: {error}")
            return None
        look.is_pingable = layers[LayerId.UNDERLAY].answer is Answer.ANSWERED
        port = layers.get(LayerId.PORT)
        look.is_refusing = port is not None and port.answer is Answer.REFUSED
        return look

    async def _ours(self) -> tuple[str, str]:
        """What of this node's own device or routes keeps packets from the overlay, and the step."""
        status = self._home.status
        if status is None or status.backend is None or (device := status.backend.device) is None:
            return "", ""
        step = "tundp doctor"
        to = self._peer.subnet.network_address
        try:
            links = {link.name: link for link in await self._netlink.links()}
            link = links.get(device.name)
            if link is None:
                return f"this node's TUN {device.name or 'device'} is gone", step
            if not link.is_up:
                text = f"this node's TUN {device.name} is down"
                return text, f"ip link set dev {quote(device.name)} up; tundp doctor"
            route = (await self._netlink.lookups([to]))[to]
        except PlatformError as error:
            self._notes.append(f"device and route of the overlay not looked at: {error}")
            return "", ""
        if isinstance(route, RouteLookup) and route.index == link.index:
            return "", ""
        names = {each.index: each.name for each in links.values()}
        by = (
            f"by {names.get(route.index, 'another device')}"
            if isinstance(route, RouteLookup)
            else f"nowhere ({os.strerror(route.errno)})"
        )
        text = f"this host routes {to} {by}, not by {device.name}: its packets miss the overlay"
        return text, f"ip route get {to}; tundp doctor --only=obstacle,device"

    async def _heard(self) -> float | None:
        """When the last datagram came from the peer, Unix time; None if that is not known."""
        if self._home.status is None:
            return None
        with contextlib.suppress(PlatformError):
            status = await fetch_status(self._home.path, limit_s=STATUS_S)
            for peer in status.peers:
                if peer.subnet == self._peer.subnet and peer.traffic is not None:
                    return peer.traffic.last_heard
        return None

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of `work`; None, and it is cancelled, when `stop` is set before."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, stop):
                each.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)


async def _echo(asker: Asker, layer: LayerId, to: IPv4Address, wait_s: float) -> Layer:
    """ICMP echo requests to one address."""
    question = Question(to)
    found = await asker.ask([question], wait_s=wait_s)
    asked = f"ICMP echo {to}"
    if question in found:
        rtt_ms = round(found[question] * 1e3, 4)
        return Layer(id=layer, asked=asked, answer=Answer.ANSWERED, rtt_ms=rtt_ms)
    if refusal := asker.refusals.get(question):
        return Layer(id=layer, asked=asked, answer=Answer.NOT_SENT, evidence=os.strerror(refusal))
    return Layer(id=layer, asked=asked, answer=Answer.SILENT)


async def _echo_after(
    before: asyncio.Future[Layer], asker: Asker, layer: LayerId, to: IPv4Address, wait_s: float
) -> Layer:
    """ICMP echo requests once another layer was asked.

    Where there is no bridge the peer's kernel answers them by ICMP redirects, which empty the
    budget it has for ICMP errors to us (net/ipv4/route.c, ip_rt_send_redirect; icmp_ratelimit): for
    a second it would not reject the question that tells a stock flanneld from silence.
    """
    await asyncio.wait((before,))
    return await _echo(asker, layer, to, wait_s)


def _interrupted(layer: LayerId) -> Layer:
    return Layer(id=layer, asked=layer.value, answer=Answer.NOT_ASKED, evidence="interrupted")


def _with_series(tun: Layer, series: Series) -> Layer:
    """The TUN's layer: what was late for the first look may have answered since."""
    if tun.answer is Answer.ANSWERED or not series.received:
        return tun
    return replace(tun, answer=Answer.ANSWERED, rtt_ms=series.rtt_min_ms, meaning="")


_MEANINGS: Final = {
    LayerId.UNDERLAY: "its host is down, has another address, or a firewall drops ICMP",
    LayerId.TUN: "nothing comes back through the overlay",
    LayerId.CONTROL: "its daemon does not answer, or the question or its answer was lost",
    LayerId.BRIDGE: "no pods there yet, or docker0/cni0 is elsewhere: no fault of the overlay",
}


def _explained(found: Mapping[LayerId, Layer], port: int | None) -> dict[LayerId, Layer]:
    """Each layer with what its silence means; the port's answer follows from those above it."""
    layers = {
        layer: replace(each, meaning=_MEANINGS.get(layer, "")) if each.answer.is_trouble else each
        for layer, each in found.items()
    }
    above = [
        each
        for each in (LayerId.TUN, LayerId.CONTROL, LayerId.BRIDGE)
        if each in layers and layers[each].answer in (Answer.ANSWERED, Answer.STOCK)
    ]
    udp = layers.get(LayerId.PORT)
    if udp is None or udp.answer is not Answer.SILENT:
        return layers
    if above:
        layers[LayerId.PORT] = replace(
            udp,
            answer=Answer.ANSWERED,
            evidence=f"a daemon listens: {above[0].value} answers through it",
        )
    else:
        layers[LayerId.PORT] = replace(
            udp,
            meaning=f"nothing refuses UDP {port}, and nobody answers by it",
        )
    return layers
