"""Which engine a node runs, and why."""

from __future__ import annotations

import logging
import socket
from typing import Any, Final

from tundp.dataplane import native
from tundp.dataplane.base import Dataplane
from tundp.dataplane.reference import ReferenceEngine
from tundp.errors import Unsupported

_log = logging.getLogger(__name__)

AUTO: Final = "auto"
REFERENCE: Final = "reference"
BEST_NATIVE: Final = "simple"

ENGINES: Final = (*native.RUNS, REFERENCE)
"""Every engine there is, fastest first."""


def make_engine(name: str, sock: socket.socket, **settings: Any) -> Dataplane:
    """The engine `name`, or for `auto` the best this machine has; says which and why.

    settings: what every engine's constructor takes. Unsupported if a C engine is asked
    for by name and the C module is not built.
    """
    if name == REFERENCE:
        return ReferenceEngine(sock, **settings)
    if name != AUTO:
        return native.NativeEngine(name, sock, **settings)
    try:
        engine: Dataplane = native.NativeEngine(BEST_NATIVE, sock, **settings)
    except Unsupported as error:
        _log.warning("engine %s, slow: %s", REFERENCE, error)
        return ReferenceEngine(sock, **settings)
    _log.info("engine %s: the fastest there is", BEST_NATIVE)
    return engine
