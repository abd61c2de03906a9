"""Replacing a file in one step, and reading one without a wait."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from tundp import files
from tundp.daemon import subnet_file
from tundp.instance import Instance
from tundp.subnet.lease_cache import LeaseCache


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o666])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_mode_is_exact_whatever_the_umask(tmp_path: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "f", "x\n", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_default_mode_is_flannels(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "subnet.env", "A=1\n")
    assert stat.S_IMODE((tmp_path / "subnet.env").stat().st_mode) == 0o644


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "f", "é\r\nb\n")
    assert (tmp_path / "f").read_bytes() == "é\r\nb\n".encode()


def test_the_old_text_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("something much longer than the new text")
    files.write_atomically(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


def test_a_reader_of_the_old_file_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.write_atomically(path, "old")
    with path.open() as reader:
        files.write_atomically(path, "new")
        assert reader.read() == "old"


def test_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "run" / "flannel" / "subnet.env"
    files.write_atomically(path, "x")
    assert path.read_text() == "x"
    assert stat.S_IMODE(path.parent.stat().st_mode) & ~0o755 == 0


@pytest.mark.parametrize("call", ["replace", "fsync", "fchmod"])
def test_a_failure_leaves_the_old_text_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_text() == "old"


def test_target_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_atomically(tmp_path / "d", "x")
    assert os.listdir(tmp_path) == ["d"]


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(OSError, match=r"exists|directory"):
        files.write_atomically(tmp_path / "f" / "x", "x")


def test_text_that_cannot_be_encoded_leaves_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(tmp_path / "f", "\ud800")
    assert os.listdir(tmp_path) == []


def test_a_symlink_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "kept"
    assert not (tmp_path / "link").is_symlink()


def test_reading_strips_a_byte_order_mark_and_keeps_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfA=\xff\r\n")
    assert files.read_regular(tmp_path / "f") == "A=\ufffd\n"


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "too long", "absent"])
def test_only_a_regular_file_of_a_size_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "f"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "too long":
        path.write_bytes(b"")
        os.truncate(path, 101)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"regular|directory|more than 100 bytes|No such"):
        files.read_regular(path, most_len=100)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_fifo_where_files_of_ours_should_be_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Opening it would wait for a writer: with it the event loop, deaf to SIGTERM."""
    (tmp_path / "state").mkdir()
    for path in (tmp_path / "subnet.env", tmp_path / "state" / "node-id"):
        os.mkfifo(path)
    found: list[object] = []

    def read() -> None:
        found.append(subnet_file.read_text(tmp_path / "subnet.env"))
        cache = LeaseCache(tmp_path / "state", Instance(tmp_path / "subnet.env"))
        found.append(len(cache.identity().node_id) >= 16)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert found == ["", True]
    assert (tmp_path / "state" / "node-id").is_file()
