"""`tundp drops`: from status and flight recorder to a report, a table and JSON.

The golden files are what people and programs are shown; they change only on purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from tests import packets
from tests.json_schema import validate
from tundp.admin import serve_admin
from tundp.cli import skb_look as skb_look_module
from tundp.cli.drops import rewrite
from tundp.errors import FilterError
from tundp.linux.kernel_counts import namespace_counts
from tundp.linux.skb_drops import Place as Namespace
from tundp.linux.skb_drops import SkbDrop
from tundp.observe import schema
from tundp.observe.codec import Malformed
from tundp.observe.drops import (
    DropsReport,
    Look,
    drops_report,
    read_examples,
    selected_text,
    selection_of,
)
from tundp.observe.kernel_drops import KERNEL_NAMES
from tundp.observe.skb_rows import SkbRow, SkbTally
from tundp.observe.skb_steps import Place, SkbStep, step_of
from tundp.observe.status import (
    CountersStatus,
    DaemonState,
    DirectionStatus,
    KernelStatus,
    Status,
)
from tundp.show_drops import drops_parts, event_line, skb_line
from tundp.wire.filter import parse

GOLDEN = Path(__file__).with_name("golden")
SCHEMA = json.loads(schema.DROPS_PATH.read_text(encoding="utf-8"))
STARTED = 1_770_000_000.0
NOW = STARTED + 3600


def status(*, encap: dict[str, int], decap: dict[str, int], uptime_s: float = 3600.0) -> Status:
    return Status(
        version="0.2.0",
        pid=1,
        state=DaemonState.RUNNING,
        started_at=STARTED,
        uptime_s=uptime_s,
        public_ip=IPv4Address("192.0.2.1"),
        kernel=KernelStatus(tun_queue_drops=12),
        counters=CountersStatus(
            encap=DirectionStatus(
                packets_in=1_000_000 + sum(encap.values()), packets_out=1_000_000, drops=encap
            ),
            decap=DirectionStatus(
                packets_in=900_000 + sum(decap.values()), packets_out=900_000, drops=decap
            ),
            totals={"socket_overflows": 3, "wakeups": 9},
        ),
    )


BEFORE = status(encap={"no_route": 1000, "send_forbidden": 6}, decap={"source_mismatch": 1})
STATUS = status(
    encap={"no_route": 1204, "send_forbidden": 6, "too_big": 2}, decap={"source_mismatch": 1}
)
LOOKS = (Look(BEFORE, 50.0), Look(STATUS, 52.0))
NAMESPACE = {"nf_conntrack.drop": 7, "Ip.ReasmFails": 2, "Udp.InErrors": 5, "Ip.FragFails": 0}


def recorded(
    packet: bytes, *, at: float, direction: str = "encap", reason: str = "no_route", **more: Any
) -> dict[str, Any]:
    """An entry of the flight recorder's document."""
    return {
        "direction": direction,
        "reason": reason,
        "unix_ns": int(at * 1e9),
        "worker": 0,
        "hop": 0,
        "outer": None,
        "port": None,
        "error": None,
        "length": len(packet),
        "packets": 1,
        "packet": packet[:128].hex(),
    } | more


def dns(to: str, source: str = "10.5.1.2") -> bytes:
    return packets.udp(b"x" * 50, sport=5353, dport=53, source=source, destination=to)


WEB = packets.tcp(b"x" * 1400, sport=40000, dport=443, source="10.5.1.2", destination="10.5.3.9")
PEER: Any = {"outer": "192.0.2.3", "port": 8285, "hop": 4}
BLACKBOX = {
    "drops": [
        recorded(dns("10.5.9.9"), at=NOW - 240.5),
        recorded(dns("10.5.8.8", "10.5.1.7"), at=NOW - 4000),  # of the process before
        recorded(dns("10.5.7.7", "10.5.1.7"), at=NOW - 100),
        recorded(WEB, at=NOW - 0.25, reason="send_forbidden", error=1, **PEER),
        recorded(b"\x60\0\0\0" + bytes(36), at=NOW - 5, direction="decap", reason="not_ipv4"),
        recorded(
            dns("10.5.1.2", "10.9.9.9"), at=NOW - 7200 + 3600, direction="decap",
            reason="source_mismatch", **PEER,
        ),
    ],
    "control": [],
}  # fmt: skip


def report(
    text: str = "", since: float | None = None, blackbox: Any = BLACKBOX, **changes: Any
) -> DropsReport:
    examples = None if blackbox is None else read_examples(blackbox)[0]
    given: dict[str, Any] = {"examples": examples, "namespace": NAMESPACE} | changes
    return drops_report(LOOKS, selection=selection_of(text, since), **given)


def printed(parts: Iterable[RenderableType], *, width: int = 80, is_terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, highlight=False, width=width, force_terminal=is_terminal, color_system=None
    )
    for part in parts:
        console.print(part, crop=False)
    return file.getvalue()


def shown(found: DropsReport) -> str:
    return printed(drops_parts(found))


def reasons(found: DropsReport) -> list[str]:
    return [f"{row.direction} {row.reason}" for row in found.drops]


@pytest.mark.parametrize(
    ("name", "width", "is_terminal"), [("80", 80, True), ("200", 200, True), ("pipe", 80, False)]
)
def test_the_table_is_the_golden_one(name: str, width: int, is_terminal: bool) -> None:
    text = printed(drops_parts(report()), width=width, is_terminal=is_terminal)
    assert text == (GOLDEN / f"drops-{name}.txt").read_text(encoding="utf-8")
    if is_terminal:
        assert all(len(line) <= width for line in text.splitlines())


def test_json_is_the_golden_document_and_fits_its_schema() -> None:
    golden = json.loads((GOLDEN / "drops.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(report().to_json())) == golden
    validate(golden, SCHEMA)
    assert SCHEMA["properties"].keys() == golden.keys()


def test_the_schema_file_is_current() -> None:
    assert schema.DROPS_PATH.read_text(encoding="utf-8") == schema.drops_text()


def test_counts_and_rates() -> None:
    found = report()
    assert [(row.reason, row.count, row.rate) for row in found.drops] == [
        ("no_route", 1204, 102.0),
        ("send_forbidden", 6, 0.0),
        ("too_big", 2, 1.0),
        ("source_mismatch", 1, 0.0),
    ]
    assert found.is_exact
    assert [(each.direction, each.dropped, each.holds) for each in found.balances] == [
        ("encap", 1212, True),
        ("decap", 1, True),
    ]


def test_no_rate_of_one_look_nor_of_two_processes() -> None:
    one = drops_report(LOOKS[1:], examples=[], namespace={}, selection=selection_of(""))
    assert {row.rate for row in one.drops} == {None}
    other = Look(replace(BEFORE, started_at=STARTED - 9), 50.0)
    two = drops_report((other, LOOKS[1]), examples=[], namespace={}, selection=selection_of(""))
    assert {row.rate for row in two.drops} == {None}


def test_a_violated_balance_is_shown() -> None:
    counters = replace(STATUS.counters or CountersStatus(), decap=DirectionStatus(packets_in=1))
    broken = (Look(replace(STATUS, counters=counters), 1.0),)
    found = drops_report(broken, examples=[], namespace={}, selection=selection_of(""))
    assert "decap: 1 in = 0 out + 0 dropped: VIOLATED" in shown(found)


def test_the_newest_packet_of_this_process_is_the_example() -> None:
    row = report().drops[0]
    assert row.example is not None
    assert row.example.words == "10.5.1.7:5353 > 10.5.7.7:53 UDP, 78 B"
    assert row.last == NOW - 100
    assert row.peer is None
    # One is of the process before this one, whose counts are gone, too.
    assert reasons(report("dst host 10.5.8.8")) == []
    forbidden = report().drops[1]
    assert forbidden.peer == "192.0.2.3:8285"
    assert forbidden.last == pytest.approx(NOW - 0.25)
    assert "10.5.1.2:40000 > 10.5.3.9:443 TCP [.] seq 1000, 1440 B, EPERM" in shown(report())


def test_reason_and_direction_select_counts_exactly() -> None:
    assert reasons(report("reason no_route")) == ["encap no_route"]
    assert reasons(report("decap")) == ["decap source_mismatch"]
    assert reasons(report("not (reason no_route or too_big) and encap")) == ["encap send_forbidden"]
    # Without a recorder, too.
    found = report("reason too_big", blackbox=None)
    assert (reasons(found), found.is_exact, list(found.undecided)) == (["encap too_big"], True, [])


def test_addresses_select_by_what_is_recorded_and_say_so() -> None:
    found = report("dst host 10.5.9.9")
    assert reasons(found) == ["encap no_route"]
    row = found.drops[0]
    # Not the newest of its reason, but the newest that was asked for; the count is the reason's.
    assert row.example is not None
    assert str(row.example.destination) == "10.5.9.9"
    assert (row.count, row.last) == (1204, NOW - 240.5)
    assert not found.is_exact
    assert list(found.undecided) == ["encap too_big"]
    text = shown(found)
    assert "not looked at: encap too_big" in text
    assert "counts are of all packets of a reason" in text
    assert reasons(report("peer 192.0.2.3 and tcp")) == ["encap send_forbidden"]
    assert reasons(report("udp port 443")) == []
    assert "no drops selected" in shown(report("udp port 443"))


def test_since_selects_by_the_last_one_recorded() -> None:
    assert reasons(report(since=NOW - 60)) == ["encap send_forbidden"]
    assert reasons(report(since=NOW - 300)) == ["encap no_route", "encap send_forbidden"]
    assert list(report(since=NOW - 60).undecided) == ["encap too_big"]


def test_without_a_recorder_there_are_counts_and_the_reason_why() -> None:
    found = report(blackbox=None, notes=("no examples, no times: it is old",))
    assert [row.example for row in found.drops] == [None] * 4
    assert "note: no examples, no times: it is old" in shown(found)
    assert "no_route" in shown(found)


def test_what_the_kernel_dropped_is_said_to_be_ours_or_not() -> None:
    found = report()
    assert [(each.name, each.count, each.is_ours) for each in found.kernel] == [
        ("tun_queue_full", 12, True),
        ("socket_overflows", 3, True),
        ("nf_conntrack.drop", 7, False),
        ("Ip.ReasmFails", 2, False),
    ]
    lines = shown(found).splitlines()
    ours = next(at for at, line in enumerate(lines) if line.startswith("socket_overflows 3"))
    heading = next(at for at, line in enumerate(lines) if "by whomever" in line)
    theirs = next(at for at, line in enumerate(lines) if "nf_conntrack.drop 7" in line)
    assert ours < heading < theirs


def seen(inner: bytes, reason: str = "NEIGH_FAILED") -> SkbStep:
    """A datagram the kernel dropped on its way to a peer."""
    outer = packets.udp(inner, sport=8285, dport=8285, source="192.0.2.1", destination="192.0.2.3")
    drop = SkbDrop(
        time_ns=int(NOW * 1e9) + 4000,
        reason=reason,
        function="neigh_invalidate",
        device="eth0",
        place=Namespace.HERE,
        packet=outer[:96],
    )
    place = Place(
        network=IPv4Network("10.5.0.0/16"),
        subnet=IPv4Network("10.5.1.0/24"),
        node=IPv4Address("192.0.2.1"),
        port=8285,
    )
    step = step_of(drop, place)
    assert step is not None
    return step


def skb_rows(steps: Iterable[SkbStep], text: str = "") -> Sequence[SkbRow]:
    tally = SkbTally(parse(text))
    for step in steps:
        tally.add(step)
    return tally.rows()


STEPS = (*(seen(WEB) for _ in range(3)), seen(dns("10.5.3.9")), seen(WEB, "QDISC_DROP"))


def test_what_the_kernel_dropped_meanwhile_is_shown_by_its_reason() -> None:
    rows = skb_rows((*STEPS, seen(WEB, "PACKET_SOCK_ERROR")))
    assert [(row.reason, row.count, row.peer) for row in rows] == [
        ("NEIGH_FAILED", 4, "192.0.2.3"),
        ("QDISC_DROP", 1, "192.0.2.3"),
    ]
    found = replace(report(), kernel_seen=rows, kernel_looked_s=1.0, kernel_lost=7)
    validate(json.loads(json.dumps(found.to_json())), SCHEMA)
    text = " ".join(shown(found).split())
    assert (
        "dropped by the kernel in these 1.0 s: encap NEIGH_FAILED 4 in neigh_invalidate, eth0,"
        " datagrams, peer 192.0.2.3: the next hop answers no ARP; ip neigh show dev eth0; is"
        " 192.0.2.3, or the gateway to it, up?; last: 10.5.1.2:5353 > 10.5.3.9:53 UDP, 78 B"
    ) in text
    assert "7 came too fast to be looked at" in text
    none = replace(report(), kernel_seen=[], kernel_looked_s=1.0)
    assert "the kernel dropped none in these 1.0 s" in shown(none)
    assert "dropped by the kernel in these" not in shown(report())
    assert "dropped none" not in shown(report()), "it was not looked at"


def test_a_pods_device_is_not_the_hosts_of_that_name() -> None:
    place = Place(
        network=IPv4Network("10.5.0.0/16"), subnet=IPv4Network("10.5.1.0/24"), node=None, port=8285
    )
    here = replace(seen(WEB).drop, packet=WEB)
    steps = [step_of(replace(here, place=each), place) for each in (Namespace.HERE, Namespace.POD)]
    rows = skb_rows(step for step in steps if step is not None)
    assert [(row.count, row.is_in_pod) for row in rows] == [(1, False), (1, True)]
    text = " ".join(shown(replace(report(), kernel_seen=rows, kernel_looked_s=1.0)).split())
    assert text.count("eth0 of the pod: ") == 1 and text.count("eth0: ") == 1, text


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        ((), None),
        (("has_pods",), "pods' own network namespaces were not looked at: that needs linux 6.12"),
        (("has_reasons",), "have no reasons here: those need linux 5.17"),
    ],
)
async def test_what_an_older_kernel_does_not_show_is_said(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], note: str | None
) -> None:
    """Else "the kernel dropped none in these 1.0 s" reads as if pods had been looked at."""
    older = SimpleNamespace(has_pods=True, has_reasons=True, lost=0)
    for name in missing:
        setattr(older, name, False)

    @contextlib.asynccontextmanager
    async def of_older(network: IPv4Network, port: int) -> AsyncIterator[SimpleNamespace]:
        yield older

    monkeypatch.setattr(skb_look_module, "skb_drops", of_older)
    place = Place(
        network=IPv4Network("10.5.0.0/16"), subnet=IPv4Network("10.5.1.0/24"), node=None, port=8285
    )
    notes: list[str] = []
    async with skb_look_module.skb_look(place, notes):
        pass
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_a_selection_is_of_the_kernels_drops_too() -> None:
    assert [row.count for row in skb_rows(STEPS, "tcp")] == [3, 1]
    assert [row.count for row in skb_rows(STEPS, "peer 192.0.2.9")] == []
    assert [row.count for row in skb_rows(STEPS, "reason no_route")] == []


def test_a_drop_of_the_kernel_in_one_line() -> None:
    line = " ".join(printed([skb_line(STEPS[3])]).split())
    assert line.endswith(
        ".000004 kernel NEIGH_FAILED 10.5.1.2:5353 > 10.5.3.9:53 UDP, 78 B in neigh_invalidate,"
        " eth0, the datagram to 192.0.2.3: the next hop answers no ARP"
    ), line


def test_a_reason_of_a_newer_daemon_is_shown() -> None:
    newer = status(encap={"struck_by_lightning": 3}, decap={})
    found = drops_report((Look(newer, 1.0),), examples=[], namespace={}, selection=selection_of(""))
    assert reasons(found) == ["encap struck_by_lightning"]
    assert "another version" in shown(found)
    nothing = drops_report(
        (Look(newer, 1.0),), examples=[], namespace={}, selection=selection_of("reason no_route")
    )
    assert reasons(nothing) == []


BROKEN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=9), of, max_size=4),
)


@given(st.dictionaries(st.sampled_from(sorted(BLACKBOX["drops"][0])), BROKEN, max_size=11), BROKEN)
@settings(max_examples=100, deadline=None)
def test_a_broken_document_is_malformed_or_has_unread_entries(
    changes: dict[str, Any], whole: Any
) -> None:
    entry = BLACKBOX["drops"][0] | changes
    examples, unread = read_examples({"drops": [BLACKBOX["drops"][3], entry]})
    assert len(examples) + unread == 2
    shown(report(examples=examples))
    try:
        assert read_examples(whole)[1] >= 0
    except Malformed as error:
        assert "flight recorder" in str(error)


def test_a_packet_that_is_none_is_shown_by_its_bytes() -> None:
    found, unread = read_examples(BLACKBOX)
    assert unread == 0
    assert found[4].words == "IP version 6, 40 B: 60" + "0" * 46


def test_a_line_for_a_drop_as_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    example = read_examples(BLACKBOX)[0][3]
    line = printed([event_line(replace(example, packets=3))])
    assert line.endswith(
        " encap send_forbidden 10.5.1.2:40000 > 10.5.3.9:443 TCP [.] seq 1000, 1440 B (3 packets)"
        " peer 192.0.2.3:8285 EPERM: EPERM or EACCES: a local firewall rule refused the datagram\n"
    )
    assert line[:15].count(":") == 2
    assert ".750000 " in line[:16]


def test_flags_and_filter_are_one_selection() -> None:
    text = selected_text(
        "tcp or udp",
        reasons=["no_route", "too_big"],
        peers=[IPv4Network("192.0.2.3")],
        sources=[IPv4Network("10.5.1.0/24")],
        destinations=[IPv4Network("10.5.9.9"), IPv4Network("10.5.8.0/24")],
    )
    assert selection_of(text).filter.text == (
        "(tcp or udp) and (reason no_route or reason too_big) and peer 192.0.2.3"
        " and src net 10.5.1.0/24 and (dst host 10.5.9.9 or dst net 10.5.8.0/24)"
    )
    assert selected_text("") == ""
    negated = selected_text("", reasons=["no_route"], is_negated=True)
    assert selection_of(negated).filter.text == "not reason no_route"
    # No words of one part reach into another.
    with pytest.raises(FilterError) as caught:
        selected_text("tcp) or (udp", reasons=["no_route"])
    assert (caught.value.text, caught.value.position) == ("tcp) or (udp", 3)


def test_short_flags() -> None:
    assert rewrite(["-f", "-o", "json", "-o=json", "tcp"]) == [
        *("--follow", "--output", "json", "--output=json", "tcp")
    ]


# Daemons that cannot answer everything


def command_against(status: Status, path: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tundp drops` against a daemon without a flight recorder."""
    command = [sys.executable, "-m", "tundp", "drops", f"--admin-socket={path}", *arguments]

    async def serve() -> subprocess.CompletedProcess[str]:
        async with serve_admin(path, lambda: status, lambda: b""):
            return await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60
            )

    done = asyncio.run(serve())
    return done.returncode, done.stdout, done.stderr


def test_a_daemon_too_old_for_examples_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.sock"
    code, output, _ = command_against(STATUS, path, "--interval=0")
    assert code == 0
    assert re.search(r"encap no_route +1,204\b", output)
    assert "no examples, no times: this needs tundp 0.2.0 on the daemon's side, it is" in output
    assert "encap: 1,001,212 in = 1,000,000 out + 1,212 dropped: holds" in output
    code, output, errors = command_against(STATUS, path, "-f")
    assert (code, output) == (1, "")
    assert "needs tundp 0.2.0" in errors


def test_a_daemon_that_counts_no_packets_is_no_daemon_without_drops(tmp_path: Path) -> None:
    starting = replace(STATUS, state=DaemonState.STARTING, counters=None)
    code, output, errors = command_against(starting, tmp_path / "new.sock", "--interval=0")
    assert (code, output) == (1, "")
    assert "counts no packets: it is starting" in errors


# The kernel's files


def test_counts_of_this_namespace() -> None:
    counts = namespace_counts()
    assert counts["Ip.InReceives"] >= 0
    assert {name for name in KERNEL_NAMES if not name.startswith("nf_conntrack")} <= counts.keys()


def test_the_kernels_files(tmp_path: Path) -> None:
    (tmp_path / "stat").mkdir()
    (tmp_path / "snmp").write_text("Ip: A B\nIp: 1 -2\nUdp: C\nUdp: x\n\nIcmp: D\n")
    (tmp_path / "netstat").write_text("IpExt: E F\nIpExt: 5\n")
    (tmp_path / "stat" / "nf_conntrack").write_text(
        "entries drop  early_drop\n0000001f  00000002 00000000\n0000001f  0000000a zz\n"
    )
    assert namespace_counts(tmp_path) == {
        "Ip.A": 1,
        "Ip.B": -2,
        "IpExt.E": 5,
        "nf_conntrack.entries": 62,
        "nf_conntrack.drop": 12,
        "nf_conntrack.early_drop": 0,
    }
    assert namespace_counts(tmp_path / "nowhere") == {}
