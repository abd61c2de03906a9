"""Memory of big values goes back to the kernel: on the real allocator, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

MB = 1 << 20
PROGRAM = f"""
import sys
from pathlib import Path
from tundp.linux import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "bound":
    print(heap.bound())
before = resident()
kept = []
for _ in range(8):
    # As a store's answer, and what is made of it: freed, with something small behind it.
    big = [bytearray(3 * {MB}) for _ in range(4)]
    kept.append(bytearray(1000))
    del big
print((resident() - before) // {MB})
"""


def run(how: str, **environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        check=True,
        env=clean | environment,
    )
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_big_blocks_leave_the_process() -> None:
    assert run("bound")[0] == "True"
    assert int(run("bound")[1]) <= 4
    # The program shows what it is about: the same without.
    assert int(run("left alone")[0]) > 4


def test_what_the_environment_says_is_left_alone() -> None:
    assert run("bound", MALLOC_ARENA_MAX="1")[0] == "False"
    assert run("bound", GLIBC_TUNABLES="glibc.malloc.arena_max=1")[0] == "False"
