"""A state directory that cannot be written: full, read-only, immutable, over quota.

[node1] eth0 -- [switch, etcd 192.0.2.254], its --state-dir on a file system of its own
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.netns.machine import TUNDP
from tests.netns.test_lasting_faults import boot
from tests.nodes import MakeOverlay
from tests.wait import until
from tundp.lab.overlay import LabNode


def state_of(node: LabNode) -> Path:
    """The node's state directory, as its daemon sees it."""
    return Path(f"/proc/{node.daemon.pid}/root{node.state_dir}")


def keys_on_disk(node: LabNode) -> set[str]:
    with contextlib.suppress(OSError):
        (path,) = state_of(node).glob("last-known*.json")
        return set(json.loads(path.read_text())["leases"])
    return set()


def fill(node: LabNode) -> Path:
    """A file that takes all the room there is left."""
    path = state_of(node) / "fill"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path


async def store_status(node: LabNode) -> dict[str, Any]:
    return dict((await node.status_document())["store"])


async def test_leases_on_disk_follow_again_once_there_is_room(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd", nodes=1, start=False) as overlay:
        node = overlay.nodes[1]
        node.state_dir.mkdir()
        await boot(overlay, node, script=f"mount -t tmpfs -o size=64k none {node.state_dir}")
        await node.wait_for_peers(0)
        await until(lambda: len(keys_on_disk(node)) == 1, "the node's lease on disk")
        filler = fill(node)
        value = json.dumps({"PublicIP": "192.0.2.77"})
        await overlay.write_etcd("subnets/10.5.250.0-24", value)

        async def has_failed() -> bool:
            return "No space left on device" in str((await node.status_document())["findings"])

        await until(has_failed, "status tells of the full disk")
        store = await store_status(node)
        assert "No space left on device" in store["cache_error"]
        shown = await node.host.run(TUNDP, "status", f"--admin-socket={node.admin_socket}")
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith("leases on disk")]
        assert "ago, failing: " in line and "No space left on device" in line, line
        assert "10.5.250.0-24" not in keys_on_disk(node)
        assert (await store_status(node))["cached_at"] == store["cached_at"], "no fresh stamp"
        filler.unlink()
        await until(lambda: "10.5.250.0-24" in keys_on_disk(node), "the lease on disk, in time")

        async def is_over() -> bool:
            after = await store_status(node)
            return bool(after["cache_error"] == "" and after["cached_at"] > store["cached_at"])

        await until(is_over)


LIFE = """
import sys, time
from pathlib import Path
from tundp.instance import Instance
from tundp.lease.codec import parse_key
from tundp.subnet.lease_cache import LeaseCache

cache = LeaseCache(Path(sys.argv[1]), Instance())

def save(revision, synced_at=None):
    return cache.save(store="s", node_id="n", api="v3", network_config="{}", leases=[],
                      own_key=parse_key("10.5.1.0-24"), revision=revision, synced_at=synced_at)

def tell(*what):
    found = LeaseCache(Path(sys.argv[1]), Instance()).load("s", "n")
    print(*what, found.revision, found.age_s > 900, cache.error, sep="|", flush=True)
    sys.stdin.readline()

tell(save(1, time.time() - 1000))
tell(save(2), cache.confirm())
tell(save(2), cache.confirm())
"""
FAULTS = {
    "full": (
        "mount -t tmpfs -o size=64k none {0}",
        "dd if=/dev/zero of={0}/fill bs=4k 2>/dev/null || true",
        "rm {0}/fill",
        "No space left on device",
    ),
    "read-only": (
        "mount -t tmpfs none {0}",
        "mount -o remount,ro {0}",
        "mount -o remount,rw {0}",
        "Read-only file system",
    ),
    "immutable": ("true", "chattr +i {0}", "chattr -i {0}", "Operation not permitted"),
    "over quota": (
        "mount -t tmpfs -o usrquota,usrquota_block_hardlimit=32k none {0}",
        "dd if=/dev/zero of={0}/fill bs=4k 2>/dev/null || true",
        "rm {0}/fill",
        "Disk quota exceeded",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_not_written_is_not_stamped_as_fresh(tmp_path: Path, fault: str) -> None:
    """On the real file systems: each has ways of its own to refuse."""
    prepare, break_, mend, words = (each.format(tmp_path) for each in FAULTS[fault])
    # Whoever may exceed quotas meets none.
    script = f"""
        {prepare} || {{ echo no such fault; exit; }}
        exec 3<&0; mkfifo {tmp_path}.steps
        setpriv --bounding-set=-sys_resource "$@" {tmp_path} <{tmp_path}.steps &
        exec 4>{tmp_path}.steps
        read step <&3; {break_} || echo no such fault; echo >&4
        read step <&3; {mend}; echo >&4
        read step <&3; echo >&4; wait
    """
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", LIFE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            told = []
            for _ in range(3):
                line = process.stdout.readline().rstrip("\n")
                if line == "no such fault":
                    pytest.skip(f"{fault}: not on this kernel or file system")
                told.append(line.split("|"))
                process.stdin.write("\n")
                process.stdin.flush()
        finally:
            process.kill()
            subprocess.run(["chattr", "-i", str(tmp_path)], stderr=subprocess.DEVNULL, check=False)
            Path(f"{tmp_path}.steps").unlink(missing_ok=True)
    saved, failed, mended = told
    assert saved == ["True", "1", "True", ""]
    assert failed[:4] == ["False", "False", "1", "True"], "old leases, and old they are called"
    assert words in failed[4]
    assert mended == ["True", "True", "2", "False", ""]
