"""What a start adopts from the descriptor store, what it refuses, and what is put there."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tundp.admin import open_admin_socket
from tundp.daemon.given import resources_of
from tundp.daemon.kept import Kept
from tundp.daemon.lock import is_running, take_lock
from tundp.daemon.process import START_S
from tundp.daemon.resources import Resources
from tundp.daemon.run import _Desk as Desk
from tundp.daemon.supervise import Supervisor
from tundp.early import Start
from tundp.hold.child import FIRST_FD
from tundp.hold.kept_fds import KeptFds
from tundp.hold.messages import NotifySocket
from tundp.linux import fd_store
from tundp.linux.notify import notify
from tundp.observe.web import MetricsServer
from tundp.settings.settings import Settings
from tundp.settings.sources import load_settings

TAKES = """
import json, os, sys
before = set(sys.modules)
from tundp.linux import fd_store
found = fd_store.taken(os.environ)
imported = sorted(set(sys.modules) - before)
print(json.dumps({
    "found": found,
    "open": [fd for fd in range(3, 12) if os.path.exists(f"/proc/self/fd/{fd}")],
    "inheritable": [os.get_inheritable(fd) for fd in found.values()],
    "variables": [name for name in os.environ if name.startswith("LISTEN_")],
    "imported": imported,
}))
"""


def take(names: str, *, count: str = "", pid: str = "$$") -> dict[str, object]:
    """What a process takes that a shell gave descriptors 3, 4, 5 of /dev/null, so named."""
    number = len(names.split(":"))
    opened = " ".join(f"{FIRST_FD + each}</dev/null" for each in range(number))
    line = f'exec {opened}; LISTEN_PID={pid} LISTEN_FDS={count or number} exec "$0" -c "$1"'
    answer = subprocess.run(
        ["sh", "-c", line, sys.executable, TAKES],
        env={"LISTEN_FDNAMES": names, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    return {**json.loads(answer.stdout), "said": answer.stderr}


def test_a_start_takes_what_has_a_known_name_and_closes_the_rest() -> None:
    taken = take("tun-0:udp-0:lock:theirs:lock:tun-x")
    assert taken["found"] == {"tun-0": 3, "udp-0": 4, "lock": 5}
    assert taken["open"] == [3, 4, 5]
    assert taken["inheritable"] == [False] * 3
    assert taken["variables"] == []
    said = str(taken["said"])
    assert "descriptor 6 has the name 'theirs', which this version has no use for" in said
    assert "descriptor 7: there is a lock already" in said


def test_taking_imports_next_to_nothing() -> None:
    taken = take("tun-0:image")
    assert taken["found"] == {"tun-0": 3, "image": 4}
    # Early in a start: these alone would be a third of it.
    assert not {"asyncio", "socket", "logging", "re"} & set(map(str, taken["imported"]))  # type: ignore[call-overload]


@pytest.mark.parametrize(("count", "pid"), [("1", "1"), ("x", "$$"), ("-1", "$$"), ("99999", "$$")])
def test_what_is_announced_to_others_or_nonsense_is_left_alone(count: str, pid: str) -> None:
    taken = take("lock", count=count, pid=pid)
    assert taken["found"] == {}
    assert taken["open"] == [3]
    assert taken["variables"] == []


def test_what_is_announced_and_not_there_is_said() -> None:
    taken = take("lock", count="2")
    assert taken["found"] == {"lock": 3}
    assert "descriptor 4 () was announced and is not there: Bad file descriptor" in taken["said"]  # type: ignore[operator]


# What is put there


class Store:
    """The holder's own socket and store, in this process."""

    def __init__(self) -> None:
        self.socket = NotifySocket()
        self.kept = KeptFds()
        self.lines: list[str] = []

    def read(self) -> list[str]:
        """Do what was asked for; the names that are kept now, sorted."""
        while (message := self.socket.receive()) is not None:
            assert message.pid == os.getpid()
            self.lines.append(" ".join(f"{key}={value}" for key, value in message.fields.items()))
            if "FDSTOREREMOVE" in message.fields:
                self.kept.remove(message.fields["FDNAME"])
            for fd in message.fds:
                self.kept.put(message.fields["FDNAME"], fd)
        return sorted(name for name, _ in self.kept.all)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setenv("NOTIFY_SOCKET", store.socket.path)
    monkeypatch.setenv("FDSTORE", "10")
    yield store
    store.kept.close()
    store.socket.close()


def test_the_store_is_kept_equal_to_what_there_is(store: Store) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, open(os.devnull) as lock:
        here = {"udp-0": sock.fileno(), "lock": lock.fileno()}
        kept = Kept()
        kept.follow(("lock", "udp-"), lambda: {name: os.dup(fd) for name, fd in here.items()})
        before = len(os.listdir("/proc/self/fd"))
        kept.sync()
        assert store.read() == ["lock", "udp-0"]
        assert "FDSTORE=1 FDNAME=udp-0 FDPOLL=0" in store.lines
        kept.sync()
        assert store.read() == ["lock", "udp-0"]
        assert len(store.lines) == 2, "what is there is not sent again"
        # Moved: another socket under the same descriptor, which the store knows nothing of.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            os.dup2(other.fileno(), sock.fileno())
        kept.sync()
        assert store.read() == ["lock", "udp-0"]
        inode = os.fstat(dict(store.kept.all)["udp-0"]).st_ino
        assert inode == os.fstat(sock.fileno()).st_ino
        del here["lock"]
        kept.sync()
        assert store.read() == ["udp-0"]
        here.clear()
        kept.freeze()
        kept.sync()
        assert store.read() == ["udp-0"], "what a stop closes is left to the next start"
        store.kept.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_store_nothing_is_sent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FDSTORE")
    kept = Kept()
    kept.follow(("lock",), lambda: {"lock": os.dup(0)})
    kept.sync()
    assert store.read() == []
    assert not fd_store.is_there()


def test_a_full_queue_costs_a_message_without_descriptors_and_no_time(store: Store) -> None:
    while notify("STATUS=busy"):
        pass
    assert not fd_store.put("lock", 0), "after half a second"
    store.read()
    assert fd_store.put("lock", 0)
    assert store.read() == ["lock"]


def failed_start(folder: Path, **variables: str) -> tuple[float, str]:
    """How long a start takes that fails at once, in seconds, and what it says."""
    (folder / "admin.sock").write_text("no socket")
    flags = [f"--{name}={folder}/{name}" for name in ("subnet-file", "state-dir")]
    began = time.monotonic()
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "tundp", "run", f"--store=file:{folder}/leases.json", *flags),
            f"--admin-socket={folder}/admin.sock",
        ],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    return time.monotonic() - began, answer.stderr


def test_a_start_that_fails_is_no_shorter_where_the_next_one_follows_at_once(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "so as not to be started again at once"
    took_s, said = failed_start(tmp_path)
    assert took_s > START_S
    monkeypatch.delenv("FDSTORE")
    plain_s, said_alone = failed_start(tmp_path)
    assert words not in said_alone
    # A machine so busy that it takes about as long anyway may have nothing to wait for.
    assert words in said or plain_s > START_S / 2


# What does not fit


def settings_in(folder: Path, *flags: str) -> Settings:
    return load_settings(
        [f"--subnet-file={folder}/s.env", f"--admin-socket={folder}/admin.sock", *flags], {}
    )


def test_what_is_not_what_its_name_says_is_closed_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tcp, other = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    found = {
        "tun-0": os.open("/dev/null", os.O_RDWR),
        "udp-0": os.dup(tcp.fileno()),
        "lock": os.open("/dev/null", os.O_RDWR),
        "admin": os.dup(tcp.fileno()),
        "health": os.memfd_create("health"),
        "metrics": os.dup(other.fileno()),
        "image": os.open("/dev/null", os.O_RDWR),
    }
    before = len(os.listdir("/proc/self/fd"))
    settings = settings_in(tmp_path, "--healthz-port=1", "--metrics-addr=127.0.0.1:1")
    resources = resources_of(Start(found, None, ""), settings, Kept(found))
    given = (resources.lock, resources.admin, resources.health, resources.metrics)
    assert given == (None,) * 4
    assert (resources.backend.tun_fds, resources.backend.udp_socks) == ((), ())
    assert len(os.listdir("/proc/self/fd")) == before - len(found)
    for words in (
        "TUN device of the descriptor store is not used: tun-0 is /dev/null, no TUN device",
        "UDP sockets of the descriptor store are not used: one is no UDP socket over IPv4",
        "descriptor lock of the store is not used: it is /dev/null, no file",
        "descriptor admin of the store is not used: it is no listening socket of that kind",
        "descriptor image of the store is not used: it is /dev/null, no memory file",
        "descriptor health of the store is not used: it is /memfd:health (deleted), no socket",
        "--metrics-addr say 127.0.0.1:1",
    ):
        assert words in caplog.text
    tcp.close()
    other.close()


def test_a_lock_and_an_admin_socket_of_these_settings_are_gone_on_with(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    lock = take_lock(settings.instance)
    assert lock is not None
    admin = open_admin_socket(settings.admin_socket)
    os.link(settings.admin_socket, tmp_path / ".admin.sock")
    found = {"lock": lock, "admin": admin.detach()}
    resources = resources_of(Start(found, None, ""), settings, Kept(found))
    assert resources.lock == lock
    assert resources.admin is not None
    resources.close()
    assert not is_running(settings.instance)


def test_an_admin_socket_without_a_sure_path_makes_room_for_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_in(tmp_path)
    admin = open_admin_socket(settings.admin_socket)
    found = {"admin": os.dup(admin.fileno())}
    assert resources_of(Start(found, None, ""), settings, Kept(found)).admin is None
    assert "was removed or replaced meanwhile" in caplog.text
    # So that a new one can be made, although the store has the old one for a while.
    assert not settings.admin_socket.exists()
    open_admin_socket(settings.admin_socket).close()
    admin.close()


def test_a_lock_somebody_else_holds_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_in(tmp_path)
    lock = take_lock(settings.instance)
    found = {"lock": os.open(settings.instance.lock, os.O_RDONLY)}
    assert resources_of(Start(found, None, ""), settings, Kept(found)).lock is None
    assert "another process holds" in caplog.text
    assert lock is not None
    os.close(lock)


def test_what_is_kept_is_duplicated_once_and_closed(tmp_path: Path) -> None:
    """Every five seconds for as long as the daemon lives."""
    sock = socket.create_server(("127.0.0.1", 0))
    settings = settings_in(tmp_path, f"--metrics-addr=127.0.0.1:{sock.getsockname()[1]}")
    lock = take_lock(settings.instance)
    assert lock is not None
    resources = Resources(lock=lock, metrics=sock)
    desk = Desk(settings, resources, Supervisor(), None)
    desk.metrics_server = MetricsServer("127.0.0.1", 0, sock, desk.metrics)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        found = desk.duplicates()
        assert sorted(found) == ["lock", "metrics"]
        for fd in found.values():
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    sock.close()
    resources.close()
