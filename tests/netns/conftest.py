"""The lab every test here builds for itself; nothing of it outlives the test.

pod1 -- cni0 [node1] eth0 -- port1 [switch br0] port2 -- eth0 [node2] cni0 -- pod2
        10.5.x.1     192.0.2.1     192.0.2.254     192.0.2.2     10.5.y.1
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.netns.firewall_box import Box, MakeBox
from tests.nodes import MakeLab, MakeOverlay
from tundp.lab.lab import Lab
from tundp.lab.overlay import OverlayLab, make_directory

NETWORK = {"Network": "10.5.0.0/16"}
_numbers = itertools.count(1)


@pytest.fixture
def make_lab() -> MakeLab:
    """A lab with a name nobody else on the machine has."""
    return lambda: Lab(f"tt{os.getpid()}x{next(_numbers)}")


@pytest.fixture
def box(make_lab: MakeLab) -> MakeBox:
    """`async with box() as box`: a namespace to make firewall rules in."""

    @contextlib.asynccontextmanager
    async def make_box() -> AsyncIterator[Box]:
        async with make_lab() as lab:
            yield Box(await lab.host("fw"))

    return make_box


@pytest.fixture
def engine() -> str:
    """What moves the packets, and flags for it; modules with several engines parametrise it."""
    return "auto"


@pytest.fixture
def make_overlay(make_lab: MakeLab, engine: str) -> MakeOverlay:
    """`async with make_overlay(...) as overlay`: nodes with running daemons, pods on request."""

    @contextlib.asynccontextmanager
    async def make(
        *flags: str,
        nodes: int = 2,
        store: str = "file",
        pods: bool = False,
        start: bool = True,
        mtu: int = 1500,
        network: dict[str, Any] = NETWORK,
    ) -> AsyncIterator[OverlayLab]:
        directory = make_directory()
        try:
            async with make_lab() as lab:
                overlay = OverlayLab(lab, directory)
                await overlay.build(nodes, mtu=mtu)
                try:
                    if store == "etcd":
                        await overlay.start_etcd(network)
                    else:
                        overlay.write_lease_file(network)
                    if start:
                        for node in overlay.nodes.values():
                            await overlay.start_daemon(node, *f"--engine={engine}".split(), *flags)
                        await overlay.wait_ready()
                        if pods:
                            for node in overlay.nodes.values():
                                await overlay.add_pod(node)
                    yield overlay
                except BaseException:
                    for node in overlay.nodes.values():
                        if node.log_path.exists():
                            print(f"--- node{node.number}\n{overlay.log_tail(node)}")
                    raise
                finally:
                    await overlay.close_etcd()
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    return make
