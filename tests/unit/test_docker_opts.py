"""docker-opts against the text mk-docker-opts.sh writes, and what a shell makes of ours."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tundp import docker_opts
from tundp.cli import main
from tundp.cli.output import EXIT_FAILED, EXIT_OK
from tundp.docker_opts import DockerOptsSettings
from tundp.errors import ConfigError, PlatformError
from tundp.linux.netlink import Route

SUBNET_ENV = """\
FLANNEL_NETWORK=10.1.0.0/16
FLANNEL_SUBNET=10.1.74.1/24
FLANNEL_MTU=1472
FLANNEL_IPMASQ=false
"""
INDIVIDUAL = """\
DOCKER_OPT_BIP="--bip=10.1.74.1/24"
DOCKER_OPT_IPMASQ="--ip-masq=true"
DOCKER_OPT_MTU="--mtu=1472"
"""
COMBINED = 'DOCKER_OPTS=" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"\n'


def render(
    text: str = SUBNET_ENV,
    environment: dict[str, str] | None = None,
    *,
    i: bool = False,
    c: bool = False,
    m: bool = False,
    k: str = "DOCKER_OPTS",
) -> str:
    return docker_opts.render(
        environment or {}, text, is_individual=i, is_combined=c, has_ip_masq=not m, key=k
    )


@pytest.mark.parametrize(
    ("i", "c", "expected"),
    [
        (False, False, INDIVIDUAL + COMBINED),
        (True, True, INDIVIDUAL + COMBINED),
        (True, False, INDIVIDUAL),
        (False, True, COMBINED),
    ],
)
def test_which_lines(i: bool, c: bool, expected: str) -> None:
    assert render(i=i, c=c) == expected


def test_red_hats_way() -> None:
    assert render(k="DOCKER_NETWORK_OPTIONS", c=True) == COMBINED.replace(
        "DOCKER_OPTS", "DOCKER_NETWORK_OPTIONS"
    )


def test_flannel_masquerades_so_docker_does_not() -> None:
    text = SUBNET_ENV.replace("IPMASQ=false", "IPMASQ=true")
    assert 'DOCKER_OPT_IPMASQ="--ip-masq=false"\n' in render(text)


def test_without_masquerade_its_value_does_not_matter() -> None:
    assert render(SUBNET_ENV + "FLANNEL_IPMASQ=maybe\n", m=True, c=True) == (
        'DOCKER_OPTS=" --bip=10.1.74.1/24 --mtu=1472"\n'
    )


def test_an_invalid_masquerade() -> None:
    with pytest.raises(ConfigError, match=r"^Invalid value of FLANNEL_IPMASQ: maybe"):
        render(SUBNET_ENV + "FLANNEL_IPMASQ=maybe\n")


def test_docker_opts_keeps_the_value_of_the_environment_in_front() -> None:
    assert render(environment={"DOCKER_OPTS": "--debug"}, c=True) == (
        'DOCKER_OPTS="--debug  --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"\n'
    )


def test_other_options_are_taken_along_in_order() -> None:
    environment = {"DOCKER_OPT_LOG": "--log-level=warn", "DOCKER_OPT_A": "--a", "DOCKER_X": "x"}
    assert render(environment=environment) == (
        'DOCKER_OPT_A="--a"\n'
        'DOCKER_OPT_BIP="--bip=10.1.74.1/24"\n'
        'DOCKER_OPT_IPMASQ="--ip-masq=true"\n'
        'DOCKER_OPT_LOG="--log-level=warn"\n'
        'DOCKER_OPT_MTU="--mtu=1472"\n'
        'DOCKER_OPTS=" --a --bip=10.1.74.1/24 --ip-masq=true --log-level=warn --mtu=1472"\n'
    )


def test_the_file_wins_over_the_environment() -> None:
    environment = {"FLANNEL_MTU": "9000", "FLANNEL_SUBNET": "10.9.9.1/24", "DOCKER_OPT_MTU": "x"}
    assert render(environment=environment) == INDIVIDUAL + COMBINED


def test_the_environment_alone() -> None:
    assert render("", {"FLANNEL_MTU": "1400"}, c=True) == 'DOCKER_OPTS=" --mtu=1400"\n'


def test_nothing_at_all() -> None:
    assert render("") == 'DOCKER_OPTS=""\n'


@pytest.mark.parametrize(
    "line",
    [
        'FLANNEL_MTU="1450"',
        "FLANNEL_MTU='1450'",
        "export FLANNEL_MTU=1450",
        "FLANNEL_MTU=1450 # of the TUN",
        "  FLANNEL_MTU=1450\r",
        "A=1 FLANNEL_MTU=1450",
    ],
)
def test_a_file_as_a_shell_reads_it(line: str) -> None:
    assert render(f"# a comment's quote\n\n{line}\nnonsense\n", c=True) == (
        'DOCKER_OPTS=" --mtu=1450"\n'
    )


def test_a_file_no_shell_could_read() -> None:
    with pytest.raises(ConfigError, match=r"line 2 .*FLANNEL_MTU=.*No closing quotation"):
        render("A=1\nFLANNEL_MTU='1450\n")


@pytest.mark.parametrize("value", ['--label="a b"', "--x=$HOME", "--x=`id`", "--x=a\\b", "--x=é'"])
def test_a_shell_gets_every_value_back(tmp_path: Path, value: str) -> None:
    (tmp_path / "opts").write_text(render("", {"DOCKER_OPT_X": value}), encoding="utf-8")
    answer = subprocess.run(
        ["sh", "-c", '. "$0"; printf %s "$DOCKER_OPT_X"', tmp_path / "opts"], capture_output=True
    )
    assert answer.stdout.decode() == value


def test_names_a_shell_cannot_have_stay_out() -> None:
    assert render("", {"DOCKER_OPT_a-b": "x", "DOCKER_OPT_é": "x"}, i=True) == ""


def route(destination: str, gateway: str | None) -> Route:
    return Route(
        destination=IPv4Network(destination),
        indexes=(2,),
        gateway=None if gateway is None else IPv4Address(gateway),
        priority=0,
        kind="unicast",
    )


def test_a_route_of_somebody_elses() -> None:
    subnet = IPv4Network("10.1.74.0/24")
    docker_opts.check_routes(
        subnet,
        [
            route("10.1.74.0/24", None),  # the bridge's own
            route("10.1.0.0/16", "192.0.2.1"),
            route("0.0.0.0/0", "192.0.2.1"),
        ],
    )
    with pytest.raises(
        ConfigError, match=r"^Your routing table already contains the subnet: 10\.1\.74\.0/24"
    ):
        docker_opts.check_routes(subnet, [route("10.1.74.0/24", "192.0.2.9")])


# 198.51.100.0/24 is for documentation (RFC 5737): no machine has a route for just that.
FREE_SUBNET_ENV = SUBNET_ENV.replace("10.1.74.1", "198.51.100.1")
FREE_TEXT = (INDIVIDUAL + COMBINED).replace("10.1.74.1", "198.51.100.1")


def settings(directory: Path, **changes: object) -> DockerOptsSettings:
    paths: dict[str, Any] = {
        "subnet_file": directory / "subnet.env",
        "docker_file": directory / "docker",
    }
    return DockerOptsSettings(**paths | changes)


async def test_a_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "subnet.env").write_text(FREE_SUBNET_ENV)
    await docker_opts.write(settings(tmp_path), {})
    assert (tmp_path / "docker").read_text() == FREE_TEXT
    assert (tmp_path / "docker").stat().st_mode & 0o777 == 0o644


async def test_names_without_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("subnet.env").write_text(FREE_SUBNET_ENV)
    bare = settings(tmp_path, subnet_file=Path("subnet.env"), docker_file=Path("docker"))
    await docker_opts.write(bare, {})
    assert Path("docker").read_text() == FREE_TEXT


async def test_a_missing_file_is_no_error(tmp_path: Path) -> None:
    await docker_opts.write(settings(tmp_path), {"FLANNEL_MTU": "1400"})
    assert "--mtu=1400" in (tmp_path / "docker").read_text()


async def test_an_invalid_value_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("old")
    with pytest.raises(ConfigError):
        await docker_opts.write(settings(tmp_path), {"FLANNEL_IPMASQ": "1"})
    assert (tmp_path / "docker").read_text() == "old"


async def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "docker").symlink_to("elsewhere")
    await docker_opts.write(settings(tmp_path), {})
    assert (tmp_path / "elsewhere").read_text() == 'DOCKER_OPTS=""\n'


async def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "docker")
    fd = os.open(tmp_path / "docker", os.O_RDONLY | os.O_NONBLOCK)
    try:
        await docker_opts.write(settings(tmp_path), {})
        assert os.read(fd, 100) == b'DOCKER_OPTS=""\n'
    finally:
        os.close(fd)


async def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlatformError, match=r"cannot write .*file/docker.* with -d"):
        await docker_opts.write(settings(tmp_path, docker_file=tmp_path / "file" / "docker"), {})


async def test_a_subnet_that_is_none_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await docker_opts.write(settings(tmp_path), {"FLANNEL_SUBNET": "10.1.74.1/99"})
    assert "--bip=10.1.74.1/99" in (tmp_path / "docker").read_text()
    assert "FLANNEL_SUBNET 10.1.74.1/99 is no IPv4 address" in caplog.messages[0]


DEFAULTS = {
    "subnet_file": "/run/flannel/subnet.env",
    "docker_file": "/run/docker_opts.env",
    "is_individual": False,
    "is_combined": False,
    "has_ip_masq": True,
    "key": "DOCKER_OPTS",
}
SHORT = {"is_individual": True, "is_combined": True, "has_ip_masq": False, "key": "K"}


@pytest.mark.parametrize(
    ("line", "expected", "breaks"),
    [
        ("", {}, "defaults"),
        ("-i -c -m -k K", SHORT, "apart"),
        ("-icmk K", SHORT, "bundled, as getopts takes them"),
        ("-icmkK", SHORT, "bundled with a glued value"),
        ("-f/run/x.env -d /y", {"subnet_file": "/run/x.env", "docker_file": "/y"}, "glued, apart"),
        ("-k=K", None, "getopts: the value is =K, which is no name"),
        ("--individual --combined --no-ip-masq --key K", SHORT, "GNU's"),
        ("-individual -combined=true -no-ip-masq -key=K", SHORT, "Go's"),
        ("-c --key=K -im", SHORT, "mixed"),
        ("--subnet-file=/x --docker-file /y", {"subnet_file": "/x", "docker_file": "/y"}, "long"),
        ("-docker-file -m", {"docker_file": "-m"}, "a value may begin with a dash"),
        ("-d -m", {"docker_file": "-m"}, "a value may begin with a dash"),
        ("--combined=false", {}, "switched off"),
    ],
)
def test_command_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    expected: dict[str, Any] | None,
    breaks: str,
) -> None:
    written = []

    async def write(settings: DockerOptsSettings, environment: Mapping[str, str]) -> None:
        written.append(settings)

    monkeypatch.setattr(docker_opts, "write", write)
    assert main(["docker-opts", *line.split()]) == (EXIT_FAILED if expected is None else EXIT_OK)
    if expected is not None:
        values: dict[str, Any] = DEFAULTS | expected
        values |= {name: Path(values[name]) for name in ("subnet_file", "docker_file")}
        assert written == [DockerOptsSettings(**values)], breaks
        assert capsys.readouterr().err == ""


def test_the_subnet_file_of_variable_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = []

    async def write(settings: DockerOptsSettings, environment: Mapping[str, str]) -> None:
        written.append(settings.subnet_file)

    monkeypatch.setattr(docker_opts, "write", write)
    file = tmp_path / "tundp.toml"
    file.write_text('subnet-file = "/file"\n')
    main(["docker-opts", f"--config={file}"])
    monkeypatch.setenv("FLANNELD_SUBNET_FILE", "/variable")
    main(["docker-opts", f"--config={file}"])
    main(["docker-opts", "-f", "/flag"])
    assert written == [Path("/file"), Path("/variable"), Path("/flag")]


@pytest.mark.parametrize("line", ["-h", "-?", "--help", "-help"])
def test_help(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert main(["docker-opts", line]) == EXIT_OK
    output, errors = capsys.readouterr()
    assert output.startswith("usage: tundp docker-opts [flags]")
    assert errors == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-x", "unknown option -x"),
        ("-f", "option -f needs an argument"),
        ("--key", "flag needs an argument: --key NAME"),
        ("-i stray", "unexpected argument 'stray'"),
        ("-k A-B", "--key 'A-B' is no name"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert main(["docker-opts", *line.split()]) == EXIT_FAILED
    output, errors = capsys.readouterr()
    assert output == ""
    assert message in errors
