"""Every command that asks a daemon, where there is none, another one, or nobody who reads.

The servers here are the test's own: a process that is no daemon, one that is silent or stopped, and
one that answers what a daemon with the first release's status (schema 1) did.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.test_replay import RAW, write_pcap
from tests.packets import udp
from tests.wait import until_sync
from tundp import admin
from tundp.cli import main
from tundp.cli.output import EXIT_FAILED, EXIT_OK, EXIT_USAGE

ASKING = (
    "status",
    "status --json",
    "status --dump",
    "status --brief",
    "drops --interval=0",
    "drops -f",
    "trace",
    "capture",
    "capture -w FILE.pcapng",
    "leases",
    "leases -f",
    "leases history",
    "explain 10.5.1.2 10.5.2.3",
    "replay PACKETS",
    "config show --running",
)
NEEDS_EVENTS = "this needs tundp 0.2.0 on the daemon's side, it is 0.1.0"
SCHEMA_1 = {
    "schema": 1,
    "version": "0.1.0",
    "pid": 4242,
    "uptime_s": 5.0,
    "network": "10.5.0.0/16",
    "subnet": "10.5.1.0/24",
    "public_ip": "192.0.2.1",
    "interface": {"name": "eth0", "address": "192.0.2.1", "mtu": 1500},
    "port": 8285,
    "tun": {"name": "flannel0", "mtu": 1472},
    "lease": {"key": "10.5.1.0-24", "state": "held", "expires_in_s": 82_800},
    "peers": [{"subnet": "10.5.2.0/24", "public_ip": "192.0.2.2"}],
    "checks": [{"name": "lease", "ok": True, "detail": "held"}],
}
"""Members of that release's status, as its own tests had them."""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("FLANNELD_", "TUNDP_")):
            monkeypatch.delenv(name)


@pytest.fixture
def words_of(tmp_path: Path) -> Callable[[str, Path], list[str]]:
    """A command line of the table, about the daemon on a socket."""
    packets = tmp_path / "packets.pcap"
    datagram = udp(b"x", sport=1, dport=2, source="10.5.1.2", destination="10.5.2.3")
    write_pcap(packets, [datagram], RAW)

    def words(line: str, path: Path) -> list[str]:
        named = line.replace("PACKETS", str(packets)).replace("FILE", str(tmp_path / "made"))
        return [*named.split(), f"--admin-socket={path}"]

    return words


Reply = Callable[[bytes], bytes | None]
"""From the first bytes of a connection to what is sent back; None: nothing ever is."""


class Server:
    """Somebody who listens on a unix socket in this process."""

    def __init__(self, path: Path, reply: Reply) -> None:
        self._reply = reply
        self._silent: list[socket.socket] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(32)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            connection.settimeout(5)
            with contextlib.suppress(OSError):
                answer = self._reply(connection.recv(65536))
                if answer is None:
                    self._silent.append(connection)
                    continue
                connection.sendall(answer)
            connection.close()

    def close(self) -> None:
        # A thread's accept() does not end by close() alone.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listening, *self._silent):
            each.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Reply], Path]]:
    """Starts a server; its socket's path."""
    opened = []

    def start(reply: Reply) -> Path:
        path = tmp_path / "admin.sock"
        opened.append(Server(path, reply))
        return path

    yield start
    for each in opened:
        each.close()


def http(status: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def old_daemon(request: bytes) -> bytes:
    """The first release's answers: a status of schema 1, metrics, and 404 for all else."""
    if request.startswith(b"GET /v1/status "):
        return http("200 OK", json.dumps(SCHEMA_1).encode())
    if request.startswith(b"GET /v1/metrics "):
        return http("200 OK", b"tundp_ready 1\n", "text/plain")
    return http("404 Not Found", b"404: Not Found", "text/plain")


def fails(capfd: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What a command says that must fail; one sentence on stderr and nothing on stdout."""
    assert main(words) == EXIT_FAILED
    printed = capfd.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tundp: "), printed.err
    return printed.err


@pytest.mark.parametrize(
    "line",
    # The other two go on with the store where no daemon is.
    [line for line in ASKING if not line.startswith(("explain", "replay"))],
)
def test_no_daemon(
    line: str, words_of: Callable[[str, Path], list[str]], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "none.sock"
    error = fails(capfd, words_of(line, path))
    assert f"no daemon answers on {path} (No such file or directory)" in error
    path.write_text("no socket")
    assert f"no daemon answers on {path} (Connection refused)" in fails(capfd, words_of(line, path))


@pytest.mark.parametrize("line", ASKING)
@pytest.mark.parametrize(
    "reply",
    [
        b"\x00\xff garbage that is no HTTP\r\n\r\n",
        b"220 mail.example.org ESMTP\r\n",
        http("200 OK", b"[1, 2]"),
        http("200 OK", b"no JSON", "text/html"),
        http("500 Oops", b"\xff", "text/plain"),
    ],
    ids=["bytes", "mail", "list", "html", "500"],
)
def test_what_answers_is_no_daemon(
    line: str, reply: bytes, words_of: Callable[[str, Path], list[str]],
    serve: Callable[[Reply], Path], capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = serve(lambda _: reply)
    error = fails(capfd, words_of(line, path))
    assert str(path) in error
    assert re.search("is no tundp|answers 500|cannot be read|ended", error), error


@pytest.mark.parametrize("line", ASKING)
def test_a_process_that_says_nothing(
    line: str, words_of: Callable[[str, Path], list[str]], monkeypatch: pytest.MonkeyPatch,
    serve: Callable[[Reply], Path], capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(admin, "ANSWER_S", 0.5)
    monkeypatch.setattr("tundp.cli.config.ANSWER_S", 0.5)
    path = serve(lambda _: None)
    error = fails(capfd, words_of(line, path))
    assert f"no daemon answers on {path} within 0.5 s: process {os.getpid()} takes" in error


@pytest.mark.parametrize("line", [*ASKING, "config show"])
def test_a_stopped_daemon_is_not_waited_for(
    line: str, words_of: Callable[[str, Path], list[str]], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "stopped.sock"
    listens = (
        "import os, signal, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]);"
        " s.listen(9); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    with subprocess.Popen([sys.executable, "-Sc", listens, str(path)]) as child:
        try:
            stat = Path(f"/proc/{child.pid}/stat")
            until_sync(lambda: stat.read_text().split()[2] == "T", "the process to stop")
            told = f"the daemon on {path} does not answer: its process {child.pid} is stopped"
            if line == "config show":
                assert main(words_of(line, path)) == EXIT_OK
                assert (
                    f"# settings by default: none was given; not the running daemon's: {told}"
                    in (capfd.readouterr().out)
                )
            else:
                assert told in fails(capfd, words_of(line, path))
        finally:
            os.kill(child.pid, signal.SIGCONT)
            child.kill()


@pytest.mark.parametrize("line", ASKING)
def test_an_older_daemon(
    line: str, words_of: Callable[[str, Path], list[str]],
    serve: Callable[[Reply], Path], capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = serve(old_daemon)
    words = words_of(line, path)
    if line == "status --json":
        assert main(words) == EXIT_OK
        assert json.loads(capfd.readouterr().out) == SCHEMA_1
        return
    error = fails(capfd, words)
    assert NEEDS_EVENTS in error
    assert f"restart the daemon on {path} with this version" in error


@pytest.mark.parametrize("command", ["trace", "capture", "drops", "drops -f"])
def test_a_wrong_filter_has_a_caret(
    command: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [*command.split(), f"--admin-socket={tmp_path}/none", "host", "10.5.1.2", "andd", "tcp"]
    assert main(words) == EXIT_USAGE
    error = capfd.readouterr().err.splitlines()
    assert error[0].startswith("tundp: filter: ")
    assert error[1].strip() == "host 10.5.1.2 andd tcp"
    assert error[2].index("^") == error[1].index("andd")


# Who reads what is printed

RUN = (sys.executable, "-m", "tundp")
QUIET = "metrics rules"
PRINTING = ("metrics rules", "config show", "config example", "completion bash", "run --help")


def shell(script: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-o", "pipefail", "-c", script, *RUN]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("line", PRINTING)
def test_a_full_disk_behind_standard_output(line: str) -> None:
    done = shell(f'"$0" "$@" {line} >/dev/full')
    assert done.returncode == EXIT_FAILED
    (error,) = done.stderr.splitlines()
    assert error.startswith("tundp: cannot write")
    assert "No space left on device" in error


@pytest.mark.parametrize("line", PRINTING)
def test_a_reader_of_one_line(line: str) -> None:
    done = shell(f'"$0" "$@" {line} | head -n 1')
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1


def test_closed_streams() -> None:
    done = shell(f'"$0" "$@" {QUIET} >&-')
    assert (done.returncode, done.stdout) == (EXIT_FAILED, "")
    assert done.stderr == "tundp: standard output is closed: give it a file, or /dev/null\n"
    done = shell('"$0" "$@" status --admin-socket=/nonexistent/s 2>&-')
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_FAILED, "", "")
    done = shell(f'"$0" "$@" {QUIET} <&- >/dev/null 2>&-')
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_OK, "", "")
