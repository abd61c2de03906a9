"""`tundp top` against real daemons and packets: figures, keys, and the terminal afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.json_schema import validate
from tests.nodes import MakeOverlay
from tests.stopped import stop
from tests.terminal import Terminal
from tests.wait import until
from tundp.lab.lab import Host, stop_process
from tundp.lab.overlay import LabNode
from tundp.lab.traffic import PingStream, ping
from tundp.observe import schema
from tundp.top import source as source_module

TUNDP = (sys.executable, "-m", "tundp", "top")
SCHEMA = json.loads(Path(schema.__file__).with_name("top.schema.json").read_text())
PAYLOAD = bytes(100)
INNER = len(PAYLOAD) + 28


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "gso"))


either_engine = pytest.mark.parametrize("engine", ["gso", "reference"], indirect=True)


async def send(host: Host, destination: str, count: int, *, port: int = 9000) -> int:
    """Send so many UDP packets of INNER bytes, not faster than any queue; the source port."""
    sock = await host.socket(socket.SOCK_DGRAM)
    with sock:
        # Not connected: an ICMP error would be told instead of a packet being sent.
        for number in range(count):
            sock.sendto(PAYLOAD, (destination, port))
            if number % 16 == 15:
                await asyncio.sleep(0.002)
        return int(sock.getsockname()[1])


def flags(node: LabNode, *more: str) -> list[str]:
    return [*TUNDP, f"--admin-socket={node.admin_socket}", *more]


@contextlib.asynccontextmanager
async def rounds(node: LabNode, *more: str) -> AsyncIterator[Sequence[dict[str, Any]]]:
    """The rounds that `tundp top -o json` prints meanwhile."""
    found: list[dict[str, Any]] = []
    process = await asyncio.create_subprocess_exec(
        *flags(node, "-o", "json", "-d", "0.2", *more),
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 22,
    )
    assert process.stdout is not None

    async def read(stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            document = json.loads(line)
            validate(document, SCHEMA)
            found.append(document)

    reading = asyncio.ensure_future(read(process.stdout))
    try:
        yield found
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        await reading
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        reading.cancel()


def total(found: Sequence[dict[str, Any]], public_ip: str, member: str) -> int:
    """What all rounds together say of a peer."""
    rows = [row for each in found for row in each["peers"] if row["public_ip"] == public_ip]
    return sum(row[member] for row in rows)


@either_engine
async def test_rounds_add_up_to_the_packets_that_were_sent(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with rounds(one) as found:
            await until(lambda: len(found) > 0, "a round")
            await send(one.host, two.tunnel_address, 600)
            await ping(one.host, "10.5.177.7", timeout_s=0.2)

            def is_all_there() -> bool:
                return total(found, two.public_ip, "packets_out") >= 600 and any(
                    row["count"] for each in found for row in each["drops"]
                )

            await until(is_all_there, "the packets in the rounds")
            pid = one.daemon.pid
        # Beside them a few echo requests of the daemon's own, of which nothing is said here.
        assert 600 <= total(found, two.public_ip, "packets_out") < 610
        assert 600 * INNER <= total(found, two.public_ip, "bytes_out") < 600 * INNER * 1.1
        for each in found:
            (row,) = (row for row in each["peers"] if row["public_ip"] == two.public_ip)
            rate = row["packets_out"] / each["seconds"]
            assert row["packets_out_s"] == pytest.approx(rate, rel=0.02, abs=0.01)
            assert row["bits_out_s"] == pytest.approx(
                8 * row["bytes_out"] / each["seconds"], rel=0.02, abs=0.01
            )
            assert (each["pid"], each["restarted"]) == (pid, False)
        encap = [each["directions"][0] for each in found]
        assert sum(each["packets_in"] for each in encap) == sum(
            each["packets_out"] + each["drops"] for each in encap
        )
        drops = {(row["direction"], row["reason"]) for each in found for row in each["drops"]}
        assert ("encap", "no_route") in drops
        kinds = {thread["name"] for thread in found[-1]["threads"]}
        assert {"loop"} <= kinds
        is_native = found[-1]["engine"] != "reference"
        assert ("packets" in kinds) is is_native


@either_engine
async def test_flows_add_up_and_the_filter_does_the_work(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with rounds(one, "udp", "port", "9000") as found:
            await until(lambda: len(found) > 0, "a round")
            await send(one.host, two.tunnel_address, 50, port=9001)
            sport = await send(one.host, two.tunnel_address, 600)

            def rows() -> list[dict[str, Any]]:
                return [row for each in found for row in each["flows"]["rows"]]

            await until(lambda: sum(row["packets_out"] for row in rows()) >= 600, "the flow")
        ends = {(row["local_port"], row["remote"], row["remote_port"]) for row in rows()}
        assert ends == {(sport, two.tunnel_address, 9000)}, "the other port is filtered out"
        assert sum(row["packets_out"] for row in rows()) == 600
        assert sum(row["bytes_out"] for row in rows()) == 600 * INNER
        assert {row["peer"] for row in rows()} == {two.public_ip}
        assert {each["flows"]["lost"] for each in found} == {0}
        for each in found:
            for row in each["flows"]["rows"]:
                rate = row["packets_out"] / each["flows"]["seconds"]
                assert row["packets_out_s"] == pytest.approx(rate, rel=0.05, abs=0.1)


async def test_what_cannot_be_read_in_time_is_counted_and_estimated(
    make_overlay: MakeOverlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that rests most of the time, and a ring of 2,048 records."""
    monkeypatch.setattr(source_module, "RING", 1 << 18)
    monkeypatch.setattr(source_module, "READ_SHARE", 1000)
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        source = source_module.Source(one.admin_socket, interval=1.0)
        try:
            await source.set_flows("udp port 9000 and encap")
            await source.flows_begin()
            sent = 12_000
            await send(one.host, two.tunnel_address, sent)
            monkeypatch.setattr(source_module, "READ_SHARE", 0)
            feed = source._flows
            assert feed is not None

            await until(lambda: feed.seen + feed.lost >= sent, "each record to be read or lost")
            flows = feed.take(lambda _: "")
        finally:
            await source.close()
        (row,) = flows.rows
        assert flows.lost > 0
        assert (row.packets_out, flows.records) == (sent - flows.lost, sent - flows.lost)
        assert row.packets_out_s * flows.seconds == pytest.approx(sent, rel=0.01)


async def test_keys_do_what_the_help_says(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = (overlay.nodes[number] for number in (1, 2, 3))
        async with (
            PingStream(one.host, two.tunnel_address, pause_s=0.02),
            Terminal(*flags(one, "-d", "0.3"), width=120) as terminal,
        ):
            await terminal.shows(rf"^10\.5\.\S+ +{two.public_ip}:8285 .*")
            assert {1049} <= terminal.screen.modes
            assert 25 not in terminal.screen.modes
            await terminal.shows(rf"{two.public_ip}:8285(?: +\S+)? +[1-9]\d+ +[1-9]")
            terminal.type("?")
            await terminal.shows("^keys of tundp top")
            await terminal.shows("any key goes back")
            terminal.type("x")
            await terminal.shows("^SUBNET")
            terminal.type(">")
            await terminal.shows("^peers by subnet")
            first = (await terminal.shows(r"(?s)SUBNET[^\n]*\n(\S+)"))[1]
            terminal.type("r")
            await terminal.shows("^peers by subnet  reversed")
            await terminal.shows(rf"(?s)SUBNET[^\n]*\n(?!{re.escape(first)})10\.5\.")
            terminal.type("\t")
            await terminal.shows(rf"^\S+ +{re.escape(two.tunnel_address)} +ICMP .*[1-9]")
            terminal.type("/udp\r")
            await terminal.shows("^filter: udp")
            await terminal.shows("^no packets yet")
            terminal.type("/\x15icmp and hos\r")
            await terminal.shows("'hos' is not understood")
            terminal.type("\x15icmp\r")
            await terminal.shows(rf"^\S+ +{re.escape(two.tunnel_address)} +ICMP .*[1-9]")
            terminal.type(" ")
            await terminal.shows("PAUSED")
            terminal.type(" ")
            await terminal.shows("every 0.3 s")
            terminal.type("+")
            await terminal.shows("every 0.5 s")
            terminal.type("i0.2\r")
            await terminal.shows("every 0.2 s")
            await ping(one.host, "10.5.177.7", timeout_s=0.05)
            terminal.type("d")
            await terminal.shows(r"^encap no_route .* 1 ")
            terminal.type("\x1bOD")  # LEFT, as xterm sends it to a program with a keypad
            await terminal.shows("^drops by reason")
            terminal.resize(40, 10)
            await terminal.shows(r"(?m)^REASON +DROP/s|^WAY +REASON +DROP/s")
            terminal.type("p")
            await terminal.shows("^SUBNET +OUT b/s +IN b/s")
            assert three.public_ip not in terminal.screen.text, "the column is folded away"
            assert len(terminal.screen.lines) == 10
            terminal.resize(120, 24)
            await terminal.shows(rf"{three.public_ip}:8285")
            terminal.type("q")
            assert await terminal.ends() == 0
            assert terminal.screen.modes >= {25}
            assert 1049 not in terminal.screen.modes
            assert terminal.modes == terminal.modes_before
            assert "Traceback" not in terminal.output


async def test_the_terminal_is_given_back_whatever_ends_it(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            async with Terminal(*flags(one)) as terminal:
                await terminal.shows("^SUBNET")
                assert terminal.modes != terminal.modes_before
                terminal.process.send_signal(ending)
                assert await terminal.ends() == 0, ending
                assert terminal.modes == terminal.modes_before
                assert (25 in terminal.screen.modes, 1049 in terminal.screen.modes) == (True, False)
        # A bug of ours, too: its traceback comes after the screen is given back.
        bug = (
            "import sys; from tundp.cli import main, top_session\n"
            "def draw(self, shown): raise ZeroDivisionError('planted')\n"
            "top_session.Session._draw = draw\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        async with Terminal(sys.executable, "-c", bug, *flags(one)[3:]) as terminal:
            assert await terminal.ends() == 1
            assert terminal.modes == terminal.modes_before
            assert "ZeroDivisionError: planted" in terminal.output.rpartition("\x1b[?1049l")[2]


async def test_stop_and_continue(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        async with Terminal(*flags(one, "-d", "0.3")) as terminal:
            await terminal.shows("^SUBNET")
            terminal.process.send_signal(signal.SIGTSTP)

            def is_stopped() -> bool:
                stat = Path(f"/proc/{terminal.process.pid}/stat").read_text()
                return stat.rpartition(")")[2].split()[0] == "T"

            await until(is_stopped, "it to be stopped")
            await until(lambda: 1049 not in terminal.screen.modes, "the screen to be given back")
            assert terminal.modes == terminal.modes_before
            terminal.process.send_signal(signal.SIGCONT)
            await until(lambda: 1049 in terminal.screen.modes, "the screen to be taken again")
            await terminal.shows("^SUBNET")
            terminal.type("d")
            await terminal.shows("^WAY|^drops by")
            terminal.type("q")
            assert await terminal.ends() == 0
            assert terminal.modes == terminal.modes_before


async def test_a_daemon_that_goes_and_comes_back(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with Terminal(*flags(one, "-d", "0.3"), width=120) as terminal:
            await terminal.shows(two.public_ip)
            assert await ping(one.host, two.tunnel_address)
            one.daemon.kill()
            await stop_process(one.daemon)
            await terminal.shows("no daemon answers .* trying again|no daemon answers")
            await overlay.start_daemon(one, "--engine=gso")
            await terminal.shows("was restarted|rates come with|is starting")
            await terminal.shows(rf"(?s)every 0.3 s.*{two.public_ip}:8285")
            assert not re.search("no daemon answers", terminal.screen.text)
            terminal.type("q")
            assert await terminal.ends() == 0


async def test_a_daemon_that_hangs_is_named_and_holds_up_no_signal(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        async with Terminal(*flags(one, "-d", "0.3", "-n", "3")) as terminal:
            assert await terminal.ends() == 0
            last = terminal.output.rpartition("\x1b[?1049l")[2]
            assert "SUBNET" in last, "the last round is there when the screen is gone"
        async with Terminal(*flags(one, "-d", "0.3")) as terminal:
            await terminal.shows("^SUBNET")
            stop(one.daemon.pid)
            try:
                await terminal.shows(r"^the daemon on \S+ does not answer: its process")
                terminal.type("d")
                await terminal.shows("^drops by")
                async with Terminal(*flags(one), width=81) as late:
                    # It waits for its first answer.
                    await until(lambda: is_asking(late.process.pid), "it to ask")
                    late.process.send_signal(signal.SIGINT)
                    assert await late.ends() == 0
            finally:
                os.kill(one.daemon.pid, signal.SIGCONT)
            await until(lambda: "does not answer" not in terminal.screen.text, "an answer")
            terminal.type("q")
            assert await terminal.ends() == 0


def is_asking(pid: int) -> bool:
    """Whether a process has caught SIGINT and holds a socket: it has asked the daemon."""
    text = Path(f"/proc/{pid}/status").read_text()
    caught = int(text.partition("SigCgt:")[2].split()[0], 16)
    sockets = [
        target
        for each in Path(f"/proc/{pid}/fd").iterdir()
        if (target := os.readlink(each)).startswith("socket:")
    ]
    # A pair of them wakes the loop up for signals; SIGHUP is caught by nobody else.
    return bool(caught & 1 << (signal.SIGHUP - 1)) and len(sockets) >= 3


@pytest.mark.parametrize(
    ("environment", "word"),
    [({"TERM": "dumb"}, "TERM is 'dumb'"), ({"TERM": "no-such"}, "no terminfo entry")],
)
async def test_a_terminal_that_cannot_have_a_screen_gets_lines(
    make_overlay: MakeOverlay, environment: dict[str, str], word: str
) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        async with Terminal(*flags(one, "-d", "0.1", "-n", "2"), environment=environment) as shown:
            assert await shown.ends() == 0
            assert word in shown.output
            assert shown.output.count("SUBNET") == 2
            assert "\x1b" not in shown.output


async def test_plain_text_json_and_who_stops_reading(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        done = await one.host.run(*flags(one, "-n", "2", "-d", "0.1"))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("SUBNET") == 2
        assert f"{two.public_ip}:8285" in done.stdout
        assert "\x1b" not in done.stdout
        read = subprocess.list2cmdline(flags(one, "-d", "0.1")) + " | head -3"
        done = await one.host.run("bash", "-o", "pipefail", "-c", read)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 3
        done = await one.host.run(*flags(one, "-n", "1", "-d", "0.1", "-o", "json", "--rows=1"))
        document = json.loads(done.stdout)
        assert (len(document["peers"]), document["flows"]) == (1, None)
        ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        done = await one.host.run(*flags(one, "-n", "1", "-d", "0.1"), environment=ascii_only)
        assert done.returncode == 0
        assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["--view=peers", "tcp"], 2, "a filter is one of flows"),
        (["tcp", "prot", "1"], 2, "'prot' is not understood"),
        (["--sort=rtt", "--view=drops"], 2, "drops can be sorted by direction, reason"),
        (["-d", "0.01"], 2, "at least 0.1 s"),
        (["-n", "0"], 2, "at least 1"),
        (["--admin-socket=/run/no-such.sock", "-n", "1"], 1, "no daemon answers on"),
    ],
)
def test_wrong_usage_and_no_daemon(more: list[str], code: int, text: str) -> None:
    done = subprocess.run([*TUNDP, *more], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert text in done.stderr
    assert done.stdout == ""


async def test_nothing_is_left_behind_by_a_kill(make_overlay: MakeOverlay) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]

        async def readers() -> int:
            return int((await one.status_document())["engine"]["readers"])

        async with rounds(one, "icmp") as found:
            await until(lambda: len(found) > 0, "a round")
            assert await readers() == 1

        async def is_unwatched() -> bool:
            return await readers() == 0

        await until(is_unwatched, "no reader")
        process = await one.host.popen(flags(one, "icmp"))

        async def is_watched() -> bool:
            return await readers() == 1

        await until(is_watched, "a reader")
        os.kill(process.pid, signal.SIGKILL)
        await until(is_unwatched, "no reader after a kill")
