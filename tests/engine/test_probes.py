"""USDT probes: their notes are in the module, and uprobes of the kernel stop at them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tundp._native
from tests.engine.test_contract import APP_PORT, NOWHERE, OF_PEER, inner, receive, world
from tests.nodes import PORT
from tests.wait import until
from tundp.choices import Engine

MODULE = Path(tundp._native.__file__).resolve()
NAMES = {
    "tun_read": ("packets",),
    "udp_send": ("packets",),
    "udp_receive": ("packets",),
    "tun_write": ("packets",),
    "drop": ("direction", "reason", "hop", "length", "packets"),
}
NO_ROUTE = 5
NOTE = re.compile(
    r"Provider: tundp\s+Name: (\w+)\s+Location: 0x(\w+), Base: 0x\w+, Semaphore: 0x(\w+)\s+"
    r"Arguments: (.*)"
)
LOAD = re.compile(r"LOAD\s+0x(\w+)\s+0x(\w+)\s+0x\w+\s+0x(\w+)\s+0x\w+\s+R E")


@dataclass(frozen=True)
class Note:
    """One place of a probe."""

    name: str
    address: int
    semaphore: int
    arguments: tuple[str, ...]


def readelf(option: str) -> str:
    command = ["readelf", "-W", option, str(MODULE)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def notes() -> list[Note]:
    return [
        Note(name, int(address, 16), int(semaphore, 16), tuple(arguments.split()))
        for name, address, semaphore, arguments in NOTE.findall(readelf("-n"))
    ]


def offset_of(address: int) -> int:
    """Where in the file the code at an address is."""
    for offset, start, length in LOAD.findall(readelf("-l")):
        at = address - int(start, 16)
        if 0 <= at < int(length, 16):
            return int(offset, 16) + at
    raise AssertionError(f"{address:#x} is in no executable segment")


def fetched(argument: str) -> str:
    """`8@24(%rdi)` as uprobe_events has it."""
    operand = argument.removeprefix("8@").replace("%r", "%")
    operand = re.sub(r"%(\d+)", r"%r\1", operand)  # r8 to r15 keep their letter
    if operand.startswith("$"):
        return f"\\{operand[1:]}:u64"
    if memory := re.fullmatch(r"(-?\d*)\((%\w+)\)", operand):
        return f"+{memory[1] or 0}({memory[2]}):u64".replace("+-", "-")
    return f"{operand}:u64"


class Uprobes:
    """The kernel's tracefs, in a mount namespace for each command; a trace buffer of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.group = f"tundp_test_{os.getpid()}"

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        script = 'mount -t tracefs none "$0" && cd "$0" && eval "$1"'
        argv = ["unshare", "-m", "sh", "-c", script, str(self._folder), command]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    def must(self, command: str) -> str:
        done = self.run(command)
        assert done.returncode == 0, (command, done.stderr, self.run("cat error_log").stdout[-600:])
        return done.stdout

    def close(self) -> None:
        self.run(f"echo 0 > instances/{self.group}/events/{self.group}/enable")
        self.run(f"rmdir instances/{self.group}")
        events = self.run("cat uprobe_events").stdout.split("\n")
        for event in events:
            if event.startswith(f"p:{self.group}/"):
                self.run(f"echo '-:{event.split()[0].removeprefix('p:')}' >> uprobe_events")


@pytest.fixture
def uprobes(tmp_path: Path) -> Iterator[Uprobes]:
    used = Uprobes(tmp_path)
    if (done := used.run("cat uprobe_events")).returncode:
        pytest.skip(f"no uprobes here: {done.stderr.strip()}")
    yield used
    used.close()
    assert used.group not in used.must("cat uprobe_events")


def test_every_probe_is_in_the_module() -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"no probes on {platform.machine()}")
    found = notes()
    assert {note.name for note in found} == set(NAMES)
    for note in found:
        assert len(note.arguments) == len(NAMES[note.name])
        assert note.semaphore == 0
        assert MODULE.read_bytes()[offset_of(note.address)] == 0x90 or (
            platform.machine() != "x86_64"
        ), "a nop"


async def test_a_uprobe_sees_each_packet(make_lab: Any, uprobes: Uprobes) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the names of registers are those of x86_64")
    group = uprobes.group
    for number, note in enumerate(notes()):
        named = zip(NAMES[note.name], note.arguments, strict=True)
        arguments = " ".join(f"{name}={fetched(argument)}" for name, argument in named)
        place = f"{MODULE}:{offset_of(note.address):#x}"
        line = f"p:{group}/{note.name}_{number} {place} {arguments}"
        uprobes.must(f"echo '{line}' >> uprobe_events")
    uprobes.must(f"mkdir instances/{group} && echo 1 > instances/{group}/events/{group}/enable")

    def seen() -> list[tuple[str, ...]]:
        text = uprobes.must(f"cat instances/{group}/trace")
        lines = re.findall(r"(?m)^.*-(\d+) +\[.* (\w+)_\d+: \(0x\w+\) (.*)", text)
        # Of this process: engines of others have the same module.
        ours = os.listdir("/proc/self/task")
        return [
            (name, *re.findall(r"=(\d+)", rest))
            for thread, name, rest in lines
            if name in NAMES and thread in ours
        ]

    async with world(make_lab, Engine.GSO) as here:
        here.app.sendto(b"out", (OF_PEER, APP_PORT))
        await receive(here.peer)
        here.peer.sendto(inner(b"in"), ("192.0.2.1", PORT))
        assert await receive(here.app) == b"in"
        here.app.sendto(b"nobody", (NOWHERE, APP_PORT))
        await here.until_read(2, 1)
        await until(lambda: len(seen()) >= 6, "six hits of the probes")
        assert seen() == [
            ("tun_read", "1"),
            ("udp_send", "1"),
            ("udp_receive", "1"),
            ("tun_write", "1"),
            ("tun_read", "1"),
            ("drop", "0", str(NO_ROUTE), "0", "34", "1"),
        ]
