"""`tundp doctor`: its table of ids, its exit codes, its answer in each form, and its remedies."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.json_schema import validate
from tests.wait import until_sync
from tundp.cli import doctor, main
from tundp.cli.doctor import COMMAND
from tundp.doctor import cases, checks, deadline, diagnosis, examine, pods, probes, remedy, store
from tundp.doctor.context import Context, finding
from tundp.doctor.diagnosis import Diagnosis, Named, diagnose
from tundp.doctor.show import diagnosis_parts
from tundp.errors import ConfigError, PlatformError
from tundp.finding import Finding, Verdict
from tundp.linux.listeners import listener, process_state
from tundp.linux.obstacles.look import IDS
from tundp.observe.status import DaemonState, Status, StoreStatus
from tundp.settings.settings import Settings
from tundp.settings.sources import resolve
from tundp.wire.drop import DropReason

GOLDEN = Path(__file__).with_name("golden")
SAID = {
    "daemon": [finding("daemon", Verdict.OK, "pid 42 answers")],
    "obstacles": [
        finding(
            "obstacle.forwarding",
            Verdict.FAIL,
            "net.ipv4.ip_forward is 0: the kernel forwards nothing between flannel0 and pods",
            command="sysctl -w net.ipv4.ip_forward=1",
            words="to keep it: a file in /etc/sysctl.d",
        )
    ],
    "peers": [
        finding(
            "peer.refused",
            Verdict.WARN,
            "peer 10.5.2.0/24 at 192.0.2.2:8285: silent since 12:03:04 (35 s); it refuses UDP 8285",
            command="tundp doctor",
            on="192.0.2.2",
        )
    ],
    "bridge": [finding("pods.none", Verdict.NOTE, "no device has an address in 10.5.1.0/24")],
    "lease": [
        Finding(id="not-looked.lease", verdict=Verdict.UNKNOWN, evidence="not looked at: no daemon")
    ],
    "drops": [
        Finding(id="not-looked.drops", verdict=Verdict.UNKNOWN, evidence="not looked at: no daemon")
    ],
}


def example() -> Diagnosis:
    return diagnose(
        [Named.of(each, check) for check, many in SAID.items() for each in many],
        version="0.2.0",
        daemon="pid 42, /run/tundp/admin.sock",
        checks=list(SAID),
        took_s=1.26,
    )


def shown(found: Diagnosis, *, is_terminal: bool, is_verbose: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=is_terminal,
        width=80,
        highlight=False,
        color_system="standard" if is_terminal else None,
    )
    for part in diagnosis_parts(found, is_verbose=is_verbose):
        console.print(part, crop=False)
    return out.getvalue()


# The answer


def test_the_answer_in_a_pipe_is_the_golden_one() -> None:
    text = shown(example(), is_terminal=False)
    assert text == (GOLDEN / "doctor-pipe.txt").read_text(encoding="utf-8")


def test_the_answer_on_a_terminal_is_the_golden_one() -> None:
    text = shown(example(), is_terminal=True)
    assert text == (GOLDEN / "doctor-terminal.txt").read_text(encoding="utf-8")


def test_the_answer_for_programs_is_the_golden_one_and_fits_the_schema() -> None:
    document = example().to_json()
    assert document == json.loads((GOLDEN / "doctor.json").read_text(encoding="utf-8"))
    schema = json.loads(diagnosis.PATH.read_text(encoding="utf-8"))
    validate(document, schema)
    assert schema["properties"].keys() == document.keys()


def test_the_worst_comes_first_and_what_is_fine_only_when_asked_for() -> None:
    found = example()
    assert [each.verdict for each in found.findings] == [
        Verdict.FAIL,
        Verdict.WARN,
        Verdict.UNKNOWN,
        Verdict.UNKNOWN,
        Verdict.NOTE,
        Verdict.OK,
    ]
    assert "pid 42 answers" not in shown(found, is_terminal=False)
    assert "pid 42 answers" in shown(found, is_terminal=False, is_verbose=True)


def test_a_check_that_could_not_look_is_not_among_those_that_found_nothing() -> None:
    found = example()
    assert found.looked_at == ["daemon"]
    assert found.not_looked_at == ["lease", "drops"]


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([Verdict.OK, Verdict.NOTE], 0),
        ([Verdict.OK, Verdict.UNKNOWN], 4),
        ([Verdict.UNKNOWN, Verdict.WARN], 3),
        ([Verdict.WARN, Verdict.FAIL, Verdict.UNKNOWN], 1),
        ([], 4),
    ],
)
def test_the_exit_code_is_that_of_the_worst(verdicts: list[Verdict], code: int) -> None:
    named = [Named.of(finding("daemon", each, "x"), "daemon") for each in verdicts]
    found = diagnose(named, version="", daemon="", checks=["daemon"], took_s=0.0)
    assert found.exit_code == code


def test_a_command_for_another_host_is_not_one_to_run_here() -> None:
    (here,) = [Named.of(each, "obstacles") for each in SAID["obstacles"]]
    (there,) = [Named.of(each, "peers") for each in SAID["peers"]]
    assert here.is_runnable
    assert not there.is_runnable
    assert there.next_step == "on 192.0.2.2: tundp doctor"


def test_names_that_somebody_else_chose_reach_no_terminal_as_they_are() -> None:
    bad = finding("pods.mtu", Verdict.WARN, "cni\x1b[2J0", command="ip link set dev \x1b[2J mtu 1")
    found = diagnose(
        [Named.of(bad, "bridge")], version="", daemon="", checks=["bridge"], took_s=0.0
    )
    assert "\x1b[2J" not in shown(found, is_terminal=True)
    assert "\x1b" not in json.dumps(found.to_json())


# The table


def test_every_id_is_in_the_table_once_and_names_a_check_that_exists() -> None:
    ids = [each.id for each in cases.CASES]
    assert len(ids) == len(set(ids))
    assert {each.check for each in cases.CASES} <= set(checks.CHECKS)
    assert all(each.cause and each.mends for each in cases.CASES)


def test_every_drop_reason_and_every_obstacle_is_in_the_table() -> None:
    ids = {each.id for each in cases.CASES}
    assert {f"drop.{reason.label}" for reason in DropReason} <= ids
    assert set(IDS) <= ids


def test_only_takes_ids_beginnings_and_checks_and_what_they_need() -> None:
    assert examine.chosen([]) == list(checks.CHECKS)
    assert examine.chosen(["obstacle"]) == ["obstacles"]
    assert examine.chosen(["cni.order", "speed"]) == ["cni", "speed"]
    assert examine.chosen(["ports"]) == ["store", "start"]
    assert examine.chosen(["public-ip"]) == ["device", "peers"]
    with pytest.raises(ConfigError, match="no check and no id is 'nonsense'"):
        examine.chosen(["nonsense"])


# A check that fails


def context(tmp_path: Path, **changes: Any) -> Context:
    values: dict[str, Any] = {
        "inspection": None,
        "status": None,
        "asked": PlatformError("none"),
        "pid": None,
        "cni_dir": tmp_path,
    }
    return Context(**values | changes)


async def run_checks(given: Context, names: list[str]) -> dict[str, list[Finding]]:
    seen = examine._Seen(names)
    await examine._run(given, seen)
    return seen.findings(0.0)


async def test_a_check_that_fails_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(_: Context) -> AsyncIterator[Finding]:
        yield finding("cni", Verdict.OK, "seen before")
        raise ZeroDivisionError

    async def refuses(_: Context) -> AsyncIterator[Finding]:
        raise PlatformError("the kernel refused")
        yield

    async def hangs(_: Context) -> AsyncIterator[Finding]:
        await asyncio.sleep(60)
        yield finding("kernel", Verdict.OK, "never")

    async def says_nothing(_: Context) -> AsyncIterator[Finding]:
        none: list[Finding] = []
        for each in none:
            yield each

    monkeypatch.setattr(examine, "LIMIT_S", 0.1)
    made = {"cni": breaks, "endpoints": refuses, "kernel": hangs, "device": says_nothing}
    monkeypatch.setattr(examine, "CHECKS", made)
    found = await run_checks(context(tmp_path), list(made))
    texts = {name: [each.evidence for each in many] for name, many in found.items()}
    assert texts["cni"] == [
        "seen before",
        "not looked at: a bug, please report it: ZeroDivisionError()",
    ]
    assert texts["endpoints"] == ["not looked at: the kernel refused"]
    assert texts["kernel"] == ["not finished: it takes longer than 0 s"]
    assert texts["device"] == ["not looked at: what it needs is not known here"]
    assert all(many[-1].verdict is Verdict.UNKNOWN for many in found.values())


async def test_without_a_daemon_what_only_it_knows_is_not_called_fine(tmp_path: Path) -> None:
    found = await run_checks(context(tmp_path), ["lease", "drops", "cni"])
    assert [each.verdict for each in found["lease"]] == [Verdict.UNKNOWN]
    assert [each.verdict for each in found["drops"]] == [Verdict.UNKNOWN]
    assert [each.verdict for each in found["cni"]] == [Verdict.NOTE]


# The deadline of the whole


@dataclass
class NoStore:
    """A store that is opened, and closed."""

    is_closed: bool = False

    async def close(self) -> None:
        self.is_closed = True


def looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **made: Any) -> Diagnosis:
    """The diagnosis by these checks of a host without a daemon, within a short deadline."""
    monkeypatch.setattr(examine, "DEADLINE_S", 0.5)
    monkeypatch.setattr(examine, "CHECKS", made)
    settings = Settings(admin_socket=tmp_path / "none")
    opened: Any = NoStore()
    found = examine.examine(settings, opened, whose="", cni_dir=tmp_path)
    assert opened.is_closed
    return found


async def _says_ok(_: Context) -> AsyncIterator[Finding]:
    yield finding("cni", Verdict.OK, "seen before")


def test_a_look_that_hangs_is_not_called_fine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def hangs(_: Context) -> AsyncIterator[Finding]:
        yield finding("device", Verdict.OK, "the first half of it")
        await asyncio.sleep(60)

    found = looked(monkeypatch, tmp_path, cni=_says_ok, device=hangs)
    assert found.looked_at == ["cni"]
    assert found.not_looked_at == ["device"]
    assert found.exit_code == 4
    (blind,) = (each for each in found.findings if each.verdict is Verdict.UNKNOWN)
    assert (blind.id, blind.check) == ("not-looked.device", "device")
    assert blind.evidence.startswith("not finished: it takes longer than")
    assert found.took_s >= 0.5


@pytest.mark.parametrize("is_on_the_loop", [True, False])
def test_what_no_cancellation_ends_holds_up_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, is_on_the_loop: bool
) -> None:
    """A parser in a worker thread, or one that holds the event loop."""
    may_end = threading.Event()

    async def is_busy(_: Context) -> AsyncIterator[Finding]:
        if is_on_the_loop:
            may_end.wait(30)
        else:
            await asyncio.to_thread(may_end.wait, 30)
        yield finding("device", Verdict.OK, "never seen")

    monkeypatch.setattr(examine, "DEADLINE_S", 0.5)
    monkeypatch.setattr(examine, "CHECKS", {"cni": _says_ok, "device": is_busy})
    settings = Settings(admin_socket=tmp_path / "none")
    opened: Any = NoStore()
    try:
        found = examine.examine(settings, opened, whose="", cni_dir=tmp_path)
        assert not may_end.is_set(), "it answers before that ends"
    finally:
        may_end.set()
    assert found.looked_at == ["cni"]
    assert found.not_looked_at == ["device"]


def test_an_error_of_the_look_is_one_of_the_command() -> None:
    async def breaks() -> None:
        raise PlatformError("no netlink here")

    with pytest.raises(PlatformError, match="no netlink here"):
        deadline.run_within(5.0, breaks)


def test_a_process_with_a_thread_that_is_left_ends_at_once(tmp_path: Path) -> None:
    """Python waits for worker threads at its end, for as long as they take."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = (
        "import asyncio, sys\n"
        "from tundp.cli.output import leave\n"
        "from tundp.doctor.deadline import run_within\n"
        "async def main(): await asyncio.to_thread(open, sys.argv[1])\n"
        "print(run_within(0.2, main))\n"
        "sys.exit(leave(4))\n"
    )
    argv = [sys.executable, "-c", program, str(gate)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (out, process.returncode) == ("False\n", 4)


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize("when", ["before", "after"])
def test_fix_calls_nothing_absent_or_mended_that_it_could_not_look_for(
    when: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = []

    async def looks_once(_: Context) -> AsyncIterator[Finding]:
        looks.append(1)
        if when == "after" and len(looks) == 1:
            yield finding("cni.order", Verdict.FAIL, "seen", command="true")
            return
        raise PlatformError("the folder cannot be read")

    monkeypatch.setattr(examine, "CHECKS", dict.fromkeys(checks.CHECKS, looks_once))
    monkeypatch.setattr(doctor, "AGAIN_S", 0.0)
    where = [f"--admin-socket={tmp_path}/none", f"--store=file:{tmp_path}/leases.json"]
    assert main(["doctor", "--fix=cni.order", "--yes", *where]) == 4
    said = capsys.readouterr().out
    assert "the folder cannot be read" in said
    assert "not found\n" not in said
    assert "mended:" not in said


@pytest.mark.usefixtures("_logging_as_before")
def test_fix_calls_nothing_mended_that_is_there_with_other_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = []

    async def finds(_: Context) -> AsyncIterator[Finding]:
        looks.append(1)
        mtu = 1300 - len(looks)
        yield finding("cni.order", Verdict.FAIL, f"{mtu} bytes", command=f"true {mtu}")

    monkeypatch.setattr(examine, "CHECKS", {"cni": finds})
    monkeypatch.setattr(doctor, "AGAIN_S", 0.0)
    where = [f"--admin-socket={tmp_path}/none", f"--store=file:{tmp_path}/leases.json"]
    assert main(["doctor", "--fix=cni.order", "--yes", *where]) == 1
    said = capsys.readouterr().out
    assert "still there after 0 s: 1298 bytes" in said


@pytest.mark.parametrize(("asked", "left"), [("peer.refused", []), ("peers.answering", ["peers"])])
def test_of_a_peer_that_was_asked_the_daemons_guess_is_left_out(
    asked: str, left: list[str]
) -> None:
    guess = finding("peers", Verdict.WARN, "192.0.2.2 is silent", words="a firewall drops")
    found = {"health": [guess], "peers": [finding(asked, Verdict.FAIL, "it refuses UDP 8285")]}
    examine._say_once(found)
    assert [each.id for each in found["health"]] == left


# Remedies


def test_a_start_is_spelt_with_the_flags_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedy, "installed_unit", lambda _: None)
    given = COMMAND.settings
    assert {"iface", "store"} <= {flag.name for flag in given}
    settings = resolve({"iface": ("eth0", "a b"), "etcd-prefix": "/x"}, {}, concerned=given)
    assert remedy.start(settings) == (
        "setsid -f tundp run --etcd-prefix=/x --iface=eth0 '--iface=a b' </dev/null >/dev/null 2>&1"
    )


def await_command_line(pid: int) -> None:
    """The kernel shows none for a moment after Popen has returned."""
    path = Path(f"/proc/{pid}/cmdline")
    until_sync(lambda: path.read_bytes(), "the process has its command line")


def test_no_command_shows_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedy, "installed_unit", lambda _: None)
    assert remedy.start(Settings(etcd_password="geheim")) == ""
    line = [sys.executable, "-c", "input()", "--etcd-password=geheim"]
    with subprocess.Popen(line, stdin=subprocess.PIPE) as process:
        try:
            await_command_line(process.pid)
            assert remedy.restart(process.pid) == ""
        finally:
            process.kill()


def test_a_restart_keeps_the_command_line_and_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = [sys.executable, "-c", "input()", "--iface=a b"]
    with (
        log.open("wb") as file,
        subprocess.Popen(line, stdin=subprocess.PIPE, stderr=file) as process,
    ):
        try:
            await_command_line(process.pid)
            command = remedy.restart(process.pid, "--public-ip=")
        finally:
            process.kill()
    assert command.startswith(f"kill {process.pid}; while grep -q . /proc/{process.pid}")
    assert f"setsid -f {sys.executable} -c 'input()' '--iface=a b' --public-ip=" in command
    assert command.endswith(f"</dev/null >>{log} 2>&1")


def test_a_restart_keeps_the_variables_and_the_folder(tmp_path: Path) -> None:
    """Run by a shell that has neither; and no secret is in the command."""
    said = tmp_path / "said"
    program = (
        "import os, sys\n"
        "if sys.argv[1:]:\n"
        f"    open({str(said)!r}, 'w').write(repr((os.getcwd(), sys.argv[1:],"
        " os.environ.get('FLANNELD_ETCD_PASSWORD'), os.environ.get('FLANNELD_ETCD_PREFIX'),"
        " os.environ.get('TUNDP_STORE'))))\n"
        "    sys.exit()\n"
        "input()\n"
    )
    file = tmp_path / "daemon.py"
    file.write_text(program)
    folder = tmp_path / "a b"
    folder.mkdir()
    variables = {"FLANNELD_ETCD_PASSWORD": "ge'h\"eim $x", "FLANNELD_ETCD_PREFIX": "/a b;c"}
    with subprocess.Popen(
        [sys.executable, str(file)],
        stdin=subprocess.PIPE,
        cwd=folder,
        env={"PATH": os.environ["PATH"], **variables},
    ) as process:
        try:
            await_command_line(process.pid)
            command = remedy.restart(process.pid, "--public-ip=")
            assert "heim" not in command
            assert process.stdin is not None
            shell = subprocess.Popen(["sh", "-c", command], cwd="/", env={"PATH": "/usr/bin:/bin"})
            # The shell waits until its parent has reaped the old one.
            process.wait(30)
            assert shell.wait(30) == 0
        finally:
            process.kill()
    until_sync(lambda: said.exists() and said.read_text(), "the new one has said what it got")
    assert said.read_text() == repr((str(folder), ["--public-ip="], *variables.values(), None))


def test_a_lease_is_deleted_with_the_credentials_files_and_no_password() -> None:
    settings = Settings(
        etcd_endpoints=("https://a:2379",), etcd_cafile="/ca", etcd_username="u", etcd_password="p"
    )

    def status(description: str) -> Status:
        stored = StoreStatus(
            description=description, is_answering=True, is_from_cache=False, revision=1
        )
        return Status(
            version="", pid=1, state=DaemonState.RUNNING, started_at=0, uptime_s=0, store=stored
        )

    v3 = remedy.delete_lease(settings, status("etcd v3 at https://a:2379"), "10.5.1.0-24; reboot")
    assert v3 == (
        "ETCDCTL_API=3 etcdctl --endpoints=https://a:2379 --cacert=/ca --user=u del"
        " '/coreos.com/network/subnets/10.5.1.0-24; reboot'"
    )
    v2 = remedy.delete_lease(settings, status("etcd v2 at https://a:2379"), "10.5.1.0-24")
    assert v2.startswith("ETCDCTL_API=2 etcdctl")
    assert " rm /coreos.com/network/subnets/10.5.1.0-24" in v2
    assert remedy.delete_lease(settings, status("file /x"), "10.5.1.0-24") == ""


# What a host shows


async def found_in(folder: Path) -> Finding:
    (each,) = [each async for each in pods.check_cni(context(folder, cni_dir=folder))]
    return each


async def test_the_first_cni_config_by_name_counts(tmp_path: Path) -> None:
    assert (await found_in(tmp_path / "none")).verdict is Verdict.NOTE
    assert (await found_in(tmp_path)).verdict is Verdict.NOTE
    (tmp_path / "10-flannel.conflist").write_text('{"plugins": [{"type": "flannel"}]}')
    (tmp_path / "99-loopback.conf").write_text('{"type": "loopback"}')
    (tmp_path / "00-old.conf.bak").write_text('{"type": "bridge"}')
    assert (await found_in(tmp_path)).verdict is Verdict.OK
    (tmp_path / "05 a;b.conf").write_text("[1, 2")
    bad = await found_in(tmp_path)
    assert (bad.id, bad.verdict) == ("cni.order", Verdict.FAIL)
    await asyncio.to_thread(subprocess.run, ["sh", "-c", bad.facts["command"]], check=True)
    assert (await found_in(tmp_path)).verdict is Verdict.OK


def test_who_listens_on_a_socket_is_known_although_it_never_answers(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    assert listener(path) is None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        assert listener(path) == os.getpid()
    assert process_state(os.getpid()) in ("R", "S")
    assert process_state(2**22 + 1) == ""


def test_who_listens_is_known_although_no_more_connections_fit(tmp_path: Path) -> None:
    """A daemon that hangs is asked until its backlog is full: connect(2) says EAGAIN."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as waiting:
        sock.bind(str(path))
        sock.listen(1)
        with pytest.raises(BlockingIOError):
            for _ in range(99):
                each = waiting.enter_context(socket.socket(socket.AF_UNIX))
                each.setblocking(False)
                each.connect(str(path))
        assert listener(path) == os.getpid()
        path.rename(tmp_path / "elsewhere")  # as in a container: another name than it was bound to
        assert listener(tmp_path / "elsewhere") == 0, "one listens, and nobody knows who"


async def test_a_closed_port_refuses_and_an_open_one_does_not() -> None:
    home = IPv4Address("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((str(home), 0))
        port = sock.getsockname()[1]
        assert not await probes.refuses(home, home, port)
        assert sock.recv(100) == b"\0"
    assert await probes.refuses(home, home, port)


def test_who_says_that_his_own_port_is_closed_is_believed() -> None:
    """RFC 792: type 3, code 3, the header and 8 bytes of the datagram."""
    quoted = bytes.fromhex(
        "4500001d00004000 40110000 c0000201 c0000202 205d205d 00090000".replace(" ", "")
    )
    error = bytes.fromhex("0303000000000000") + quoted
    head = bytes.fromhex("45c0003800000000 40010000 c0000202 c0000201".replace(" ", ""))
    assert probes.read_closed(head + error) == (IPv4Address("192.0.2.2"), 8285)
    longer = b"\x46" + head[1:] + bytes(4)
    assert probes.read_closed(longer + error) == (IPv4Address("192.0.2.2"), 8285)
    other = head[:12] + bytes((192, 0, 2, 9)) + head[16:]
    assert probes.read_closed(other + error) is None, "a router, or a forger, says it"
    assert probes.read_closed(head + b"\x03\x01" + error[2:]) is None, "host unreachable"
    for cut in range(len(head + error) - 4):
        assert probes.read_closed((head + error)[:cut]) is None


async def test_an_endpoint_that_refuses_and_one_that_connects() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        refused = await store._connect(None, url)  # type: ignore[arg-type]
        assert refused is not None
        assert (refused[0], refused[2], refused[3]) == ("store.refused", "systemctl start etcd", "")
        sock.listen()
        assert await store._connect(None, url) is None  # type: ignore[arg-type]


# The command line


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """The command sets up logging for itself, which would be that of every later test."""
    root, ours = logging.getLogger(), logging.getLogger("tundp")
    before = root.level, ours.level, root.handlers[:]
    yield
    root.setLevel(before[0])
    ours.setLevel(before[1])
    root.handlers[:] = before[2]


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--yes"], "--yes goes with --fix=ID"),
        (["--only=nonsense"], "no check and no id is 'nonsense'"),
        (["--fix=nonsense"], "no check and no id is 'nonsense'"),
    ],
)
def test_wrong_usage(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = [f"--admin-socket={tmp_path}/none", f"--store=file:{tmp_path}/leases.json"]
    assert main(["doctor", *arguments, *where]) == 2
    assert text in capsys.readouterr().err
