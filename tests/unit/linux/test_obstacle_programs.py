"""Which BPF programs are attached: where to ask, and what is made of the answer."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.linux.test_obstacles import SCENE
from tundp.errors import PlatformError
from tundp.finding import Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Netlink
from tundp.linux.obstacles import bpf
from tundp.linux.obstacles.look import look

MOUNTS = """\
22 28 0:21 / /proc rw,nosuid - proc proc rw
30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup cgroup rw,cpu
31 23 0:27 {root} {mounted} rw,nosuid shared:5 - cgroup2 cgroup2 rw,nsdelegate
"""


@pytest.fixture
def own() -> str:
    """This process's group."""
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    found = next((line[3:] for line in lines if line.startswith("0::/")), None)
    if found is None or ".." in found:
        pytest.skip("this process is in no control group of version 2 that is seen here")
    return found


def mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / "mountinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(bpf, "_MOUNTS", tmp_path / "mountinfo")


def test_a_control_group_is_found_below_its_mount(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(monkeypatch, tmp_path, MOUNTS.format(root="/", mounted="/a\\040b/unified"))
    top = Path("/a b/unified")
    assert bpf.group_of(os.getpid()) == (top, top / own.removeprefix("/"))


@pytest.mark.parametrize("text", ["", MOUNTS.format(root="/none/such", mounted="/mnt")])
def test_a_control_group_that_is_not_mounted_is_not_taken_for_none(
    own: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(monkeypatch, tmp_path, text)
    with pytest.raises(PlatformError, match=rf"{own} of process \d+ is in no file system"):
        bpf.group_of(os.getpid())


def test_a_process_that_is_gone_is_an_error() -> None:
    with pytest.raises(PlatformError, match="/proc/4194305/cgroup: No such file"):
        bpf.group_of(4_194_305)  # PID_MAX_LIMIT + 1


def test_a_machine_without_a_known_number_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(PlatformError, match="unknown number on vax"):
        bpf.query(1, uapi.BPF_TCX_INGRESS)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOENT, errno.ENODEV, errno.EPERM])
def test_what_the_kernel_refuses_is_not_taken_for_nothing(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only errors that mean that there is nothing count as nothing."""
    calls: list[tuple[Any, ...]] = []

    def refuse(*words: Any) -> int:
        calls.append(words)
        return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(syscall=refuse))
    monkeypatch.setattr("ctypes.get_errno", lambda: code)
    asked = bpf.ask(SCENE, ("lo",))
    assert len(calls) == (2 if code == errno.EPERM else 3)  # two ways of lo, and sk_lookup
    assert asked.findings == []
    if code == errno.EPERM:
        assert asked.looked_at == []
        assert asked.refused == "BPF programs tcx, sk_lookup: Operation not permitted"
    else:
        assert asked.looked_at == ["tcx", "sk_lookup"]
        assert asked.refused == ""


class Refusing:
    """A kernel that lists nothing."""

    async def refuse(self, *_: Any, **__: Any) -> Any:
        raise PlatformError("refused")

    dump = routes = addresses = lookups = refuse


async def test_where_devices_are_unknown_nothing_that_needs_them_is_called_looked_at() -> None:
    looked = await look(cast("Netlink", Refusing()), SCENE)
    assert looked.summary.verdict is Verdict.UNKNOWN
    said, _, unread = looked.summary.evidence.partition("; not looked at: ")
    assert "devices: refused" in unread
    for part in ("routes", "neighbours", "filters and queues of tc, XDP"):
        assert part not in said
        assert f"{part}: the devices of this host could not be listed" in unread
