"""The process a daemon is: its logging, rights, descriptors, event loop and signals.

Parsing, printing and exit codes are the command line's (tundp.cli); what the daemon opens
and runs is tundp.daemon.run's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from tundp.choices import Loop
from tundp.errors import ConfigError, PlatformError, TundpError
from tundp.settings.settings import Settings
from tundp.settings.sources import unknown_variables

if TYPE_CHECKING:
    from tundp.store.base import Store

_SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
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


def serve(settings: Settings, store: Store) -> None:
    """Be the daemon until a signal ends it.

    Raises ExceptionGroups of TundpError: LeaseLost with --on-lease-lost=exit, anything else
    that ends a daemon.
    """
    # Before logging is set up: some libraries set their own loggers when they are imported.
    from tundp.daemon.run import run

    set_up_logging(settings.v)
    for name in unknown_variables(os.environ):
        _log.warning("variable %s is set, but tundp does not know it", name)
    drop_capabilities()
    raise_file_limit()
    with asyncio.Runner(loop_factory=loop_factory(settings.loop)) as runner:
        runner.run(run_until_signal(run(settings, store)))


def set_up_logging(level: int) -> None:
    """Log to stderr: errors at level -1, information at 0, debugging above."""
    least = logging.INFO if level == 0 else logging.DEBUG if level > 0 else logging.ERROR
    logging.basicConfig(
        stream=sys.stderr,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        level=least,
    )
    # Libraries report each failed request at ERROR; what matters of it we say ourselves, once.
    for library in ("etcd", "urllib3", "pyroute2", "aiohttp", "grpclib", "hpack", "h2"):
        logging.getLogger(library).setLevel(logging.DEBUG if level >= 2 else logging.CRITICAL)


def drop_capabilities() -> None:
    """Keep what networking needs; a root without the rest is no root."""
    from tundp.linux import capability
    from tundp.linux.firewall import choose as firewall

    kept = [capability.CAP_NET_ADMIN]
    if firewall.needs_raw_sockets():
        # It opens a raw socket to talk to the kernel.
        kept.append(capability.CAP_NET_RAW)
    try:
        capability.keep_only(kept)
    except PlatformError as error:
        _log.warning("%s", error)


def raise_file_limit() -> None:
    """Allow as many open files as the hard limit does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def loop_factory(choice: Loop) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes an event loop of that kind. ConfigError if it is not installed."""
    if choice is Loop.ASYNCIO:
        return asyncio.new_event_loop
    if importlib.util.find_spec("uvloop") is None:
        if choice is Loop.UVLOOP:
            raise ConfigError("--loop uvloop: uvloop is not installed; use --loop=asyncio")
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


async def run_until_signal(daemon: Coroutine[Any, Any, None]) -> None:
    """Run `daemon` until it ends or SIGINT or SIGTERM cancels it; TundpError after a bug."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(daemon)
    bugs: list[BaseException] = []

    def give_up(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # An exception in a callback, that is a bug of ours on the packet path. Going on
        # would spin on the same descriptor for ever: end, and let systemd start anew.
        error = context.get("exception") or RuntimeError(context.get("message"))
        if isinstance(error, OSError) and error.errno in _SCARCE:
            # The loop's own listener lacks descriptors or memory for a moment, and tries again.
            _log.error("%s: %s", context.get("message"), error)
            return
        if not bugs:
            _log.critical("bug, stopping: %s", context.get("message"), exc_info=error)
        bugs.append(error)
        task.cancel()

    loop.set_exception_handler(give_up)

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


def leaves(group: BaseExceptionGroup[TundpError]) -> list[TundpError]:
    """The exceptions in `group` and in the groups inside it."""
    found: list[TundpError] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found.extend(leaves(error))
        else:
            found.append(error)
    return found
