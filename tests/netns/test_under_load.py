"""Every debugging command while a gigabit a second flows: they answer, and leave nothing behind.

pod1 -- [node1] -- [switch, lease file] -- [node2] -- pod2; TCP from pod 1 to pod 2 all the time

LAB_KILLS=30 (make labs) kills so many commands at random moments, a fifth of that otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.netns.machine import TUNDP
from tests.netns.test_capture import pods, readers
from tests.nodes import MakeOverlay, answers, counters, must_run
from tests.thorough import IS_ALL
from tests.wait import until
from tundp.lab.lab import Host, processes_in, stop_process
from tundp.lab.overlay import LabNode, OverlayLab

BITS_PER_S = 1_000_000_000
BLOCK_LEN = 1 << 20
KILLS = int(os.environ.get("LAB_KILLS", "6"))
NOWHERE = "10.5.254.9"
LIMIT_S = 120


@dataclass
class Gigabit:
    """One TCP connection at a gigabit a second, or as much as there is, each block with its CRC."""

    sent: int = 0
    received: int = 0
    failure: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def send(self, sock: socket.socket) -> None:
        try:
            with sock:
                block = bytearray(os.urandom(BLOCK_LEN))
                due = time.monotonic()
                while not self._stop.is_set():
                    struct.pack_into("!I", block, 4, self.sent)
                    struct.pack_into("!I", block, 0, zlib.crc32(memoryview(block)[4:]))
                    sock.sendall(block)
                    self.sent += 1
                    due = max(due + BLOCK_LEN * 8 / BITS_PER_S, time.monotonic() - 0.1)
                    time.sleep(max(0.0, due - time.monotonic()))
        except OSError as error:
            self.failure = f"sender: {error}"

    def receive(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as file:
                connection.settimeout(60)
                while block := file.read(BLOCK_LEN):
                    crc, number = struct.unpack_from("!II", block)
                    if number != self.received or zlib.crc32(memoryview(block)[4:]) != crc:
                        raise OSError(f"block {number} is not the {self.received}th, or broken")
                    self.received += 1
        except OSError as error:
            self.failure = f"receiver: {error}"

    def stop(self) -> None:
        self._stop.set()


@contextlib.asynccontextmanager
async def gigabit(source: Host, destination: Host, address: str) -> AsyncIterator[Gigabit]:
    """Traffic while the block lasts; then every byte that was sent must have arrived."""
    stream = Gigabit()
    with await destination.socket(socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(1)
        listener.settimeout(30)
        sender = await source.socket(socket.SOCK_STREAM)
        sender.settimeout(60)
        receiving = threading.Thread(target=stream.receive, args=(listener,))
        receiving.start()
        await asyncio.to_thread(sender.connect, listener.getsockname())
        sending = threading.Thread(target=stream.send, args=(sender,))
        sending.start()
        try:
            await until(lambda: stream.received > 20 or stream.failure, "traffic to flow")
            yield stream
        finally:
            stream.stop()
            await asyncio.to_thread(sending.join)
            await asyncio.to_thread(receiving.join)
    assert not stream.failure
    assert stream.received == stream.sent > 20


def words_of(node: LabNode, line: str) -> tuple[str, ...]:
    name, *rest = line.split(" ")
    group = [rest.pop(0)] if name == "config" or rest[:1] == ["history"] else []
    which = f"--admin-socket={node.admin_socket}", f"--subnet-file={node.subnet_file}"
    return (TUNDP, name, *group, *which, *rest)


async def dropping(node: LabNode) -> None:
    """A packet to nobody, again and again."""
    while True:
        await answers(node.pod, NOWHERE, timeout_s=0.1)
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def loaded(make_overlay: MakeOverlay) -> AsyncIterator[tuple[OverlayLab, Gigabit]]:
    async with pods(make_overlay) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        async with gigabit(one.pod, two.pod, two.pod_address) as stream:
            drops = asyncio.create_task(dropping(one))
            try:
                yield overlay, stream
            finally:
                drops.cancel()
                await asyncio.gather(drops, return_exceptions=True)


async def started(node: LabNode, line: str, out: Path) -> subprocess.Popen[bytes]:
    with out.open("wb") as log:
        return await node.host.popen(words_of(node, line), log=log)


async def finish(process: subprocess.Popen[bytes], line: str, out: Path) -> str:
    """What a command printed, stderr included; it must end by itself and well."""
    try:
        code = await asyncio.to_thread(process.wait, LIMIT_S)
    finally:
        await stop_process(process)
    text = out.read_text(errors="replace")
    assert "Traceback" not in text, f"{line}: {text[-2000:]}"
    # doctor: warnings and what it cannot look at are codes of their own; explain: unknown is 3.
    allowed = {"doctor": (0, 1, 3, 4), "explain": (0, 3), "config": (0, 1)}
    assert code in allowed.get(line.split()[0], (0,)), f"{line}: exit code {code}: {text[-2000:]}"
    return text


async def is_left_alone(node: LabNode, tables: str, files: int) -> str:
    """Empty once nothing of any command is left on a node; else what is."""
    left = [pid for pid in processes_in(node.host.namespace) if pid != node.daemon.pid]
    open_files = len(os.listdir(f"/proc/{node.daemon.pid}/fd"))
    now = (await node.host.run("nft", "list", "tables")).stdout
    found = {
        "readers": await readers(node),
        "processes": left,
        "tables": "" if now == tables else now,
        "descriptors": open_files if open_files > files else 0,
    }
    return ", ".join(f"{name}: {each}" for name, each in found.items() if each)


async def must_be_left_alone(node: LabNode, tables: str, files: int) -> None:
    async def is_clean() -> bool:
        return not await is_left_alone(node, tables, files)

    try:
        await until(is_clean)
    except AssertionError:
        raise AssertionError(await is_left_alone(node, tables, files)) from None


async def test_each_and_ten_at_once(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with loaded(make_overlay) as (overlay, stream):
        one, two = overlay.nodes[1], overlay.nodes[2]
        tables = await must_run(one.host, "nft", "list", "tables")
        files = len(os.listdir(f"/proc/{one.daemon.pid}/fd"))
        pcap = tmp_path / "wire.pcapng"
        expected = {
            "status": str(two.gateway.network),
            "status --brief": str(one.gateway.network),
            "drops": "no_route",
            "leases": two.public_ip,
            "leases history": "snapshot: ",
            "blackbox": "encap drop no_route",
            f"explain {one.pod_address} {two.pod_address}": two.public_ip,
            f"capture --wire --inner -c 300 -w {pcap} tcp": "300 packets captured",
            f"replay {pcap}": "encap forward",
            "trace -c 2 tcp": "send",
            "trace -c 1 --drops": "no_route",
            "config check": "OK",
            "doctor": "",
        }
        if not IS_ALL:
            for line in ("config check", "doctor", "status --brief", "leases history"):
                del expected[line]  # most of them run below, too
        for number, (line, wanted) in enumerate(expected.items()):
            before, out = stream.received, tmp_path / f"each{number}"
            text = await finish(await started(one, line, out), line, out)
            assert wanted in text, f"{line}: {text[-2000:]}"
            await until(lambda before=before: stream.received > before, "traffic goes on")

        lines = [
            "trace --for 3s tcp",
            f"capture -w {tmp_path}/ten.pcapng -s 64 --drops --for 3s",
            "drops -f",
            "leases -f",
            "status",
            f"explain {one.pod_address} {two.pod_address}",
            "doctor",
            "blackbox",
            "config check --json",
            f"bugreport -w {tmp_path}/ten.tar.gz --for 2s",
        ]
        outs = [tmp_path / f"ten{number}" for number in range(len(lines))]
        running = [await started(one, line, out) for line, out in zip(lines, outs, strict=True)]

        async def ended(process: subprocess.Popen[bytes], line: str, out: Path) -> str:
            if line.endswith(" -f"):
                await until(lambda: running[0].poll() is not None, "the trace beside it to end")
                process.send_signal(signal.SIGINT)
            return await finish(process, line, out)

        texts = await asyncio.gather(*map(ended, running, lines, outs))
        assert "no_route" in texts[2]
        assert (await counters(one))["conserved"] and (await counters(two))["conserved"]
        await must_be_left_alone(one, tables, files)
    print(f"{stream.received} blocks of {BLOCK_LEN} bytes")


async def test_killed_at_any_moment(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """SIGKILL: no tap, table, process or descriptor of it stays, and traffic goes on."""
    rng = random.Random(11)
    async with loaded(make_overlay) as (overlay, stream):
        one, two = overlay.nodes[1], overlay.nodes[2]
        tables = await must_run(one.host, "nft", "list", "tables")
        files = len(os.listdir(f"/proc/{one.daemon.pid}/fd"))
        lines = [
            "trace tcp",
            f"capture -w {tmp_path}/a.pcapng",
            "drops -f",
            f"capture --wire -w {tmp_path}/b.pcapng",
            "doctor",
            f"bugreport -w {tmp_path}/c.tar.gz",
            "leases -f",
            f"explain {one.pod_address} {two.pod_address}",
            "status",
            "config check",
        ]
        for number in range(KILLS):
            line = lines[number % len(lines)]
            process = await started(one, line, tmp_path / "killed")
            await asyncio.sleep(rng.uniform(0.2, 2.5))
            process.kill()
            await asyncio.to_thread(process.wait)
        await must_be_left_alone(one, tables, files)
        document = json.loads(await must_run(one.host, *words_of(one, "status --json")))
        assert document["counters"]["conserved"] and document["engine"]["readers"] == 0
        assert not (tmp_path / "c.tar.gz").exists()
        assert not [each for each in os.listdir(tmp_path) if each.startswith(".c.tar.gz")]
        before = stream.received
        await until(lambda: stream.received > before, "traffic goes on")
