"""The quota of the daemon's user is used up: every file it writes is refused, and mended later.

[node1] eth0 -- [switch], all its files on a tmpfs with usrquota
"""

from __future__ import annotations

import contextlib
import json
import os
from functools import partial
from pathlib import Path

import pytest

from tests.netns.test_lasting_faults import boot, findings_of, warnings
from tests.nodes import MakeOverlay, is_ready, lease_is
from tests.wait import until
from tundp.lab.overlay import LabNode

WORDS = "Disk quota exceeded"
BLOCKS, INODES = "64k", 40
NETWORK = {"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}


class Disk:
    """The tmpfs as seen from here: who runs the tests may exceed quotas, the daemon may not."""

    def __init__(self, node: LabNode) -> None:
        self.path = node.directory / "disk"
        self.node = node

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self.node.daemon.pid}/root{self.path}")

    def fill(self) -> None:
        """More blocks and more inodes than root may have."""
        (self.seen / "fill").mkdir()
        for number in range(INODES + 5):
            (self.seen / "fill" / str(number)).write_bytes(bytes(4096))

    def empty(self) -> None:
        for each in (self.seen / "fill").iterdir():
            each.unlink()
        (self.seen / "fill").rmdir()


async def test_every_file_is_refused_and_written_once_there_is_room(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        node = overlay.nodes[1]
        disk = Disk(node)
        disk.path.mkdir()
        leases = disk.path / "leases.json"
        document = json.dumps({"config": NETWORK, "leases": {}})
        mount = (
            f"mount -t tmpfs -o usrquota,usrquota_block_hardlimit={BLOCKS},"
            f"usrquota_inode_hardlimit={INODES} none {disk.path}"
        )
        await boot(
            overlay,
            node,
            f"--store=file:{leases}",
            *(f"--subnet-file={disk.path}/subnet.env", f"--state-dir={disk.path}/state"),
            f"--admin-socket={node.admin_socket}",
            "--iptables-forward-rules=false",
            script=f"{mount} || exit 77; printf '%s' '{document}' > {leases}",
        )
        await until(lambda: node.admin_socket.exists() or node.daemon.poll() == 77)
        if node.daemon.poll() == 77:
            pytest.skip("this kernel has no quotas for tmpfs (CONFIG_TMPFS_QUOTA, Linux 6.6)")
        await until(partial(is_ready, node), "ready")
        env = disk.seen / "subnet.env"
        kept = env.read_text()
        (lease,) = json.loads((disk.seen / "leases.json").read_text())["leases"]
        disk.fill()

        # Everything has to be written again, and nothing can be.
        env.unlink()
        (disk.seen / "leases.json").write_text(document)
        (cache,) = (disk.seen / "state").glob("last-known*.json")
        cache.unlink()

        async def all_is_named() -> bool:
            found = await findings_of(node)
            seen = {name for name, (_, evidence) in found.items() if WORDS in evidence}
            return {"subnet-file", "state-dir"} <= seen and await lease_is(node, "lost")

        await until(all_is_named, "status names subnet.env, the lease cache and the lost lease")
        assert node.daemon.poll() is None
        assert (await node.status_document())["lease"]["state"] == "lost"
        assert not env.exists()
        assert [each.name for each in disk.seen.iterdir() if ".tmp" in each.name] == []
        said = warnings(node, WORDS)
        assert any("leases.json" in line for line in said), said
        assert any("subnet.env" in line for line in said), said
        assert len(said) <= 12, said

        disk.empty()

        async def all_is_written() -> bool:
            with contextlib.suppress(OSError, ValueError):
                now = json.loads((disk.seen / "leases.json").read_text())["leases"]
                is_right = env.read_text() == kept and lease in now and cache.exists()
                return is_right and await is_ready(node)
            return False

        await until(all_is_written, "all files again, without a restart")
        left = [each.name for each in disk.seen.rglob(".*") if not each.name.endswith(".lock")]
        assert left == [], "no temporary file stays"
        assert os.path.exists(f"/proc/{node.daemon.pid}")
