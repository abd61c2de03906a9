"""Writes native/include/tundp_tables.h from the tables in tundp/: one list, two languages.

    python native/tables.py            write the header
    python native/tables.py --check    exit code 1 if it is not current

native/build.py calls `write` before it compiles, so that editing a table is all there is to do.
The tables are standard-library Python: nothing has to be built to read them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "native" / "include" / "tundp_tables.h"
sys.path.insert(0, str(ROOT))

from tundp.choices import SourceCheck  # noqa: E402
from tundp.engine import hop_slots, latency, taps  # noqa: E402
from tundp.engine.counters import COUNTERS, DIRECTION_COUNTERS, CounterSpec  # noqa: E402
from tundp.wire import (  # noqa: E402
    coalesce,
    echo,
    event,
    filter_program,
    icmp,
    ip,
    overhead,
    peer_message,
    policy,
    ratelimit,
    socket_wait,
    transport,
    vnet,
)
from tundp.wire.coalesce import Miss  # noqa: E402
from tundp.wire.drop import DropReason  # noqa: E402
from tundp.wire.event import Stage  # noqa: E402
from tundp.wire.facts import Field  # noqa: E402
from tundp.wire.filter_program import OpKind  # noqa: E402

LIMITS = {
    "TUNDP_OVERHEAD": (overhead.OVERHEAD, "bytes of outer headers"),
    "TUNDP_MAX_DATAGRAM_LEN": (overhead.MAX_DATAGRAM_LEN, "of one IPv4 UDP datagram"),
    "TUNDP_IP_MIN_MTU": (ip.MIN_MTU, "RFC 791 section 3.2"),
    "TUNDP_HEADERS_MAX": (transport.HEADERS_MAX, "IPv4 and TCP with all their options"),
    "TUNDP_VNET_LEN": (vnet.LEN, "linux/virtio_net.h"),
    "TUNDP_REPLY_MAX": (icmp.MAX_ERROR_LEN, "bytes of an ICMP error"),
    "TUNDP_ICMP_RATE_PER_S": (ratelimit.ICMP_RATE_PER_S, "ICMP errors to one of its own pods"),
    "TUNDP_ICMP_WIRE_RATE_PER_S": (ratelimit.ICMP_WIRE_RATE_PER_S, "about packets of one peer"),
    "TUNDP_ICMP_BURST": (ratelimit.ICMP_BURST, "either, at once"),
    "TUNDP_ICMP_LOCAL_BUCKETS": (ratelimit.ICMP_LOCAL_BUCKETS, "by the pod's last octet"),
    "TUNDP_ICMP_WIRE_BUCKETS": (ratelimit.ICMP_WIRE_BUCKETS, "the first for who is no peer"),
    "TUNDP_ECHO_HEAD_LEN": (echo.HEAD_LEN, "bytes of an ICMP echo message up to its cookie"),
    "TUNDP_PEER_PROTO": (peer_message.IP_PROTO, "RFC 3692: of messages between nodes"),
    "TUNDP_PEER_PACKET_MAX": (peer_message.PACKET_MAX, "bytes of one, headers included"),
    "TUNDP_ADMITTED_MAX": (policy.ADMITTED_MAX, "networks the source check admits"),
    "TUNDP_ERRNO_COUNT": (134, "EHWPOISON, asm-generic/errno.h, and one more"),
    "TUNDP_HOP_SOCKETS_MAX": (hop_slots.SOCKETS_MAX, "send sockets of single hops, a worker"),
    "TUNDP_HOP_SEND_BUFFER_LEN": (hop_slots.SEND_BUFFER_LEN, "SO_SNDBUF of one of them"),
    "TUNDP_HOP_HOLD_NS": (hop_slots.HOLD_NS, "a hop keeps its socket at least so long"),
    "TUNDP_HOP_STUCK_NS": (hop_slots.STUCK_NS, "a queue is stuck that did not drain so long"),
    "TUNDP_HOP_CLOSED_NS": (hop_slots.CLOSED_NS, "a hop whose socket was taken gets nothing"),
    "TUNDP_HOP_LOOK_NS": (hop_slots.LOOK_NS, "after no socket could be had, none is looked for"),
    "TUNDP_SNAP_MAX": (event.SNAP_MAX, "bytes of a packet an event record can hold"),
    "TUNDP_EVENT_LEN": (event.HEADER_LEN, "of an event record without its packet"),
    "TUNDP_EVENT_ALIGN": (event.ALIGN, "event records begin and end at multiples"),
    "TUNDP_WAIT_MAX": (socket_wait.WAIT_MAX, "ns: the longest wait in a socket that is told"),
    "TUNDP_WAIT_STEP_NS": (socket_wait.STEP_NS, "a change of the clock that is a step"),
    "TUNDP_WAIT_SLEW_SHIFT": (socket_wait.SLEW_SHIFT, "a clock's slew: 1 / 2^this at most"),
    "TUNDP_EVENT_DROPS": (event.DROPS_BIT, "bit of the drops, among those of the stages"),
    "TUNDP_TAPS_MAX": (taps.TAPS_MAX, "readers of events at once"),
    "TUNDP_TAP_LEN_MIN": (taps.RING_LEN_MIN, "bytes of a ring: any record fits"),
    "TUNDP_LATENCY_EVERY": (latency.EVERY, "one of so many batches is measured"),
    "TUNDP_LATENCY_FINITE": (latency.FINITE, "buckets with a bound: 1 us, 2 us, 4 us ..."),
    "TUNDP_LATENCY_COUNT": (latency.COUNT, "and one for longer times"),
    "TUNDP_EXAMPLES": (taps.EXAMPLES, "packets the flight recorder keeps of a reason"),
    "TUNDP_EXAMPLE_LEN": (taps.EXAMPLE_LEN, "bytes of each"),
    "TUNDP_EXAMPLE_NS": (taps.EXAMPLE_NS, "between two of them"),
    "TUNDP_COALESCE_ITEMS": (coalesce.MAX_ITEMS, "super-packets under construction"),
    "TUNDP_COALESCE_TCP_SEGMENTS": (coalesce.MAX_TCP_SEGMENTS, "packets in one of TCP"),
    "TUNDP_FILTER_OPS_MAX": (filter_program.OPS_MAX, "instructions of a packet filter"),
}


def text() -> str:
    """The header."""
    return "\n".join(_lines()) + "\n"


def write() -> None:
    """Write the header if it is not current; so nothing is touched in a read-only tree."""
    if not is_current():
        HEADER.write_text(text(), encoding="utf-8")


def is_current() -> bool:
    """Whether the header says what the tables say."""
    return HEADER.exists() and HEADER.read_text(encoding="utf-8") == text()


def _lines() -> Iterator[str]:
    yield "/* Generated by native/tables.py from the tables in tundp/wire and tundp/engine:"
    yield " * edit those. */"
    yield "#ifndef TUNDP_TABLES_H"
    yield "#define TUNDP_TABLES_H"
    yield ""
    yield "#include <stdint.h>"
    yield ""
    yield "/* cdef-begin */"
    yield ""
    for name, (value, means) in LIMITS.items():
        yield f"#define {name} {value} /* {means} */"
    yield ""
    yield "/* wire/drop.py */"
    yield from _enum("tundp_drop", "TUNDP_DROP", [(each.name, each) for each in DropReason])
    yield f"#define TUNDP_DROP_COUNT {len(DropReason)}"
    yield ""
    yield "/* wire/coalesce.py */"
    yield from _enum("tundp_miss", "TUNDP_MISS", [(each.name, each) for each in Miss])
    yield f"#define TUNDP_MISS_COUNT {len(Miss)}"
    yield ""
    yield "/* wire/facts.py */"
    yield from _enum("tundp_field", "TUNDP_FIELD", [(each.name, each) for each in Field])
    yield f"#define TUNDP_FIELD_COUNT {len(Field)}"
    yield ""
    yield "/* wire/filter_program.py */"
    yield from _enum("tundp_op_kind", "TUNDP_OP", [(each.name, each) for each in OpKind])
    yield ""
    yield "/* wire/event.py */"
    yield from _enum("tundp_stage", "TUNDP_STAGE", [(each.name, each) for each in Stage])
    yield ""
    yield "/* choices.py */"
    yield from _enum(
        "tundp_source_check",
        "TUNDP_SOURCE",
        [(each.name, number) for number, each in enumerate(SourceCheck)],
    )
    yield ""
    yield "/* engine/counters.py: one direction. */"
    yield "struct tundp_direction {"
    yield from _fields(DIRECTION_COUNTERS)
    yield "\tuint64_t latency[TUNDP_LATENCY_COUNT];"
    yield "\tuint64_t drops[TUNDP_DROP_COUNT];"
    yield "};"
    yield ""
    yield "/* engine/counters.py; `errnos` by number, the last for all above. */"
    yield "struct tundp_counters {"
    yield "\tstruct tundp_direction encap;"
    yield "\tstruct tundp_direction decap;"
    yield from _fields(COUNTERS)
    yield "\tuint64_t coalesce_misses[TUNDP_MISS_COUNT];"
    yield "\tuint64_t errnos[TUNDP_ERRNO_COUNT];"
    yield "};"
    yield ""
    yield "/* cdef-end */"
    yield ""
    yield "/* wire/drop.py: errno and reason of a refused send; others are SEND_FAILED. */"
    yield from _pairs("TUNDP_SEND_REASONS", [(r.name, r.send_errnos) for r in DropReason])
    yield ""
    yield "/* wire/drop.py: errno and reason of a refused TUN write; others are TUN_FAILED. */"
    yield from _pairs("TUNDP_TUN_REASONS", [(r.name, r.tun_errnos) for r in DropReason])
    yield ""
    yield "#endif"


def _enum(name: str, prefix: str, members: list[tuple[str, int]]) -> Iterator[str]:
    yield f"enum {name} {{"
    for member, number in members:
        yield f"\t{prefix}_{member} = {int(number)},"
    yield "};"


def _fields(specs: tuple[CounterSpec, ...]) -> Iterator[str]:
    for spec in specs:
        yield f"\tuint64_t {spec.name};"


def _pairs(name: str, rows: list[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
    pairs = [f"X({error}, TUNDP_DROP_{reason})" for reason, errors in rows for error in errors]
    yield f"#define {name}(X) \\"
    for pair in pairs[:-1]:
        yield f"\t{pair} \\"
    yield f"\t{pairs[-1]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(not is_current())
    write()
