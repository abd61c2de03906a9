"""The flight recorder as a document, and as lines for people.

The document is what GET /v1/blackbox and `tundp blackbox --json` give; made of the file, by
whoever has it: a daemon, or a command when the daemon is dead.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from tundp.engine.recorder import ControlEvent, Recorded, read_recorder
from tundp.errors import PlatformError
from tundp.files import read_regular
from tundp.observe.events import reason_name
from tundp.wire import describe
from tundp.wire.event import Record


def read(path: Path) -> dict[str, Any]:
    """The document of a file: a flight recorder, or such a document as JSON.

    PlatformError if it is neither, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            is_document = file.read(1) == b"{"
        if not is_document:
            return document(read_recorder(path))
        found: dict[str, Any] = json.loads(read_regular(path))
        for _ in lines(found):
            pass
    except FileNotFoundError:
        return document(read_recorder(path))  # whose words are for people
    except OSError as error:
        if isinstance(error, PlatformError):
            raise
        raise PlatformError(f"{path}: {error.strerror}", error.errno) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlatformError(
            f"{path}: no document of tundp blackbox --json ({type(error).__name__}: {error})"
        ) from None
    return found


def document(recorded: Recorded) -> dict[str, Any]:
    """Everything in a flight recorder, oldest first; packets in hex."""
    identity = recorded.identity
    return {
        "version": identity.version,
        "pid": identity.pid,
        "boot_id": identity.boot_id,
        "started_at": identity.started_at,
        "drops": [
            _drop(worker, record, identity.unix_ns, identity.reasons)
            for worker, record in recorded.drops
        ],
        "control": [_control(event) for event in recorded.control],
    }


def _drop(worker: int, record: Record, unix_ns: int, reasons: tuple[str, ...]) -> dict[str, Any]:
    return {
        "direction": "encap" if record.stage.is_encap else "decap",
        "reason": reason_name(record, reasons),
        "unix_ns": record.time_ns + unix_ns,
        "worker": worker,
        "packet_id": record.packet_id,
        "hop": record.hop,
        "outer": str(IPv4Address(record.outer)) if record.outer else None,
        "port": record.port or None,
        "error": record.error or None,
        "length": record.length,
        "packets": record.packets,
        "generation": record.generation,
        "packet": record.packet.hex(),
    }


def _control(event: ControlEvent) -> dict[str, Any]:
    return asdict(event) | {"fields": dict(event.fields)}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The document as lines, drops and control events by time: what happened before the end."""
    started = _stamp(int(found["started_at"] * 1e9))
    yield f"tundp {found['version']}, pid {found['pid']}, started {started}"
    entries = [
        *((int(each["unix_ns"]), _drop_line(each)) for each in found["drops"]),
        *((int(each["unix_ns"]), f"{each['kind']}: {each['text']}") for each in found["control"]),
    ]
    for unix_ns, text in sorted(entries):
        yield f"{_stamp(unix_ns)}  {text}"


def _drop_line(drop: Mapping[str, Any]) -> str:
    text = f"{drop['direction']} drop {drop['reason']}"
    if drop["outer"]:
        text += f", peer {drop['outer']}:{drop['port']}"
    if drop["error"]:
        text += f", {errno.errorcode.get(drop['error'], drop['error'])}"
    packet = describe.packet(bytes.fromhex(drop["packet"]), drop["length"])
    return f"{text}: {packet}{_times(drop['packets'])}"


def _times(packets: int) -> str:
    return f", and {packets - 1} more like it" if packets > 1 else ""


def _stamp(unix_ns: int) -> str:
    """Local time to the microsecond."""
    seconds, rest = divmod(unix_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{rest // 1000:06d}"
