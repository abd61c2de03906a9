"""`tundp bugreport` ends in time, whatever hangs: files, checks and worker threads of others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from tundp.bugreport import collect, daemon, host
from tundp.cli.program import main

gate, what = sys.argv[1:3]

def opens():
    open(gate).read()  # for ever: nobody writes

async def hangs(*_args, **_more):
    await asyncio.to_thread(opens)

def redacts(*_):
    print("redacting", flush=True)
    opens()

few = [("hangs.txt", gate, "x"), ("net-dev.txt", "/proc/net/dev", "x")]
host._FILES, host._PROGRAMS, host._UNIT_PROGRAMS = few, (), ()
items = collect._items
collect._items = lambda *given: (replace(each, limit_s=min(each.limit_s, 1.0))
                                 for each in items(*given))
daemon.check = hangs  # as a check that parses a large ruleset
daemon.examine = lambda *_args, **_more: opens()
if what == "redact":
    collect._member = redacts
sys.exit(main(["bugreport", "--no-capture", *sys.argv[3:]]))
"""


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """All but what to do: a report without a daemon, in which a read and two checks hang."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    return [
        *(sys.executable, "-c", PROGRAM, str(gate), "", "-w", str(tmp_path / "r.tar.gz")),
        f"--admin-socket={tmp_path}/none.sock",
        f"--store=file:{tmp_path}/leases.json",
        f"--subnet-file={tmp_path}/subnet.env",
    ]


def test_a_report_is_written_whatever_hangs(argv: list[str], tmp_path: Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "r.tar.gz") as archive:
        names = {each.name.removeprefix("tundp-bugreport/") for each in archive}
    assert {"README.txt", "host/net-dev.txt", "config/settings.toml"} <= names
    assert not names & {"host/hangs.txt", "doctor.json", "config/check.json"}
    for name in ("host/hangs.txt", "doctor.json", "config/check.json"):
        assert f"{name}: it took longer than 1 s" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_it_redacts(
    argv: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """The loop is held then, and whatever ran on other threads still runs."""
    argv[4] = "redact"
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "redacting\n"
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert "ended by a signal: no report was written" in said and "Traceback" not in said
    assert not (tmp_path / "r.tar.gz").exists()
