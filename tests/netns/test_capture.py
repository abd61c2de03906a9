"""`tundp capture` of running daemons, read back by tshark and tcpdump, field by field.

pod1 -- [node1] -- [switch] -- [node2] -- pod2, as in conftest.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.netns.machine import TUNDP
from tests.nodes import MakeOverlay, answers, counters
from tests.wait import until
from tundp.cli import wireshark
from tundp.lab.lab import stop_process
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream, transfer
from tundp.wire.drop import DropReason


@dataclass(slots=True)
class Capture:
    """A running `tundp capture`, and what it printed."""

    process: subprocess.Popen[bytes]
    directory: Path
    files: list[int] = field(default_factory=list)

    @property
    def out(self) -> str:
        return (self.directory / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.directory / "err").read_text()

    async def began(self) -> None:
        """Until it says that it captures."""
        await until(lambda: "capturing on" in self.err or self.process.poll() is not None,
                    "the capture to begin")  # fmt: skip
        assert self.process.poll() is None, self.err

    async def end(self, signum: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), 60)


@contextlib.asynccontextmanager
async def capturing(
    node: LabNode, directory: Path, *words: str, wrapped: Sequence[str] = ()
) -> AsyncIterator[Capture]:
    """`tundp capture WORDS` of a node's daemon; what it prints goes into files of `directory`."""
    directory.mkdir(exist_ok=True)
    argv = [*wrapped, TUNDP, "capture", f"--admin-socket={node.admin_socket}", *words]
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        process = await start(argv, stdout=out, stderr=err)
    try:
        yield Capture(process, directory)
    finally:
        await stop_process(process)


def shark(path: Path, *fields: str, more: Sequence[str] = ()) -> list[list[str]]:
    """A row of fields for each packet, as tshark sees the file; no field of it twice in a row."""
    argv = ["tshark", "-r", str(path), "-d", "udp.port==8285,ip", "-T", "fields"]
    argv += ["-E", "occurrence=f", *more, *(word for name in fields for word in ("-e", name))]
    return [line.split("\t") for line in printed_by(*argv).splitlines()]


def printed_by(*argv: str, **environment: str) -> str:
    """What a program prints, which must not fail."""
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


async def start(argv: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
    return await asyncio.to_thread(popen, argv, **streams)


def holds(path: Path, text: str) -> bool:
    return path.exists() and text.encode() in path.read_bytes()


@contextlib.asynccontextmanager
async def pods(make_overlay: MakeOverlay) -> AsyncIterator[OverlayLab]:
    async with make_overlay(pods=True) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        # ARP and path probes are over before anything is counted.
        await until(lambda: answers(one.pod, two.pod_address), "the first ping between the pods")
        yield overlay


async def test_a_ping_and_a_drop_in_wireshark(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """Each packet on both sides of both daemons, under one id; the drop with reason and step."""
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        path = tmp_path / "ping.pcapng"
        words = ("-w", str(path), "--drops", "icmp and host", one.pod_address)
        async with capturing(one, tmp_path / "1", *words) as capture:
            await capture.began()
            assert await answers(one.pod, two.pod_address, timeout_s=10)
            assert not await answers(one.pod, "10.5.255.9", timeout_s=0.3)
            await until(lambda: holds(path, "DROP no_route"), "the drop in the file")
            assert await capture.end() == 0
            assert f"packets captured to {path}, 0 events lost" in capture.err
        rows = shark(
            path, "frame.interface_name", "frame.packet_id", "frame.comment", "ip.src", "ip.dst",
            "ip.len", "ip.checksum.status", "frame.packet_flags_direction", "icmp.type",
            more=["-o", "ip.check_checksum:TRUE"],
        )  # fmt: skip
        by_interface = {name: row for name, *row in rows}
        pings = [row for row in rows if row[0] != "drop/no_route"]
        names = [row[0] for row in pings]
        # The refusal of the dropped one is written to the TUN as well.
        assert names[:4] == ["flannel0/in", "udp:8285/out", "udp:8285/in", "flannel0/out"], rows
        request_in, request_out, reply_in, reply_out = pings[:4]
        assert request_in[1] == request_out[1] != reply_in[1] == reply_out[1]
        assert request_in[3:6] == [one.pod_address, two.pod_address, "84"]
        assert request_out[3:6] == [one.public_ip, two.public_ip, "112"]
        assert reply_in[3:6] == [two.public_ip, one.public_ip, "112"]
        assert reply_out[3:6] == [two.pod_address, one.pod_address, "84"]
        assert {row[6] for row in rows} == {"1"}, "every IPv4 header sum is right"
        assert [row[7] for row in pings[:4]] == ["0x00000001", "0x00000002"] * 2
        assert f"-> {two.public_ip}:8285, FIB " in request_out[2]
        assert "us after its read" in request_out[2]
        assert str(two.gateway.network) in request_out[2]
        reason = DropReason.NO_ROUTE
        dropped = by_interface["drop/no_route"]
        assert f"DROP no_route: {reason.means}" in dropped[1]
        assert dropped[1].endswith(f"Next: {reason.next_step}")
        assert dropped[3] == "10.5.255.9"
        # Names of this node, and of the peer once it was sent to.
        named = shark(path, "ip.src_host", "ip.dst_host", more=["-N", "n"])
        assert ["node-here", f"node-of-{str(two.gateway.network).replace('/', '-')}"] in named
        assert len(printed_by("tcpdump", "-nr", str(path)).splitlines()) == len(rows)
        rules = Path(wireshark.__file__).with_name("wireshark_files") / "colorfilters"
        filters = re.findall(r"(?m)^@[^@]+@([^@]+)@", rules.read_text())
        found = [shark(path, "frame.interface_name", more=["-Y", each]) for each in filters]
        ways = [sum(f"/{way}" in row[0] for row in rows) for way in ("in", "out")]
        assert [len(each) for each in found] == [1, 0, 2, *ways]


async def test_bulk_traffic_at_wire_size(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """Super-packets cut again: none above the MTU, every checksum right, as tshark adds them up."""
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        big, wire = tmp_path / "big.pcapng", tmp_path / "wire.pcapng"
        async with (
            capturing(one, tmp_path / "1", "-w", str(big), "--inner", "-s", "64", "tcp") as first,
            capturing(one, tmp_path / "2", "-w", str(wire), "--wire", "--inner", "tcp") as second,
        ):
            await first.began()
            await second.began()
            _, is_equal = await transfer(one.pod, two.pod, two.pod_address, payload_len=3 << 20)
            assert is_equal
            await asyncio.sleep(0.2)
            assert [await first.end(), await second.end()] == [0, 0]
        rows = shark(
            wire, "ip.len", "ip.checksum.status", "tcp.checksum.status", "frame.interface_name",
            "frame.comment", "tcp.len", "frame.packet_id",
            more=["-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE"],
        )  # fmt: skip
        assert {tuple(row[1:3]) for row in rows} == {("1", "1")}
        assert max(int(row[0]) for row in rows) <= 1472
        assert {row[3] for row in rows} == {"flannel0/in", "flannel0/out"}
        sizes = [int(row[0]) for row in shark(big, "frame.len")]
        print(f"largest packet {max(sizes)} bytes, {len(rows)} at wire size, {second.err}")
        assert (max(sizes) > 1472) == ("super-packet for" in "".join(row[4] for row in rows))
        if "0 events lost" in second.err:
            sent = sum(int(row[5]) for row in rows if row[3] == "flannel0/in")
            assert sent >= 3 << 20


async def test_ten_captures_at_once_and_what_is_left_of_them(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """All see the same under traffic; ended or killed, none of them leaves anything on."""
    async with pods(make_overlay) as overlay, contextlib.AsyncExitStack() as stack:
        one, two = overlay.nodes[1], overlay.nodes[2]

        async def open_capture(number: int) -> Capture:
            path = tmp_path / f"{number}.pcapng"
            opened = capturing(one, tmp_path / str(number), "-w", str(path), "icmp and host",
                               one.pod_address)  # fmt: skip
            capture = await stack.enter_async_context(opened)
            await capture.began()
            return capture

        captures = await asyncio.gather(*map(open_capture, range(10)))
        assert await readers(one) == 10
        async with PingStream(one.pod, two.pod_address) as stream:
            await until(lambda: stream.received >= 20, "20 answers")
        await asyncio.sleep(0.5)  # the daemon gives away what it has 50 times a second
        signals = [signal.SIGKILL, signal.SIGTERM] * 5
        ends = [await capture.end(each) for capture, each in zip(captures, signals, strict=True)]
        assert ends == [-signal.SIGKILL, 0] * 5
        seen = [shark(tmp_path / f"{at}.pcapng", "frame.packet_id") for at in range(10)]
        assert len(seen[0]) >= 80
        assert all(each == seen[0] for each in seen), "a killed one's file is whole but for its end"

        async def is_unwatched() -> bool:
            return await readers(one) == 0

        await until(is_unwatched, "the daemon to close the taps of all ten")
        assert await answers(one.pod, two.pod_address, timeout_s=10)
        assert (await counters(one))["conserved"]


async def readers(node: LabNode) -> int:
    """Taps that are open in the node's daemon."""
    return int((await node.status_document())["engine"]["readers"])


async def test_a_pipe_into_tshark_while_it_runs(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """Packets are shown while the capture runs; a reader that leaves ends it without a word."""
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        reading, writing = os.pipe()
        shown = tmp_path / "shown"
        with shown.open("wb") as file:
            tshark = await start(
                ["tshark", "-l", "-r", "-", "-T", "fields", "-e", "frame.interface_name"],
                stdin=reading, stdout=file, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        os.close(reading)
        argv = [TUNDP, "capture", f"--admin-socket={one.admin_socket}", "-w", "-", "icmp"]
        capture = await start(argv, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        try:
            async with PingStream(one.pod, two.pod_address):
                await until(lambda: b"flannel0/out" in shown.read_bytes(), "packets in tshark")
                assert capture.poll() is None
            tshark.kill()
            tshark.wait()
            assert await asyncio.to_thread(capture.wait, 60) == 0
            assert capture.stderr is not None
            lines = capture.stderr.read().decode().splitlines()
            assert all(line.startswith("tundp: ") for line in lines), lines
            assert "packets captured" in lines[-1]
        finally:
            for process in (tshark, capture):
                await stop_process(process)
            assert capture.stderr is not None
            capture.stderr.close()


async def test_a_full_disk_and_a_daemon_that_ends(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """One line, exit code 1, whole packets in the file, and no tap left."""
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        room = tmp_path / "room"
        room.mkdir()
        script = 'mount -t tmpfs -o size=32k none "$0" && "$@"; rc=$?; cp "$0"/p "$0".p; exit $rc'
        wrapped = ["unshare", "--mount", "sh", "-c", script, str(room)]
        words = ("-w", f"{room}/p", "icmp")
        async with capturing(one, tmp_path / "1", *words, wrapped=wrapped) as capture:
            await capture.began()
            async with PingStream(one.pod, two.pod_address, pause_s=0.002):
                await until(lambda: capture.process.poll() is not None, "the capture to end")
            assert await capture.end(0) == 1
            assert f"cannot write {room}/p: No space left on device; it ends with" in capture.err
            assert "Traceback" not in capture.err
        rows = shark(tmp_path / "room.p", "frame.packet_id")
        assert len(rows) > 20
        assert await readers(one) == 0
        path = tmp_path / "ended.pcapng"
        async with capturing(one, tmp_path / "2", "-w", str(path), "icmp") as capture:
            await capture.began()
            assert await answers(one.pod, two.pod_address, timeout_s=10)
            await until(lambda: holds(path, "decap"), "the answer in the file")
            await one.stop_daemon()
            assert await capture.end(0) == 1
            assert f"the daemon behind {one.admin_socket} ended" in capture.err
        assert len(shark(path, "frame.packet_id")) >= 4


async def test_lines_and_json(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with (
            capturing(one, tmp_path / "1", "-c", "4", "icmp and host", one.pod_address) as text,
            capturing(one, tmp_path / "2", "-o", "json", "-c", "16", "--outer", "icmp") as lines,
            capturing(one, tmp_path / "3", "--for", "1s", "--drops", "reason no_route") as timed,
            PingStream(one.pod, two.pod_address),
        ):
            assert [await text.end(0), await lines.end(0), await timed.end(0)] == [0, 0, 0]
        kept = tmp_path / "kept"
        kept.write_text("kept")
        words = ("-w", str(kept), "host", one.pod_address, "and")
        async with capturing(one, tmp_path / "4", *words) as wrong:
            assert await wrong.end(0) == 2
        assert "filter" in wrong.err
        assert kept.read_text() == "kept"
        printed = text.out.splitlines()
        assert len(printed) == 4
        assert f"{one.pod_address} > {two.pod_address} ICMP echo request id " in text.out
        documents = [json.loads(line) for line in lines.out.splitlines()]
        assert {each["interface"] for each in documents} == {"udp:8285/out", "udp:8285/in"}
        assert {each["peer"]["address"] for each in documents} == {two.public_ip}
        assert timed.out == ""


async def test_wireshark_lists_and_captures(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """The extcap entry that is installed, and fields of the Lua post-dissector."""
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        folder = tmp_path / "shark"
        printed_by(TUNDP, "capture", f"--install-wireshark={folder}")

        async def tshark(*words: str) -> str:
            # As root Wireshark looks into one folder only, and our tests leave it alone.
            script = 'mount --bind "$0" "$EXTCAP" && exec tshark "$@"'
            return await asyncio.to_thread(
                printed_by, "unshare", "--mount", "sh", "-c", script, f"{folder}/extcap", *words,
                EXTCAP=extcap, TUNDP_ADMIN_SOCKET=str(one.admin_socket),
            )  # fmt: skip

        (extcap,) = re.findall(r"(?m)^Extcap path:\s+(\S+)", printed_by("tshark", "-G", "folders"))

        assert f"tundp (tundp overlay ({one.admin_socket}))" in await tshark("-D")
        assert "IPV4" in await tshark("-L", "-i", "tundp")
        async with PingStream(one.pod, two.pod_address):
            printed = await tshark(
                "-i", "tundp", "-f", f"icmp and host {one.pod_address}", "-c", "8",
                "-X", f"lua_script:{folder}/plugins/tundp.lua", "-T", "fields",
                "-e", "frame.interface_name", "-e", "tundp.stage", "-e", "tundp.label",
                "-e", "ip.proto",
            )  # fmt: skip
        rows = [line.split("\t") for line in printed.splitlines()]
        assert {tuple(row[:2]) for row in rows} == {
            ("flannel0/in", "read"), ("udp:8285/out", "send"),
            ("udp:8285/in", "receive"), ("flannel0/out", "write"),
        }  # fmt: skip
        assert {row[3] for row in rows} == {"1", "17,1"}, "outer datagrams are opened"
