"""Every file a daemon writes is refused, by a quota or by a limit of file sizes; mended later.

[node1] eth0 -- [switch], all its files on a tmpfs of its own, its log behind a pipe
"""

from __future__ import annotations

import contextlib
import json
import resource
from functools import partial
from pathlib import Path

import pytest

from tests.netns.test_lasting_faults import boot, findings_of, warnings
from tests.nodes import MakeOverlay, is_ready, lease_is
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab

NETWORK = {"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}
LEASES = json.dumps({"config": NETWORK, "leases": {}})
BLOCKS, INODES = "64k", 40
WORDS = {"quota": "Disk quota exceeded", "file size": "File too large"}
OPTIONS = {
    "quota": f"-o usrquota,usrquota_block_hardlimit={BLOCKS},usrquota_inode_hardlimit={INODES}",
    "file size": "",
}


class Disk:
    """The daemon's files as seen from here: who runs the tests may exceed quotas, it may not."""

    def __init__(self, node: LabNode, fault: str) -> None:
        self.path = node.directory / "disk"
        self.node = node
        self.fault = fault
        self.path.mkdir()

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self.node.daemon.pid}/root{self.path}")

    def refuse(self) -> None:
        """No more of anything: blocks and inodes for its user, or bytes in any file of its."""
        if self.fault == "file size":
            self._limit(1)
            return
        (self.seen / "fill").mkdir()
        for number in range(INODES + 5):
            (self.seen / "fill" / str(number)).write_bytes(bytes(4096))

    def allow(self) -> None:
        if self.fault == "file size":
            self._limit(resource.RLIM_INFINITY)
            return
        for each in (self.seen / "fill").iterdir():
            each.unlink()
        (self.seen / "fill").rmdir()

    def _limit(self, most_len: int) -> None:
        limits = (most_len, resource.RLIM_INFINITY)
        resource.prlimit(self.node.daemon.pid, resource.RLIMIT_FSIZE, limits)


async def start(overlay: OverlayLab, node: LabNode, disk: Disk) -> None:
    """With all its files on the disk; the test is skipped if the kernel has no such quota."""
    mount = f"mount -t tmpfs {OPTIONS[disk.fault]} none {disk.path} || exit 77"
    # What it logs is no file of its: the limit would hold for that, too.
    log = (
        f"mkfifo {disk.path}/log; cat {disk.path}/log >> {node.log_path} & exec 2> {disk.path}/log"
    )
    await boot(
        overlay,
        node,
        f"--store=file:{disk.path}/leases.json",
        *(f"--subnet-file={disk.path}/subnet.env", f"--state-dir={disk.path}/state"),
        "--iptables-forward-rules=false",
        script=f"{mount}; printf '%s' '{LEASES}' > {disk.path}/leases.json; {log}",
    )
    await until(lambda: node.admin_socket.exists() or node.daemon.poll() == 77)
    if node.daemon.poll() == 77:
        pytest.skip("this kernel has no quotas for tmpfs (CONFIG_TMPFS_QUOTA, Linux 6.6)")
    await until(partial(is_ready, node), "ready")


@pytest.mark.parametrize("fault", WORDS)
async def test_every_file_is_refused_and_written_once_it_can_be(
    make_overlay: MakeOverlay, fault: str
) -> None:
    words = WORDS[fault]
    async with make_overlay(nodes=1, start=False) as overlay:
        node = overlay.nodes[1]
        disk = Disk(node, fault)
        await start(overlay, node, disk)
        env, leases = disk.seen / "subnet.env", disk.seen / "leases.json"
        kept = env.read_text()
        (lease,) = json.loads(leases.read_text())["leases"]
        (cached,) = await until(lambda: list((disk.seen / "state").glob("last-known*")))
        before = len(node.log_path.read_text())

        # Everything has to be written again, and nothing can be.
        disk.refuse()
        env.unlink()
        cached.unlink()
        leases.write_text(LEASES)

        async def all_is_named() -> bool:
            found = await findings_of(node)
            seen = {name for name, (_, evidence) in found.items() if words in evidence}
            return {"subnet-file", "state-dir"} <= seen and await lease_is(node, "lost")

        await until(all_is_named, "status names subnet.env, the lease cache and the lost lease")
        assert node.daemon.poll() is None
        assert not env.exists()
        said = warnings(node, words, before)
        assert any("leases.json" in line for line in said), said
        assert any("subnet.env" in line for line in said), said
        assert len(said) <= 12, said

        disk.allow()

        async def all_is_written() -> bool:
            with contextlib.suppress(OSError, ValueError):
                is_right = env.read_text() == kept and cached.exists()
                now = json.loads(leases.read_text())["leases"]
                return is_right and lease in now and await is_ready(node)
            return False

        await until(all_is_written, "all files again, without a restart")
        hidden = [each.name for each in disk.seen.rglob(".*") if not each.name.endswith(".lock")]
        assert hidden == [], "no temporary file stays"
