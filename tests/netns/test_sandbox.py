"""--sandbox: what a daemon can no longer do, tried from inside; and all it still has to do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SANDBOXED = Path(__file__).with_name("sandboxed.py")

EPERM_CALLS = (
    *("ptrace", "process_vm_readv", "mount", "umount2", "open_tree", "pivot_root", "chroot"),
    *("unshare", "setns", "bpf", "perf_event_open", "init_module", "finit_module", "kexec_load"),
    *("keyctl", "add_key", "io_uring_setup", "userfaultfd", "reboot", "sethostname"),
    *("open_by_handle_at", "execveat", "fchmodat", "fchown", "fsetxattr"),
    *("clone into namespaces", "type into a terminal", "make set-user-id"),
    *("AF_PACKET", "AF_ALG", "AF_VSOCK", "AF_BLUETOOTH", "AF_TIPC"),
    *("unix stream outside", "unix packets outside"),
)
FILES_REFUSED = (
    *("run sh", "run python", "run a loader's argument"),
    *("write outside", "write over outside", "remove outside", "link outside", "move outside"),
    *("read outside", "list outside", "read shadow", "read a parent's memory"),
    *("write a sysctl", "write a library"),
)
ALLOWED = (
    *("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK", "write own", "read resolv.conf"),
    *("read route table", "open the tun device", "run nft", "run iptables", "import late"),
    *("start a thread", "read a certificate", "read a renewed one", "pair of unix sockets"),
)


def landlock_abi() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(444, None, ctypes.c_size_t(0), 1)))


@pytest.fixture
def try_all(tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs sandboxed.py and returns what it printed; its certificate is renewed meanwhile."""
    for name in ("outside", "own", "tls"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "there").write_text("secret")
    (tmp_path / "own" / "kept").write_text("kept")
    certificate = tmp_path / "tls" / "ca.pem"
    certificate.write_text("first")
    abstract = f"tundp-test-{uuid.uuid4().hex}"
    kinds = {"stream": socket.SOCK_STREAM, "packets": socket.SOCK_SEQPACKET}
    with contextlib.ExitStack() as stack:
        for name, kind in {abstract: socket.SOCK_STREAM, **kinds}.items():
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            # As Docker's and D-Bus's: behind them somebody else's root does what is asked.
            listener.bind(f"\0{name}" if name == abstract else str(tmp_path / name))
            listener.listen()

        def run(
            *flags: str, before: Callable[[], None] | None = None, must_start: bool = True
        ) -> dict[str, Any]:
            paths = {
                "outside": str(tmp_path / "outside"),
                "own": str(tmp_path / "own"),
                "certificate": str(certificate),
                "abstract": abstract,
                **{name: str(tmp_path / name) for name in kinds},
            }
            own = tmp_path / "own"
            with subprocess.Popen(
                [
                    *(sys.executable, str(SANDBOXED), json.dumps(paths)),
                    *("--etcd-endpoints=https://192.0.2.1:2379", f"--etcd-cafile={certificate}"),
                    *(f"--subnet-file={own}/subnet.env", f"--admin-socket={own}/admin.sock"),
                    *(f"--state-dir={tmp_path}/state", *flags),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=before,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            ) as process:
                assert process.stdin and process.stdout and process.stderr
                line = process.stdout.readline()
                if line == "renew\n":
                    new = certificate.with_name("new.pem")
                    new.write_text("renewed")
                    new.rename(certificate)
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                complaint = process.stderr.read()
            if not must_start:
                return {"code": process.returncode, "stderr": complaint}
            assert process.returncode == 0, complaint
            found: dict[str, Any] = json.loads(line)
            return found

        yield run


def needs(abi: int) -> None:
    if landlock_abi() < abi:
        pytest.skip(f"this kernel has Landlock ABI {landlock_abi()}, and this needs {abi}")


def test_what_it_must_not_do_is_refused_and_the_rest_is_not(
    try_all: Callable[..., dict[str, Any]],
) -> None:
    needs(1)
    found = try_all()
    answers = found["answers"]
    assert found["abi"] == landlock_abi()
    assert found["seccomp"] is True
    assert {name: answers[name] for name in EPERM_CALLS} == dict.fromkeys(EPERM_CALLS, "EPERM")
    assert answers["clone3"] == "ENOSYS"
    refused = {name: answers[name] for name in FILES_REFUSED}
    assert {name: each for name, each in refused.items() if each not in ("EACCES", "EXDEV")} == {}
    assert {name: answers[name] for name in ALLOWED} == dict.fromkeys(ALLOWED, "ok")
    if landlock_abi() >= 3:
        assert answers["cut off outside"] == "EACCES"
    if landlock_abi() >= 6:
        assert (answers["signal outside"], answers["abstract socket outside"]) == ("EPERM", "EPERM")
        assert found["missing"] == []


def test_without_it_everything_goes(try_all: Callable[..., dict[str, Any]]) -> None:
    """What the test above finds refused is refused by the sandbox, and not by this machine."""
    answers = try_all("--sandbox=off")["answers"]
    still = {"read a parent's memory", "type into a terminal"}
    names = {*FILES_REFUSED, "signal outside", "abstract socket outside"} - still
    assert {name for name in names if answers[name] in ("EACCES", "EPERM")} == set()
    calls = {name for name in EPERM_CALLS if answers[name] == "EPERM"}
    assert calls <= {*still, "ptrace", "bpf", "perf_event_open", "userfaultfd", "add_key"}


def test_names_of_endpoints_need_etc(try_all: Callable[..., dict[str, Any]]) -> None:
    needs(1)
    found = try_all("--etcd-endpoints=https://etcd.example:2379")
    assert found["gaps"] == ["reading /etc, for etcd's endpoints have names (etcd.example)"]
    assert found["answers"]["read shadow"] == "ok"
    assert found["answers"]["write outside"] == "EACCES"


def refuse_with_enosys(*numbers: int) -> Callable[[], None]:
    """For a child before exec: a kernel without these calls, simulated by a filter of our own."""

    def install() -> None:
        code = struct.pack("=HBBI", 0x20, 0, 0, 0)
        for at, number in enumerate(numbers):
            code += struct.pack("=HBBI", 0x15, len(numbers) - at, 0, number)
        code += struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
        code += struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | errno.ENOSYS)
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, program, 0, 0) == 0

    return install


SECCOMP = 317 if platform.machine() == "x86_64" else 277


def test_a_kernel_without_landlock(try_all: Callable[..., dict[str, Any]]) -> None:
    found = try_all(before=refuse_with_enosys(444, 445, 446))
    assert (found["abi"], found["seccomp"]) == (0, True)
    assert "the kernel has no Landlock" in found["missing"][0]
    assert found["answers"]["run sh"] == "ok"
    assert found["answers"]["mount"] == "EPERM"


def test_a_kernel_without_seccomp(try_all: Callable[..., dict[str, Any]]) -> None:
    needs(1)
    found = try_all(before=refuse_with_enosys(SECCOMP))
    assert found["seccomp"] is False
    assert "the kernel has no seccomp" in found["missing"][0]
    assert found["answers"]["run sh"] == "EACCES"
    assert found["answers"]["AF_ALG"] != "EPERM"


@pytest.mark.parametrize(
    ("numbers", "named"),
    [((444, 445, 446), "no Landlock"), ((SECCOMP,), "no seccomp filter")],
    ids=["landlock", "seccomp"],
)
def test_on_refuses_to_start_without(
    try_all: Callable[..., dict[str, Any]], numbers: tuple[int, ...], named: str
) -> None:
    ended = try_all("--sandbox=on", before=refuse_with_enosys(*numbers), must_start=False)
    assert ended["code"] != 0
    last = ended["stderr"].strip().splitlines()[-1]
    assert "--sandbox=on" in last
    assert named in last


def test_on_refuses_to_start_with_a_gap(try_all: Callable[..., dict[str, Any]]) -> None:
    needs(6)
    ended = try_all("--sandbox=on", "--etcd-endpoints=https://etcd.example:2379", must_start=False)
    assert ended["code"] != 0
    last = ended["stderr"].strip().splitlines()[-1]
    assert "--sandbox=on: these settings leave open reading /etc" in last
    assert "etcd.example" in last
    assert "--sandbox=auto" in last
