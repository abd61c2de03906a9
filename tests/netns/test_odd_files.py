"""Files that are none, where commands read settings, subnet.env or leases: named, never waited for.

Each command runs in a network namespace of its own: cleanup would touch this host's rules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wait import DEADLINE_S
from tundp.files import read_stream

NO_FILE = "is no regular file"
TOO_LONG = "has more than 1048576 bytes"


def plant(path: Path, kind: str) -> str:
    """Make `path` a FIFO, a directory or a sparse file of a gigabyte; what an error must say."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 30)
    return {"fifo": NO_FILE, "directory": "Is a directory", "gigabyte": TOO_LONG}[kind]


def run(directory: Path, *words: str, stdin: str = "") -> tuple[int, str]:
    """Exit code and output; it fails if the command waits for the file."""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "tundp", *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd=directory,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["fifo", "directory", "gigabyte"])
def test_settings_files_that_are_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "f"
    what = plant(path, kind)
    for flag in ("--config", "--env-file"):
        code, text = run(tmp_path, "config", "show", f"{flag}={path}")
        assert (code, len(text.strip().splitlines())) == (2, 1), text
        assert f"{flag} {path}" in text
        assert what in text


@pytest.mark.parametrize("kind", ["fifo", "directory", "gigabyte"])
def test_subnet_env_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "subnet.env"
    what = plant(path, kind)
    leases = tmp_path / "leases.json"
    leases.write_text('{"config": {"Network": "10.5.0.0/16"}, "leases": {}}')
    flags = (f"--subnet-file={path}", f"--state-dir={tmp_path / 'state'}")
    code, text = run(tmp_path, "cleanup", "--dry-run", *flags, f"--store=file:{leases}")
    assert code == 0, text
    assert f"cannot read {path}: {what}" in text
    assert "Traceback" not in text
    code, text = run(
        tmp_path,
        "config",
        "check",
        *flags,
        f"--store=file:{leases}",
        "--iface=lo",
        "--public-ip=192.0.2.1",
    )
    assert "Traceback" not in text
    assert f"{path}: {what}" in text, text
    code, text = run(tmp_path, "docker-opts", "-f", str(path), "-d", str(tmp_path / "opts"))
    # As the script does, docker-opts passes over what is no file.
    assert code == (1 if kind == "gigabyte" else 0), text
    assert "Traceback" not in text
    assert f"{path}: {what}" in text


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_a_lease_file_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "leases.json"
    what = plant(path, kind)
    code, text = run(
        tmp_path, "config", "check", f"--store=file:{path}", f"--subnet-file={tmp_path / 'e'}"
    )
    assert code != 0
    assert f"{path}: {what}" in text, text
    assert "Traceback" not in text


def test_settings_may_come_from_a_pipe(tmp_path: Path) -> None:
    """A shell's <(...), as with secrets that are on no disk."""
    code, text = run(tmp_path, "config", "show", "--config=/dev/stdin", stdin='iface = "eth7"\n')
    assert code == 0, text
    assert "eth7" in text
    code, text = run(tmp_path, "config", "show", "--config=/dev/zero")
    assert code == 2, text
    assert TOO_LONG in text


def test_settings_of_a_pipe_nobody_writes_to(tmp_path: Path) -> None:
    """A FIFO below /dev, which open(2) waits for, and a pipe that is open and silent: both hung."""
    fifo = Path("/dev/shm") / f"tundp-{os.getpid()}"
    os.mkfifo(fifo)
    read_end, write_end = os.pipe()
    try:
        for path in (fifo, Path(f"/dev/fd/{read_end}")):
            with pytest.raises(TimeoutError, match="nobody wrote to it within"):
                read_stream(path, limit_s=0.1)
        os.write(write_end, b"iface = ")
        with pytest.raises(TimeoutError, match="8 bytes and no end within"):
            read_stream(Path(f"/dev/fd/{read_end}"), limit_s=0.1)
    finally:
        fifo.unlink()
        os.close(read_end)
        os.close(write_end)


def test_settings_and_environment_of_a_shells_substitution(tmp_path: Path) -> None:
    """`<(...)` of bash, whose program takes a while before it writes."""
    for flag, line in (("--config", 'iface = "eth7"'), ("--env-file", "FLANNELD_IFACE=eth7")):
        writer = f"sleep 0.3; echo '{line}'"
        done = subprocess.run(
            ["bash", "-c", f'"$0" -m tundp config show {flag} <({writer})', sys.executable],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert "eth7" in done.stdout
