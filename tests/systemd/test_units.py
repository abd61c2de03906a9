"""The unit files as systemd itself judges them, without running one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tundp.settings.options import OPTIONS
from tundp.settings.settings import load_settings, unknown_variables

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


def test_none_is_forgotten() -> None:
    assert set(SERVICES) == set(EXPOSURE_MAX)


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_clean(directory: Path, name: str) -> None:
    answer = analyze("verify", "--man=no", directory / name, directory=directory)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_dockers_drop_in_is_clean(directory: Path) -> None:
    drop_in = directory / "docker.service.d" / "tundp.conf"
    # dockerd need not be installed here: everything else about its line stays.
    text = drop_in.read_text()
    assert "ExecStart=/usr/bin/dockerd -H fd://" in text
    drop_in.write_text(text.replace("/usr/bin/dockerd", "/bin/true"))
    answer = analyze("verify", "--man=no", directory / "docker.service", directory=directory)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_a_wrong_key_would_be_noticed(directory: Path) -> None:
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


def test_the_template_does_the_same() -> None:
    own = ("EnvironmentFile=", "ExecStart=")
    one, many = (
        [line for line in settings(name, "Service") if not line.startswith(own)]
        for name in ("tundp.service", "tundp@.service")
    )
    assert one == many


EXAMPLE = (UNITS / "tundp-default").read_text()
ASSIGNMENTS = dict(re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))


def test_the_example_sets_nothing() -> None:
    assert all(line.startswith("#") or not line for line in EXAMPLE.splitlines())


def test_the_example_can_be_used() -> None:
    assert not unknown_variables(ASSIGNMENTS)
    config = load_settings([], ASSIGNMENTS)
    assert config.iface == ("eth1",)
    assert config.store_path == Path("/var/lib/tundp/store.json")


def test_the_examples_defaults_are_the_defaults() -> None:
    # What has no default, or the default would say nothing of how to write it.
    examples = {
        "FLANNELD_ETCD_CAFILE",
        "FLANNELD_ETCD_CERTFILE",
        "FLANNELD_ETCD_KEYFILE",
        "FLANNELD_ETCD_PASSWORD",
        "FLANNELD_ETCD_USERNAME",
        "FLANNELD_IFACE",
        "FLANNELD_PUBLIC_IP",
        "TUNDP_STORE",
    }
    defaults = load_settings([], {})
    for option in OPTIONS:
        if option.variable in ASSIGNMENTS.keys() - examples:
            given = load_settings([], {option.variable: ASSIGNMENTS[option.variable]})
            assert getattr(given, option.field) == getattr(defaults, option.field), option.name
