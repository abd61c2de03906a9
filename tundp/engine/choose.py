"""Choosing the engine a node runs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import Final

from tundp.choices import Engine, Offload
from tundp.engine.base import Dataplane, EngineContext
from tundp.engine.native import library, twins
from tundp.engine.native.engine import EngineSettings, NativeEngine
from tundp.engine.reference import ReferenceEngine
from tundp.errors import ConfigError, Unsupported
from tundp.linux import probe
from tundp.linux.offload import KernelOffloads, find_offloads, why_no_batches
from tundp.linux.probe import ProbeReport

_log = logging.getLogger(__name__)

ENGINES: Final = tuple(each.value for each in Engine if each is not Engine.AUTO)
"""Names of every engine there is, fastest first."""
_SLOW: Final = "slow: "
"""Begins the reason for an engine that is taken for lack of a better one."""
_BATCHED: Final = (Engine.GSO, Engine.MMSG)
"""Engines that send and receive many datagrams a system call; each may have several workers."""


def best_engine(kernel: KernelOffloads) -> tuple[Engine, str]:
    """The engine for what this kernel has, and why that one."""
    try:
        library.require()
    except Unsupported as error:
        return Engine.REFERENCE, f"{_SLOW}{error}"
    if why_not := why_no_batches():
        return Engine.SIMPLE, f"{_SLOW}{why_not}"
    if kernel.offloads:
        return Engine.GSO, "the kernel has super-packets"
    return Engine.MMSG, "no super-packets here"


def probe_machine() -> ProbeReport:
    """What `tundp probe` shows. Moves this process to a namespace of its own, for good."""
    why_not = probe.enter_private_namespace()
    kernel = find_offloads()
    engine, why = best_engine(kernel)
    findings = probe.probe(kernel, may_make_device=why_not is None)
    try:
        variants = twins.sums_variants()
        probes = "USDT probes" if library.has_probes() else "no USDT probes"
        build = f"ABI {library.ABI}, {probes}"
    except Unsupported as error:
        variants, build = [], str(error)
    return ProbeReport(
        kernel=os.uname().release,
        machine=os.uname().machine,
        cpus=len(os.sched_getaffinity(0)),
        native=build,
        sums=tuple(variants),
        findings=tuple(findings),
        not_asked=why_not,
        engine=engine.value,
        why=why,
        offloads=tuple(each.value for each in Offload if each in kernel.offloads),
        missing={each.value: text for each, text in kernel.missing.items()},
    )


def make_engine(
    name: Engine,
    socks: Sequence[socket.socket],
    settings: EngineSettings,
    context: EngineContext,
) -> Dataplane:
    """The engine `name`, or for AUTO the best this machine has; logs which and why.

    Unsupported if an engine is asked for by name and the C module is not built or this process
    may not make its system calls; ConfigError if it cannot have that many workers.
    """
    kernel = find_offloads(settings.disabled)
    why = "asked for"
    if name is Engine.AUTO:
        name, why = best_engine(kernel)
    elif name in _BATCHED and (why_not := why_no_batches()):
        one = " and --workers=1" if len(socks) > 1 else ""
        raise Unsupported(
            f"--engine={name.value} cannot run here, {why_not}; use --engine=simple{one}"
        )
    if len(socks) > 1 and name not in _BATCHED:
        raise ConfigError(_why_one_worker(name, len(socks), why))
    engine: Dataplane
    if name is Engine.REFERENCE:
        engine = ReferenceEngine(socks[0], context)
    else:
        engine = NativeEngine(name, socks, context, settings, kernel)
    is_makeshift = why.startswith(_SLOW)
    _log.log(
        logging.WARNING if is_makeshift else logging.INFO,
        "engine %s (%s): %s",
        name.value,
        why,
        engine.describe(),
    )
    return engine


def _why_one_worker(name: Engine, workers: int, why: str) -> str:
    """Words for several workers with an engine that has one. why: that engine was chosen."""
    names = " or ".join(f"--engine={each.value}" for each in _BATCHED)
    if why.startswith(_SLOW):
        return (
            f"--workers={workers} needs {names}, and neither can run here"
            f" ({why.removeprefix(_SLOW)}): use --workers=1, or make that work"
        )
    return f"--workers={workers}: engine {name.value} has one; use --workers=1, or {names}"
