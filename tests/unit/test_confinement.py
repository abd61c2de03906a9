"""What settings leave open in the sandbox is named, and `--sandbox=on` does not start with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tundp.daemon.confinement import plan_for, require
from tundp.errors import PlatformError
from tundp.linux.sandbox import Holds, Plan
from tundp.linux.sandbox.landlock import READ_FILE, WRITE_FILE
from tundp.settings.sources import load_settings

BY_ADDRESS = "--etcd-endpoints=https://192.0.2.1:2379"
OTHERS = (
    "/etc/shadow",
    "/etc/ssl/private/other.key",
    "/etc/pki/tls/private/other.key",
    "/etc/kubernetes/admin.conf",
    "/etc/ssh/ssh_host_ed25519_key",
    "/root/.ssh/id_ed25519",
    "/var/lib/etcd/member/snap/db",
    "/run/docker/secret",
)
"""Files of others, whether this machine has them or not."""
SYSTEM = ("/etc/ld.so.preload", "/etc/cron.d/x", "/usr/bin/tundp", "/root/.profile", "/tmp/x")


def plan_of(tmp_path: Path, *flags: str) -> Plan:
    own = tmp_path / "own"
    settings = load_settings(
        [
            BY_ADDRESS,
            f"--subnet-file={own}/subnet.env",
            f"--admin-socket={own}/admin.sock",
            f"--state-dir={own}/state",
            *flags,
        ],
        {},
    )
    return plan_for(settings)


def opened(plan: Plan, access: int, files: tuple[str, ...]) -> list[str]:
    """The files below a rule that has this access."""
    folders = [rule.path for rule in plan.rules if rule.access & access]
    return [file for file in files if any(Path(file).is_relative_to(each) for each in folders)]


def test_files_of_others_are_not_read_nor_the_systems_written(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.gaps == ()
    assert opened(plan, READ_FILE, OTHERS) == []
    assert opened(plan, WRITE_FILE, SYSTEM) == []


@pytest.mark.parametrize(
    ("flags", "gap", "file"),
    [
        (
            ("--etcd-endpoints=https://etcd.example:2379",),
            "reading /etc, for etcd's endpoints have names (etcd.example)",
            "/etc/shadow",
        ),
        (
            ("--etcd-cafile=/etc/ca.pem",),
            "reading /etc, for a certificate, key or CA of etcd is in it",
            "/etc/shadow",
        ),
        (
            ("--etcd-certfile=/etc/ssl/c.pem", "--etcd-keyfile=/etc/ssl/c.key"),
            "reading /etc/ssl, for a certificate, key or CA of etcd is in it",
            "/etc/ssl/private/other.key",
        ),
    ],
)
def test_what_must_be_read_and_holds_more_is_a_gap(
    tmp_path: Path, flags: tuple[str, ...], gap: str, file: str
) -> None:
    plan = plan_of(tmp_path, *flags)
    assert gap in plan.gaps
    assert file in opened(plan, READ_FILE, OTHERS)


@pytest.mark.parametrize(
    ("flag", "folder", "file"),
    [
        ("--subnet-file=/etc/subnet.env", "/etc", "/etc/cron.d/x"),
        ("--admin-socket=/tmp/admin.sock", "/tmp", "/tmp/x"),
        ("--store=file:/root/leases.json", "/root", "/root/.profile"),
    ],
)
def test_what_must_be_written_and_holds_more_is_a_gap(
    tmp_path: Path, flag: str, folder: str, file: str
) -> None:
    plan = plan_of(tmp_path, flag)
    (gap,) = [each for each in plan.gaps if each.startswith("writing")]
    assert gap.startswith(f"writing below {folder}, ")
    assert file in opened(plan, WRITE_FILE, SYSTEM)


def test_on_names_what_is_missing_and_what_is_open() -> None:
    require(Holds(landlock_abi=6, has_seccomp=True))
    with pytest.raises(PlatformError, match="--sandbox=on: these settings leave open reading /etc"):
        require(Holds(landlock_abi=6, has_seccomp=True, gaps=("reading /etc, for x is in it",)))
    with pytest.raises(PlatformError, match="signals cannot be refused here; these settings"):
        require(Holds(missing=("signals",), gaps=("reading /etc",)))
