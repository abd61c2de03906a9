"""Sandboxes and environments of public bug reports, around a real daemon: docs/tried-cases.md."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.nodes import MakeOverlay, answers, has_peer, log_contains, until_logged
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab

SECCOMP = """
import ctypes, os, struct, sys
# A filter that answers errno argv[1] to the system calls argv[2], then the command argv[3:].
# struct sock_filter, SECCOMP_RET_ERRNO and SECCOMP_RET_ALLOW: linux/filter.h, linux/seccomp.h.
code, numbers = int(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")]
steps = [(0x20, 0, 0, 0)]
for number in numbers:
    steps += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | code)]
steps.append((0x06, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(len(steps), ctypes.cast(code, ctypes.c_void_p))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execvp(sys.argv[3], sys.argv[3:])
"""
MMSG = {"x86_64": "299,307", "aarch64": "243,269"}
"""recvmmsg and sendmmsg (asm/unistd.h)."""


def run_argv(overlay: OverlayLab, node: LabNode, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tundp",
        "run",
        *overlay.store_flags,
        "--iface=eth0",
        "--iptables-forward-rules=false",
        f"--subnet-file={node.subnet_file}",
        f"--admin-socket={node.admin_socket}",
        f"--state-dir={node.state_dir}",
        *flags,
    ]


async def start(
    overlay: OverlayLab, node: LabNode, wrapper: Sequence[str], *flags: str
) -> subprocess.Popen[bytes]:
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen([*wrapper, *run_argv(overlay, node, *flags)], log=log)
    return node.daemon


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
async def test_a_sandbox_without_batches_gets_the_simple_engine(
    make_overlay: MakeOverlay, code: int
) -> None:
    """A daemon that may not call recvmmsg and sendmmsg was ready, and carried nothing."""
    numbers = MMSG.get(os.uname().machine)
    if numbers is None:
        pytest.skip(f"system call numbers of {os.uname().machine} are not known here")
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await one.stop_daemon()
        wrapper = [sys.executable, "-c", SECCOMP, str(code), numbers]
        await start(overlay, one, wrapper)
        await overlay.wait_ready()
        await until(lambda: answers(one.host, two.tunnel_address))
        assert (await one.status_document())["engine"]["name"] == "simple"
        await until(lambda: log_contains(one, "engine simple (slow: sendmmsg: "))
        await one.stop_daemon()
        asked = await start(overlay, one, wrapper, "--engine=gso")
        assert asked.wait(60) == 1
        await until_logged(one, "--engine=gso cannot run here, sendmmsg: ")
        await until_logged(one, "use --engine=simple")


GARBAGE = (
    b"",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS to a plain port
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 50_000 + b"\r\n",
    b"GET http://other/healthz HTTP/1.1\r\nHost: \xff\r\n\r\n",
    b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /readyz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"HEAD /readyz HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /readyz HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n" * 50,
    b"GET /readyz?verbose=%ff%00&format=%zz HTTP/1.1\r\nHost: a\r\n\r\n",
    b"SSH-2.0-scanner\r\n",
    bytes(range(256)) * 100,
)


async def test_rubbish_to_health_metrics_and_admin_sockets(make_overlay: MakeOverlay) -> None:
    """Scanners, load balancers with TLS, clients that never end."""
    flags = ("--healthz-port=10256", "--metrics-addr=127.0.0.1:9100")
    async with make_overlay(*flags) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        places = (10256, 9100, str(one.admin_socket))
        slow = []

        def throw(place: int | str, data: bytes, *, stays: bool) -> None:
            family = socket.AF_INET if isinstance(place, int) else socket.AF_UNIX
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(5)
            with contextlib.suppress(OSError):
                sock.connect(("127.0.0.1", place) if isinstance(place, int) else place)
                sock.sendall(data)
                if stays:
                    slow.append(sock)
                    return
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
            sock.close()

        try:
            for place in places:
                for data in GARBAGE:
                    await one.host.call(throw, place, data, stays=False)
                    await one.host.call(throw, place, data[: len(data) // 2], stays=True)
            assert (await one.get(10256, "/readyz"))[0] == 200
            assert (await one.get(9100, "/metrics"))[0] == 200
            assert (await one.status_document())["lease"]["state"] == "held"
            assert await answers(one.host, two.tunnel_address, timeout_s=5)
        finally:
            for sock in slow:
                sock.close()
        text = one.log_path.read_text()
        assert "Traceback" not in text


async def test_a_reader_of_the_log_that_hangs_stops_no_packet(make_overlay: MakeOverlay) -> None:
    """The pipe behind stderr is full: nothing of the daemon may wait for who should read it."""
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        read_end, write_end = os.pipe()
        try:
            one.daemon = await one.host.call(
                subprocess.Popen,
                run_argv(overlay, one, "--healthz-port=10256"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=write_end,
            )
            one.host.processes.append(one.daemon)
            await overlay.start_daemon(two)
            await overlay.wait_ready()
            os.set_blocking(write_end, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(write_end, b"x" * 4096)
            os.set_blocking(write_end, True)
            document = json.loads(overlay.lease_file.read_text())
            document["leases"]["10.5.250.0-24"] = {"PublicIP": "192.0.2.77"}
            overlay.lease_file.write_text(json.dumps(document))
            await until(lambda: answers(one.host, two.tunnel_address))
            await until(lambda: has_peer(one, "10.5.250.0/24", "192.0.2.77"), deadline_s=10)
            assert (await one.get(10256, "/healthz"))[0] == 200
            assert await one.stop_daemon() == 0
        finally:
            os.close(read_end)
            os.close(write_end)
