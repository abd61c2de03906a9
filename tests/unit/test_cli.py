"""The command line: what is printed where, exit codes, and what is loaded for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tundp
from tests.wait import until_sync
from tundp.admin import serve_admin
from tundp.cli import config, demo, flanneld, main, program
from tundp.cli.bench import BenchOptions
from tundp.cli.command import Command, Given
from tundp.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from tundp.cli.program import COMMANDS, EXAMPLES, find
from tundp.cli.run import RunCommand
from tundp.daemon.report import setting_statuses
from tundp.daemon.running import settings_of
from tundp.errors import ConfigError, Interrupted
from tundp.observe.status import DaemonState, Status
from tundp.settings import goflags
from tundp.settings.declare import flags_of
from tundp.settings.settings import FLAGS, SETTABLE, Settings
from tundp.settings.sources import load_settings
from tundp.wire.filter import parse as parse_filter

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("FLANNELD_", "TUNDP_")):
            monkeypatch.delenv(name)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["config", "show", *arguments]) == EXIT_OK
    output, errors = capsys.readouterr()
    assert errors == ""
    return tomllib.loads(output)


# config show


def test_show_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    settings = shown(capsys)
    assert settings.keys() == {flag.name for flag in SETTABLE}
    assert settings["iface"] == []
    assert settings["ip-masq"] is False
    assert settings["iptables-forward-rules"] is True
    assert settings["healthz-port"] == 0
    assert settings["metrics-addr"] == ""
    assert settings["etcd-endpoints"] == "http://127.0.0.1:4001,http://127.0.0.1:2379"
    assert settings["admin-socket"] == "/run/tundp/admin.sock"


def test_show_blanks_the_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLANNELD_ETCD_PASSWORD", SECRET)
    for more in ([], ["--origin"]):
        main(["config", "show", "--etcd-username=u", *more])
        output, errors = capsys.readouterr()
        assert SECRET not in output + errors
        assert 'etcd-password = "***"' in output


def test_show_tells_where_each_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "tundp.toml"
    path.write_text("workers = 2\nspin = 7\nv = 1\n")
    monkeypatch.setenv("FLANNELD_IP_MASQ", "true")
    monkeypatch.setenv("TUNDP_SPIN", "8")
    arguments = ["config", "show", "--origin", f"--config={path}", "--v=2", "--iface=a"]
    assert main(arguments) == EXIT_OK
    output = capsys.readouterr().out
    origins = dict(re.findall(r"^(\S+) = .* # (\S+)$", output, re.MULTILINE))
    assert origins.keys() == {flag.name for flag in SETTABLE}
    assert {name: origin for name, origin in origins.items() if origin != "default"} == {
        "v": "--v",
        "iface": "--iface",
        "ip-masq": "FLANNELD_IP_MASQ",
        "spin": "TUNDP_SPIN",
        "workers": str(path),
    }
    settings = tomllib.loads(output)
    assert (settings["v"], settings["spin"], settings["workers"]) == (2, 8, 2)


def test_show_keeps_signs_of_toml_in_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    text = '/a"b\\c#d\te'
    assert shown(capsys, f"--etcd-prefix={text}")["etcd-prefix"] == text
    assert shown(capsys, "--iface=a,b", '--iface="')["iface"] == ["a,b", '"']


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "output", "errors"),
    [
        (["config", "show", "--nonsense"], EXIT_USAGE, "", "tundp: unknown flag --nonsense"),
        (["config", "check", "--v=x"], EXIT_USAGE, "", "tundp: --v 'x' is not a whole number"),
        (["config"], EXIT_USAGE, "", "usage: tundp config show|check|example"),
        (["config", "shwo"], EXIT_USAGE, "", "usage: tundp config show|check|example"),
        (["config", "--help"], EXIT_OK, "usage: tundp config show|check|example", ""),
        (["help", "config"], EXIT_OK, "usage: tundp config show|check|example", ""),
        (["help", "nonsense"], EXIT_USAGE, "", "unknown command 'nonsense'"),
        (["nonsense"], EXIT_USAGE, "", "tundp: unknown command 'nonsense'"),
        (["stauts"], EXIT_USAGE, "", "did you mean tundp status?"),
        (["--version"], EXIT_OK, f"tundp {tundp.__version__}", ""),
        (["-version"], EXIT_OK, f"tundp {tundp.__version__}", ""),
        (["bench", "diff"], EXIT_USAGE, "", "A is missing: usage: tundp bench diff A B"),
        (["bench", "diff", "a", "b", "c"], EXIT_USAGE, "", "unexpected argument 'c'"),
        (["bench", "--rounds=0"], EXIT_USAGE, "", "--rounds '0' is out of range"),
        (["bench", "--profile=x"], EXIT_USAGE, "", "is not one of quick, default, full"),
        (["completion", "ksh"], EXIT_USAGE, "", "there is bash, zsh, fish"),
        (["docker-opts", "--nonsense"], EXIT_FAILED, "", "unknown flag --nonsense"),
        (["config", "show", "-h"], EXIT_OK, "usage: tundp config show", ""),
        (["run", "--nonsense"], EXIT_USAGE, "", "tundp: unknown flag --nonsense"),
        (["run", "stray"], EXIT_USAGE, "", "tundp: unexpected argument 'stray'"),
        (["run", "--kube-subnet-mgr"], EXIT_USAGE, "", "not yet in tundp"),
        (["run", "--config=/nonexistent"], EXIT_USAGE, "", "/nonexistent: No such file"),
        (["run", "--version"], EXIT_OK, "", f"tundp {tundp.__version__}"),
        (["run", "--help"], EXIT_OK, "usage: tundp run [flags]", ""),
        (["run", "-h"], EXIT_OK, "usage: tundp run [flags]", ""),
        (["cleanup", "--help"], EXIT_OK, "usage: tundp cleanup", ""),
        (["cleanup", "--nonsense"], EXIT_USAGE, "", "tundp: unknown flag --nonsense"),
        (
            ["status", "--admin-socket=/nonexistent/s"],
            EXIT_FAILED,
            "",
            "tundp: no daemon answers on /nonexistent/s",
        ),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, output: str, errors: str
) -> None:
    assert main(arguments) == code
    got = capsys.readouterr()
    assert (output in got.out) if output else got.out == ""
    assert (errors in got.err) if errors else got.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "output", "errors"),
    [
        (["--version"], EXIT_OK, "", f"tundp {tundp.__version__}"),
        (["-version=true"], EXIT_OK, "", f"tundp {tundp.__version__}"),
        (["-h"], EXIT_OK, "usage: flanneld [flags]", ""),
        (["--help"], EXIT_OK, "usage: flanneld [flags]", ""),
        (["--nonsense"], EXIT_USAGE, "", "flanneld: unknown flag --nonsense"),
        (["-kube-subnet-mgr"], EXIT_USAGE, "", "flanneld: --kube-subnet-mgr"),
        (["--version", "stray", "--nonsense"], EXIT_OK, "", "tundp "),
        (["--etcd-cafile=/nonexistent/ca"], EXIT_USAGE, "", "flanneld: "),
    ],
)
def test_flanneld(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, output: str, errors: str
) -> None:
    assert flanneld(arguments) == code
    got = capsys.readouterr()
    assert (output in got.out) if output else got.out == ""
    assert (errors in got.err) if errors else got.err == ""


def test_diff_takes_directories(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    assert main(["bench", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == EXIT_USAGE
    assert f"{tmp_path}/a/results.json is no results.json of schema" in capsys.readouterr().err


def test_a_signal_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(given: Given[Any]) -> None:
        raise Interrupted("interrupted; everything torn down")

    command = dataclasses.replace(demo.COMMAND, run=interrupted)  # type: ignore[arg-type]
    monkeypatch.setattr(program, "COMMANDS", (command,))
    assert main(["demo"]) == EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == "tundp: interrupted; everything torn down\n"


def test_the_scripts_lead_here() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {
        "tundp": "tundp.cli:main",
        "flanneld": "tundp.cli:flanneld",
    }


def test_a_password_given_wrongly_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [f"--etcd-password={SECRET}"],
        [f"--etcd-pasword={SECRET}"],
        [f"--etcd-username=u:{SECRET}@x", "--v=x"],
    ):
        assert main(["run", *arguments]) == EXIT_USAGE
        assert flanneld(arguments) == EXIT_USAGE
    got = capsys.readouterr()
    assert SECRET not in got.out + got.err


# Help


def test_help_lists_every_option_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    text = capsys.readouterr().out
    flannels, own = text.split("tundp's own flags:")
    assert "flannel's flags:" in flannels
    flannels = flannels.split("flannel's flags:")[1]
    for option in FLAGS:
        here, there = (flannels, own) if option.is_flannels else (own, flannels)
        flag = re.compile(rf"^  --{option.name}(?= |$)", re.MULTILINE)
        assert flag.search(here), option.name
        assert not flag.search(there), option.name


def test_help_tells_defaults_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in FLAGS:
        if option.variable:
            assert f"[{option.variable}]" in text, option.name
    for default in (
        "(default: http://127.0.0.1:4001,http://127.0.0.1:2379)",
        "(default: /run/flannel/subnet.env)",
        "(default: flannel%d)",
        "(default: true)",
        "(default: /run/tundp/admin.sock; with another --subnet-file, one named after it)",
        "(default: 50 microseconds)",
        "(default: 86400 seconds)",
    ):
        assert default in text
    assert "%%" not in text
    assert "None" not in text


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["-help"], ["help"]])
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == EXIT_OK
    text, errors = capsys.readouterr()
    assert errors == ""
    for command in COMMANDS:
        assert re.search(rf"^  {command.name}\s", text, re.MULTILINE), command.name
    assert "exit codes:" in text


def test_no_command_at_all_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_USAGE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("usage: tundp COMMAND [flags]")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command(
    capsys: pytest.CaptureFixture[str], command: Command[Any] | RunCommand
) -> None:
    assert main(["help", *command.name.split()]) == EXIT_OK
    text = capsys.readouterr().out
    assert text.startswith(f"usage: tundp {command.name} ")
    for spelling in ("--help", "-help", "-h", "--h", "--help=true"):
        assert main([*command.name.split(), spelling]) == EXIT_OK
        assert capsys.readouterr().out == text, spelling
    for flag in command.own_flags:
        assert re.search(rf"^  --{flag.name}(?= |$)", text, re.MULTILINE), flag.name
    assert "None" not in text
    for line, _ in command.examples:
        assert line in text


def test_every_example_of_the_help_is_a_command_line_that_is_taken() -> None:
    """Only read: what the commands do with it is tested elsewhere."""
    lines = [line for line, _ in EXAMPLES]
    lines += [line for command in COMMANDS for line, _ in command.examples]
    assert len(lines) > 20
    for line in lines:
        # As a shell takes it apart: assignments in front, a pipe or a redirection behind.
        words = shlex.split(re.split(r" [|>] |<\(|\)$", line.replace("source <(", ""))[0])
        while "=" in words[0]:
            words.pop(0)
        assert words.pop(0) == "tundp", line
        command, rest = find(words)
        assert command is not None, line
        flags = [flag for flag in command.flags if flag.name != "config"]
        count = len(command.operands)
        parsed = goflags.parse(
            command.rewrite(rest),
            (*flags, *command.settings),
            operand_count=command.operand_count,
            ignores_stray=command.ignores_stray,
        )
        assert len(parsed.operands) >= count, line
        if command.more_operands:
            parse_filter(" ".join(parsed.operands[count:]))


# One dialect


SPELLINGS = ("-{}={}", "--{}={}", "-{} {}", "--{} {}")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_status_takes_every_spelling(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, spelling: str
) -> None:
    path = tmp_path / "none.sock"
    assert main(["status", *spelling.format("admin-socket", path).split()]) == EXIT_FAILED
    assert str(path) in capsys.readouterr().err


def test_status_takes_variables_and_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "none.sock"
    monkeypatch.setenv("TUNDP_ADMIN_SOCKET", str(path))
    assert main(["status"]) == EXIT_FAILED
    assert str(path) in capsys.readouterr().err
    monkeypatch.delenv("TUNDP_ADMIN_SOCKET")
    file = tmp_path / "tundp.toml"
    file.write_text(f'admin-socket = "{path}"\niface = "eth7"\n')
    assert main(["status", f"--config={file}"]) == EXIT_FAILED
    assert str(path) in capsys.readouterr().err
    monkeypatch.setenv("FLANNELD_SUBNET_FILE", "/run/flannel/blue.env")
    assert main(["status"]) == EXIT_FAILED
    assert "/run/tundp/run-flannel-blue.env.sock" in capsys.readouterr().err


def test_status_does_not_read_what_does_not_concern_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLANNELD_V", "rubbish")
    monkeypatch.setenv("TUNDP_ADMIN_SOCKET", str(tmp_path / "none.sock"))
    assert main(["status"]) == EXIT_FAILED
    assert "rubbish" not in capsys.readouterr().err
    assert main(["status", "--iface=eth0"]) == EXIT_USAGE
    assert "tundp status --help lists them" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_own_options_take_every_spelling(capsys: pytest.CaptureFixture[str], spelling: str) -> None:
    assert main(["demo", *spelling.format("megabytes", "0").split()]) == EXIT_USAGE
    assert "--megabytes '0' is out of range: at least 1" in capsys.readouterr().err


def test_operands_and_flags_mix() -> None:
    options = flags_of(BenchOptions)
    parsed = goflags.parse(["a", "-out", "x", "b", "--ladder"], options, operand_count=2)
    assert parsed.operands == ("a", "b")
    assert {name: str(value) for name, value in parsed.values.items()} == {
        "out": "x",
        "ladder": "True",
    }
    with pytest.raises(ConfigError, match="unexpected argument 'c'"):
        goflags.parse(["a", "b", "c"], options, operand_count=2)


# The settings in force


def test_show_says_whose_settings_it_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "UNIT_FILE", tmp_path / "none")
    monkeypatch.setenv("TUNDP_ADMIN_SOCKET", str(tmp_path / "none.sock"))
    main(["config", "show"])
    assert capsys.readouterr().out.startswith("# settings by default: none was given\n")
    main(["config", "show", "--v=1"])
    assert capsys.readouterr().out.startswith("# settings given here: flags, environment")


def test_show_names_the_units_file_and_reads_it_when_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tundp"
    file.write_text(
        '# of the unit\n; too\nFLANNELD_IFACE=eth7\n TUNDP_SPIN = "7" \n'
        "FLANNELD_ETCD_PREFIX='/a \\\nb'\nFLANNELD_IFCAE=x\nTUNDP_STORE=\n"
    )
    monkeypatch.setattr(config, "UNIT_FILE", file)
    main(["config", "show"])
    assert f"the unit's are in {file}: --env-file={file}" in capsys.readouterr().out
    # The unit does not see the environment of this shell.
    monkeypatch.setenv("FLANNELD_V", "3")
    assert main(["config", "show", "--origin", f"--env-file={file}", "--workers=2"]) == EXIT_OK
    output, errors = capsys.readouterr()
    assert output.startswith(f"# settings of {file}, and the flags given\n")
    assert "variable FLANNELD_IFCAE is set, but tundp does not know it" in errors
    shown = tomllib.loads(output)
    assert (shown["iface"], shown["spin"], shown["v"]) == (["eth7"], 7, 0)
    assert (shown["etcd-prefix"], shown["workers"]) == ("/a b", 2)
    assert re.search(rf"^spin = 7 +# TUNDP_SPIN of {file}$", output, re.MULTILINE)
    assert main(["config", "show", "--env-file=/nonexistent"]) == EXIT_USAGE
    assert main(["config", "show", f"--env-file={file}", "--running"]) == EXIT_USAGE


def status_of(settings: Settings, pid: int = os.getpid()) -> Status:
    return Status(
        version="1",
        pid=pid,
        state=DaemonState.RUNNING,
        started_at=0.0,
        uptime_s=0.0,
        settings=setting_statuses(settings),
    )


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A daemon's admin socket, answering with the settings of some flags and variables."""
    stack = contextlib.ExitStack()
    path = tmp_path / "admin.sock"
    monkeypatch.setattr(config, "UNIT_FILE", tmp_path / "none")

    def start(*arguments: str, **environment: str) -> str:
        settings = load_settings(arguments, environment)
        stack.enter_context(answering(path, status_of(settings)))
        return f"--admin-socket={path}"

    with stack:
        yield start


@contextlib.contextmanager
def answering(path: Path, status: Status) -> Iterator[None]:
    """serve_admin on a loop of its own thread."""
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with serve_admin(path, lambda: status, bytes):
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(30), "the admin socket is not there after 30 s"
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_show_without_flags_shows_the_running_daemons(
    capsys: pytest.CaptureFixture[str], daemon: Any
) -> None:
    socket = daemon("--iface=eth7", TUNDP_SPIN="7")
    assert main(["config", "show", "--origin", socket]) == EXIT_OK
    output = capsys.readouterr().out
    assert output.startswith(f"# settings of the running daemon, pid {os.getpid()}")
    shown = tomllib.loads(output)
    assert (shown["iface"], shown["spin"]) == (["eth7"], 7)
    assert re.search(r"^spin = 7 +# TUNDP_SPIN$", output, re.MULTILINE)


def test_show_with_flags_shows_theirs_and_names_the_running_daemon(
    capsys: pytest.CaptureFixture[str], daemon: Any
) -> None:
    socket = daemon("--iface=eth7")
    assert main(["config", "show", socket, "--v=1"]) == EXIT_OK
    output = capsys.readouterr().out
    assert "# settings given here" in output
    assert f"the daemon's on {socket.partition('=')[2]}: --running" in output
    assert tomllib.loads(output)["iface"] == []
    assert main(["config", "show", socket, "--v=1", "--running"]) == EXIT_OK
    shown = tomllib.loads(capsys.readouterr().out)
    assert (shown["iface"], shown["v"]) == (["eth7"], 1)


def test_show_running_without_a_daemon_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    socket = tmp_path / "none.sock"
    assert main(["config", "show", "--running", f"--admin-socket={socket}"]) == EXIT_FAILED
    assert f"no daemon answers on {socket}" in capsys.readouterr().err


def test_a_running_daemons_password_is_read_from_where_it_has_it(tmp_path: Path) -> None:
    file = tmp_path / "tundp.toml"
    file.write_text(f'etcd-username = "u"\netcd-password = "{SECRET}"\n')

    def asked(settings: Settings, pid: int = os.getpid(), **given: object) -> Settings:
        return settings_of(status_of(settings, pid), given)

    assert asked(load_settings([f"--config={file}"], {})).etcd_password == SECRET
    environment = {"FLANNELD_ETCD_USERNAME": "u", "FLANNELD_ETCD_PASSWORD": SECRET}
    with subprocess.Popen(["sleep", "60"], env=os.environ | environment) as child:
        try:
            # Between exec and its first instruction it has none yet.
            until_sync(Path(f"/proc/{child.pid}/environ").read_bytes, "the environment of a child")
            assert asked(load_settings([], environment), child.pid).etcd_password == SECRET
        finally:
            child.kill()
    words = [f"--etcd-password={SECRET}", "-etcd-password", SECRET]
    told = load_settings(["--etcd-username=u", words[0]], {})
    for given in (words[:1], words[1:]):
        with subprocess.Popen(["/bin/sh", "-c", "read x", "sh", *given], stdin=-1) as child:
            try:
                until_sync(Path(f"/proc/{child.pid}/cmdline").read_bytes, "a child's command line")
                assert asked(told, child.pid).etcd_password == SECRET
            finally:
                child.kill()
    with pytest.raises(ConfigError, match="give it again as --etcd-password"):
        asked(told)
    assert asked(told, os.getpid(), **{"etcd-password": "again"}).etcd_password == "again"


def test_a_daemon_that_does_not_report_its_settings_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.sock"
    with answering(path, dataclasses.replace(status_of(Settings()), settings={})):
        assert main(["config", "show", "--running", f"--admin-socket={path}"]) == EXIT_FAILED
    assert "version 1) does not report its settings" in capsys.readouterr().err


# What is loaded


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--help"],
        ["run", "--nonsense"],
        ["run", "--version"],
        ["config", "show"],
        ["cleanup", "--help"],
        ["--version"],
        ["--help"],
        ["help", "bench"],
        ["completion", "bash"],
    ],
    ids=" ".join,
)
def test_only_what_a_command_needs_is_loaded(arguments: list[str]) -> None:
    """Half a second of imports before every usage text is what --help need not wait for."""
    program = (
        "import json, sys\n"
        "from tundp.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "tundp.settings.settings" in loaded
    assert "asyncio" not in loaded
    heavy = {"numpy", "aiohttp", "pyroute2", "grpclib", "etcd", "rich", "uvloop", "matplotlib"}
    assert not loaded & (heavy | {"prometheus_client", "tundp.daemon.run", "tundp._native"})


# drops


def test_a_wrong_filter_is_pointed_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drops", "tcp", "prot", "80"]) == EXIT_USAGE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == (
        "tundp: filter: 'prot' is not understood: expected and, or, or the end\n"
        "  tcp prot 80\n"
        "      ^\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reason=no_rout"], "--reason 'no_rout' is no drop reason: did you mean no_route"),
        (["--to=10.5.1.1/16"], "--to '10.5.1.1/16' is no IPv4 address"),
        (["--since=soon"], "--since 'soon' is no time above zero"),
        (["-o", "yaml"], "--output 'yaml'"),
        (["--not"], "--not needs something"),
        (["-f", "--since=10m"], "--since is about the past"),
    ],
)
def test_wrong_flags_of_drops(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drops", *arguments]) == EXIT_USAGE
    assert words in capsys.readouterr().err


def test_drops_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drops", f"--admin-socket={tmp_path}/none.sock"]) == EXIT_FAILED
    assert "no daemon answers on" in capsys.readouterr().err
