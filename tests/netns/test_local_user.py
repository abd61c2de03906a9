"""A user of the host without rights, beside a daemon: what is open to everybody is no way in.

pod1 [node1] [node2]     an attacker, uid 65534, in node1's network namespace
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.nodes import MakeOverlay
from tests.wait import DEADLINE_S
from tundp.lab.lab import Host

AS_NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--bounding-set=-all", "--inh-caps=-all"),
)
JOIN = """
import errno, fcntl, os, struct, sys
# TUNSETIFF with IFF_TUN | IFF_NO_PI, and IFF_MULTI_QUEUE and IFF_VNET_HDR as argv[2] says.
fd = os.open("/dev/net/tun", os.O_RDWR)
try:
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), int(sys.argv[2], 0)))
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print("joined")
"""


async def join(host: Host, device: str, flags: int) -> str:
    """What a user without rights gets for trying to have a queue of the device."""
    done = await host.call(
        subprocess.run,
        [*AS_NOBODY, sys.executable, "-c", JOIN, device, hex(flags)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout.strip())


@pytest.mark.parametrize("workers", [1, 2])
async def test_nobody_else_joins_the_device(make_overlay: MakeOverlay, workers: int) -> None:
    async with make_overlay(f"--workers={workers}", nodes=1) as overlay:
        node = overlay.nodes[1]
        for flags in (0x1001, 0x1101, 0x5001, 0x5101):
            # EINVAL: a device of one queue is asked for several, or the other way round.
            assert await join(node.host, "flannel0", flags) in ("EPERM", "EBUSY", "EINVAL")
        if workers > 1:
            assert await join(node.host, "flannel0", 0x5101) == "EPERM"
