"""What the systemd unit lets the daemon write, read from unit files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tundp.daemon.unit import Unit, installed_unit

SHIPPED = Path(__file__).parents[2] / "systemd"
NAME = "tundp.service"


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("etc", "run", "lib")]
    for each in found:
        (each / f"{NAME}.d").mkdir(parents=True)
    return found


def test_no_unit(directories: list[Path]) -> None:
    assert installed_unit([NAME], directories) is None


@pytest.mark.parametrize("name", ["tundp.service", "tundp@.service"])
def test_the_shipped_unit_may_write_where_the_defaults_are(name: str) -> None:
    unit = installed_unit([name], [SHIPPED])
    assert unit is not None
    assert unit.is_strict
    for text in ("/run/flannel", "/run/tundp", "/var/lib/tundp", "/var/lib/tundp/deeper"):
        assert unit.may_write(Path(text)), text
    for text in ("/etc/tundp", "/var/lib", "/var/lib/tundp2", "/", "/opt"):
        assert not unit.may_write(Path(text)), text


def test_without_strict_everything_may_be_written(directories: list[Path]) -> None:
    (directories[2] / NAME).write_text("[Service]\nProtectSystem=full\n")
    unit = unit_of(directories)
    assert unit == Unit(name=NAME, is_strict=False, writable=())
    assert unit.may_write(Path("/etc/tundp"))


def unit_of(directories: Sequence[Path], *names: str) -> Unit:
    found = installed_unit(names or (NAME,), directories)
    assert found is not None
    return found


def test_drop_ins_add_and_reset(directories: list[Path]) -> None:
    etc, run, lib = directories
    (lib / NAME).write_text(
        "[Unit]\nReadWritePaths=/no\n[Service]\nProtectSystem=strict\nStateDirectory=tundp a:b\n"
        "#ReadWritePaths=/no\nReadWritePaths=-/one \\\n  /two\n"
    )
    assert unit_of(directories).writable == (
        Path("/one"),
        Path("/two"),
        Path("/var/lib/tundp"),
        Path("/var/lib/a"),
    )
    (etc / f"{NAME}.d" / "10-more.conf").write_text("[Service]\nReadWritePaths=/three\n")
    unit = unit_of(directories)
    assert unit.may_write(Path("/three"))
    assert unit.may_write(Path("/one"))
    # The same name in a directory of lower precedence is hidden; a later name comes later.
    (lib / f"{NAME}.d" / "10-more.conf").write_text("[Service]\nReadWritePaths=/hidden\n")
    (run / f"{NAME}.d" / "20-reset.conf").write_text("[Service]\nReadWritePaths=\n")
    unit = unit_of(directories)
    assert unit.writable == (Path("/var/lib/tundp"), Path("/var/lib/a"))


def test_the_administrators_unit_hides_the_packages(directories: list[Path]) -> None:
    (directories[0] / NAME).write_text("[Service]\nProtectSystem=no\n")
    (directories[2] / NAME).write_text("[Service]\nProtectSystem=strict\n")
    assert not unit_of(directories).is_strict


def test_the_first_name_that_is_installed(directories: list[Path]) -> None:
    (directories[2] / "b.service").write_text("[Service]\n")
    assert unit_of(directories, "a.service", "b.service").name == "b.service"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((), None),
        (("CAP_NET_ADMIN",), {"CAP_NET_ADMIN"}),
        (("CAP_NET_ADMIN", "cap_net_raw"), {"CAP_NET_ADMIN", "CAP_NET_RAW"}),
        (("CAP_NET_ADMIN CAP_NET_RAW",), {"CAP_NET_ADMIN", "CAP_NET_RAW"}),
        # What it leaves out says nothing of what it leaves in.
        (("CAP_NET_ADMIN", "~CAP_SYS_ADMIN"), None),
    ],
)
def test_capabilities_add_up(
    directories: list[Path], lines: tuple[str, ...], expected: set[str] | None
) -> None:
    text = "".join(f"CapabilityBoundingSet={line}\n" for line in lines)
    (directories[2] / NAME).write_text(f"[Service]\n{text}")
    assert unit_of(directories).capabilities == expected


@pytest.mark.parametrize("name", ["tundp.service", "tundp@.service"])
def test_the_shipped_units_leave_net_admin(name: str) -> None:
    unit = installed_unit([name], [SHIPPED])
    assert unit is not None
    assert unit.capabilities == frozenset({"CAP_NET_ADMIN"})
