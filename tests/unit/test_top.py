"""Rounds of `tundp top`: rates from two looks, flows from records, keys, and the screen.

The golden screens are what people are shown; they change only on purpose.
"""

from __future__ import annotations

import copy
import json
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.json_schema import validate
from tests.packets import MF, icmp_echo, ipv4, tcp, udp
from tundp.errors import PlatformError
from tundp.observe import schema
from tundp.observe.top import FlowRate, Flows, TopRound
from tundp.top import flows as flows_module
from tundp.top.columns import COLUMNS, Shown, figure, rows_of, since, sort_names, sorted_rows
from tundp.top.counts import Sample, round_of, sample_of
from tundp.top.flows import FlowTable, peer_finder
from tundp.top.frame import Line, Size, plain, plain_ascii, screen
from tundp.top.source import kind_of
from tundp.top.view import KEYS, Action, View
from tundp.wire.event import Record, Stage

GOLDEN = Path(__file__).with_name("golden")
STARTED = 1_770_000_000.0
SCHEMA = json.loads(Path(schema.__file__).with_name("top.schema.json").read_text())


def direction(packets: int, dropped: dict[str, int], reads: int) -> dict[str, Any]:
    out = packets - sum(dropped.values())
    return {
        "packets_in": packets,
        "bytes_in": 1000 * packets,
        "packets_out": out,
        "bytes_out": 1000 * out,
        "reads": reads,
        "writes": reads // 2,
        "super_in": 0,
        "super_out": 0,
        "drops": dropped,
    }


def peer(number: int, out: int, into: int, **changes: Any) -> dict[str, Any]:
    traffic = {
        "packets_out": out,
        "bytes_out": 1000 * out,
        "packets_in": into,
        "bytes_in": 500 * into,
        "drops": 0,
        "queue_full": 0,
        "last_heard": STARTED + 95,
        "last_errno": None,
    }
    reach = {"standing": "answers", "since": STARTED, "rtt_ms": 0.25 + number}
    found = {
        "subnet": f"10.5.{number}.0/24",
        "public_ip": f"192.0.2.{number}",
        "port": 8285,
        "path": None,
        "traffic": traffic,
        "reach": reach,
    }
    return found | changes


def document(
    *, uptime: float, peers: Sequence[dict[str, Any]] = (), pid: int = 4242, **changes: Any
) -> dict[str, Any]:
    found = {
        "schema": 2,
        "version": "0.2.0",
        "pid": pid,
        "state": "running",
        "waiting_for": "",
        "started_at": STARTED,
        "uptime_s": uptime,
        "public_ip": "192.0.2.1",
        "subnet": "10.5.1.0/24",
        "backend": {"type": "udp", "mtu": 1472},
        "engine": {"name": "gso"},
        "kernel": {"tun_queue_drops": 0},
        "routing": {"generation": 1, "silent_peers": 0},
        "peers": list(peers),
        "counters": {
            "encap": direction(1000, {"no_route": 10}, 100),
            "decap": direction(500, {}, 50),
            "syscalls": 1000,
        },
    }
    return found | changes


def sample(monotonic: float, **of: Any) -> Sample:
    ticks = {"packets": (2, 1.0 + monotonic / 10, 5.0 + monotonic / 4), "loop": (1, 1.0, 1.0)}
    return sample_of(document(**of), monotonic=monotonic, ticks=ticks)


def a_round(**changes: Any) -> TopRound:
    """Two seconds: 4,000 packets to one peer, 3 drops, a silent peer, one without traffic."""
    silent = {"standing": "silent", "since": STARTED, "rtt_ms": None}
    narrow = {"inner_mtu": 1372, "mtu_origin": "measured"}
    peers = [
        [
            peer(2, 0, 0),
            peer(3, out, into, path=narrow),
            peer(4, quiet, 0, reach=silent),
            peer(5, 0, 0, reach=None, traffic=None),
        ]
        for out, into, quiet in ((100, 50, 7), (4100, 2050, 17))
    ]
    peers[1][2]["traffic"]["last_heard"] = None
    before = sample(10.0, uptime=90.0, peers=peers[0])
    counters = {
        "encap": direction(5000, {"no_route": 12, "too_big": 1}, 180),
        "decap": direction(2500, {}, 90),
        "syscalls": 1500,
    }
    routing = {"generation": 1, "silent_peers": 1}
    after = sample(12.0, uptime=92.0, peers=peers[1], counters=counters, routing=routing, **changes)
    return round_of(before, after, interval_s=2.0)


def test_rates_are_the_differences_of_two_looks() -> None:
    found = a_round()
    assert (found.seconds, found.peers_total, found.silent_peers) == (2.0, 4, 1)
    by_subnet = {each.subnet: each for each in found.peers}
    busy = by_subnet["10.5.3.0/24"]
    assert (busy.packets_out, busy.packets_in) == (4000, 2000)
    assert (busy.packets_out_s, busy.packets_in_s) == (2000.0, 1000.0)
    assert (busy.bits_out_s, busy.bits_in_s) == (16e6, 4e6)
    assert (busy.rtt_ms, busy.path_mtu) == (3.25, 1372)
    idle = by_subnet["10.5.2.0/24"]
    assert (idle.packets_out_s, idle.path_mtu, idle.heard_s) == (0.0, 1472, 0.0)
    assert by_subnet["10.5.4.0/24"].heard_s is None
    assert not by_subnet["10.5.5.0/24"].is_counted
    encap, decap = found.directions
    assert (encap.packets_in, encap.packets_out, encap.drops) == (4000, 3997, 3)
    assert (encap.packets_s, encap.reads_s, encap.packets_per_read) == (2000.0, 40.0, 50.0)
    assert (decap.packets_s, decap.packets_per_write) == (1000.0, 100.0)
    assert found.syscalls_s == 250.0
    rows = [(each.reason, each.count, each.total, each.drops_s) for each in found.drops]
    assert rows == [("no_route", 2, 12, 1.0), ("too_big", 1, 1, 0.5)]
    assert [(each.name, each.threads, each.user, each.system) for each in found.threads] == [
        ("packets", 2, 0.1, 0.25),
        ("loop", 1, 0.0, 0.0),
    ]


def test_the_first_look_has_no_rates() -> None:
    found = round_of(None, sample(1.0, uptime=90.0, peers=[peer(2, 5, 5)]), interval_s=2.0)
    assert found.seconds == 0
    assert [each.packets_out for each in found.peers] == [0]
    assert [(each.packets_in, each.packets_s) for each in found.directions] == [(0, 0.0)] * 2
    assert [(each.count, each.total) for each in found.drops] == [(0, 10)]
    assert found.threads == ()


def test_subnets_of_one_endpoint_are_one_row() -> None:
    """They have one set of counters: two rows would show its packets twice."""
    looks = []
    for out in (0, 30):
        second = peer(2, out, 0) | {"subnet": "10.5.77.0/24"}
        looks.append(sample(out / 10, uptime=out / 10, peers=[peer(2, out, 0), second]))
    (row,) = round_of(*looks, interval_s=3.0).peers
    assert (row.subnet, row.subnets, row.packets_out) == ("10.5.2.0/24", 2, 30)


@pytest.mark.parametrize("what", ["pid", "started_at"])
def test_a_restarted_daemon_is_noticed_and_gives_no_rates(what: str) -> None:
    before = sample(10.0, uptime=90.0, peers=[peer(2, 500, 0)])
    changed: dict[str, Any] = {what: 4343 if what == "pid" else STARTED + 91}
    after = sample(12.0, uptime=1.0, peers=[peer(2, 900, 0)], **changed)
    found = round_of(before, after, interval_s=2.0)
    assert found.restarted
    assert found.seconds == 0
    assert [each.packets_out for each in found.peers] == [0]
    assert "restarted (pid 4242" in found.notes[0]


def test_a_peer_that_came_and_one_counted_anew_have_what_came_since() -> None:
    before = sample(10.0, uptime=90.0, peers=[peer(2, 500, 0)])
    after = sample(11.0, uptime=91.0, peers=[peer(2, 20, 0), peer(3, 7, 0)])
    found = round_of(before, after, interval_s=1.0)
    assert [each.packets_out for each in found.peers] == [20, 7]


def test_a_clock_that_is_set_changes_no_rate() -> None:
    before = sample(10.0, uptime=90.0, peers=[peer(2, 0, 0)])
    after = sample(12.0, uptime=3690.0, peers=[peer(2, 100, 0)])
    found = round_of(before, after, interval_s=2.0)
    assert (found.seconds, found.peers[0].packets_out_s) == (2.0, 50.0)


def test_a_backend_without_counters_and_a_start_say_so() -> None:
    nothing = {"counters": None, "engine": None, "kernel": None}
    found = round_of(None, sample(1.0, uptime=9.0, **nothing), interval_s=2.0)
    assert "leaves packets to the kernel" in found.notes[0]
    starting = nothing | {
        "state": "starting", "waiting_for": "etcd", "routing": None, "backend": None,
        "subnet": None, "public_ip": None,
    }  # fmt: skip
    found = round_of(None, sample(1.0, uptime=9.0, **starting), interval_s=2.0)
    assert list(found.notes) == ["the daemon is starting: etcd"]
    assert texts(found, View(), 80, 24)


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ({"schema": 1}, "has schema 1, .* needs a daemon of tundp 0.2.0"),
        ({"schema": 2}, "KeyError: 'peers'"),
        ([], "has schema None"),
        ({"schema": 2, "peers": [7]}, "TypeError"),
        (document(uptime=1.0) | {"counters": {"encap": {}}}, "KeyError: 'packets_in'"),
    ],
)
def test_an_answer_of_another_version_is_named(broken: Any, text: str) -> None:
    with pytest.raises(PlatformError, match=text):
        round_of(None, sample_of(broken, monotonic=1.0), interval_s=2.0)


# Flows


def records(*given: tuple[Stage, bytes, dict[str, Any]]) -> bytes:
    return b"".join(
        Record(
            stage=stage,
            packet_id=number,
            length=fields.pop("length", len(packet)),
            packet=packet[: flows_module.SNAP],
            **fields,
        ).pack()
        for number, (stage, packet, fields) in enumerate(given)
    )


def taken(table: FlowTable, *, seconds: float = 2.0, lost: int = 0) -> Flows:
    finder = peer_finder([{"subnet": "10.5.2.0/24", "public_ip": "192.0.2.2"}])
    return table.take(seconds=seconds, lost=lost, peer_of=finder)


def ends(row: FlowRate) -> tuple[str, str, int | None, str, int | None]:
    return row.protocol, row.local, row.local_port, row.remote, row.remote_port


def test_both_directions_of_a_flow_are_one_row() -> None:
    there = tcp(b"x" * 10, source="10.5.1.7", destination="10.5.2.8", sport=4000, dport=80)
    back = tcp(b"x" * 20, source="10.5.2.8", destination="10.5.1.7", sport=80, dport=4000)
    table = FlowTable()
    table.add(
        records(
            (Stage.TUN_READ, there, {}),
            (Stage.TUN_READ, there, {}),
            (Stage.UDP_RECEIVE, back, {"outer": 0xC0000202}),
            (Stage.UDP_SEND, there, {}),  # the same packet, further on
            (Stage.TUN_READ, there, {"is_dropped": True}),
        )
    )
    found = taken(table)
    (row,) = found.rows
    assert ends(row) == ("TCP", "10.5.1.7", 4000, "10.5.2.8", 80)
    assert (row.packets_out, row.packets_in, row.peer) == (2, 1, "192.0.2.2")
    assert (row.bytes_out, row.bytes_in) == (2 * len(there), len(back))
    assert (row.packets_out_s, row.bits_in_s) == (1.0, 4.0 * len(back))
    assert (found.records, found.lost, found.total) == (3, 0, 1)


def test_a_super_packet_is_as_many_packets_with_a_header_each() -> None:
    head = tcp(b"", source="10.5.1.7", destination="10.5.2.8")
    fields = {"packets": 5, "gso_size": 1000, "length": len(head) + 4500}
    table = FlowTable()
    table.add(records((Stage.TUN_READ, head, fields)))
    (row,) = taken(table).rows
    assert (row.packets_out, row.bytes_out) == (5, 5 * len(head) + 4500)
    assert row.peer == "192.0.2.2", "of its remote address, while nothing came back"


def test_what_has_no_ports_is_told_apart_by_addresses() -> None:
    echo = icmp_echo(b"", source="10.5.1.7", destination="10.5.9.9")
    late = ipv4(b"payload!", 17, source="10.5.1.7", destination="10.5.9.9", frag=MF | 100)
    table = FlowTable()
    table.add(
        records(
            (Stage.TUN_READ, echo, {}),
            (Stage.TUN_READ, late, {}),
            (Stage.TUN_READ, b"\x60" + bytes(50), {}),
            (Stage.TUN_READ, b"\x45", {}),
        )
    )
    found = {ends(row): row for row in taken(table).rows}
    assert set(found) == {
        ("ICMP", "10.5.1.7", None, "10.5.9.9", None),
        ("UDP", "10.5.1.7", None, "10.5.9.9", None),
        ("not IPv4", "", None, "", None),
    }
    assert found["not IPv4", "", None, "", None].packets_out == 2
    assert {row.peer for row in found.values()} == {""}


def test_options_do_not_hide_the_ports() -> None:
    longest = b"\x01" * 40
    packet = udp(
        b"x", source="10.5.1.7", destination="10.5.2.8", sport=7, dport=9, ip_options=longest
    )
    assert packet[0] == 0x4F
    table = FlowTable()
    table.add(records((Stage.TUN_READ, packet, {})))
    assert ends(taken(table).rows[0]) == ("UDP", "10.5.1.7", 7, "10.5.2.8", 9)


def test_lost_records_scale_the_rates_and_are_named() -> None:
    packet = udp(b"x", source="10.5.1.7", destination="10.5.2.8")
    table = FlowTable()
    table.add(records(*[(Stage.TUN_READ, packet, {})] * 10))
    found = taken(table, seconds=1.0, lost=30)
    (row,) = found.rows
    assert (row.packets_out, row.packets_out_s) == (10, 40.0)
    shown = texts(replace(a_round(), flows=found), View(shown=Shown.FLOWS), 100, 24)
    assert any("sampled: 30 of 40 records lost" in line for line in shown)


def test_an_idle_flow_stays_for_a_few_rounds() -> None:
    packet = udp(b"x", source="10.5.1.7", destination="10.5.2.8")
    table = FlowTable()
    table.add(records((Stage.UDP_RECEIVE, packet, {"outer": 0xC0000203})))
    assert taken(table).total == 1
    for _ in range(4):
        found = taken(table)
        assert (found.total, len(found.rows)) == (0, 1)
        assert (found.rows[0].packets_in, found.rows[0].peer) == (0, "192.0.2.3")
    assert taken(table).rows == []


def test_more_flows_than_are_told_apart_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows_module, "FLOWS_MAX", 3)
    table = FlowTable()
    packets = [udp(b"x", source="10.5.1.7", destination="10.5.2.8", sport=n) for n in range(1, 6)]
    table.add(records(*[(Stage.TUN_READ, packet, {}) for packet in packets]))
    found = taken(table)
    assert (len(found.rows), found.unlisted) == (3, 2)
    assert sum(row.packets_out for row in found.rows) + found.unlisted == 5


@pytest.mark.parametrize("data", [b"\0" * 64, struct.pack("=I", 72) + bytes(20)])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="event record"):
        FlowTable().add(data)


# The view


def pressed(view: View, *keys: str) -> Action:
    action = Action.NOTHING
    for key in keys:
        action = view.press(key)
    return action


def test_every_key_of_the_help_does_something() -> None:
    names = {"SPACE": " ", "TAB": "\t", "UP": "KEY_UP", "DOWN": "KEY_DOWN", "^L": "\x0c"}
    for keys, _, _ in KEYS:
        for key in keys.split():
            assert View().press(names.get(key, key)) is not Action.NOTHING, key
    assert View().press("x") is Action.NOTHING


def test_views_and_their_order() -> None:
    view = View()
    assert pressed(view, "\t") is Action.FILTER
    assert view.shown is Shown.FLOWS
    assert pressed(view, "\t") is Action.FILTER
    assert pressed(view, "p") is Action.DRAW
    assert view.sort == "traffic"
    seen = [view.sort for _ in sort_names(Shown.PEERS) if pressed(view, ">")]
    assert sorted(seen) == sorted(sort_names(Shown.PEERS))
    assert view.sort == "traffic"
    pressed(view, "<")
    assert view.sort == "mtu"
    pressed(view, "r")
    assert view.is_reversed
    pressed(view, "d")
    assert not view.is_reversed, "each view has its own"


def test_a_filter_is_typed_and_a_wrong_one_named() -> None:
    view = View()
    pressed(view, "f", *"tcp prot 443")
    assert pressed(view, "\n") is Action.DRAW
    assert view.prompt is not None
    assert "'prot' is not understood" in view.prompt.error
    assert "'prot'" in texts(a_round(), view, 80, 24)[-1]
    pressed(view, "^U", *"tcp port 4433", "KEY_BACKSPACE")
    assert pressed(view, "\n") is Action.FILTER
    assert (view.filter, view.shown) == ("tcp port 443", Shown.FLOWS)
    assert not view.prompt
    pressed(view, "/", "x", "\x1b")
    assert view.filter == "tcp port 443"
    pressed(view, "/", "\x15")
    assert pressed(view, "KEY_ENTER") is Action.FILTER
    assert view.filter == ""


def test_intervals() -> None:
    view = View(interval=2.0)
    assert pressed(view, "+") is Action.INTERVAL
    assert view.interval == 5.0
    pressed(view, "-", "-", "-")
    assert view.interval == 0.5
    pressed(view, *"-----")
    assert view.interval == 0.1
    for wrong in ("0", "nan", "1e9", "x"):
        view.prompt = None
        pressed(view, "i", *wrong, "\n")
        assert view.prompt is not None
        assert "from 0.1 to 3600" in view.prompt.error
    pressed(view, "^U", *"0.75")
    assert pressed(view, "\r") is Action.INTERVAL
    assert view.interval == 0.75
    assert pressed(view, " ") is Action.DRAW
    assert view.is_paused
    assert pressed(view, " ") is Action.INTERVAL


def test_each_column_sorts_and_turns() -> None:
    found = replace(a_round(), flows=FLOWS)
    for shown in Shown:
        rows = rows_of(found, shown)
        for name in sort_names(shown):
            there = sorted_rows(rows, shown, name)
            back = sorted_rows(rows, shown, name, is_reversed=True)
            values = [value_of(shown, name, row) for row in there]
            assert [value_of(shown, name, row) for row in back] == values[::-1], name
            assert len(there) == len(rows)
    peers = sorted_rows(found.peers, Shown.PEERS, "answers")
    assert peers[0].standing == "silent"  # type: ignore[union-attr]
    peers = sorted_rows(found.peers, Shown.PEERS, "traffic")
    assert peers[0].subnet == "10.5.3.0/24"  # type: ignore[union-attr]


def value_of(shown: Shown, name: str, row: Any) -> Any:
    if name == "traffic":
        return row.bits_out_s + row.bits_in_s
    return next(each for each in COLUMNS[shown] if each.id == name).value(row)


# The screen


FLOWS = Flows(
    filter="tcp",
    records=5200,
    seconds=2.0,
    total=2,
    rows=[
        FlowRate(
            protocol="TCP",
            local="10.5.1.7",
            local_port=40_000,
            remote="10.5.3.9",
            remote_port=443,
            peer="192.0.2.3",
            packets_out_s=1234.5,
            packets_in_s=0.5,
            bits_out_s=987_654_321.0,
            bits_in_s=4000.0,
        ),
        FlowRate(protocol="ICMP", local="10.5.1.7", remote="10.5.2.1", packets_in_s=7.0),
    ],
)


def texts(found: TopRound | None, view: View, width: int, height: int, **more: str) -> list[str]:
    return [line.text for line in screen(found, view, Size(width=width, height=height), **more)]


def lines_of(width: int, height: int) -> list[Line]:
    """All views and the help, one below the other."""
    found = replace(a_round(), flows=FLOWS)
    shown = []
    for each in Shown:
        shown += screen(found, View(shown=each), Size(width=width, height=height))
    return shown + screen(found, View(has_help=True), Size(width=width, height=height))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (132, 40), (40, 10)])
def test_the_screen_is_the_golden_one(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    shown = lines_of(width, height)
    text = "".join(f"{line.text.rstrip()}\n" for line in shown)
    assert text == (GOLDEN / f"top-{width}x{height}.txt").read_text(encoding="utf-8")
    assert all(len(line.text) <= width for line in shown)


def test_a_pipe_has_every_digit_and_no_screen() -> None:
    size = Size(width=None, height=None, is_exact=True)
    text = "\n".join(plain(a_round(), View(), size, 2))
    assert "encap: 2,000 p/s  16,000,000 b/s" in text
    assert "10.5.3.0/24" in text
    assert "10.5.5.0/24" not in text, "two rows were asked for"
    rows = [line for line in text.splitlines() if line.startswith("10.5.3.0/24")]
    assert rows[0].split()[3:7] == ["2,000", "1,000", "16,000,000", "4,000,000"]


@pytest.mark.parametrize("width", [1, 5, 17, 39, 60, 79, 81, 120])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 13, 14, 30])
def test_no_size_makes_a_line_or_a_screen_too_long(width: int, height: int) -> None:
    found = replace(a_round(), flows=replace(FLOWS, error="no flows: " + "x" * 300))
    for shown in Shown:
        for view in (View(shown=shown), View(shown=shown, has_help=True)):
            lines = texts(found, view, width, height, trouble="y" * 500)
            assert max(map(len, lines)) <= width
            if not view.has_help:
                assert len(lines) == height


def test_only_rows_that_fit_are_made() -> None:
    peers = [peer(2, 0, 0) | {"public_ip": f"192.0.2.{n}"} for n in range(200)]
    looks = [sample(at, uptime=at, peers=copy.deepcopy(peers)) for at in (1.0, 2.0)]
    found = round_of(*looks, interval_s=1.0)
    view = View()
    rows = [line for line in texts(found, view, 80, 24) if line.startswith("10.5.")]
    assert 10 < len(rows) < 24
    assert "192.0.2.0:8285" in rows[0]
    view.press("KEY_END")
    rows = [line for line in texts(found, view, 80, 24) if line.startswith("10.5.")]
    assert "192.0.2.199:8285" in rows[-1]
    view.press("KEY_HOME")
    assert "192.0.2.0:8285" in "\n".join(texts(found, view, 80, 24))


def test_trouble_and_foreign_text_are_one_clean_line() -> None:
    shown = texts(a_round(), View(), 80, 24, trouble="no daemon \x1b[2J\nanswers")
    assert any("no daemon \\x1b[2J\\nanswers" in line for line in shown)
    starting = replace(a_round(), notes=["the daemon is starting: \x1b]0;x\x07 漢字" + "漢" * 99])
    for line in screen(starting, View(), Size(width=80, height=24)):
        assert line.text.isprintable()
    odd = replace(a_round().peers[0], standing="\x1b[7m\nrow", public_ip="\u202e1")
    for line in screen(replace(a_round(), peers=[odd]), View(), Size(width=120, height=24)):
        assert line.text.isprintable()
    assert plain_ascii("a…b µs 漢") == "a~b us \\u6f22"


def test_json_fits_its_schema() -> None:
    found = json.loads(json.dumps(replace(a_round(), flows=FLOWS).to_json()))
    validate(found, SCHEMA)
    assert SCHEMA["properties"].keys() == found.keys()
    # What every member is: nothing is left out silently.
    assert found["flows"]["rows"][0]["remote_port"] == 443


def test_figures() -> None:
    assert [figure(each) for each in (0, 0.04, 0.44, 9.96, 12.6, 9999, 12_345, 9.9e9)] == [
        "0", "<0.1", "0.4", "10", "13", "9,999", "12.3 k", "9.9 G",
    ]  # fmt: skip
    spans = (None, 0, 119, 120, 7199, 7200, 172_800)
    assert [since(each) for each in spans] == ["never", "0s", "119s", "2m", "119m", "2h", "2d"]


def test_threads_are_known_by_their_names() -> None:
    names = ("tundp-gso-0", "tundp-mmsg-15", "tundp", "lookup etcd-0", "a-b-c")
    found = [kind_of(name, is_main=False) for name in names]
    assert found == ["packets", "packets", "others", "others", "others"]
    assert kind_of("tundp", is_main=True) == "loop"
