"""A capture without a file: one line a packet, for people or as JSON for programs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from tundp.observe.capture import Entry
from tundp.observe.capture_words import label
from tundp.printable import LINE_MAX, printable
from tundp.wire import describe
from tundp.wire.pcapng import Way


def text_line(entry: Entry) -> str:
    """Time of day (local), interface, what the packet is, what was decided of it."""
    seconds, rest = divmod(entry.time_ns, 1_000_000_000)
    # The local time of day, as in the log and as tcpdump has it.
    moment = datetime.fromtimestamp(seconds, UTC).astimezone()
    time = f"{moment:%H:%M:%S}.{rest // 1000:06d}"
    return printable(f"{time} {entry.interface:<14} {_summary(entry)}  | {entry.comment}", LINE_MAX)


def json_line(entry: Entry) -> str:
    """One JSON object, without line breaks."""
    return json.dumps(json_record(entry))


def text_lost(count: int) -> str:
    """A line between packets about events nobody read in time."""
    return f"-- {count} events lost: they were not read in time"


def json_lost(count: int) -> str:
    """The same as a JSON object."""
    return json.dumps({"lost": count})


def json_record(entry: Entry) -> dict[str, Any]:
    """A packet and what is known of it. Members are added in later versions, never changed."""
    event, record, peer = entry.event, entry.event.record, entry.event.peer
    return {
        "time_ns": entry.time_ns,
        "interface": entry.interface,
        "direction": {Way.INBOUND: "in", Way.OUTBOUND: "out"}.get(entry.way, ""),
        "stage": event.stage.name.lower(),
        "packet_id": entry.packet_id,
        "label": label(event, entry.number),
        "worker": event.worker,
        "number": entry.number,
        "last_number": record.packet_id + record.more_ids,
        "is_dropped": event.reason is not None,
        "reason": event.reason,
        "errno": record.error or None,
        "peer": None
        if peer is None
        else {
            "address": str(peer.address),
            "port": peer.port,
            "subnets": [str(each) for each in peer.subnets],
        },
        "length": entry.length,
        "packets": record.packets,
        "together": record.together,
        "gso_size": record.gso_size,
        "generation": record.generation,
        "summary": _summary(entry),
        "comment": entry.comment,
        "packet": entry.data.hex(),
    }


def _summary(entry: Entry) -> str:
    outer_len = len(entry.data) - len(entry.inner)
    return describe.packet(bytes(entry.inner), entry.length - outer_len)
