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

    def fail(*_: Any, **__: Any) -> None:
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


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folders_made_on_the_way_are_nobody_elses_to_write(tmp_path: Path, umask: int) -> None:
    """Under umask 000 the parents of the last folder were anybody's to write."""
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "run" / "flannel" / "a" / "subnet.env", "x\n")
        os.close(files.open_folder(tmp_path / "state" / "b", makes=True))
    finally:
        os.umask(before)
    for folder in ("run", "run/flannel", "run/flannel/a", "state", "state/b"):
        status = (tmp_path / folder).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o755, os.geteuid()), folder


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir(mode=0o750)
    files.write_atomically(tmp_path / "kept" / "f", "x")
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o750


@pytest.fixture
def anybodys(tmp_path: Path) -> Path:
    """A folder such as /tmp, with a link to a folder outside it."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "f").write_text("not for us")
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / "link").symlink_to(tmp_path / "target")
    (folder / "link.json").symlink_to(tmp_path / "target" / "f")
    return folder


def test_a_link_in_a_folder_anybody_may_write_is_not_followed(
    tmp_path: Path, anybodys: Path
) -> None:
    link = anybodys / "link"
    words = f"{link} is a symbolic link in {anybodys}, which anybody may write.*remove it, or name"
    for act in (
        lambda: files.write_atomically(link / "f", "ours"),
        lambda: files.write_atomically(link / "below" / "f", "ours"),
        lambda: files.write_replacing(link / "f", "ours"),
        lambda: files.write_atomically(link, "ours", follows_link=True),
        lambda: files.read_regular(link / "f", is_ours=True),
        lambda: os.close(files.open_folder(link, makes=True)),
    ):
        with pytest.raises(OSError, match=words):
            act()
    with pytest.raises(OSError, match=r"link\.json is a symbolic link"):
        files.read_regular(anybodys / "link.json", is_ours=True)
    assert os.listdir(tmp_path / "target") == ["f"]
    assert (tmp_path / "target" / "f").read_text() == "not for us"
    # A folder of ours in it may be used, and made.
    files.write_atomically(anybodys / "ours" / "f", "x")
    assert files.read_regular(anybodys / "ours" / "f", is_ours=True) == "x"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_a_folder_or_file_of_another_user_in_it_is_not_taken(anybodys: Path) -> None:
    (anybodys / "theirs").mkdir()
    (anybodys / "node-id").write_text('{"NodeID": "7c1f"}')
    os.chown(anybodys / "theirs", 1234, 1234)
    os.chown(anybodys / "node-id", 1234, 1234)
    with pytest.raises(OSError, match=r"theirs belongs to user 1234 in .*which anybody may write"):
        files.write_atomically(anybodys / "theirs" / "f", "x")
    with pytest.raises(OSError, match="node-id belongs to user 1234"):
        files.read_regular(anybodys / "node-id", is_ours=True)
    cache = LeaseCache(anybodys, Instance())
    assert cache.identity().node_id != "7c1f"
    assert (anybodys / "node-id").stat().st_uid == 0, "ours has taken its place"


def test_a_second_name_of_a_file_in_it_is_not_taken(tmp_path: Path, anybodys: Path) -> None:
    """Whoever may make hard links could have a file of root's read or written over."""
    os.link(tmp_path / "target" / "f", anybodys / "f")
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match=r"f has a second name elsewhere in .*which anybody may"):
            files.open_file(anybodys / "f", flags)
    files.write_atomically(anybodys / "f", "ours")
    assert (tmp_path / "target" / "f").read_text() == "not for us"


def test_links_in_folders_of_ones_own_are_followed(tmp_path: Path) -> None:
    """/var/run is one; /var/lib may be another disk's."""
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "disk")
    (tmp_path / "relative").symlink_to("disk/../disk/a")
    files.write_atomically(tmp_path / "absolute" / "a" / "f", "1")
    assert (tmp_path / "disk" / "a" / "f").read_text() == "1"
    files.write_atomically(tmp_path / "relative" / "f", "2")
    assert (tmp_path / "disk" / "a" / "f").read_text() == "2"
    (tmp_path / "link").symlink_to("relative/f")
    files.write_atomically(tmp_path / "link", "3", follows_link=True)
    assert (tmp_path / "disk" / "a" / "f").read_text() == "3"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="symbolic links"):
        files.write_atomically(tmp_path / "round" / "f", "3")


def test_no_descriptor_is_left_open(tmp_path: Path, anybodys: Path) -> None:
    before = os.listdir("/proc/self/fd")
    files.write_atomically(tmp_path / "a" / "b" / "f", "x")
    for path in (
        anybodys / "link" / "f",
        tmp_path / "absent" / "f",
        tmp_path / "target" / "f" / "g",
    ):
        with pytest.raises(OSError):
            files.read_regular(path, is_ours=True)
    assert len(os.listdir("/proc/self/fd")) == len(before)
