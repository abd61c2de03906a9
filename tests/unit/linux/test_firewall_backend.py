"""Back end and rights are asked of the programs, whatever they are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tundp.linux import capability, command
from tundp.linux.firewall import backend
from tundp.linux.firewall.backend import BackEnd, needs_raw_sockets, parse_version

LEGACY = "iptables v1.8.9 (legacy)"
NFT = "iptables v1.8.9 (nf_tables)"


@pytest.mark.parametrize(
    ("text", "numbers", "back_end"),
    [
        ("iptables v1.8.9 (nf_tables)\n", (1, 8, 9), BackEnd.NFT),
        ("iptables-save v1.8.9 (legacy)\n", (1, 8, 9), BackEnd.LEGACY),
        ("ip6tables-nft-restore v1.8.9 (nf_tables)\n", (1, 8, 9), BackEnd.NFT),
        # Before 1.8 there was but one, and it was not named.
        ("iptables v1.6.1\n", (1, 6, 1), BackEnd.LEGACY),
        ("iptables v1.4.21\n", (1, 4, 21), BackEnd.LEGACY),
        ("iptables v1.8 (nf_tables)\n", (1, 8, 0), BackEnd.NFT),
        # A wrapper's own lines.
        (
            "2026-11-26 audit: v9.9 iptables called\niptables v1.8.7 (legacy)\n",
            (1, 8, 7),
            BackEnd.LEGACY,
        ),
        ("called (legacy)\niptables v1.8.7 (nf_tables)\nbye (legacy)\n", (1, 8, 7), BackEnd.NFT),
    ],
)
def test_a_version_is_read(text: str, numbers: tuple[int, int, int], back_end: BackEnd) -> None:
    version = parse_version(text)
    assert version is not None
    assert (version.numbers, version.back_end) == (numbers, back_end)


@pytest.mark.parametrize("text", ["", "iptables: not found\n", "busybox v1.36 (legacy)\n"])
def test_what_is_no_version_is_none(text: str) -> None:
    assert parse_version(text) is None


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder programs are found in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(command, "SYSTEM_PATH", "/usr/bin:/bin")

    def which(name: str, path: str) -> str | None:
        del path
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr(shutil, "which", which)
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def install(programs: Path, name: str, says: str, **others: str) -> None:
    for suffix in ("", "-save", "-restore"):
        script(programs / f"{name}{suffix}", f"echo '{others.get(suffix.strip('-'), says)}'")


def test_any_legacy_program_needs_raw_sockets(programs: Path) -> None:
    assert not needs_raw_sockets(), "nothing is installed"
    install(programs, "iptables", NFT)
    install(programs, "ip6tables", NFT.replace("ip", "ip6", 1))
    assert not needs_raw_sockets()
    install(programs, "iptables", LEGACY)  # a wrapper: its name says nothing
    assert needs_raw_sockets()
    install(programs, "iptables", NFT, restore=LEGACY)
    assert needs_raw_sockets(), "one of them is enough"
    install(programs, "iptables", NFT)
    install(programs, "ip6tables", LEGACY)
    assert needs_raw_sockets()


def test_a_name_with_legacy_in_it_says_nothing(programs: Path) -> None:
    real = programs / "my-legacy-scripts"
    script(real, f"echo '{NFT}'")
    for suffix in ("", "-save", "-restore"):
        (programs / f"iptables{suffix}").symlink_to(real)
    assert not needs_raw_sockets()


def test_a_program_that_hangs_or_fails_may_be_legacy(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(programs, "iptables", "iptables: error")
    assert needs_raw_sockets()
    monkeypatch.setattr(backend, "ASK_S", 0.1)
    script(programs / "iptables", "exec sleep 60")
    assert needs_raw_sockets()


@pytest.mark.parametrize(
    ("held", "needed", "said"),
    [
        ({12}, (12, 13), "needs CAP_NET_RAW, which this process lacks"),
        ({13}, (12, 13), "needs CAP_NET_ADMIN, which this process lacks"),
        (set(), (12, 13), "needs CAP_NET_ADMIN and CAP_NET_RAW, which"),
        (set(), (12,), "needs CAP_NET_ADMIN, which"),
        ({12, 13}, (12, 13), "has CAP_NET_ADMIN and CAP_NET_RAW, so something else refuses"),
    ],
)
def test_the_capability_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, held: set[int], needed: tuple[int, ...], said: str
) -> None:
    monkeypatch.setattr(capability, "held", lambda: frozenset(held))
    complaint = "iptables v1.8.9 (legacy): can't initialize: Permission denied (you must be root)"
    finished = command.Finished(
        argv=("iptables", "-S"), code=3, stdout="", stderr=complaint, capabilities=needed
    )
    assert said in str(finished.error())
