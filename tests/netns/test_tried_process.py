"""Sandboxes and environments of public bug reports, around a real daemon: docs/tried-cases.md."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.nodes import MakeOverlay, answers, log_contains
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
        assert await log_contains(one, "--engine=gso cannot run here, sendmmsg: ")
        assert await log_contains(one, "use --engine=simple")
