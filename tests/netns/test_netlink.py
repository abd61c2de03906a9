"""The netlink door under concurrent callers: the daemon's repair and re-creation meet there."""

from __future__ import annotations

import asyncio
import os

from tests.nodes import MakeLab
from tundp.linux.netlink import Netlink


async def test_many_askers_at_once_all_get_their_answer(make_lab: MakeLab) -> None:
    # The kernel refuses a second dump on a socket with EBUSY.
    async with make_lab() as lab:
        host = await lab.host("h")
        answers = await asyncio.gather(
            *(ask() for ask in (host.netlink.links, host.netlink.addresses) * 10)
        )
        assert all(answers)


async def test_watching_again_and_again_leaves_no_descriptor_open() -> None:
    async with Netlink() as netlink:
        await netlink.links()

        async def watch() -> int:
            async with netlink.watch() as changes:
                waiting = asyncio.ensure_future(changes())
                await asyncio.sleep(0)
                waiting.cancel()
            return len(os.listdir("/proc/self/fd"))

        counts = [await watch() for _ in range(20)]
        assert counts[-1] <= counts[0] + 1
