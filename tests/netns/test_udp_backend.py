"""The udp backend in this process, over a TUN device of a lab host that it is given."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import pytest

from tests.nodes import MakeLab, link_of, must_run
from tests.routes import fib_of
from tundp.backend.base import BackendContext, Given, PacketSettings
from tundp.backend.udp import backend as backend_module
from tundp.backend.udp.backend import UdpBackend
from tundp.backend.udp.config import DEFAULT_PORT, udp_config
from tundp.backend.udp.sockets import open_sockets
from tundp.choices import Engine, SourceCheck
from tundp.engine.native.engine import EngineSettings
from tundp.finding import Verdict
from tundp.lab.lab import Host
from tundp.lease.codec import parse_key
from tundp.linux.iface import Interface, Selection, look
from tundp.linux.tun import Tun, TunMode
from tundp.linux.udp import open_udp
from tundp.wire.impair import Impairment

OVERLAY = IPv4Network("10.5.0.0/16")
OWN = parse_key("10.5.1.0-24")


@contextlib.asynccontextmanager
async def opened(
    make_lab: MakeLab, *commands: str
) -> AsyncIterator[tuple[Host, UdpBackend, Interface]]:
    """A backend that carries packets on a host, after these commands."""
    async with make_lab() as lab:
        host, other = await lab.host("one"), await lab.host("two")
        await lab.cable(host, "eth0", other, "eth0")
        await host.configure("eth0", "192.0.2.1/24")
        await other.configure("eth0", "192.0.2.2/24")
        for command in commands:
            await must_run(host, *command.split())
        interface = await look(host.netlink, Selection(iface=("eth0",)), OVERLAY)
        tun = await host.call(Tun, "flannel0", TunMode())
        sock = await host.call(open_udp, interface.address, DEFAULT_PORT)
        packets = PacketSettings(
            tun_name="flannel0",
            engine=Engine.REFERENCE,
            workers=1,
            source_check=SourceCheck.COUNT,
            admitted=(),
            engine_settings=EngineSettings(),
        )
        given = Given(tun_fds=tun.fds, udp_socks=(sock,))
        backend = UdpBackend(
            udp_config(), BackendContext(netlink=host.netlink, packets=packets, given=given)
        )
        try:
            backend.prepare(interface)
            fib = fib_of(("10.5.2.0/24", "192.0.2.2"), own=OWN.subnet)
            await backend.open(OVERLAY, OWN, fib=fib, peers={})
            yield host, backend, interface
        finally:
            backend.close()


async def test_routes_that_host_gw_left_do_not_bypass_the_device(make_lab: MakeLab) -> None:
    async with opened(
        make_lab,
        "ip route add 10.5.7.0/24 via 192.0.2.2 dev eth0 proto 85",
        "ip route add 10.6.7.0/24 via 192.0.2.2 dev eth0 proto 85",
        "ip route add 10.5.8.0/24 via 192.0.2.2 dev eth0 proto static",
    ) as (host, _, _):
        assert "dev flannel0" in await must_run(host, "ip", "route", "get", "10.5.7.9")
        # Another instance's, and an operator's, are not ours to remove.
        for address in ("10.6.7.9", "10.5.8.9"):
            assert "via 192.0.2.2" in await must_run(host, "ip", "route", "get", address)


async def test_a_link_with_another_mtu_is_followed_though_the_device_is_gone(
    make_lab: MakeLab,
) -> None:
    async with opened(make_lab) as (host, backend, interface):
        assert backend.mtu == 1472
        await must_run(host, "ip", "link", "del", "flannel0")
        assert await link_of(host, "flannel0") is None
        now = replace(interface, link=replace(interface.link, mtu=1400))
        assert await backend.underlay_changed(now) is False
        assert backend.mtu == 1372


async def test_chaos_has_ended_when_the_engine_sends_from_another_address(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lanes take what comes from the address it began with, and discard the rest."""
    async with opened(make_lab) as (host, backend, _):
        with monkeypatch.context() as patched:
            # Its sockets have to be the host's, as all of a daemon are.
            patched.setattr(asyncio, "to_thread", host.call)
            (run,) = await backend.chaos.begin(
                "192.0.2.2", Impairment(delay_s=0.001), for_s=600, seed=7
            )
        attach, impaired = backend.engine.attach, list[str]()

        def noting(tun: Tun) -> None:
            impaired.append(backend.chaos.words())
            attach(tun)

        monkeypatch.setattr(backend.engine, "attach", noting)
        await must_run(host, "ip", "addr", "add", "192.0.2.51/24", "dev", "eth0")
        now = await look(host.netlink, Selection(iface=("192.0.2.51",)), OVERLAY)
        fresh = await host.call(open_sockets, now.address, DEFAULT_PORT, 1)
        monkeypatch.setattr(backend_module, "open_sockets", lambda *_: fresh)
        moved = replace(now, link=replace(now.link, mtu=1400))
        assert await backend.underlay_changed(moved) is True
        assert impaired == [""]
        assert run.why_ended == "this node's underlay address changed"
        assert backend.chaos.totals().holds
        assert backend.mtu == 1372


async def test_without_sockets_for_answers_it_says_that_nothing_is_measured(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair = socket.socketpair

    def refuse_datagrams(*given: int) -> Any:
        if len(given) > 1 and given[1] & socket.SOCK_DGRAM:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return make_pair(*given)

    monkeypatch.setattr(socket, "socketpair", refuse_datagrams)
    async with opened(make_lab) as (_, backend, _):
        (found,) = [each for each in backend.checks() if each.id == "path-mtu"]
        assert found.verdict is Verdict.WARN
        assert "Too many open files" in found.evidence
