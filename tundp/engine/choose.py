"""Which engine a node runs, and why."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

from tundp.engine.base import Dataplane
from tundp.engine.native import library, twins
from tundp.engine.native.engine import RUNS, EngineSettings, NativeEngine
from tundp.engine.reference import ReferenceEngine
from tundp.errors import ConfigError, Unsupported
from tundp.linux import probe
from tundp.linux.offload import KernelOffloads, Offload, find_offloads

_log = logging.getLogger(__name__)

PROBE_SCHEMA: Final = 1
AUTO: Final = "auto"
REFERENCE: Final = "reference"
SUPER: Final = "gso"
BATCHED: Final = "mmsg"

ENGINES: Final = (*RUNS, REFERENCE)
"""Every engine there is, fastest first."""


def best_engine(kernel: KernelOffloads) -> tuple[str, str]:
    """The engine for what this kernel has, and why that one."""
    try:
        library.require()
    except Unsupported as error:
        return REFERENCE, f"slow: {error}"
    if kernel.offloads:
        return SUPER, "the kernel has super-packets"
    return BATCHED, "no super-packets here"


def probe_machine() -> dict[str, Any]:
    """What `tundp probe` shows. Moves this process to a namespace of its own, for good."""
    why_not = probe.enter_private_namespace()
    kernel = find_offloads()
    engine, why = best_engine(kernel)
    findings = probe.probe(kernel, may_make_device=why_not is None)
    try:
        variants = twins.sums_variants()
        build = f"ABI {library.ABI}"
    except Unsupported as error:
        variants, build = [], str(error)
    return {
        "schema": PROBE_SCHEMA,
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "cpus": len(os.sched_getaffinity(0)),
        "native": build,
        "sums": variants,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "not_asked": why_not,
        "engine": engine,
        "why": why,
        "offloads": [each.value for each in Offload if each in kernel.offloads],
        "missing": {each.value: text for each, text in kernel.missing.items()},
    }


def make_engine(
    name: str, socks: Sequence[socket.socket], settings: EngineSettings, **world: Any
) -> Dataplane:
    """The engine `name`, or for `auto` the best this machine has; says which and why.

    world: what every engine's constructor takes. Unsupported if a C engine is asked for by
    name and the C module is not built; ConfigError if it cannot have that many workers.
    """
    kernel = find_offloads(settings.disabled)
    why = "asked for"
    if name == AUTO:
        name, why = best_engine(kernel)
    if len(socks) > 1 and name not in (SUPER, BATCHED):
        raise ConfigError(f"--workers: engine {name} has one; use --engine={SUPER} or {BATCHED}")
    engine: Dataplane
    if name == REFERENCE:
        engine = ReferenceEngine(socks[0], **world)
    else:
        engine = NativeEngine(name, socks, settings=settings, kernel=kernel, **world)
    _log.log(
        logging.WARNING if name == REFERENCE and why != "asked for" else logging.INFO,
        "engine %s (%s): %s",
        name,
        why,
        engine.describe(),
    )
    return engine
