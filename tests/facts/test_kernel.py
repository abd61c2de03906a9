"""What we believe of the kernel, asked of the one at hand. Each belief names who relies on it."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wait import until_sync
from tundp.linux import uapi

IN_NAMESPACE = """
import errno, os, select, socket, sys
sys.path[:0] = {path!r}
from tundp.linux.tun import Tun
def ip(*words): assert os.system(" ".join(("ip", *words))) == 0
{body}
"""


def in_namespace(body: str) -> str:
    """Run `body` in a network namespace of its own, gone when the process is."""
    program = IN_NAMESPACE.format(path=sys.path, body=body)
    answer = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", program], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_a_deleted_tun_reads_ebadfd_and_wakes_its_poller() -> None:
    # engine/reference.py tells a deleted device by this, and is woken to find out.
    assert errno.EBADFD == 77
    assert in_namespace(
        """
tun = Tun("t0")
poller = select.poll(); poller.register(tun.fd, select.POLLIN)
ip("link", "set", "t0", "up")
for _ in range(9):
    try: os.read(tun.fd, 2000)
    except BlockingIOError: break
assert not poller.poll(0)
ip("link", "del", "t0")
assert poller.poll(1000)
try: os.read(tun.fd, 2000)
except OSError as error: print(error.errno)
"""
    ) == str(errno.EBADFD)


@pytest.mark.parametrize(
    ("packet", "state", "expected"),
    [
        ("b'\\x45' + bytes(19)", "down", errno.EIO),
        ("b'\\x05' + bytes(19)", "up", errno.EINVAL),
        ("b'\\xf5' + bytes(19)", "up", errno.EINVAL),
        ("b'\\x45' + bytes(19)", "up", 0),
    ],
)
def test_what_a_tun_write_answers(packet: str, state: str, expected: int) -> None:
    # The errno to drop-reason table of engine/reference.py.
    assert in_namespace(
        f"""
tun = Tun("t0")
ip("link", "set", "t0", "{state}")
try: os.write(tun.fd, {packet}); print(0)
except OSError as error: print(error.errno)
"""
    ) == str(expected)


def test_which_sources_a_receiving_kernel_takes() -> None:
    # wire/ip.py's is_unicast: multicast and limited broadcast are martians, class E is not.
    # 0/8 but for 0.0.0.0 passes since Linux 5.3; is_single_host refuses it all the same.
    assert in_namespace(
        """
from tundp.wire import ip as wire
from tundp.linux.sysctl import set_device
tun = Tun("t0")
ip("addr", "add", "10.5.1.0/32", "dev", "t0")
ip("link", "set", "t0", "up")
ip("route", "add", "default", "dev", "t0")
for device in ("all", "t0"): set_device("ipv4", device, "rp_filter", 0)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("10.5.1.0", 9999))
sock.setblocking(False)
def number(text): return int.from_bytes(socket.inet_aton(text), "big")
for source in ("240.5.2.7", "255.255.255.254", "192.0.2.1",
               "255.255.255.255", "224.0.0.1", "0.0.0.0", "127.0.0.1"):
    payload = (1).to_bytes(2, "big") + (9999).to_bytes(2, "big") + bytes((0, 9, 0, 0)) + b"x"
    os.write(tun.fd, wire.build_header(payload_len=9, source=number(source),
             destination=number("10.5.1.0"), ip_proto=17, ttl=64) + payload)
    try: print(sock.recvfrom(9)[1][0])
    except BlockingIOError: pass
"""
    ).split() == ["240.5.2.7", "255.255.255.254", "192.0.2.1"]


def test_the_device_goes_with_its_last_descriptor_and_children_do_not_keep_it() -> None:
    # SIGTERM leaves nothing behind: linux/tun.py makes the descriptor close-on-exec.
    assert (
        in_namespace(
            """
import subprocess
tun = Tun("t%d")
assert tun.name == "t0" and not os.get_inheritable(tun.fd)
child = subprocess.Popen(["sleep", "20"], close_fds=False)
tun.close()
print(os.path.exists("/proc/sys/net/ipv4/conf/t0"))
child.kill(); child.wait()
"""
        )
        == "False"
    )


def test_the_device_decides_what_is_refused_and_the_error_queue_names_its_mtu() -> None:
    # linux/udp.py: IP_PMTUDISC_INTERFACE, which a route's MTU and what ICMP says do not concern.
    assert (
        in_namespace(
            f"""
ip("link", "set", "lo", "up")
ip("link", "add", "d0", "type", "veth"); ip("link", "set", "veth0", "up")
ip("link", "set", "d0", "up", "mtu", "1400")
ip("addr", "add", "192.0.2.1/24", "dev", "d0")
ip("route", "add", "192.0.2.9", "dev", "d0", "mtu", "1300")
from ipaddress import IPv4Address
from tundp.linux import udp
sock = udp.open_udp(IPv4Address("192.0.2.1"), 8285)
sock.sendto(bytes(1372), ("192.0.2.9", 8285))
try: sock.sendto(bytes(1373), ("192.0.2.9", 8285))
except OSError as error: print(error.errno == {errno.EMSGSIZE},
    udp.device_mtu(IPv4Address("192.0.2.1"), "192.0.2.9"),
    udp.device_mtu(IPv4Address("127.0.0.1"), "127.0.0.1"),
    udp.device_mtu(IPv4Address("192.0.2.1"), "198.51.100.1"))
"""
        )
        == "True 1400 65535 None"
    )


def test_forced_buffers_pass_the_sysctl_limit() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 8 << 20)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 16 << 20


def test_a_receive_buffer_holds_as_many_datagrams_as_the_charge_says() -> None:
    # linux/queues.py, which measures the charge; daemon/checks/queues.py divides by it.
    assert (
        in_namespace(
            """
ip("link", "set", "lo", "up")
from tundp.linux.queues import datagram_charge
from tundp.linux import uapi
for length in (100, 1472):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, 1 << 20)
        bound = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // datagram_charge(length)
        for _ in range(bound + 100): sock.sendto(bytes(length), sock.getsockname())
        sock.setblocking(False)
        held = 0
        try:
            while sock.recv(2000): held += 1
        except BlockingIOError: print(held - bound)
"""
        )
        == "0\n0"
    )


def test_rxq_ovfl_counts_what_the_socket_lost() -> None:
    # engine/reference.py shows it as socket_overflows.
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.setsockopt(socket.SOL_SOCKET, uapi.SO_RXQ_OVFL, 1)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        for _ in range(100):
            sender.sendto(bytes(1000), receiver.getsockname())
        read = 0
        while select.select([receiver], [], [], 0)[0]:
            receiver.recv(2000)
            read += 1
        sender.sendto(b"x", receiver.getsockname())
        _, ancillary, _, _ = receiver.recvmsg(2000, 64)
        assert 0 < read < 100
        assert ancillary == [
            (socket.SOL_SOCKET, uapi.SO_RXQ_OVFL, (100 - read).to_bytes(4, sys.byteorder))
        ]


def test_unconnected_udp_socket_never_hears_of_a_refusal() -> None:
    # So one dead peer cannot make a send to another fail, and uvloop's reader stays awake.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind(("127.0.0.1", 0))
            address = gone.getsockname()
        for _ in range(3):
            sock.sendto(b"x", address)
        assert not select.select([sock], [], [], 0.05)[0]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_these_tests_run_as_root() -> None:
    assert os.geteuid() == 0


def test_who_listens_last_is_who_listens(tmp_path: Path) -> None:
    # unix(7) says that SO_PEERCRED names who called listen(2); it may be called again, by another
    # process with the same socket: tundp.linux.listeners finds a successor so.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "sock"))
        listening.listen()

        def peer() -> int:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "sock"))
                ucred = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("=iII", ucred)[0])

        assert peer() == os.getpid()
        code = (
            "import socket, sys; socket.socket(fileno=int(sys.argv[1])).listen(); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
        ) as other:
            try:
                until_sync(lambda: peer() == other.pid)
            finally:
                other.kill()
