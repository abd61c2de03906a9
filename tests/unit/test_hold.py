"""`tundp hold` with small commands instead of a daemon: what it keeps, believes and ends."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tundp
from tests.stopped import stop
from tests.wait import until_sync
from tundp.hold.kept_fds import ROOM, KeptFds

ROOT = str(Path(tundp.__file__).parents[1])
HOLDER = "import sys; from tundp.hold.holder import hold; sys.exit(hold(sys.argv[1:]))"
# What every command here begins with: `note` tells the test that a line was reached.
BEGIN = """
import os, signal, socket, sys, time
directory = sys.argv[1]
def note(text):
    with open(f"{directory}/notes", "a") as file:
        file.write(f"{text}\\n")
def tell(*lines, fds=()):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(sock, ["\\n".join(lines).encode()], fds)
"""

Hold = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Start a holder with a command in Python; whatever it leaves is ended."""
    holders = []

    def start(script: str, *, watchdog: str = "0") -> subprocess.Popen[bytes]:
        path = tmp_path / "command.py"
        path.write_text(BEGIN + script)
        command = [sys.executable, "-I", "-S", str(path), str(tmp_path)]
        with (tmp_path / "log").open("ab") as log:
            holder = subprocess.Popen(
                [sys.executable, "-S", "-c", HOLDER, watchdog, *command],
                env={"PYTHONPATH": ROOT, "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)},
                stderr=log,
            )
        holders.append(holder)
        return holder

    yield start
    for holder in holders:
        if holder.poll() is None:
            for pid in children(holder.pid):
                os.kill(pid, signal.SIGKILL)
            holder.kill()
            holder.wait()


def notes(directory: Path) -> list[str]:
    path = directory / "notes"
    return path.read_text().splitlines() if path.exists() else []


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(holder: subprocess.Popen[bytes]) -> int:
    until_sync(lambda: holder.poll() is not None, "the holder to end")
    return holder.returncode


def test_a_command_that_fails_finds_what_it_had_stored(hold: Hold, tmp_path: Path) -> None:
    holder = hold("""
if "LISTEN_FDS" not in os.environ:
    for name in ("first", "image", "gone"):
        fd = os.memfd_create(name)
        os.write(fd, name.encode())
        tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])
    tell("FDSTOREREMOVE=1", "FDNAME=gone")
    tell("READY=1")
    os.abort()
assert os.environ["LISTEN_PID"] == str(os.getpid())
names = os.environ["LISTEN_FDNAMES"].split(":")
assert int(os.environ["LISTEN_FDS"]) == len(names)
for number, name in enumerate(names):
    note(f"{name} {os.pread(3 + number, 99, 0).decode()}")
""")
    assert ended(holder) == 0, (tmp_path / "log").read_text()
    assert sorted(notes(tmp_path)) == ["first first", "image image"]
    assert "was killed by SIGABRT, starting it again" in (tmp_path / "log").read_text()
    assert not list(tmp_path.glob("tundp-hold-*"))


def test_a_command_that_never_gets_ready_is_not_started_all_the_time(
    hold: Hold, tmp_path: Path
) -> None:
    holder = hold("""
note(time.monotonic())
sys.exit(1 if open(f"{directory}/notes").read().count("\\n") < 2 else 0)
""")
    assert ended(holder) == 0
    first, second = map(float, notes(tmp_path))
    # Both begin with the interpreter's start, which may take longer the first time.
    assert second - first > 1.0


@pytest.mark.parametrize("code", [2, 127])
def test_what_no_new_attempt_mends_ends_the_holder(hold: Hold, code: int) -> None:
    assert ended(hold(f"sys.exit({code})")) == code


def test_a_command_that_is_not_there_ends_the_holder(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "tundp", "hold", "--", "no-such-command", "--flag"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert answer.returncode == 127
    assert answer.stderr == "tundp hold: cannot run no-such-command: No such file or directory\n"


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_both(
    hold: Hold, tmp_path: Path, order: signal.Signals
) -> None:
    holder = hold(f"""
signal.signal({int(order)}, lambda *_: (note("stopped"), sys.exit(0)))
note("started")
while True: signal.pause()
""")
    until_sync(lambda: notes(tmp_path) == ["started"])
    holder.send_signal(order)
    assert ended(holder) == 0
    assert notes(tmp_path) == ["started", "stopped"]


def test_sighup_starts_what_is_installed_now(hold: Hold, tmp_path: Path) -> None:
    holder = hold('note("old"); signal.pause()')
    until_sync(lambda: notes(tmp_path) == ["old"])
    (tmp_path / "command.py").write_text(BEGIN + 'note("new")')
    holder.send_signal(signal.SIGHUP)
    assert ended(holder) == 0
    assert notes(tmp_path) == ["old", "new"]


def test_nobody_but_the_main_process_is_believed(hold: Hold, tmp_path: Path) -> None:
    holder = hold("""
fd = os.memfd_create("mine")
tell("FDSTORE=1", "FDNAME=mine", fds=[fd])
tell("READY=1")
note(os.environ["NOTIFY_SOCKET"])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
if os.environ.get("LISTEN_FDNAMES"):
    note(os.environ["LISTEN_FDNAMES"])
    sys.exit(0)
while True: signal.pause()
""")
    until_sync(lambda: len(notes(tmp_path)) == 1)
    (main,) = children(holder.pid)
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(notes(tmp_path)[0])
        for data in (
            b"",
            b"\0" * 4096,
            b"=\n==\nMAINPID",
            b"FDSTOREREMOVE=1\nFDNAME=mine",
            f"MAINPID={os.getpid()}".encode(),
            b"FDSTORE=1\nFDNAME=theirs",
        ):
            socket.send_fds(sock, [data], [writer] * 3)
    os.close(writer)
    # The holder has read and closed all of it when nobody has the writing end any more.
    until_sync(lambda: select.select([reader], [], [], 0)[0], "the holder to close all of it")
    os.close(reader)
    assert children(holder.pid) == [main]
    holder.send_signal(signal.SIGUSR1)
    assert ended(holder) == 0
    assert notes(tmp_path)[-1] == "mine"


def test_odd_words_of_the_main_process_do_no_harm(hold: Hold, tmp_path: Path) -> None:
    holder = hold("""
for text in ("0", "1", "-1", "x", "9" * 30, str(os.getppid()), "999999999", ""):
    tell(f"MAINPID={text}")
fd = os.memfd_create("x")
for name in ("", "a:b", "n" * 256, "new\\tline", "\\xe4"):
    tell("FDSTORE=1", f"FDNAME={name}", fds=[fd])
tell("FDSTORE=1", "FDNAME=fine")
tell("FDSTOREREMOVE=1")
tell("READY=1")
sys.exit(0 if "LISTEN_FDS" not in os.environ and os.path.exists(f"{directory}/notes") else
         note("once") or 1)
""")
    assert ended(holder) == 0, (tmp_path / "log").read_text()
    assert "names 1 its successor, which is no process" in (tmp_path / "log").read_text()


def test_a_successor_is_followed_and_orphans_are_reaped(hold: Hold, tmp_path: Path) -> None:
    holder = hold("""
if os.fork() == 0:
    if os.fork() == 0:
        os._exit(7)  # an orphan, which nobody here waits for
    time.sleep(0.2)
    os._exit(0)
successor = os.fork()
if successor:
    tell("READY=1")
    tell(f"MAINPID={successor}", "STATUS=the successor goes on")
    note(f"{os.getpid()} {successor}")
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True: signal.pause()
""")
    until_sync(lambda: len(notes(tmp_path)) == 1)
    successor = int(notes(tmp_path)[0].split()[1])
    # A child of ours by PR_SET_CHILD_SUBREAPER; the others are gone, none as a zombie.
    until_sync(lambda: children(holder.pid) == [successor])
    holder.terminate()
    assert ended(holder) == 0
    assert "starting it again" not in (tmp_path / "log").read_text()


def test_a_stopped_command_is_aborted_and_started_again(hold: Hold, tmp_path: Path) -> None:
    holder = hold(
        """
note(os.environ["WATCHDOG_USEC"] + " " + str(os.environ["WATCHDOG_PID"] == str(os.getpid())))
if len(open(f"{directory}/notes").read().split("\\n")) > 2:
    sys.exit(0)
tell("READY=1")
while True:
    tell("WATCHDOG=1")
    time.sleep(0.1)
""",
        watchdog="3",
    )
    until_sync(lambda: len(notes(tmp_path)) == 1)
    (main,) = children(holder.pid)
    time.sleep(0.5)
    stop(main)
    assert ended(holder) == 0
    assert notes(tmp_path) == ["3000000 True"] * 2
    assert f"process {main} has been silent for 3 s: aborting it" in (tmp_path / "log").read_text()


def test_the_command_ends_with_a_killed_holder(hold: Hold, tmp_path: Path) -> None:
    holder = hold("""
signal.signal(signal.SIGTERM, lambda *_: (note("asked to end"), sys.exit(0)))
note("started")
while True: signal.pause()
""")
    until_sync(lambda: notes(tmp_path) == ["started"])
    holder.kill()
    holder.wait()
    until_sync(lambda: notes(tmp_path) == ["started", "asked to end"])


def test_ready_and_status_go_on_to_the_holders_own_supervisor(hold: Hold, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outer:
        outer.bind(str(tmp_path / "outer"))
        outer.settimeout(30)
        path = tmp_path / "command.py"
        path.write_text(BEGIN + 'tell("READY=1", "STATUS=fine", "MAINPID=999999999", "FDSTORE=1")')
        holder = subprocess.Popen(
            [
                *(sys.executable, "-S", "-c", HOLDER, "0"),
                *(sys.executable, "-I", "-S", str(path), str(tmp_path)),
            ],
            env={"PYTHONPATH": ROOT, "NOTIFY_SOCKET": str(tmp_path / "outer"), "TMPDIR": "/tmp"},
        )
        assert outer.recv(4096) == b"READY=1\nSTATUS=fine"
        assert ended(holder) == 0


def test_the_store_has_room_for_so_many_and_closes_what_it_does_not_keep() -> None:
    kept = KeptFds()
    files = [os.memfd_create(str(number)) for number in range(ROOM + 1)]
    before = len(os.listdir("/proc/self/fd"))
    assert [kept.put(f"m-{number}", fd) for number, fd in enumerate(files[:-1])] == [""] * ROOM
    # The same again is no second one, and takes no room.
    assert kept.put("m-0", os.dup(files[0])) == ""
    assert kept.put("more", files[-1]) == f"there are {ROOM} already"
    assert [name for name, _ in kept.all][:2] == [f"m-{ROOM - 1}", f"m-{ROOM - 2}"]
    kept.remove("m-5")
    kept.close()
    assert len(os.listdir("/proc/self/fd")) == before - len(files)
