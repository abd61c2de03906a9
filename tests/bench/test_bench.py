"""The bench itself, small: real labs, real traffic, and every way it must not be fooled."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import netns

from tests.wait import DEADLINE_S, until, until_sync
from tundp.bench import machine, paths, workloads
from tundp.bench.plan import BenchSettings
from tundp.bench.restart import run_restarts
from tundp.bench.restart_results import RestartSettings
from tundp.bench.results import load
from tundp.bench.run import PREFIX, Progress, clean_bench, run_bench
from tundp.errors import LabError
from tundp.finding import Verdict
from tundp.lab import generators
from tundp.lab.generators import Generator
from tundp.lab.lab import Host, Lab, create_namespace, remove_namespace

PORT = 5999


def left_behind() -> list[str]:
    return [name for name in netns.listnetns() if name.startswith(PREFIX)]


def settings(*only: str, **changes: Any) -> BenchSettings:
    base: dict[str, Any] = {"rounds": 2, "seconds": 0.1, "topology": "host", "flanneld": None}
    base["patience_s"] = 0.0  # the machine is busy with other tests
    return BenchSettings(profile="quick", only=only, **(base | changes))


async def small_bench(*only: str, **changes: Any) -> Any:
    return await run_bench(settings(*only, **changes), Progress(), lambda results: None)


async def with_two_hosts(check: Any) -> None:
    async with Lab(f"tt{os.getpid()}b") as lab:
        left, right = await lab.host("l"), await lab.host("r")
        await lab.cable(left, "eth0", right, "eth0")
        await left.configure("eth0", "192.0.2.1/24")
        await right.configure("eth0", "192.0.2.2/24")
        await check(left, right)


async def test_stream_receiver_sees_one_wrong_byte() -> None:
    data = generators.pattern()
    good = bytes(generators.require().ffi.buffer(data, 70_000)[:])

    async def check(left: Host, right: Host) -> None:
        for wrong_at, expected in ((None, 0), (123_456, 1)):
            receiver = generators.stream_receiver(right, "192.0.2.2", PORT, data).start()
            sender = await left.socket(socket.SOCK_STREAM)
            with sender:
                await asyncio.to_thread(sender.connect, ("192.0.2.2", PORT))
                # The period is 65521: what follows is the pattern again from its start.
                period = good[:65521]
                stream = bytearray(period * 4)
                if wrong_at is not None:
                    stream[wrong_at] ^= 1
                await asyncio.to_thread(sender.sendall, stream)
            await until(lambda receiver=receiver: receiver.counted().bytes == 4 * 65521)
            assert receiver.counted().corrupt == expected
            receiver.stop()

    await with_two_hosts(check)


async def test_datagram_receiver_tells_corrupt_double_late_and_reordered_apart() -> None:
    data = generators.pattern()
    pattern = bytes(generators.require().ffi.buffer(data, 70_000)[:])

    def datagram(number: int, run: int = 7, size: int = 100) -> bytearray:
        header = struct.pack("=QQ", number, run)
        return bytearray(header + pattern[number : number + size - 16])

    async def check(left: Host, right: Host) -> None:
        receiver: Generator = generators.datagram_receiver(
            right, "192.0.2.2", PORT, data, run_id=7, size=100
        ).start()
        broken = datagram(3)
        broken[50] ^= 0x10
        sender = await left.socket(socket.SOCK_DGRAM)
        sent = [datagram(1), datagram(2), broken, datagram(2), datagram(6), datagram(5)]
        sent += [datagram(8, run=6), bytearray(b"short"), datagram(7)[:16], datagram(9)]
        with sender:
            for each in sent:
                sender.sendto(each, ("192.0.2.2", PORT))
        await until(lambda: receiver.counted().messages == 5)
        counted = receiver.counted()
        receiver.stop()
        assert counted.corrupt == 3  # a flipped bit, no header, and cut right behind it
        assert counted.duplicates == 1
        assert counted.stale == 1
        assert counted.reordered == 1
        assert counted.bytes == 5 * 100

    await with_two_hosts(check)


async def test_requests_are_matched_with_their_own_answers() -> None:
    async def check(left: Host, right: Host) -> None:
        answers = generators.answerer(right, "192.0.2.2", PORT, is_stream=False, size=16).start()
        asks = generators.requester(left, "192.0.2.2", PORT, is_stream=False, size=16).start()
        await until(lambda: asks.counted().samples > 100)
        asks.stop()
        answers.stop()
        assert asks.samples_ns is not None
        samples = asks.samples_ns[: asks.counted().samples]
        assert samples.min() > 1000
        # An answer later than the requester's patience is lost; on a busy machine some are.
        assert asks.counted().lost < asks.counted().samples

    await with_two_hosts(check)


async def test_traffic_interrupted_before_it_began_is_stopped_all_the_same() -> None:
    async def check(left: Host, right: Host) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
        is_free = threading.Event()
        occupant = loop.run_in_executor(None, is_free.wait)  # the start waits for its thread
        traffic = generators.answerer(right, "192.0.2.2", PORT, is_stream=False, size=16)
        is_waiting = asyncio.Event()

        def wanted() -> Iterator[Any]:
            yield traffic
            raise AssertionError("it was interrupted before")

        async def use() -> None:
            loop.call_soon(is_waiting.set)
            async with workloads._running(wanted()):
                pass

        using = asyncio.create_task(use())
        await is_waiting.wait()
        using.cancel()
        is_free.set()
        with pytest.raises(asyncio.CancelledError):
            await using
        await occupant
        assert not traffic._thread.is_alive()

    await with_two_hosts(check)


async def test_cpu_accounting_counts_a_known_burner() -> None:
    before = machine.read_cpu()
    burnt = await asyncio.to_thread(generators.burn, 0.4)
    used = machine.read_cpu().since(before)
    assert burnt >= 0.4
    # Other work may add all that there is; a blind counter or a wrong unit would be far off.
    assert 0.5 * burnt < used.busy < 1.5 * len(os.sched_getaffinity(0)) * used.at


async def test_cpu_accounting_takes_off_what_the_machine_does_on_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 3 CPU seconds in 2 s of nothing, then 5.5 in 3 s: 1 more than the machine's own 4.5.
    reads = iter([(10.0, 100.0), (13.0, 102.0), (13.0, 102.0), (18.5, 105.0)])

    def read_cpu() -> machine.CpuTimes:
        busy, at = next(reads)
        return machine.CpuTimes(
            user=busy, system=0.0, softirq=0.0, steal=0.0, context_switches=0, at=at
        )

    monkeypatch.setattr(machine, "read_cpu", read_cpu)
    monkeypatch.setattr(machine, "burn", lambda seconds: seconds)
    burnt, used = await machine.check_accounting(0.01)
    assert burnt == 0.01
    assert used == pytest.approx(1.0)


async def test_bench_runs_verifies_and_leaves_nothing() -> None:
    found = await small_bench("veth", "simple", "tcp1", "udp64", "tcp_rr", rounds=1)
    assert not found.is_partial
    assert left_behind() == []
    for lab in ("virtual", "wire"):
        for workload in ("tcp1", "udp64", "tcp_rr"):
            for row in ("vxlan", "vxlan-again", "veth", "simple"):
                kind = "p50_us" if workload == "tcp_rr" else "gbps"
                assert found.cell(lab, row, workload, kind).median > 0, (lab, row, workload)
        # One packet a system call: two reads and two sends a packet, empty ones besides.
        crossings = found.cell(lab, "simple", "tcp1", "crossings_per_packet").median
        # A packet that a busy receiver loses costs the two of its sender only.
        assert 2 < crossings < 4.4
        assert 2 < found.cell(lab, "simple", "tcp1", "copied_per_byte").median < 4.4
        assert found.cell(lab, "simple", "tcp1", "syscalls_per_packet").median >= 4
        assert found.cell(lab, "vxlan", "tcp1", "syscalls_per_packet") is None
    status = {check.title: check.verdict for check in found.checks}
    assert status["payloads"] is Verdict.OK
    assert status["frames wire veth"] is Verdict.OK
    assert status["frames virtual veth"] is Verdict.NOTE  # super-packets, as the lab promises
    assert status["syscalls wire simple"] is Verdict.OK
    assert status["IP fragments wire"] is Verdict.OK


async def test_every_workload_and_pods_work() -> None:
    names = ["udp1400-loss", "tcp1-rev", "udp_rr", "tcp_rr-load", "tcp_crr", "tcp4", "udp512"]
    found = await small_bench("veth", "virtual", *names, topology="pods", rounds=1)
    for name in names:
        assert found.cell("virtual", "veth", name, "window_s"), name
    assert found.cell("virtual", "veth", "tcp_crr", "transactions_per_s").median > 100
    assert found.cell("virtual", "veth", "udp1400-loss", "loss").median <= 0.005


async def test_bench_is_not_comparable_where_the_wire_has_super_packets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def forget(host: Host, device: Any) -> Any:
        return None

    monkeypatch.setattr(paths, "make_wire_like", forget)
    found = await small_bench("veth", "wire", "tcp_rr", rounds=1)
    assert "NOT COMPARABLE" in found.headline
    assert "frames wire veth" in found.headline


async def test_bench_names_the_rows_this_kernel_lacks() -> None:
    found = await small_bench("fou", "wireguard", "wireguard-go", "virtual", "tcp_rr", rounds=1)
    for row in found.rows:
        is_there = (
            row.name == "wireguard-go" and shutil.which("wireguard-go") and shutil.which("wg")
        )
        if row.name in ("fou", "wireguard", "wireguard-go"):
            assert bool(row.why_not) is not bool(is_there), row.name


async def test_stock_flanneld_row_is_started_as_flanneld_is(tmp_path: Path) -> None:
    # No flanneld binary can be had here: a script that takes its command line stands in.
    binary = tmp_path / "flanneld"
    files = f"--admin-socket={tmp_path}/$$.sock --state-dir={tmp_path}"
    run = f'exec {sys.executable} -m tundp run {files} "$@"'
    binary.write_text(f"#!/bin/sh\n{run}\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    found = await small_bench(
        "flanneld", "virtual", "tcp1", rounds=1, seconds=1.0, flanneld=str(binary)
    )
    assert found.cell("virtual", "flanneld", "tcp1", "gbps").median > 0
    assert left_behind() == []
    found = await small_bench("flanneld", "virtual", "tcp_rr", rounds=1, flanneld="/no/such")
    (row,) = [row for row in found.rows if row.name == "flanneld"]
    assert row.why_not == "--flanneld /no/such: no such program"


async def test_a_row_that_fails_takes_no_other_along(tmp_path: Path) -> None:
    binary = tmp_path / "flanneld"
    binary.write_bytes(b"\x00 no program")
    binary.chmod(0o755)
    found = await small_bench("flanneld", "virtual", "tcp_rr", rounds=1, flanneld=str(binary))
    (row,) = [row for row in found.rows if row.name == "flanneld"]
    assert "cannot be built" in row.why_not
    assert found.cell("virtual", "vxlan", "tcp_rr", "p50_us")
    assert left_behind() == []


async def test_two_benches_at_once_are_one_too_many() -> None:
    first = asyncio.create_task(small_bench("veth", "tcp_rr", "virtual"))
    await until(left_behind, "the first bench's namespaces")
    with pytest.raises(LabError, match="another tundp bench is running"):
        await small_bench("veth", "tcp_rr", "virtual")
    with pytest.raises(LabError, match="another tundp bench is running"):
        await clean_bench()
    assert not (await first).is_partial


async def test_bench_refuses_to_start_where_its_namespaces_exist() -> None:
    name = f"{PREFIX}-v-vxlan-l"
    create_namespace(name)
    try:
        with pytest.raises(LabError, match="tundp bench --clean"):
            await small_bench("tcp_rr", "virtual")
        assert left_behind() == [name]
    finally:
        remove_namespace(name)


def bench_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tundp", "bench", *arguments]


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


def has_result(process: subprocess.Popen[str], out: Path) -> bool:
    assert process.poll() is None, read(process)
    return (out / "results.json").exists()


def is_looking_at_frames(process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, read(process)
    return any(name.endswith("w-veth-r") for name in left_behind())


def test_interrupted_bench_keeps_what_it_has_and_tears_down(tmp_path: Path) -> None:
    out = tmp_path / "report"
    process = subprocess.Popen(
        bench_command("--only=veth,tcp_rr,tcp1", "--rounds=12", "--seconds=0.1", f"--out={out}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until_sync(lambda: has_result(process, out))
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "interrupted; everything torn down, what was measured is kept" in text
    found = load(out / "results.json")
    assert found.is_partial
    assert found.samples
    assert "PARTIAL" in (out / "report.md").read_text()
    assert left_behind() == []


def test_command_writes_reports_and_diff_reads_them(tmp_path: Path) -> None:
    out = tmp_path / "report"
    answer = subprocess.run(
        bench_command(
            "--only=veth,virtual,tcp1,tcp_rr", "--rounds=2", "--seconds=0.1", f"--out={out}"
        ),
        capture_output=True,
        text=True,
    )
    assert (out / "report.html").exists(), answer.stdout + answer.stderr
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert not re.search(r"(src|href)=[\"']?https?://", page)
    document = json.loads((out / "results.json").read_text())
    assert document["schema"] == 1
    same = subprocess.run(
        bench_command("diff", str(out / "results.json"), str(out / "results.json")),
        capture_output=True,
        text=True,
    )
    # Two rounds of a busy machine may be too noisy for even that.
    verdicts = re.findall(
        r"(same|undecided|not comparable|better|worse|gone|new)$", same.stdout, re.MULTILINE
    )
    assert verdicts and not {"better", "worse", "gone", "new"} & set(verdicts), same.stdout
    assert "NOT COMPARABLE" in same.stdout
    assert "rounds 2" in same.stdout
    assert same.returncode == 1


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_bench_ended_while_it_looks_at_frames_leaves_nothing(
    tmp_path: Path, signum: signal.Signals
) -> None:
    process = subprocess.Popen(
        bench_command("--only=veth,tcp_rr,wire", f"--out={tmp_path}/r"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until_sync(lambda: is_looking_at_frames(process))
        process.send_signal(signum)
        text, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert left_behind() == []


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--only=nonsense"], 2, "no such row, workload or lab"),
        (["--out=/proc/nothing"], 2, "--out /proc/nothing"),
        (["--rounds=0"], 2, "at least 1"),
        (["--seconds=-1"], 2, "seconds above 0"),
        (["diff", "one.json"], 2, "B is missing: usage"),
        (["diff", "/no/a.json", "/no/b.json"], 2, "/no/a.json"),
    ],
)
def test_bad_input_is_named(arguments: list[str], code: int, expected: str) -> None:
    answer = subprocess.run(bench_command(*arguments), capture_output=True, text=True)
    assert answer.returncode == code
    assert expected in answer.stderr
    assert "Traceback" not in answer.stderr


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="root"):
        asyncio.run(small_bench("tcp_rr", "virtual"))


async def test_a_killed_daemon_is_measured_and_nothing_is_left() -> None:
    settings = RestartSettings(runs=1, loads=("1000",), only=("virtual", "kill"))
    found = await run_restarts(settings, Progress(), lambda _: None)
    assert not found.is_partial
    null, killed = found.rows
    (nothing,), (once,) = null.runs, killed.runs
    assert nothing.result is not None and nothing.result.lost == 0
    assert once.error == ""
    assert once.result is not None and once.result.lost > 0
    assert once.leaked == 0
    first = min(loss.at_s for way in once.result.directions for loss in way.losses)
    assert first >= dict(once.result.marks)["kill -9, start again"] - 0.1
    rounds = next(check for check in found.checks if check.id == "rounds")
    assert rounds.verdict is Verdict.FAIL  # one is not enough
    assert left_behind() == []
