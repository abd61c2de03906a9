"""sd_notify against a real datagram socket."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tundp.linux import notify


@pytest.fixture
def listen() -> Iterator[Callable[..., Any]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)

        def bind(address: str) -> socket.socket:
            sock.bind(address)
            return sock

        yield bind


@pytest.fixture
def short_dir() -> Iterator[str]:
    # A unix socket's path has room for 107 bytes, which tmp_path may exceed.
    with tempfile.TemporaryDirectory(prefix="sdn") as path:
        yield path


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (("READY=1",), b"READY=1"),
        (("READY=1", "STATUS=10.5.1.0/24, 3 peers"), b"READY=1\nSTATUS=10.5.1.0/24, 3 peers"),
        (("STATUS=é",), "STATUS=é".encode()),
    ],
)
def test_a_path(
    monkeypatch: pytest.MonkeyPatch,
    listen: Any,
    short_dir: Any,
    fields: tuple[Any, ...],
    expected: bytes,
) -> None:
    path = os.path.join(short_dir, "notify")
    sock = listen(path)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    notify.notify(*fields)
    assert sock.recv(4096) == expected


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch, listen: Any) -> None:
    name = f"tundp-test-{os.getpid()}"
    sock = listen(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    notify.notify("STOPPING=1")
    assert sock.recv(4096) == b"STOPPING=1"


@pytest.mark.parametrize("value", [None, ""])
def test_silent_without_systemd(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    if value is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    monkeypatch.setattr(socket, "socket", refuse)
    assert notify.notify("READY=1") is None


def test_a_deaf_socket_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, short_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = os.path.join(short_dir, "nobody")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    notify.notify("READY=1")
    (line,) = caplog.messages
    assert path in line
    assert "No such file" in line


def test_a_full_socket_does_not_block(
    monkeypatch: pytest.MonkeyPatch, listen: Any, short_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = os.path.join(short_dir, "notify")
    listen(path)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    for _ in range(10_000):
        notify.notify("STATUS=" + "x" * 1000)
        if caplog.messages:
            break
    assert "temporarily unavailable" in caplog.messages[0]
