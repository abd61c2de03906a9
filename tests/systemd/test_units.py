"""The unit files as systemd itself judges them, without running one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tundp.settings.settings import FLAGS, Settings
from tundp.settings.sources import load_settings, unknown_variables

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
# systemd 252 with the units as they are, plus room for one more check of a newer one.
EXPOSURE_MAX = {"tundp.service": 2.6, "tundp@.service": 2.6, "tundp-docker-opts.service": 1.4}
STUBS = {
    "docker.service": "[Service]\nType=notify\nExecStart=/bin/true\nRestart=always\n",
    "etcd.service": "[Service]\nExecStart=/bin/true\n",
    "flanneld.service": "[Service]\nExecStart=/bin/true\n",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Our units beside stubs of what they name, as they would be in /etc/systemd/system."""
    shutil.copytree(UNITS, tmp_path, dirs_exist_ok=True)
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def analyze(*arguments: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    # The trailing colon adds systemd's own directories, where network-online.target is.
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{directory}:", "SYSTEMD_COLORS": "0"}
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, env=environment
    )


def test_every_service_has_its_limit_of_exposure() -> None:
    assert set(SERVICES) == set(EXPOSURE_MAX)


@pytest.mark.parametrize("name", SERVICES)
def test_systemd_analyze_finds_no_fault_in_a_unit(directory: Path, name: str) -> None:
    answer = analyze("verify", "--man=no", directory / name, directory=directory)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_systemd_analyze_finds_no_fault_in_dockers_drop_in(directory: Path) -> None:
    drop_in = directory / "docker.service.d" / "tundp.conf"
    # dockerd need not be installed here: everything else about its line stays.
    text = drop_in.read_text()
    assert "ExecStart=/usr/bin/dockerd -H fd://" in text
    drop_in.write_text(text.replace("/usr/bin/dockerd", "/bin/true"))
    answer = analyze("verify", "--man=no", directory / "docker.service", directory=directory)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_systemd_analyze_finds_a_wrong_key(directory: Path) -> None:
    unit = directory / "tundp.service"
    unit.write_text(unit.read_text() + "\n[Service]\nProtectSytem=strict\n")
    answer = analyze("verify", "--man=no", unit, directory=directory)
    assert "ProtectSytem" in answer.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_the_sandbox_stays_tight(directory: Path, name: str) -> None:
    threshold = round(EXPOSURE_MAX[name] * 10)
    answer = analyze(
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={threshold}",
        directory / name,
        directory=directory,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def settings(name: str, section: str) -> list[str]:
    """The lines of one section: continued ones joined, comments and blank ones left out."""
    text = (UNITS / name).read_text().replace("\\\n", "")
    body = text.split(f"\n[{section}]\n")[1].split("\n[")[0]
    return [line for line in body.splitlines() if line and not line.startswith("#")]


def test_the_template_unit_differs_in_environment_and_command_alone() -> None:
    own = ("EnvironmentFile=", "ExecStart=", "ExecReload=")
    one, many = (
        [line for line in settings(name, "Service") if not line.startswith(own)]
        for name in ("tundp.service", "tundp@.service")
    )
    assert one == many


EXAMPLE = (UNITS / "tundp-default").read_text()
ASSIGNMENTS = dict(re.findall(r"^#([A-Z0-9_]+)=(.*)$", EXAMPLE, re.MULTILINE))


def test_the_example_environment_file_sets_nothing() -> None:
    assert all(line.startswith("#") or not line for line in EXAMPLE.splitlines())


def test_the_example_environment_file_can_be_used() -> None:
    assert not unknown_variables(ASSIGNMENTS)
    # The one that names a file, which is not here.
    settings = load_settings([], ASSIGNMENTS | {"TUNDP_CONFIG": ""})
    assert settings.iface == ("eth1",)
    assert settings.store.path == Path("/var/lib/tundp/leases.json")


def test_the_example_environment_file_has_every_setting_with_an_effect() -> None:
    expected = {
        flag.variable
        for flag in FLAGS
        if flag.variable and not flag.no_effect and not flag.name.startswith("kube")
    }
    assert ASSIGNMENTS.keys() == expected


def test_the_example_environment_file_shows_the_defaults() -> None:
    for flag in FLAGS:
        if flag.variable in ASSIGNMENTS and not flag.example:
            given = load_settings([], {flag.variable: ASSIGNMENTS[flag.variable]})
            assert getattr(given, flag.field) == getattr(Settings(), flag.field), flag.name
