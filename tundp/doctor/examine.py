"""Runs the checks, each on its own: one that fails or takes too long hides no other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Collection
from dataclasses import replace
from pathlib import Path
from typing import Final

import tundp
from tundp.daemon.checks.inspection import Inspection
from tundp.doctor.cases import check_of
from tundp.doctor.checks import CHECKS, DAEMONS, LIMITS_S, NEEDS
from tundp.doctor.context import Check, Context, ask_daemon, listener, running
from tundp.doctor.diagnosis import Diagnosis, Named, diagnose
from tundp.errors import ConfigError, TundpError
from tundp.finding import Finding, Verdict
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings
from tundp.store.base import Store

LIMIT_S: Final = 8.0
"""Deadline of one check."""
_log = logging.getLogger(__name__)


async def examine(
    settings: Settings,
    store: Store,
    *,
    whose: str,
    cni_dir: Path,
    only: Collection[str] = (),
) -> Diagnosis:
    """Run the checks. Closes the store. only: ids, their beginnings or checks; none: all."""
    began = time.monotonic()
    try:
        names = chosen(only)
        async with Netlink() as netlink:
            pid = await asyncio.to_thread(listener, settings.admin_socket)
            asked = await ask_daemon(settings.admin_socket, pid)
            status = running(asked)
            context = Context(
                inspection=Inspection(
                    settings=settings, store=store, netlink=netlink, whose=whose, status=status
                ),
                status=status,
                asked=asked,
                pid=pid,
                cni_dir=cni_dir,
            )
            found = await _run(context, names)
    finally:
        await store.close()
    _explain_silence(found)
    named = [Named.of(each, name) for name, many in found.items() for each in many]
    daemon = f"pid {status.pid}, {settings.admin_socket}" if status else f"none answers: {asked}"
    return diagnose(
        [each for each in named if _is_wanted(each, only)],
        version=tundp.__version__,
        daemon=daemon,
        checks=names,
        took_s=time.monotonic() - began,
    )


def chosen(only: Collection[str]) -> list[str]:
    """The checks that find what `only` names, in order. ConfigError for what nothing finds."""
    if not only:
        return list(CHECKS)
    wanted: set[str] = set()
    for each in only:
        found = {name for name in CHECKS if name == each} or check_of(each)
        if not found:
            raise ConfigError(f"--only: no check and no id is {each!r}: see docs/debugging.md")
        wanted |= found
    # What a check needs runs, too; peers are asked wherever their answer is waited for.
    wanted |= {NEEDS[name] for name in wanted if name in NEEDS}
    if wanted & {"device", "drops"}:
        wanted.add("peers")
    return [name for name in CHECKS if name in wanted]


def _is_wanted(named: Named, only: Collection[str]) -> bool:
    if not only or named.verdict is Verdict.UNKNOWN:
        return True
    return any(
        named.check == each or named.id == each or named.id.startswith(f"{each}.") for each in only
    )


async def _run(context: Context, names: Collection[str]) -> dict[str, list[Finding]]:
    """What each check finds; all at the same time, but those that need another one."""
    tasks: dict[str, asyncio.Task[list[Finding]]] = {}
    if "peers" not in names or context.status is None:
        context.probed.set()
    for name in names:
        before = tasks.get(NEEDS.get(name, ""))
        tasks[name] = asyncio.ensure_future(_one(context, name, CHECKS[name], before))
    try:
        return {name: await task for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def _one(
    context: Context, name: str, check: Check, before: asyncio.Task[list[Finding]] | None
) -> list[Finding]:
    """What one check finds. Never fails: what it could not look at is a finding."""
    if before is not None:
        await asyncio.wait([before])
    if context.status is None and name in DAEMONS:
        return [_blind(name, "there is no daemon that answers, and only it knows")]
    found: list[Finding] = []
    limit_s = LIMITS_S.get(name, LIMIT_S)
    try:
        async with asyncio.timeout(limit_s), contextlib.aclosing(_each(check, context)) as each:
            # What was found before the deadline counts, too: no list comprehension.
            async for finding in each:
                found.append(finding)  # noqa: PERF401
    except TimeoutError:
        found.append(_blind(name, f"it took longer than {limit_s:.0f} s"))
    except TundpError as error:
        found.append(_blind(name, str(error)))
    except Exception as error:  # noqa: BLE001  (in the answer, and UNKNOWN)
        _log.debug("bug in check %s", name, exc_info=True)
        found.append(_blind(name, f"a bug, please report it: {error!r}"))
    if not found:
        found.append(_blind(name, "what it needs is not known here"))
    return found


async def _each(check: Check, context: Context) -> AsyncGenerator[Finding, None]:
    async for each in check(context):
        yield each


def _explain_silence(found: dict[str, list[Finding]]) -> None:
    """What is in the way here explains a silent peer: it comes first, and the peer is a warning."""
    here = [
        each.id
        for name in ("chaos", "device", "obstacles")
        for each in found.get(name, ())
        if each.verdict in (Verdict.WARN, Verdict.FAIL)
    ]
    if not here or "peers" not in found:
        return
    first = f"first what is wrong here: {', '.join(dict.fromkeys(here))}"
    found["peers"] = [
        replace(each, verdict=Verdict.WARN, meaning=first) if each.id.startswith("peer.") else each
        for each in found["peers"]
    ]


def _blind(name: str, why: str) -> Finding:
    return Finding(
        id=f"not-looked.{name}", verdict=Verdict.UNKNOWN, evidence=f"not looked at: {why}"
    )
