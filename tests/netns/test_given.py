"""Resources given rather than opened: the device, sockets and locks of a predecessor."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.nodes import MakeLab, MakeOverlay, answers, is_ready, link_of, must_run, until_logged
from tests.wait import until
from tundp.admin import open_admin_socket
from tundp.backend.base import Given
from tundp.daemon.lock import is_running, take_lock
from tundp.daemon.resources import Resources, open_resources
from tundp.errors import PlatformError
from tundp.instance import Instance
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream
from tundp.linux import uapi
from tundp.linux.device import QUEUE_LEN
from tundp.linux.tun import Tun, TunMode
from tundp.linux.udp import RECEIVE_BUFFER_LEN, open_udp
from tundp.observe.web import open_listener
from tundp.settings.sources import load_settings

SCRIPT = Path(__file__).with_name("given_daemon.py")
SUPER = TunMode(has_vnet_header=True, wants_tso=True, wants_uso=True)
PLAIN = TunMode()


async def hold(
    overlay: OverlayLab, node: LabNode, stack: contextlib.AsyncExitStack, mode: TunMode
) -> dict[str, object]:
    """Everything a daemon of this node needs, held by this process."""
    tun = await node.host.call(Tun, "flannel%d", mode)
    stack.callback(tun.close)
    udp = stack.enter_context(await node.host.call(open_udp, IPv4Address(node.public_ip), 8285))
    admin = stack.enter_context(open_admin_socket(node.admin_socket))
    health = stack.enter_context(
        await node.host.call(open_listener, "127.0.0.1", 10256, "--healthz-port")
    )
    lock = take_lock(Instance(node.subnet_file))
    assert lock is not None
    stack.callback(os.close, lock)
    return {
        "tun": list(tun.fds),
        "udp": [udp.fileno()],
        "admin": admin.fileno(),
        "health": health.fileno(),
        "lock": lock,
    }


def descriptors(given: dict[str, object]) -> list[int]:
    return [
        fd
        for value in given.values()
        for fd in (value if isinstance(value, list) else [value])
        if isinstance(fd, int)
    ]


async def start(overlay: OverlayLab, node: LabNode, given: dict[str, object]) -> None:
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(
            [
                sys.executable,
                str(SCRIPT),
                json.dumps(given),
                *overlay.store_flags,
                "--iface=eth0",
                "--healthz-port=10256",
                "--engine=gso",
                f"--subnet-file={node.subnet_file}",
                f"--state-dir={node.state_dir}",
                f"--admin-socket={node.admin_socket}",
            ],
            log=log,
            pass_fds=descriptors(given),
        )


async def test_a_device_and_sockets_outlive_the_daemon_that_used_them(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False) as overlay, contextlib.AsyncExitStack() as stack:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(two)
        given = await hold(overlay, one, stack, SUPER)
        await start(overlay, one, given)
        await overlay.wait_ready()
        await until(lambda: is_ready(one))
        await until_logged(one, "device flannel0 adopted with 1 queues")
        before = await link_of(one.host, "flannel0")
        assert before is not None
        await until(lambda: answers(two.host, one.tunnel_address))
        async with PingStream(two.host, one.tunnel_address) as stream:
            await until(lambda: stream.received >= 20)
            one.daemon.kill()
            one.daemon.wait()
            assert await link_of(one.host, "flannel0") == before, "device, address and state stay"
            assert is_running(Instance(one.subnet_file)), "the lock is whoever has it"
            await start(overlay, one, given)
            now = stream.received
            await until(lambda: stream.received >= now + 20)
        assert await link_of(one.host, "flannel0") == before
        # Nothing was lost: what came in the gap waited in the device's and the socket's queues.
        assert stream.lost == 0, stream


async def test_the_longer_queue_of_a_device_that_is_given_is_kept(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False, nodes=1) as overlay, contextlib.AsyncExitStack() as stack:
        (one,) = overlay.nodes.values()
        given = await hold(overlay, one, stack, SUPER)
        small, large = 1 << 16, RECEIVE_BUFFER_LEN + (1 << 20)
        for length, kept in ((500, (QUEUE_LEN, RECEIVE_BUFFER_LEN)), (30_000, (30_000, large))):
            await must_run(one.host, *f"ip link set flannel0 txqueuelen {length}".split())
            udp = given["udp"]
            assert isinstance(udp, list)
            with socket.socket(fileno=os.dup(udp[0])) as sock:
                size = small if length == 500 else large
                sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, size)
            await start(overlay, one, given)
            await overlay.wait_ready()
            backend = (await one.status_document())["backend"]
            assert (backend["device"]["queue_len"], backend["receive_buffer"] // 2) == kept
            await one.stop_daemon(signal.SIGKILL)


async def test_a_device_that_does_not_fit_is_named_and_another_is_made(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(start=False) as overlay, contextlib.AsyncExitStack() as stack:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(two)
        given = await hold(overlay, one, stack, PLAIN)
        await start(overlay, one, given)
        await overlay.wait_ready()
        await until_logged(one, "it has no vnet headers (IFF_VNET_HDR)")
        await until(lambda: answers(two.host, one.tunnel_address))


async def test_adopting_refuses_what_is_no_such_device(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host = await lab.host("one")
        tun = await host.call(Tun, "t%d", SUPER)
        other = await host.call(Tun, "u%d", SUPER)
        try:
            adopted = await host.call(Tun.adopt, [os.dup(tun.fd)], SUPER)
            assert (adopted.name, adopted.has_tso) == (tun.name, tun.has_tso)
            adopted.close()
            pipe, end = os.pipe()
            os.close(end)
            for fds, mode, text in (
                ([os.dup(tun.fd)], PLAIN, "it has vnet headers"),
                ([os.dup(tun.fd), os.dup(tun.fd)], SUPER, "with 2 queues: 1 are wanted"),
                (
                    [os.dup(tun.fd), os.dup(other.fd)],
                    TunMode(has_vnet_header=True, queues=2),
                    f"several devices as one: {tun.name}, {other.name}",
                ),
                ([pipe], SUPER, "is no TUN device"),
            ):
                with pytest.raises(PlatformError, match=text):
                    await host.call(Tun.adopt, fds, mode)
                for fd in fds:
                    with pytest.raises(OSError, match="Bad file descriptor"):
                        os.fstat(fd)
            assert await link_of(host, tun.name) is not None, "the owner's descriptor is its own"
        finally:
            tun.close()
            other.close()


async def test_a_health_port_below_1024_is_opened_before_rights_are_dropped(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay("--healthz-port=80") as overlay:
        one = overlay.nodes[1]
        status, _ = await one.get(80, "/healthz")
        assert status == 200


def test_opening_is_all_or_nothing(tmp_path: Path) -> None:
    flags = [
        f"--subnet-file={tmp_path}/x.env",
        f"--admin-socket={tmp_path}/x.sock",
        "--healthz-ip=127.0.0.1",
        "--healthz-port=1",
    ]
    settings = load_settings(flags, {})
    taken = open_listener("127.0.0.1", 1, "--flag")
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(PlatformError, match=r"127\.0\.0\.1:1"):
        open_resources(settings)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not is_running(settings.instance)
    taken.close()
    resources = open_resources(settings)
    assert is_running(settings.instance)
    with pytest.raises(PlatformError, match="another tundp runs"):
        open_resources(settings, Resources(backend=Given()))
    resources.close()
    resources.close()
    assert not is_running(settings.instance)
