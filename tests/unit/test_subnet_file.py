"""subnet.env that cannot be written, or that somebody else writes, too: real files and mounts."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tundp.daemon.lock import is_running, take_lock
from tundp.daemon.subnet_file import SubnetFile, read_text
from tundp.errors import PlatformError
from tundp.files import write_replacing
from tundp.instance import Instance
from tundp.lease.codec import parse_key
from tundp.lease.subnet_env import SubnetEnv
from tundp.subnet.lease_cache import LeaseCache

ENV = SubnetEnv(
    network=IPv4Network("10.5.0.0/16"),
    key=parse_key("10.5.7.0-24"),
    network6=None,
    mtu=1472,
    ip_masq=False,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
IN_PLACE = """
import sys
from pathlib import Path
from tundp.files import write_replacing
write_replacing(Path(sys.argv[1]), sys.argv[2])
"""


def in_mounts(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A shell script in a mount namespace of its own."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, "sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "breaks"),
    [
        ('mount --bind "$2" "$1"', "a file mounted over it: rename says EBUSY"),
        (
            'mount --bind "$2" "$1"; mount --bind "$(dirname "$1")" "$(dirname "$1")";'
            ' mount -o remount,bind,ro "$(dirname "$1")"; mount --bind "$2" "$1"',
            "and the directory around it is read-only",
        ),
    ],
)
def test_a_file_that_is_a_mount_point_is_written_in_place(
    tmp_path: Path, script: str, breaks: str
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    path, mounted = directory / "subnet.env", tmp_path / "mounted"
    for text in ("short\n", "a much longer text than before\n", "cut\n"):
        path.write_text("under the mount")
        mounted.write_text("the old text, of some length\n" * 3)
        done = in_mounts(
            f'{script}; exec "$3" -c "$4" "$1" "$5"',
            *(str(path), str(mounted), sys.executable, IN_PLACE, text),
        )
        assert done.returncode == 0, (breaks, done.stderr)
        assert mounted.read_text() == text, breaks
        assert path.read_text() == "under the mount"
    assert os.listdir(directory) == ["subnet.env"], "no temp file stays"


@pytest.mark.parametrize(
    ("script", "error", "breaks"),
    [
        (
            'mount -t tmpfs -o size=8k none "$(dirname "$1")"; printf old > "$1";'
            ' dd if=/dev/zero of="$(dirname "$1")/fill" bs=1k count=64 2>/dev/null || true',
            "No space left",
            "a full disk: the old text stays whole",
        ),
        (
            'mount -t tmpfs none "$(dirname "$1")"; printf old > "$1";'
            ' mount -o remount,ro "$(dirname "$1")"',
            "Read-only file system",
            "a read-only file system",
        ),
    ],
)
def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, script: str, error: str, breaks: str
) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "subnet.env"
    done = in_mounts(
        f'{script}; "$2" -c "$3" "$1" "$(seq 3000)" || cat "$1"',
        *(str(path), sys.executable, IN_PLACE),
    )
    assert error in done.stderr, breaks
    assert done.stdout == "old", breaks


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        write_replacing(tmp_path / "file" / "subnet.env", "x")


def run_for_minutes(path: Path, minutes: int, spoil: object = None) -> SubnetFile:
    """A daemon's checks every five seconds, on a clock of our own."""
    now = [100.0]
    made = SubnetFile(Instance(path), clock=lambda: now[0])
    made.write(ENV)
    for _ in range(12 * minutes):
        now[0] += 5.0
        if callable(spoil):
            spoil()
        made.check()
    return made


def test_a_file_that_cannot_be_written_costs_a_line_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_text("")
    made = run_for_minutes(tmp_path / "file" / "subnet.env", 10)
    assert "irectory" in made.error or "exists" in made.error
    assert 10 <= len(caplog.messages) <= 11, caplog.messages
    (tmp_path / "file").unlink()
    made.check()
    assert made.error == ""
    assert "FLANNEL_SUBNET=10.5.7.1/24" in made.path.read_text()
    assert "working again" in caplog.messages[-1]


def test_who_else_writes_it_is_named_and_fails_readiness(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "subnet.env"
    made = run_for_minutes(path, 10, lambda: path.write_text("FLANNEL_SUBNET=10.9.9.1/24\n"))
    assert len(caplog.messages) <= 20, caplog.messages
    assert "another program has undone it 12 times in the last minute" in made.error
    assert "another program" in caplog.messages[-1]
    assert "FLANNEL_SUBNET=10.5.7.1/24" in path.read_text()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Every open(2) of this process fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_look_that_fails_is_no_change_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a free descriptor the file was said to be removed or changed, every five seconds."""
    made = SubnetFile(Instance(tmp_path / "subnet.env"))
    made.write(ENV)
    with no_descriptor_left():
        for _ in range(5):
            made.check()
        assert made.unseen == "Too many open files"
        assert made.error == "", "nobody knows that it is wrong"
    (line,) = caplog.messages
    assert "cannot look at" in line
    assert "removed or changed" not in line
    made.check()
    assert made.unseen == ""
    made.path.unlink()
    made.check()
    assert made.path.exists()
    assert "was removed or changed" in caplog.messages[-1]


def test_without_descriptors_nothing_is_taken_for_missing(tmp_path: Path) -> None:
    """Not another daemon, not subnet.env, not the node id: each would cost what is there."""
    instance = Instance(tmp_path / "subnet.env")
    instance.subnet_file.write_text("FLANNEL_SUBNET=10.5.7.1/24\n")
    cache = LeaseCache(tmp_path / "state", instance)
    node_id = cache.identity().node_id
    lock = take_lock(instance)
    assert lock is not None
    try:
        with no_descriptor_left():
            for look in (
                lambda: take_lock(instance),
                lambda: is_running(instance),
                lambda: read_text(instance.subnet_file),
                cache.identity,
            ):
                with pytest.raises(PlatformError, match="Too many open files"):
                    look()
        assert is_running(instance)
        assert cache.identity().node_id == node_id
    finally:
        os.close(lock)


def test_once_is_no_contest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "subnet.env"
    made = run_for_minutes(path, 1, None)
    path.unlink()
    made.check()
    assert path.exists()
    assert made.error == ""
    (line,) = caplog.messages
    assert line == f"{path} was removed or changed: writing it again"


def test_a_link_to_what_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    """A regular file by its kind, whose first byte is an input/output error."""
    path = tmp_path / "subnet.env"
    made = SubnetFile(Instance(path))
    made.write(ENV)
    kept = path.read_text()
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        path.read_text()
    made.check()
    assert not path.is_symlink()
    assert path.read_text() == kept
    assert made.unseen == ""
