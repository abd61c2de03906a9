"""Runs the checks, each on its own: one that fails or takes too long hides no other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import tundp
from tundp.daemon.checks.inspection import Inspection
from tundp.doctor.cases import check_of
from tundp.doctor.checks import CHECKS, DAEMONS, NEEDS
from tundp.doctor.context import Check, Context, ask_daemon, running
from tundp.doctor.deadline import run_within
from tundp.doctor.diagnosis import Diagnosis, Named, diagnose
from tundp.errors import ConfigError, PlatformError, TundpError
from tundp.finding import Finding, Verdict
from tundp.linux.listeners import listener
from tundp.linux.netlink import Netlink
from tundp.observe.status import Status
from tundp.settings.settings import Settings
from tundp.store.base import Store

DEADLINE_S: Final = 9.0
"""Deadline of all that is looked at: with a start, a grace and an answer it is 10 s at most."""
LIMIT_S: Final = 8.0
"""Deadline of one check."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seen:
    """What was found so far: filled by the thread that looks, read by the one that waits."""

    checks: Sequence[str]
    daemon: str = "not asked yet"
    found: dict[str, list[Finding]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    """The checks that are through, whether they could look or not."""

    def findings(self, looked_s: float) -> dict[str, list[Finding]]:
        """The findings of every check; one that is not through says so. looked_s: so far."""
        every = {name: list(self.found.get(name, ())) for name in self.checks}
        for name in self.checks:
            if name not in self.ended:
                every[name].append(_unfinished(name, looked_s))
        return every


def examine(
    settings: Settings,
    store: Store,
    *,
    whose: str,
    cni_dir: Path,
    only: Collection[str] = (),
    began: float | None = None,
    asked: Status | PlatformError | None = None,
) -> Diagnosis:
    """Run the checks, and return what was found by DEADLINE_S after `began` (time.monotonic()).

    Closes the store. A check that is not through by then is UNKNOWN, whatever it found. only: ids,
    their beginnings or checks; none: all. asked: what the daemon answered, if it was asked before.
    """
    began = time.monotonic() if began is None else began
    seen = _Seen(chosen(only))

    async def look() -> None:
        try:
            async with Netlink() as netlink:
                context = await _context(settings, store, netlink, whose, cni_dir, asked)
                status = context.status
                seen.daemon = (
                    f"pid {status.pid}, {settings.admin_socket}"
                    if status
                    else f"none answers: {context.asked}"
                )
                await _run(context, seen)
        finally:
            await store.close()

    run_within(began + DEADLINE_S - time.monotonic(), look)
    found = seen.findings(time.monotonic() - began)
    _explain_silence(found)
    _say_once(found)
    named = [Named.of(each, name) for name, many in found.items() for each in many]
    return diagnose(
        [each for each in named if _is_wanted(each, only)],
        version=tundp.__version__,
        daemon=seen.daemon,
        checks=seen.checks,
        took_s=time.monotonic() - began,
    )


async def _context(
    settings: Settings,
    store: Store,
    netlink: Netlink,
    whose: str,
    cni_dir: Path,
    asked: Status | PlatformError | None,
) -> Context:
    pid = await asyncio.to_thread(listener, settings.admin_socket)
    answer = await ask_daemon(settings.admin_socket, pid) if asked is None else asked
    status = running(answer)
    return Context(
        inspection=Inspection(
            settings=settings, store=store, netlink=netlink, whose=whose, status=status
        ),
        status=status,
        asked=answer,
        pid=pid,
        cni_dir=cni_dir,
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


async def _run(context: Context, seen: _Seen) -> None:
    """Fill in what each check finds; all at the same time, but those that need another one."""
    tasks: dict[str, asyncio.Task[None]] = {}
    if "peers" not in seen.checks or context.status is None:
        context.probed.set()
    for name in seen.checks:
        before = tasks.get(NEEDS.get(name, ""))
        tasks[name] = asyncio.ensure_future(_one(context, name, seen, before))
    try:
        await asyncio.gather(*tasks.values())
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def _one(context: Context, name: str, seen: _Seen, before: asyncio.Task[None] | None) -> None:
    """Fill in what one check finds. Never fails: what it could not look at is a finding."""
    found = seen.found.setdefault(name, [])
    if before is not None:
        await asyncio.wait([before])
    if context.status is None and name in DAEMONS:
        found.append(_blind(name, "there is no daemon that answers, and only it knows"))
        seen.ended.add(name)
        return
    try:
        async with (
            asyncio.timeout(LIMIT_S),
            contextlib.aclosing(_each(CHECKS[name], context)) as each,
        ):
            # What was found before the deadline counts, too: no list comprehension.
            async for finding in each:
                found.append(finding)
    except TimeoutError:
        found.append(_unfinished(name, LIMIT_S))
    except TundpError as error:
        found.append(_blind(name, str(error)))
    except Exception as error:  # noqa: BLE001  (in the answer, and UNKNOWN)
        _log.debug("bug in check %s", name, exc_info=True)
        found.append(_blind(name, f"a bug, please report it: {error!r}"))
    if not found:
        found.append(_blind(name, "what it needs is not known here"))
    seen.ended.add(name)


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


def _say_once(found: dict[str, list[Finding]]) -> None:
    """Of peers that were asked here, what the daemon guesses of their silence is left out."""
    if any(each.id.startswith("peer.") for each in found.get("peers", ())):
        found["health"] = [
            each
            for each in found.get("health", ())
            if each.id != "peers" or each.verdict is Verdict.OK
        ]


def _blind(name: str, why: str) -> Finding:
    return Finding(
        id=f"not-looked.{name}", verdict=Verdict.UNKNOWN, evidence=f"not looked at: {why}"
    )


def _unfinished(name: str, looked_s: float) -> Finding:
    return Finding(
        id=f"not-looked.{name}",
        verdict=Verdict.UNKNOWN,
        evidence=f"not finished: it takes longer than {looked_s:.0f} s",
    )
