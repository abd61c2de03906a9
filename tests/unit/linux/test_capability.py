"""Capabilities given up in a child process, and what that child may still do after it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tundp.errors import PlatformError
from tundp.linux import capability

AS_ROOT = pytest.mark.skipif(
    capability.held() < {8, capability.CAP_NET_ADMIN}, reason="needs capabilities to give up"
)
PROGRAM = """
import ctypes, logging, os, subprocess, sys, threading
sys.path[:0] = {path!r}
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(levelname)s %(message)s")
from tundp.linux import capability, uapi
def sets(directory="/proc/thread-self"):
    lines = open(directory + "/status").read().splitlines()
    pairs = [line.split(":") for line in lines if line.startswith(("Cap", "NoNewPrivs"))]
    return {{name: int(value, 16) for name, value in pairs}}
{body}
"""


def in_child(body: str) -> str:
    program = PROGRAM.format(path=sys.path, body=body)
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_numbers_are_the_kernels() -> None:
    with open("/proc/self/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith("CapEff:"))
    assert sum(1 << number for number in capability.held()) == int(line.split()[1], 16)


@AS_ROOT
def test_all_five_sets_hold_nothing_else() -> None:
    out = in_child(
        """
capability.keep_only([capability.CAP_NET_ADMIN])
for name, mask in sets().items(): print(name, hex(mask))
"""
    )
    assert dict(line.split() for line in out.splitlines()) == {
        "CapInh": "0x0",
        "CapPrm": "0x1000",
        "CapEff": "0x1000",
        "CapBnd": "0x1000",
        "CapAmb": "0x0",
        "NoNewPrivs": "0x1",
    }


@AS_ROOT
def test_dropped_capabilities_do_not_come_back_over_exec() -> None:
    # uid 0 gets its whole bounding set at exec: the reason that set is emptied, too.
    out = in_child(
        """
capability.keep_only([])
print(subprocess.run(["grep", "CapEff", "/proc/self/status"], capture_output=True).stdout)
"""
    )
    assert "0000000000000000" in out


@AS_ROOT
def test_an_ambient_capability_is_dropped_too() -> None:
    out = in_child(
        """
libc = ctypes.CDLL(None, use_errno=True)
words = (capability._Words * 2)()
every = capability._sets().permitted
for number in (0, 1):
    part = every >> 32 * number & 0xFFFFFFFF
    words[number] = capability._Words(part, part, part)
header = capability._Header(uapi.LINUX_CAPABILITY_VERSION_3, 0)
assert libc.capset(ctypes.byref(header), words) == 0
for number in (12, 13): assert libc.prctl(47, 2, number, 0, 0) == 0
assert sets()["CapAmb"] == 0x3000, sets()
capability.keep_only([capability.CAP_NET_RAW])
print(hex(sets()["CapAmb"]), hex(sets()["CapInh"]))
"""
    )
    assert out.split() == ["0x2000", "0x2000"]


@AS_ROOT
def test_what_was_kept_works_and_what_was_not_does_not() -> None:
    # 8 is CAP_SETPCAP: with it gone, the bounding set refuses; the rest goes all the same.
    out = in_child(
        """
capability.keep_only([capability.CAP_NET_ADMIN, capability.CAP_NET_RAW])
before = sets()["CapBnd"]
capability.keep_only([capability.CAP_NET_ADMIN])
assert sets()["CapBnd"] == before == 0x3000
assert sets()["CapPrm"] == 0x1000
capability.require(capability.CAP_NET_ADMIN, "a device")
try: capability.require(capability.CAP_NET_RAW, "raw sockets")
except capability.PlatformError as error: print(error)
try: os.chroot("/")
except PermissionError: print("no chroot")
"""
    )
    assert "DEBUG the bounding set stays as it is: Operation not permitted" in out
    assert "raw sockets need CAP_NET_RAW, which this process lacks" in out
    assert "no chroot" in out


def test_without_any_privilege_it_is_harmless() -> None:
    out = in_child(
        """
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
capability.keep_only([capability.CAP_NET_ADMIN])
print("held", sorted(capability.held()), sets()["NoNewPrivs"])
"""
    )
    assert out.splitlines()[-1] == "held [] 1"


@AS_ROOT
def test_a_thread_from_before_is_named() -> None:
    out = in_child(
        """
started, done = threading.Event(), threading.Event()
def wait():
    started.set()
    done.wait()
thread = threading.Thread(target=wait)
thread.start()
started.wait()
capability.keep_only([capability.CAP_NET_ADMIN])
print("tid", thread.native_id)
done.set()
late = []
thread = threading.Thread(target=lambda: late.append(sets()["CapPrm"]))
thread.start(); thread.join()
print("late", hex(late[0]))
"""
    )
    tid = next(line for line in out.splitlines() if line.startswith("tid ")).split()[1]
    assert f"WARNING thread {tid} was started before" in out
    assert "late 0x1000" in out


@pytest.mark.parametrize("number", [-1, 64])
def test_a_capability_that_does_not_exist_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"capability {number} does not exist"):
        capability.keep_only([number])


def test_what_is_lacking_is_named_with_the_fix() -> None:
    # 40 is the newest the kernel knows; 63 will not be given out soon.
    assert 63 not in capability.held()
    if os.geteuid() == 0:
        capability.require(capability.CAP_NET_ADMIN, "nothing")
    else:
        with pytest.raises(PlatformError, match="need CAP_NET_ADMIN"):
            capability.require(capability.CAP_NET_ADMIN, "devices")
