"""What `tundp status` says of each peer: who answers, who does not, and what the path carries."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from tests.nodes import MakeOverlay
from tests.wait import until
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import ping

TUNDP = (sys.executable, "-m", "tundp")


@pytest.fixture(params=["gso", "reference"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def peer_of(node: LabNode, other: LabNode) -> dict[str, Any]:
    """What `node` says of `other`."""
    peers = (await node.status_document())["peers"]
    (found,) = (each for each in peers if each["public_ip"] == other.public_ip)
    return dict(found)


async def test_a_silent_peer_is_told_from_one_that_answers(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = overlay.nodes[1], overlay.nodes[2], overlay.nodes[3]
        assert await three.stop_daemon() == 0
        for _ in range(3):
            assert await ping(one.host, two.tunnel_address)
        for _ in range(2):
            assert await ping(one.host, three.tunnel_address, timeout_s=0.2) is None
        heard = (await peer_of(one, two))["traffic"]
        assert (heard["packets_out"], heard["packets_in"], heard["drops"]) == (3, 3, 0)
        status = await one.status()
        now = status.started_at + status.uptime_s
        assert status.started_at <= heard["last_heard"] <= now + 1

        async def were_sent() -> bool:
            return bool((await peer_of(one, three))["traffic"]["packets_out"] == 2)

        await until(were_sent, "both packets to be sent")
        silent = (await peer_of(one, three))["traffic"]
        assert silent["packets_in"] == 0
        assert silent["last_heard"] is None
        shown = await one.host.run(*TUNDP, "status", f"--admin-socket={one.admin_socket}")
        # Between them whether it answers, and how fast, once that is known.
        row = r"(?m)^10\.5\.\S+ +(\S+):8285 +(?:[a-z-]+ +)?(?:\S+ ms +)?(\d+) +(\d+) +(\S+)"
        rows = re.findall(row, shown.stdout)
        assert [row[:3] for row in rows] == [
            (three.public_ip, "2", "0"),
            (two.public_ip, "3", "3"),
        ], shown.stdout
        assert rows[0][3] == "never"


async def test_the_path_mtu_to_a_peer_is_shown(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        assert (await peer_of(one, two))["path"] is None
        await one.host.netlink.call(
            "narrow the path",
            "route",
            "add",
            dst=f"{two.public_ip}/32",
            oif=await one.host.index("eth0"),
            metrics={"mtu": 1400},
        )

        async def is_narrow() -> bool:
            await ping(one.host, two.tunnel_address, size=1444, dont_fragment=True, timeout_s=0.2)
            path = (await peer_of(one, two))["path"]
            return path is not None and path["inner_mtu"] == 1372

        await until(is_narrow, "the path to be narrow")
        assert (await one.status_document())["routing"]["narrow_paths"] == 1
        shown = await one.host.run(*TUNDP, "status", f"--admin-socket={one.admin_socket}")
        assert "path MTU" in shown.stdout
        assert re.search(rf"{two.public_ip}:8285 .* 1372\b", shown.stdout), shown.stdout
