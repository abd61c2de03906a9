"""The registry of checks: name to function, in the order in which they are reported."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import MappingProxyType
from typing import Final

from tundp.choices import Engine
from tundp.daemon.check import CHECKS as BEFORE_A_START
from tundp.doctor import daemon, peers, pods, store, traffic
from tundp.doctor.context import Check, Context, finding
from tundp.engine.choose import best_engine
from tundp.finding import Finding, Verdict
from tundp.linux.obstacles.look import look
from tundp.linux.offload import find_offloads

STORE_S: Final = 3.0
"""How long the store is waited for; endpoints are looked at one by one, meanwhile."""
RULES_S: Final = 4.0
"""Deadline of listing and judging firewall rules; what else is in the way is looked for then."""
_CHOSEN_ALREADY: Final = frozenset(("interface.other",))
"""Ids that help to choose settings, and say nothing of a daemon that runs."""
_OF_A_START: Final = ("lease", "peers", "routes", "obstacles", "limits")
"""Checks of `tundp config check` that a running daemon answers better, or that ask it again."""


async def _before_a_start(context: Context) -> AsyncIterator[Finding]:
    """`tundp config check`; what later checks of it need is left in its Inspection."""
    for name, each in BEFORE_A_START.items():
        if name in ("daemon", "store"):  # checks of their own here
            continue
        if name in _OF_A_START and context.status is not None:
            continue
        async for found in each(context.inspection):
            if found.id not in _CHOSEN_ALREADY or context.status is None:
                yield found


async def _store(context: Context) -> AsyncIterator[Finding]:
    """The network config and the leases, read as a daemon reads them."""
    store = context.inspection.store
    try:
        async with asyncio.timeout(STORE_S), contextlib.aclosing(_read_store(context)) as each:
            async for found in each:
                yield found
    except TimeoutError:
        yield finding(
            "store.silent",
            Verdict.FAIL,
            f"{store.description} did not answer a request within {STORE_S:.0f} s",
            words="where its endpoint takes connections all the same, its process hangs or is"
            " stopped: on its host, systemctl restart etcd",
        )


async def _read_store(context: Context) -> AsyncGenerator[Finding, None]:
    async for each in BEFORE_A_START["store"](context.inspection):
        yield each


async def check_obstacles(context: Context) -> AsyncIterator[Finding]:
    """What the kernel would drop or divert, looked for with our rights, not the daemon's."""
    scene = context.scene
    if scene is None:
        # Without a daemon `tundp config check` looks for what will be in the way.
        return
    looked = await look(context.inspection.netlink, scene, rules_s=RULES_S)
    for each in looked.findings:
        yield each
    if looked.summary.verdict is not Verdict.NOTE:  # which says no more than the findings
        yield looked.summary


async def check_kernel(_: Context) -> AsyncIterator[Finding]:
    """What this kernel lacks for the fastest engine."""
    engine, why = best_engine(find_offloads())
    is_slow = engine is Engine.REFERENCE
    yield finding(
        "kernel.engine" if is_slow else "kernel",
        Verdict.WARN if is_slow else Verdict.OK,
        f"engine {engine.value}: {why}",
        words="tundp probe tells what this kernel lacks",
    )


CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "chaos": daemon.check_chaos,
        "daemon": daemon.check_daemon,
        "health": daemon.check_health,
        "device": daemon.check_device,
        "lease": daemon.check_lease,
        "store": _store,
        "endpoints": store.check_endpoints,
        "start": _before_a_start,
        "obstacles": check_obstacles,
        "peers": peers.check_peers,
        "bridge": pods.check_bridge,
        "subnet-env": pods.check_subnet_env,
        "cni": pods.check_cni,
        "masquerade": pods.check_masquerade,
        "drops": traffic.check_drops,
        "speed": traffic.check_speed,
        "kernel": check_kernel,
    }
)
"""Each by its name. All run at the same time but `start`, which needs what `store` finds."""
NEEDS: Final[Mapping[str, str]] = MappingProxyType({"start": "store"})
"""Which check has to be through before another one begins."""
DAEMONS: Final = frozenset(
    (
        *("chaos", "health", "lease", "obstacles", "peers", "bridge", "subnet-env", "masquerade"),
        *("drops", "speed"),
    )
)
"""Checks that look at nothing without a daemon that answers."""
