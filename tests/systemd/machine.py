"""A booted systemd in a container that leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import tundp
from tests.wait import DEADLINE_S, until_sync

LANDLOCK = "landlock_create_ruleset landlock_add_rule landlock_restrict_self"
TARGET = "tundp-test.target"
PYTHON = sorted({sys.prefix, sys.base_prefix, str(Path(tundp.__file__).parents[1])})
"""Python, its packages and the checkout: what must be visible, wherever it is mounted."""
# Waits for interfaces that a container without a network manager never gets.
MASKED = (
    "NetworkManager-wait-online.service",
    "ifupdown-wait-online.service",
    "networking.service",
    "systemd-networkd-wait-online.service",
)
# The mounts are in a mount namespace and go with it; all of it goes when pytest does.
BOOT = """
set -e
cd "$1"; shift
for group in $TUNDP_TEST_CGROUPS; do echo $$ > "$group/cgroup.procs"; done
mount -t tmpfs tmpfs writable
mkdir writable/upper writable/work writable/root
cp -a staged/. writable/upper/
layers="lowerdir=$TUNDP_TEST_ROOT,upperdir=writable/upper,workdir=writable/work"
mount -t overlay overlay -o "$layers" writable/root
exec setpriv --pdeathsig KILL systemd-nspawn -D writable/root "$@"
"""


class Machine:
    """A root directory under a systemd of its own, with a network of its own.

    The root is this machine's, with Python and the checkout visible wherever they are
    mounted, or another directory with nothing added. It is never written to. The network is
    empty, or the namespace of a lab's host.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        namespace: Path | None = None,
        shared: Mapping[Path, str] | None = None,
    ) -> None:
        """shared: directories that can be written, to where they are in the container."""
        self.root = root
        self.namespace = namespace
        self.shared = shared or {}
        if shutil.which("systemd-nspawn") is None:
            pytest.fail("there is no systemd-nspawn here: install systemd-container")
        self.directory = Path(tempfile.mkdtemp(prefix="tundp-booted-"))
        self.staged = self.directory / "staged"
        self.cgroups: list[Path] = []
        self.nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0
        (self.directory / "writable").mkdir()
        self.write("etc/machine-id", f"{os.urandom(16).hex()}\n")
        self.write(
            f"etc/systemd/system/{TARGET}", "[Unit]\nRequires=basic.target\nAfter=basic.target\n"
        )
        for name in MASKED:
            (self.staged / "etc/systemd/system" / name).symlink_to("/dev/null")

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """A file that is there at boot."""
        file = self.staged / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def boot(self) -> None:
        self._make_cgroups()
        with open(self.directory / "console", "wb") as console:
            self.nspawn = subprocess.Popen(
                [
                    *("unshare", "--mount", "--propagation", "private", "sh", "-c", BOOT, "boot"),
                    *(self.directory, "--quiet", "--register=no", "--keep-unit", "--boot"),
                    *("--link-journal=no", "--console=pipe"),
                    f"--network-namespace-path={self.namespace}"
                    if self.namespace
                    else "--private-network",
                    *("--capability=CAP_NET_ADMIN", "--bind=/dev/net/tun"),
                    # A host's kernel refuses them to nobody; older nspawns do.
                    f"--system-call-filter={LANDLOCK}",
                    *(f"--bind-ro={path}" for path in PYTHON if self.root == Path("/")),
                    *(f"--bind={path}:{there}" for path, there in self.shared.items()),
                    f"systemd.unit={TARGET}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {
                    "TUNDP_TEST_CGROUPS": " ".join(map(str, self.cgroups)),
                    "TUNDP_TEST_ROOT": str(self.root),
                    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
                },
            )
        self.until(self._has_booted)

    def run(self, *argv: str, is_checked: bool = True, deadline_s: float = DEADLINE_S) -> str:
        """What a command in the container prints."""
        # While systemd-nspawn lives its child's number is nobody else's.
        assert self.nspawn is not None
        assert self.nspawn.poll() is None, self.log()
        command = ["nsenter", "--all", f"--target={self.leader}", *argv]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{' '.join(argv)} does not end\n{self.log()}")
        if is_checked and answer.returncode:
            pytest.fail(f"{' '.join(argv)}: {answer.stdout}{answer.stderr}\n{self.log()}")
        return answer.stdout + answer.stderr

    def show(self, unit: str) -> dict[str, str]:
        """All properties of a unit."""
        lines = self.run("systemctl", "show", unit).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def journal(self, unit: str = "tundp*") -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, is_checked=False)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for it; a failure shows the machine's log."""
        try:
            until_sync(condition)
        except AssertionError as error:
            pytest.fail(f"{error}\n{self.log()}")

    def log(self) -> str:
        """What there is to say about a failure: the journal, or why there is none."""
        if self.nspawn is not None and self.nspawn.poll() is None and self.leader:
            return self.journal()
        console = self.directory / "console"
        return console.read_text(errors="replace") if console.exists() else ""

    def stop(self) -> None:
        """Power off, and remove everything. The kernel ends all of it with its first process."""
        try:
            if self.nspawn is not None:
                # systemd-nspawn passes it on as the order to halt.
                self.nspawn.terminate()
                try:
                    self.nspawn.wait(DEADLINE_S if self.leader else 0)
                except subprocess.TimeoutExpired:
                    self.nspawn.kill()
                    self.nspawn.wait()
        finally:
            shutil.rmtree(self.directory)
            self.until(self._has_no_cgroups)

    def _has_booted(self) -> bool:
        assert self.nspawn is not None
        if self.nspawn.poll() is not None:
            pytest.skip(f"systemd-nspawn cannot boot a container here: {self.log()[-1000:]}")
        if not self.leader:
            self.leader = self._find_leader(self.nspawn.pid)
        if not self.leader:
            return False
        return "running" in self.run("systemctl", "is-system-running", is_checked=False).split()

    def _has_no_cgroups(self) -> bool:
        """Whether they are removed, which the kernel refuses until all in them has ended."""
        try:
            for group in self.cgroups:
                for path, _, _ in os.walk(group, topdown=False):
                    os.rmdir(path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    @staticmethod
    def _find_leader(nspawn: int) -> int:
        """The container's first process; 0 while systemd-nspawn still builds the container."""
        try:
            found = Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split()
            names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in (nspawn, *found)]
        except (FileNotFoundError, ProcessLookupError):
            return 0  # one of its short-lived children
        # The child is a copy of systemd-nspawn until it becomes systemd.
        return int(found[0]) if names == ["systemd-nspawn", "systemd"] else 0

    def _make_cgroups(self) -> None:
        """A control group of our own: systemd-nspawn makes others in the one it is started in.

        In systemd's hierarchies only: cgroup v2, and its own one of v1 where both are in use.
        """
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split()
            kind, options = words[words.index("-") + 1], words[-1].split(",")
            if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options):
                group = Path(words[4], f"tundp-test-{os.getpid()}")
                try:
                    group.mkdir(exist_ok=True)
                except OSError as error:
                    pytest.skip(f"systemd-nspawn needs a control group: {error}")
                self.cgroups.append(group)
