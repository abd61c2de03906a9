"""Replacing a file in one step."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tundp import files


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
