"""Questions to a peer's daemon, by way of this node's: GET /v1/peers/ask of the admin socket."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final

from tundp.admin import ask_peer
from tundp.errors import PlatformError
from tundp.observe.matrix import Cell, Reached
from tundp.observe.ping import Answer, Clock, Layer, LayerId

LIMIT_S: Final = 5.0
"""Deadline of this node's daemon, which waits two seconds for the peer."""
STOCK: Final = "stock flanneld"
_ANSWERS: Final = {
    "answer": Answer.ANSWERED,
    "protocol-unreachable": Answer.STOCK,
    "silence": Answer.SILENT,
    "off": Answer.OFF,
    "not-sent": Answer.NOT_SENT,
}
_ASKED: Final = "hello"
PAGES_MAX: Final = 64
"""Questions for one peer's view of the others."""
_CELLS: Final = {
    "answers": Cell.HEARD,
    "one-way": Cell.HEARD,
    "silent": Cell.SILENT,
    "refused": Cell.SILENT,
}
"""By engine.reach.Standing; of the others nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a peer's daemon says of itself, or what came back instead."""

    layer: Layer
    implementation: str = ""
    """`tundp 0.2.0`, `stock flanneld`; empty if that is not known."""
    clock: Clock | None = None


async def ask_hello(path: Path, subnet: IPv4Network) -> Hello:
    """Ask the peer that has `subnet` who it is; never raises."""
    try:
        document = await _ask(path, subnet, "hello")
    except PlatformError as error:
        layer = Layer(
            id=LayerId.CONTROL, asked=_ASKED, answer=Answer.NOT_ASKED, evidence=str(error)
        )
        return Hello(layer=layer)
    return read_hello(document)


async def _ask(path: Path, subnet: IPv4Network, what: str, start: int = 0) -> Mapping[str, Any]:
    """This node's daemon's document about one question. PlatformError if it could not be asked."""
    try:
        async with asyncio.timeout(LIMIT_S):
            return await ask_peer(path, subnet, what, start)
    except TimeoutError:
        raise PlatformError(f"the daemon on {path} took longer than {LIMIT_S:.0f} s") from None


def read_hello(document: Mapping[str, Any]) -> Hello:
    """Decode the document about `hello`; what of it cannot be read is left out."""
    answer = _ANSWERS.get(str(document.get("result")), Answer.NOT_ASKED)
    fields = document.get("answer")
    fields = fields if isinstance(fields, dict) else {}
    name = f"{fields.get('implementation') or 'tundp'} {fields.get('version') or ''}".strip()
    implementation, evidence = "", str(document.get("detail") or "")
    if answer is Answer.ANSWERED:
        implementation = name
        evidence = name if fields else f"tundp, but {evidence or 'it does not say who it is'}"
    elif answer is Answer.STOCK:
        implementation = STOCK
        evidence = "stock flanneld, or a tundp that answers no questions (protocol unreachable)"
    rtt_s = _number(document.get("rtt_s"))
    layer = Layer(
        id=LayerId.CONTROL,
        asked=_ASKED,
        answer=answer,
        rtt_ms=None if rtt_s is None else round(rtt_s * 1e3, 4),
        evidence=evidence,
    )
    return Hello(layer=layer, implementation=implementation, clock=_clock(fields))


def _clock(fields: Mapping[str, Any]) -> Clock | None:
    offset, error = _number(fields.get("clock_offset_s")), _number(fields.get("clock_error_s"))
    if offset is None or error is None:
        return None
    return Clock(offset_s=offset, error_s=error)


def _number(value: Any) -> float | None:
    """A finite number of a document, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# Its view of the others


async def ask_reach(path: Path, subnet: IPv4Network) -> dict[str, Reached] | None:
    """How the peer that has `subnet` reaches the others, by their subnets; None: no answer.

    PlatformError if it could not be asked.
    """
    found: dict[str, Reached] = {}
    start = 0
    for _ in range(PAGES_MAX):
        document = await _ask(path, subnet, "reach", start)
        fields = document.get("answer")
        if document.get("result") != "answer" or not isinstance(fields, dict):
            return found or None
        page = read_reach(fields)
        found |= page
        entries = fields.get("peers")
        start += len(entries) if isinstance(entries, list) else 0
        total = fields.get("total")
        if not page or not isinstance(total, int) or start >= total:
            break
    return found


def read_reach(fields: Mapping[str, Any]) -> dict[str, Reached]:
    """Decode one page; entries that cannot be read are left out."""
    found = {}
    entries = fields.get("peers")
    for each in entries if isinstance(entries, list) else ():
        if not isinstance(each, dict):
            continue
        try:
            subnet = IPv4Network(str(each.get("subnet")))
        except ValueError:
            continue
        rtt_s, mtu = _number(each.get("rtt_s")), _number(each.get("path_mtu"))
        found[str(subnet)] = Reached(
            cell=_CELLS.get(str(each.get("state")), Cell.UNKNOWN),
            rtt_ms=None if not rtt_s else round(rtt_s * 1e3, 4),
            path_mtu=None if not mtu else int(mtu),
        )
    return found
