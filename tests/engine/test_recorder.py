"""The flight recorder: what was dropped last can be read, also when the process is dead."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_contract import NOWHERE, OF_PEER, every_engine, inner, world
from tests.nodes import PORT
from tundp.choices import Engine
from tundp.engine.recorder import (
    ENTRIES,
    ENTRY_LEN,
    ControlEvent,
    open_recorder,
    read_recorder,
)
from tundp.errors import PlatformError
from tundp.wire.drop import DropReason

APP_PORT = 7000


@every_engine
async def test_the_last_drops_of_each_reason_are_kept(
    make_lab: Any, engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "box"
    recorder = open_recorder(path, "test")
    async with world(make_lab, engine, recorder=recorder) as here:
        here.app.sendto(b"nobody has this", (NOWHERE, APP_PORT))
        await here.until_read(1, 0)
        expired = inner(bytes(200), ttl=1)
        here.peer.sendto(expired, ("192.0.2.1", PORT))
        await here.until_read(1, 1)
        here.peer.sendto(inner(b"fine"), ("192.0.2.1", PORT))
        await here.until_read(1, 2)
        found = {record.reason: record for _, record in read_recorder(path).drops}
    assert set(found) == {DropReason.NO_ROUTE, DropReason.HOP_LIMIT_EXCEEDED}
    no_route, late = found[DropReason.NO_ROUTE], found[DropReason.HOP_LIMIT_EXCEEDED]
    assert no_route.stage.is_encap and no_route.packet.endswith(b"nobody has this")
    assert not late.stage.is_encap
    assert (late.hop, late.outer, late.port) == (2, 0xC0000202, PORT)
    assert late.packet == expired[:128] and late.length == len(expired)
    assert os.stat(path).st_mode & 0o777 == 0o600


@every_engine
async def test_a_flood_leaves_the_newest_ones(
    make_lab: Any, engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "box"
    recorder = open_recorder(path, "test")
    async with world(make_lab, engine, recorder=recorder) as here:
        for number in range(400):
            here.peer.sendto(inner(struct.pack("=I", number), ttl=1), ("192.0.2.1", PORT))
            if number % 20 == 19:
                await here.until_read(0, number + 1)
        numbers = [
            struct.unpack("=I", record.packet[28:32])[0] for _, record in read_recorder(path).drops
        ]
    assert 1 < len(numbers) <= 8
    assert numbers == sorted(numbers)
    assert numbers[-1] > 200


def test_a_killed_process_leaves_what_it_knew(tmp_path: Path) -> None:
    path = tmp_path / "box"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tundp.engine.recorder import ControlEvent, open_recorder\n"
        "box = open_recorder(Path(sys.argv[1]), 'dead')\n"
        "for number in range(700):\n"
        "    box.note(ControlEvent(unix_ns=number, kind='lease', text='x' * (number % 600),"
        " fields={'number': number}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    found = read_recorder(path)
    assert found.identity.version == "dead"
    assert [event.unix_ns for event in found.control] == list(range(700 - ENTRIES, 700))
    assert all(len(event.text) <= ENTRY_LEN for event in found.control)
    short = [event for event in found.control if event.unix_ns % 600 < 300]
    assert all(len(event.text) == event.unix_ns % 600 for event in short)
    assert all(event.fields == {"number": event.unix_ns} for event in short)


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "box"
    for name in ("first", "second", "third"):
        open_recorder(path, name).note(ControlEvent(unix_ns=1, kind="log", text=name, fields={}))
    assert read_recorder(path).identity.version == "third"
    assert read_recorder(tmp_path / "box.previous").control[0].text == "second"


@pytest.mark.parametrize("junk", [b"", b"tundpbx", b"tundpbx1\xff\xff\xff\xff", b"\x00" * 9000])
def test_what_is_no_flight_recorder_is_said_so(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "box"
    path.write_bytes(junk)
    with pytest.raises(PlatformError, match="box"):
        read_recorder(path)
    with pytest.raises(PlatformError, match="no tundp has run here"):
        read_recorder(tmp_path / "none")


async def test_an_engine_with_nobody_there(make_lab: Any) -> None:
    """Without a recorder drops are counted as ever."""
    async with world(make_lab, Engine.GSO) as here:
        here.app.sendto(b"out", (OF_PEER, APP_PORT))
        here.app.sendto(b"nobody", (NOWHERE, APP_PORT))
        await here.until_read(2, 0)
        assert here.engine.counters().encap.drops[DropReason.NO_ROUTE] == 1
