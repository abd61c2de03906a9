"""Enters the daemon's sandbox, then tries what it must refuse and what it must allow.

argv: JSON of names to paths, then the daemon's flags. Prints JSON: what was tried, and the name
of its errno or `ok`. Numbers of system calls are written down here: they are an oracle.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tundp.daemon import confinement, process
from tundp.settings.sources import load_settings

X86 = platform.machine() == "x86_64"
# name: (x86_64, aarch64, arguments); arguments that do nothing should the call be let through
CALLS: dict[str, tuple[int, int, tuple[Any, ...]]] = {
    "ptrace": (101, 117, (2, os.getppid(), 0, 0)),  # PEEKDATA of what is not traced: ESRCH
    "process_vm_readv": (310, 270, (os.getppid(), 0, 0, 0, 0, 0)),
    "mount": (165, 40, (0, b"/nowhere", 0, 0, 0)),
    "umount2": (166, 39, (b"/nowhere", 0)),
    "open_tree": (428, 428, (-1, b"/nowhere", 0)),
    "pivot_root": (155, 41, (b"/nowhere", b"/nowhere")),
    "chroot": (161, 51, (b"/nowhere",)),
    "unshare": (272, 97, (0x20000,)),
    "setns": (308, 268, (-1, 0)),
    "bpf": (321, 280, (0, 0, 0)),
    "perf_event_open": (298, 241, (0, 0, -1, -1, 0)),
    "init_module": (175, 105, (0, 0, 0)),
    "finit_module": (313, 273, (-1, 0, 0)),
    "kexec_load": (246, 104, (0, 0, 0, 0)),
    "keyctl": (250, 219, (0, -3, 0)),
    "add_key": (248, 217, (0, 0, 0, 0, 0)),
    "io_uring_setup": (425, 425, (1, 0)),
    "userfaultfd": (323, 282, (1,)),
    "reboot": (169, 142, (0, 0, 0, 0)),
    "sethostname": (170, 161, (0, -1)),
    "open_by_handle_at": (304, 265, (-1, 0, 0)),
    "execveat": (322, 281, (-1, b"", 0, 0, 0)),
    "fchmodat": (268, 53, (-1, b"nowhere", 0)),
    "fchown": (93, 55, (-1, 0, 0)),
    "fsetxattr": (190, 7, (-1, 0, 0, 0, 0)),
    "clone3": (435, 435, (0, 0)),
}
FAMILIES = {"AF_PACKET": 17, "AF_ALG": 38, "AF_VSOCK": 40, "AF_BLUETOOTH": 31, "AF_TIPC": 30}
ALLOWED_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}


def call(number: int, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.syscall(number, *arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def result(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok"


def open_socket(family: int, kind: int = socket.SOCK_DGRAM) -> None:
    socket.socket(family, kind).close()


def clone_into_namespaces() -> None:
    """clone(CLONE_NEWUTS | CLONE_NEWNS | SIGCHLD), the child ends at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = libc.syscall(56 if X86 else 220, 0x04020000 | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child < 0:
        raise OSError(ctypes.get_errno(), "clone")
    os.waitpid(child, 0)


def make_set_user_id(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fchmod(fd, 0o4755)
    finally:
        os.close(fd)


def connect_abstract(name: str) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        sock.connect(f"\0{name}")


def connect_path(path: str, kind: int) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, kind)) as sock:
        sock.connect(path)


def pass_between_a_pair() -> None:
    one, two = socket.socketpair()
    with one, two:
        one.send(b"x")
        assert two.recv(1) == b"x"


def run(*argv: str) -> None:
    subprocess.run(argv, check=False, capture_output=True, stdin=subprocess.DEVNULL)


def replace_file(path: Path) -> None:
    path.write_text("x")
    path.with_name("new").write_text("y")
    path.with_name("new").rename(path)
    path.unlink()


def tries(paths: dict[str, str]) -> dict[str, Callable[[], object]]:
    outside, own = Path(paths["outside"]), Path(paths["own"])
    column = 0 if X86 else 1
    found: dict[str, Callable[[], object]] = {
        "run sh": lambda: run("/bin/sh", "-c", "true"),
        "run python": lambda: run(sys.executable, "-c", ""),
        "run a loader's argument": lambda: run("/bin/true"),
        "write outside": lambda: (outside / "made").write_text("x"),
        "write over outside": lambda: (outside / "there").write_text("x"),
        "cut off outside": lambda: os.truncate(outside / "there", 0),
        "remove outside": lambda: (outside / "there").unlink(),
        "link outside": lambda: (own / "link").hardlink_to(outside / "there"),
        "move outside": lambda: (own / "kept").rename(outside / "moved"),
        "read outside": lambda: (outside / "there").read_text(),
        "list outside": lambda: list(outside.iterdir()),
        "read shadow": lambda: Path("/etc/shadow").read_text(),
        "write a sysctl": lambda: os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)),
        "write a library": lambda: os.close(os.open(os.__file__, os.O_WRONLY)),
        "signal outside": lambda: os.kill(os.getppid(), 0),
        "abstract socket outside": lambda: connect_abstract(paths["abstract"]),
        "unix stream outside": lambda: connect_path(paths["stream"], socket.SOCK_STREAM),
        "unix packets outside": lambda: connect_path(paths["packets"], socket.SOCK_SEQPACKET),
        "pair of unix sockets": pass_between_a_pair,
        "clone into namespaces": clone_into_namespaces,
        "type into a terminal": lambda: __import__("fcntl").ioctl(0, 0x5412, b"x"),
        "make set-user-id": lambda: make_set_user_id(own / "kept"),
        "write own": lambda: replace_file(own / "file"),
        "read resolv.conf": lambda: Path("/etc/resolv.conf").read_text(),
        "read route table": lambda: Path("/proc/net/route").read_text(),
        "open the tun device": lambda: os.close(os.open("/dev/net/tun", os.O_RDWR)),
        "run nft": lambda: run("nft", "--version"),
        "run iptables": lambda: run("iptables", "--version"),
        "import late": lambda: __import__("xml.dom.minidom"),
        "start a thread": start_thread,
    }
    for name, (x86, arm, arguments) in CALLS.items():
        found[name] = lambda number=(x86, arm)[column], a=arguments: call(number, *a)  # type: ignore[misc]
    for name, family in (FAMILIES | ALLOWED_FAMILIES).items():
        found[name] = lambda family=family: open_socket(family)  # type: ignore[misc]
    if "certificate" in paths:
        certificate = Path(paths["certificate"])
        found["read a certificate"] = certificate.read_text
        found["read a renewed one"] = lambda: wait_for_renewed(certificate)
    # Last: a daemon has given its capabilities up before it enters. With them mount and the
    # like would be let through by all but the sandbox, and CAP_PERFMON reads any memory.
    found["read a parent's memory"] = read_memory
    return found


def read_memory() -> None:
    process.drop_capabilities()
    Path(f"/proc/{os.getppid()}/environ").read_bytes()


def wait_for_renewed(path: Path) -> None:
    """The parent replaces the file when it reads the line."""
    print("renew", flush=True)
    sys.stdin.readline()
    assert path.read_text() == "renewed"


def start_thread() -> None:
    import threading

    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def main() -> None:
    paths = json.loads(sys.argv[1])
    settings = load_settings(sys.argv[2:], os.environ)
    holds = confinement.confine(settings)
    answers = {name: result(attempt) for name, attempt in tries(paths).items()}
    document = {
        "abi": holds.landlock_abi if holds else None,
        "seccomp": holds.has_seccomp if holds else None,
        "missing": holds.missing if holds else None,
        "gaps": holds.gaps if holds else None,
        "answers": answers,
    }
    print(json.dumps(document), flush=True)


main()
