"""The command line: what is printed where, exit codes, and what is loaded for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tundp
from tundp.cli import EXIT_FAILED, EXIT_OK, EXIT_USAGE, flanneld, main
from tundp.settings.options import OPTIONS

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("FLANNELD_", "TUNDP_")):
            monkeypatch.delenv(name)


def shown(capsys, *arguments: str) -> dict[str, object]:
    assert main(["config", "show", *arguments]) == EXIT_OK
    output, errors = capsys.readouterr()
    assert errors == ""
    return tomllib.loads(output)


# config show


def test_show_has_every_setting(capsys):
    settings = shown(capsys)
    assert settings.keys() == {option.name for option in OPTIONS} - {"help", "version", "config"}
    assert settings["iface"] == []
    assert settings["ip-masq"] is False
    assert settings["iptables-forward-rules"] is True
    assert settings["healthz-port"] == 0
    assert settings["metrics-addr"] == ""
    assert settings["etcd-endpoints"] == "http://127.0.0.1:4001,http://127.0.0.1:2379"
    assert settings["admin-socket"] == "/run/tundp/admin.sock"


def test_show_blanks_the_password(capsys, monkeypatch):
    monkeypatch.setenv("FLANNELD_ETCD_PASSWORD", SECRET)
    for more in ([], ["--origin"]):
        main(["config", "show", "--etcd-username=u", *more])
        output, errors = capsys.readouterr()
        assert SECRET not in output + errors
        assert 'etcd-password = "***"' in output


def test_show_tells_where_each_came_from(capsys, monkeypatch, tmp_path):
    path = tmp_path / "tundp.toml"
    path.write_text("workers = 2\nspin = 7\nv = 1\n")
    monkeypatch.setenv("FLANNELD_IP_MASQ", "true")
    monkeypatch.setenv("TUNDP_SPIN", "8")
    arguments = ["config", "show", "--origin", f"--config={path}", "--v=2", "--iface=a"]
    assert main(arguments) == EXIT_OK
    output = capsys.readouterr().out
    origins = dict(re.findall(r"^(\S+) = .* # (\S+)$", output, re.MULTILINE))
    assert origins.keys() == {option.name for option in OPTIONS} - {"help", "version", "config"}
    assert {name: origin for name, origin in origins.items() if origin != "default"} == {
        "v": "--v",
        "iface": "--iface",
        "ip-masq": "FLANNELD_IP_MASQ",
        "spin": "TUNDP_SPIN",
        "workers": str(path),
    }
    settings = tomllib.loads(output)
    assert (settings["v"], settings["spin"], settings["workers"]) == (2, 8, 2)


def test_show_keeps_signs_of_toml_in_their_place(capsys):
    text = '/a"b\\c#d\te'
    assert shown(capsys, f"--etcd-prefix={text}")["etcd-prefix"] == text
    assert shown(capsys, "--iface=a,b", '--iface="')["iface"] == ["a,b", '"']


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "output", "errors"),
    [
        (["config", "show", "--nonsense"], EXIT_USAGE, "", "tundp: unknown flag --nonsense"),
        (["config", "check", "--v=x"], EXIT_USAGE, "", "tundp: --v 'x' is not a whole number"),
        (["config"], EXIT_USAGE, "", "usage: tundp config show"),
        (["config", "shwo"], EXIT_USAGE, "", "usage: tundp config show"),
        (["config", "--help"], EXIT_OK, "usage: tundp config show", ""),
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
def test_exit_codes(capsys, arguments, code, output, errors):
    assert main(arguments) == code
    got = capsys.readouterr()
    assert (output in got.out) if output else got.out == ""
    assert (errors in got.err) if errors else got.err == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["nonsense"], EXIT_USAGE), ([], EXIT_USAGE), (["--version"], 0), (["--help"], 0)],
)
def test_exit_codes_of_argparse(capsys, arguments, code):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == code


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
def test_flanneld(capsys, arguments, code, output, errors):
    assert flanneld(arguments) == code
    got = capsys.readouterr()
    assert (output in got.out) if output else got.out == ""
    assert (errors in got.err) if errors else got.err == ""


def test_the_scripts_lead_here():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {
        "tundp": "tundp.cli:main",
        "flanneld": "tundp.cli:flanneld",
    }


def test_a_password_given_wrongly_is_not_repeated(capsys):
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


def test_help_lists_every_option_in_its_group(capsys):
    main(["run", "--help"])
    text = capsys.readouterr().out
    flannels, own = text.split("tundp's own flags:")
    assert "flannel's flags:" in flannels
    flannels = flannels.split("flannel's flags:")[1]
    for option in OPTIONS:
        here, there = (flannels, own) if option.is_flannels else (own, flannels)
        flag = re.compile(rf"^  --{option.name}(?= |$)", re.MULTILINE)
        assert flag.search(here), option.name
        assert not flag.search(there), option.name


def test_help_tells_defaults_and_variables(capsys):
    main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in OPTIONS:
        if not option.is_boolean:
            assert f"[{option.variable}]" in text, option.name
    for default in (
        "(default: http://127.0.0.1:4001,http://127.0.0.1:2379)",
        "(default: /run/flannel/subnet.env)",
        "(default: flannel%d)",
        "(default: true)",
        "(default: /run/tundp/admin.sock; with another --subnet-file, one named after that)",
    ):
        assert default in text
    assert "%%" not in text
    assert "None" not in text


def test_help_of_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("run", "config", "cleanup", "docker-opts", "status", "demo", "bench", "probe"):
        assert re.search(rf"^    {command}\s", text, re.MULTILINE), command
    assert "exit codes:" in text


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
    ],
    ids=" ".join,
)
def test_only_what_a_command_needs_is_loaded(arguments):
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
    assert "tundp.settings.options" in loaded
    heavy = {"numpy", "aiohttp", "pyroute2", "grpclib", "etcd", "rich", "uvloop", "matplotlib"}
    assert not loaded & (heavy | {"prometheus_client", "tundp.daemon.run", "tundp._native"})
