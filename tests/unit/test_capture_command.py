"""`tundp capture` before it meets a daemon: its command line, Wireshark's questions, its files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tundp.cli import extcap
from tundp.cli.capture import COMMAND
from tundp.cli.program import main


@pytest.fixture(autouse=True)
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No daemon of this machine is listed or asked."""
    path = tmp_path / "run"
    path.mkdir()
    monkeypatch.setattr(extcap, "RUN_DIRECTORY", path)
    monkeypatch.setenv("TUNDP_ADMIN_SOCKET", str(path / "admin.sock"))
    return path


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("-W 3 -w f", "--files needs --file-size"),
        ("-C 3", "--file-size needs --write"),
        ("-C 3 -w -", "--file-size needs --write with the name of a file"),
        ("--text -o json", "--text and --output=json contradict"),
        ("-w - --text", "standard output has --write"),
        ("-c 0", "--count '0' is out of range"),
        ("-s 19", "--snaplen '19' is out of range: bytes from 20 to 65535, 0 for all"),
        ("-s 65536", "--snaplen '65536' is out of range"),
        ("-B 255", "--buffer-size '255' is out of range: KiB from 256 to 65536"),
        ("--for 0s", "--for '0s' is no time above zero"),
        ("-o xml", "--output 'xml' is not one of text, json"),
        ("--capture", "--capture needs --fifo"),
        ("host 10.5.1.2 and", "tundp: filter: the filter ends here"),
        ("-w f port", "tundp: filter: the filter ends here"),
        ("--extcap-dlts", "--extcap-interface is missing"),
        ("--capture --fifo f --extcap-interface eth0", "--extcap-interface 'eth0'"),
        ("--capture --fifo f --extcap-interface tundp-../x", "--extcap-interface 'tundp-../x'"),
        ("-w", "flag needs an argument: --write FILE"),
    ],
)
def test_wrong_usage_is_named(
    line: str, error: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["capture", *line.split()]) == 2
    printed = capsys.readouterr()
    assert error in printed.err
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "no file was made"


def test_no_daemon_is_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["capture", "-c", "1", "tcp", "port", "80"]) == 1
    printed = capfd.readouterr()
    assert f"no daemon answers on {tmp_path}/run/admin.sock" in printed.err
    assert printed.out == ""


def test_letters_behind_two_dashes_are_words_of_the_filter() -> None:
    assert COMMAND.rewrite(["-w", "x", "-s=9", "--", "-w"]) == [
        "--write", "x", "--snaplen=9", "--", "-w"
    ]  # fmt: skip


# Wireshark's questions


def test_interfaces(capsys: pytest.CaptureFixture[str], run_directory: Path) -> None:
    for name in ("admin", "run-flannel-blue.env", "odd}{name"):
        (run_directory / f"{name}.sock").touch()
    assert main(["capture", "--extcap-interfaces", "--extcap-version=4.0"]) == 0
    first, *interfaces = capsys.readouterr().out.splitlines()
    assert first.startswith("extcap {version=")
    assert interfaces == [
        f"interface {{value=tundp}}{{display=tundp overlay ({run_directory}/admin.sock)}}",
        f"interface {{value=tundp-run-flannel-blue.env}}{{display=tundp overlay"
        f" ({run_directory}/run-flannel-blue.env.sock)}}",
    ]


def test_link_type_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capture", "--extcap-interface", "tundp", "--extcap-dlts"]) == 0
    assert capsys.readouterr().out == "dlt {number=228}{name=IPV4}{display=IPv4 packets}\n"
    assert main(["capture", "--extcap-interface", "tundp", "--extcap-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    own = {f"--{flag.name}" for flag in COMMAND.own_flags}
    for number, line in enumerate(lines):
        assert line.startswith(f"arg {{number={number}}}{{call=--")
        assert line.split("{call=")[1].split("}")[0] in own


def test_a_filter_is_judged_for_wireshark(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["capture", "--extcap-interface=tundp", "--extcap-capture-filter"]
    assert main([*words, "tcp port 443"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*words, "tcp prot 443"]) == 0
    assert "at character 5 of the filter" in capsys.readouterr().out


def test_an_interface_leads_to_its_socket(run_directory: Path) -> None:
    chosen = Path("/elsewhere.sock")
    assert extcap.socket_of("tundp", chosen) == chosen
    assert extcap.socket_of("tundp-blue.env", chosen) == run_directory / "blue.env.sock"


# What is installed


def test_files_for_wireshark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "with space"
    assert main(["capture", "--install-wireshark", str(folder)]) == 0
    printed = capsys.readouterr().out
    entry = folder / "extcap" / "tundp"
    assert os.access(entry, os.X_OK)
    asked = subprocess.run([entry, "--extcap-interfaces"], capture_output=True, text=True)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "{value=tundp}" in asked.stdout
    for path in (entry, folder / "plugins/tundp.lua", folder / "profiles/tundp/colorfilters"):
        assert f"wrote {path}" in printed
    assert f"ln -s '{folder}/extcap/tundp' EXTCAP" in printed


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capture", "--install-wireshark", "/proc/nowhere"]) == 1
    assert "cannot write /proc/nowhere/extcap/tundp: " in capsys.readouterr().err
