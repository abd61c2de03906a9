"""The process a daemon is: its logging, rights, descriptors, event loop and signals.

Parsing, printing and exit codes are the command line's (tundp.cli); what the daemon opens
and runs is tundp.daemon.run's.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import tundp
from tundp import collector, early
from tundp.choices import Loop
from tundp.daemon import logs
from tundp.errors import SCARCE, ConfigError, PlatformError, TundpError
from tundp.linux import fd_store
from tundp.settings.settings import Settings
from tundp.settings.sources import variable_warnings

if TYPE_CHECKING:
    from tundp.daemon.resources import Resources
    from tundp.daemon.supervise import Supervisor
    from tundp.engine.native.early import EarlyWorkers
    from tundp.store.base import Store

E = TypeVar("E", bound=Exception)
START_S: Final = 2.0
"""A failed start lasts so long at least, where a supervisor makes the next one at once."""
_PACKAGE: Final = os.path.join(os.path.dirname(tundp.__file__), "")
_log = logging.getLogger("tundp")


def open_store(settings: Settings) -> Store:
    """The store, and faults of its settings found while a wrong flag is still wrong usage.

    TLS keys are read here, before capabilities go: they may be another user's files.
    """
    # One thread more per process is what numpy's library would start, for nothing.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imported here: netlink, HTTP and numpy are half a second that --help need not wait for.
    from tundp.daemon import stores

    return stores.open_store(settings)


def serve(
    settings: Settings,
    store: Store,
    given: Resources | None = None,
    *,
    start: early.Start = early.NOTHING,
    is_successor: bool = False,
) -> None:
    """Be the daemon until a signal ends it, or a successor takes over.

    given: what a predecessor had open; start: what the descriptor store had for this start, and who
    carries packets with it already. Both are owned from here on. is_successor: take over from the
    one that runs, if there is one. Raises ExceptionGroups of TundpError: LeaseLost with
    --on-lease-lost=exit, anything else that ends a daemon.
    """
    # Before logging is set up: some libraries set their own loggers when they are imported.
    from tundp.daemon.given import log_start, resources_of
    from tundp.daemon.handover.taker import ask as ask_for_takeover
    from tundp.daemon.kept import Kept
    from tundp.daemon.resources import open_resources
    from tundp.daemon.run import run
    from tundp.daemon.supervise import Supervisor
    from tundp.linux import capability, heap

    heap.bound()
    unknown = logs.set_up(
        settings.v,
        settings.vmodule,
        username=settings.etcd_username,
        password=settings.etcd_password,
    )
    for item in unknown:
        _log.warning("--vmodule %s has no effect: not LOGGER=LEVEL, as in tundp.store=1", item)
    for sentence in variable_warnings(os.environ):
        _log.warning("%s", sentence)
    _log.info("tundp %s starting: %s", tundp.__version__, settings.describe())
    log_start(start, settings)
    capability.require(capability.CAP_NET_ADMIN, "a TUN device, its address and its route")
    with contextlib.ExitStack() as stack:
        takeover = None
        # Given descriptors: its supervisor's start. What listens there is what it was given.
        asks = is_successor and not start.descriptors
        if asks and (takeover := ask_for_takeover(settings)) is not None:
            stack.enter_context(takeover.refusing())
            given = takeover.resources(settings)
            takeover.adopt_environment()
        if given is None:
            given = resources_of(start, settings, Kept(start.descriptors))
        resources = open_resources(settings, given)
        try:
            give_up_rights(settings, start)
        except BaseException:
            resources.close()
            raise
        logs.write_apart()
        collector.settle()
        supervisor = Supervisor()
        daemon = run(settings, store, resources, supervisor, takeover)
        with asyncio.Runner(loop_factory=loop_factory(settings.loop)) as runner:
            runner.run(run_until_signal(daemon, supervisor))


def give_up_rights(settings: Settings, start: early.Start) -> None:
    """Keep the rights a daemon needs, and enter its sandbox; every thread. PlatformError."""
    threads = () if start.workers is None else start.workers.threads
    drop_capabilities(threads)
    enter_sandbox(settings, threads)
    if start.workers is not None:
        # Rights are each thread's own: those that have more than is left end here.
        renew(start.workers)
    require_limits()


def pace(began: float) -> None:
    """Before a start that failed ends: wait until START_S after it `began` (time.monotonic()).

    Whoever keeps descriptors restarts a daemon at once, so that what waits in their queues fits,
    and a start that fails at once would be tried ten times a second. A signal ends the wait.
    """
    left_s = began + START_S - time.monotonic()
    if fd_store.is_there() and left_s > 0:
        _log.info("ending in %.1f s, so as not to be started again at once", left_s)
        time.sleep(left_s)


def renew(workers: EarlyWorkers) -> None:
    """Have early packet threads go on with this thread's rights; without them if that fails."""
    try:
        workers.renew()
    except RuntimeError as error:
        _log.warning("early start ended: no thread can be started (%s)", error)


def drop_capabilities(leaving: Collection[int] = ()) -> None:
    """Keep what networking needs; a root without the rest is no root.

    leaving: threads that are about to end, and may keep theirs until then.
    """
    from tundp.linux import capability
    from tundp.linux.firewall import choose as firewall

    kept = [capability.CAP_NET_ADMIN]
    if firewall.needs_raw_sockets() or firewall.has_legacy_tables():
        # iptables-legacy opens a raw socket to talk to the kernel, also to remove old rules.
        kept.append(capability.CAP_NET_RAW)
    try:
        capability.keep_only(kept, leaving)
    except PlatformError as error:
        _log.warning("%s", error)


def require_limits() -> None:
    """Raise the limit of open files; warn of what this sandbox refuses a daemon.

    PlatformError if that is what no daemon can do without. Not before capabilities are given
    up: the thread it starts may not be gone when it has ended.
    """
    from tundp.linux import limits

    why_not_raised = limits.raise_file_limit()
    found = limits.findings()
    for finding in found:
        text = "; ".join(filter(None, (finding.evidence, finding.meaning, finding.next_step)))
        if finding.is_failure:
            raise PlatformError(text)
        _log.warning("%s", text)
    if why_not_raised and not any(each.id == "limits.rlimits" for each in found):
        _log.warning("the limit of open files cannot be raised: %s", why_not_raised)


def enter_sandbox(settings: Settings, leaving: Collection[int] = ()) -> None:
    """Give up what a daemon with these settings has no use for; see daemon/confinement.py."""
    from tundp.daemon.confinement import confine

    confine(settings, leaving)


def loop_factory(choice: Loop) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes an event loop of that kind.

    ConfigError if it is not installed, PlatformError if it cannot run here. AUTO takes asyncio's
    in both cases.
    """
    from tundp.linux import limits

    if choice is Loop.ASYNCIO:
        return asyncio.new_event_loop
    if why_not := limits.why_no_eventfd():
        if choice is Loop.UVLOOP:
            raise PlatformError(
                f"--loop=uvloop cannot run here, eventfd2: {why_not}; use --loop=asyncio"
            )
        return asyncio.new_event_loop
    if importlib.util.find_spec("uvloop") is None:
        if choice is Loop.UVLOOP:
            raise ConfigError("--loop uvloop: uvloop is not installed; use --loop=asyncio")
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


async def run_until_signal(daemon: Coroutine[Any, Any, None], supervisor: Supervisor) -> None:
    """Run `daemon` until it ends or SIGINT or SIGTERM cancels it.

    TundpError if a callback of ours fails again and again at once, and `supervisor` cannot help.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(daemon)
    bugs: list[BaseException] = []

    def on_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        message = context.get("message")
        error = context.get("exception") or RuntimeError(message)
        if not _is_bug_of_ours(context):
            _log.warning("%s: %r", message, error)
            _log.debug("where it was raised:", exc_info=error)
        elif not supervisor.callback_failed(error) and not bugs:
            _log.critical("bug, stopping: %s: %r", message, error)
            bugs.append(error)
            task.cancel()

    loop.set_exception_handler(on_error)

    def stop(signum: int) -> None:
        _log.info("%s: stopping", signal.Signals(signum).name)
        task.cancel()
        # A second one kills at once, as with flannel.
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop, signum)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if bugs:
        raise TundpError(f"ended by a bug: {bugs[0]!r}; please report the log above")


def _is_bug_of_ours(context: dict[str, Any]) -> bool:
    """Whether the event loop reports an exception of a callback of ours, as of the packet path.

    Such a callback may fail again at once, on the same descriptor and for ever. Everything else
    the loop reports is over already: a future or task nobody awaits any more, a library's
    protocol or timer (its connection is lost, which is noticed where it is used), a listener
    short of descriptors.
    """
    if "handle" not in context:
        return False
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in SCARCE:
        return False
    if error is None or error.__traceback__ is None:
        return True
    return any(
        frame.f_code.co_filename.startswith(_PACKAGE)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def leaves(group: BaseExceptionGroup[E]) -> list[E]:
    """The exceptions in `group` and in the groups inside it."""
    found: list[E] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found.extend(leaves(error))
        else:
            found.append(error)
    return found
