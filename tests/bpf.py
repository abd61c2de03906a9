"""Attaches BPF programs of two instructions that give one verdict: `python tests/bpf.py WHAT ...`.

Written from linux/bpf.h alone, without code of the product; a shell script of a test runs it in
the namespace of a lab host. What only a descriptor keeps attached is kept by a child process,
whose pid goes into a file; it ends by itself after two minutes.

    xdp DEVICE drv|skb|link:PIDFILE    drop all that comes in
    tcx DEVICE ingress|egress [PIDFILE]  drop; with a file as a link, else until detached
    tcx-off DEVICE ingress|egress PROGRAM_ID
    netfilter HOOKNUM PIDFILE          drop all IPv4 at a hook (0 to 4)
    sk_lookup PIDFILE                  no socket for anything that comes in
    cgroup DIRECTORY ingress|egress    drop what sockets of the group receive or send
    cgroup-off DIRECTORY ingress|egress PROGRAM_ID
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Final

_NUMBER: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
"""bpf(2)'s, by architecture."""
PROG_LOAD, PROG_ATTACH, PROG_DETACH, PROG_GET_FD_BY_ID, LINK_CREATE = 5, 8, 9, 13, 28
SCHED_CLS, XDP, CGROUP_SKB, SK_LOOKUP, NETFILTER = 3, 6, 8, 30, 32
"""enum bpf_prog_type."""
AT_CGROUP: Final = {"ingress": 0, "egress": 1}
AT_SK_LOOKUP, AT_XDP, AT_NETFILTER = 36, 37, 45
AT_TCX: Final = {"ingress": 46, "egress": 47}
"""enum bpf_attach_type."""
XDP_FLAGS: Final = {"skb": 2, "drv": 4}
KEPT_S: Final = 120
_libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> int:
    """Call bpf(2). OSError if it fails."""
    buffer = ctypes.create_string_buffer(attributes, 128)
    result = _libc.syscall(_NUMBER[platform.machine()], command, buffer, 128)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def load(kind: int, verdict: int, attach_type: int = 0) -> int:
    """A descriptor of a program that returns `verdict`."""
    code = ctypes.create_string_buffer(
        struct.pack("=BBhiBBhi", 0xB7, 0, 0, verdict, 0x95, 0, 0, 0), 16
    )
    license_ = ctypes.create_string_buffer(b"GPL")
    return bpf(
        PROG_LOAD,
        struct.pack(
            "=IIQQIIQII16sII",
            *(kind, 2, ctypes.addressof(code), ctypes.addressof(license_)),
            *(0, 0, 0, 0, 0, b"tundp_test", 0, attach_type),
        ),
    )


def attach(target: int, program: int, attach_type: int) -> None:
    """Attach until it is detached."""
    bpf(PROG_ATTACH, struct.pack("=IIII", target, program, attach_type, 0))


def link(program: int, target: int, attach_type: int, more: bytes = b"", flags: int = 0) -> None:
    """Attach as long as the process lives."""
    bpf(LINK_CREATE, struct.pack("=IIII", program, target, attach_type, flags) + more)


def set_xdp(device: str, program: int, mode: str) -> None:
    """RTM_SETLINK with IFLA_XDP."""
    inner = struct.pack("=HHi", 8, 1, program) + struct.pack("=HHI", 8, 3, XDP_FLAGS[mode])
    body = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(device), 0, 0)
    body += struct.pack("=HH", 4 + len(inner), 43 | 0x8000) + inner
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.send(struct.pack("=IHHII", 16 + len(body), 19, 5, 1, 0) + body)
        (code,) = struct.unpack_from("=i", sock.recv(65536), 16)
    if code:
        raise OSError(-code, os.strerror(-code))


def keep(path: str) -> None:
    """Leave the descriptors to a child, and its pid in a file."""
    ready, done = os.pipe()
    if os.fork():
        os.close(done)
        os.read(ready, 1)
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for each in range(3):
        os.dup2(null, each)
    Path(path).write_text(f"{os.getpid()}\n", encoding="ascii")
    os.write(done, b".")
    signal.alarm(KEPT_S)
    signal.pause()


def main(what: str, *words: str) -> None:
    """See above."""
    if what == "xdp":
        device, mode = words
        program = load(XDP, 1, AT_XDP)
        if mode.startswith("link:"):
            link(program, socket.if_nametoindex(device), AT_XDP, flags=XDP_FLAGS["skb"])
            keep(mode.removeprefix("link:"))
        else:
            set_xdp(device, program, mode)
    elif what == "tcx":
        device, way, *kept = words
        index, kind = socket.if_nametoindex(device), AT_TCX[way]
        program = load(SCHED_CLS, 2, kind)
        if kept:
            link(program, index, kind, bytes(16))
            keep(*kept)
        else:
            attach(index, program, kind)
    elif what == "tcx-off":
        device, way, number = words
        program = bpf(PROG_GET_FD_BY_ID, struct.pack("=III", int(number), 0, 0))
        index = socket.if_nametoindex(device)
        bpf(PROG_DETACH, struct.pack("=IIII", index, program, AT_TCX[way], 0))
    elif what == "netfilter":
        number, path = words
        program = load(NETFILTER, 0, AT_NETFILTER)
        more = struct.pack("=IIiI", socket.AF_INET, int(number), -50, 0)
        link(program, 0, AT_NETFILTER, more)
        keep(path)
    elif what == "sk_lookup":
        (path,) = words
        space = os.open("/proc/self/ns/net", os.O_RDONLY)
        link(load(SK_LOOKUP, 0, AT_SK_LOOKUP), space, AT_SK_LOOKUP)
        keep(path)
    elif what == "cgroup":
        directory, way = words
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        attach(group, load(CGROUP_SKB, 0, AT_CGROUP[way]), AT_CGROUP[way])
    elif what == "cgroup-off":
        directory, way, number = words
        program = bpf(PROG_GET_FD_BY_ID, struct.pack("=III", int(number), 0, 0))
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        bpf(PROG_DETACH, struct.pack("=IIII", group, program, AT_CGROUP[way], 0))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
