"""Whether the daemon is alive and ready: the look at its threads, the watchdog, the answers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from aiohttp import ClientSession

from tests.clock import Hurried
from tundp.errors import PlatformError
from tundp.finding import Finding, Verdict, must_hold
from tundp.lab.etcd import free_port
from tundp.observe.health import HEARTBEAT_S, LAG_MAX_S, STUCK_S, Health
from tundp.observe.metrics import CONTENT_TYPE, Metrics
from tundp.observe.web import open_listener, serve_health, serve_metrics

HEARTBEAT_MISSES = round(STUCK_S / HEARTBEAT_S)
"""Looks in a row that find a thread where it was, before it counts as stuck."""
FINE = [must_hold("lease", True, "held")]
BAD = [must_hold("lease", False, "192.0.2.9 holds it now"), must_hold("device", True, "flannel0")]


def hurried(main: Callable[[Health, Hurried], Coroutine[Any, Any, None]]) -> None:
    """`main` beside a Health that watches."""

    async def whole(loop: Hurried) -> None:
        health = Health()
        watch = asyncio.ensure_future(health.watch())
        try:
            await main(health, loop)
            assert not watch.done()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    loop = Hurried()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(whole(loop))


class Threads:
    """Packet threads by script: each look takes the next line; the last one stays."""

    def __init__(self, *script: tuple[int, ...]) -> None:
        self._script = list(script)

    def pulse(self) -> tuple[int, ...]:
        return self._script.pop(0) if len(self._script) > 1 else self._script[0]


def of(health: Health, name: str) -> Finding:
    (check,) = (check for check in health.alive() if check.id == name)
    return check


async def looks(count: int) -> None:
    """Until so many more looks were taken, and a little."""
    await asyncio.sleep(count * HEARTBEAT_S + HEARTBEAT_S / 4)


# Packet threads


def test_turning_threads_are_alive() -> None:
    count = iter(range(10_000))

    async def main(health: Health, _: Hurried) -> None:
        health.attend(lambda: (next(count), 7 + next(count)), lambda: FINE)
        for _round in range(20):
            await looks(1)
            assert health.is_alive
            assert health.is_ready
        assert of(health, "packet-threads").evidence == "all running"

    hurried(main)


def test_a_stuck_thread_is_found_after_so_many_looks_and_recovers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    turning = [(n, n) for n in range(5)]
    stuck = [(4 + n, 4) for n in range(1, HEARTBEAT_MISSES + 3)]
    again = [(20 + n, 5 + n) for n in range(20)]
    threads = Threads(*turning, *stuck, *again)

    async def main(health: Health, _: Hurried) -> None:
        health.attend(threads.pulse, lambda: FINE)
        seen = []
        for number in range(len(turning) + len(stuck) + 5):
            await asyncio.sleep(HEARTBEAT_S if number else HEARTBEAT_S * 1.25)
            seen.append(health.is_alive)
        # The first line of the script is where they were before the first look.
        found = len(turning) - 1 + HEARTBEAT_MISSES - 1
        recovered = len(turning) - 1 + len(stuck)
        assert seen == [not found <= number < recovered for number in range(len(seen))]

    hurried(main)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [
        "packet thread [1] is stuck"
    ]


def test_which_thread_is_stuck_and_for_how_long() -> None:
    count = iter(range(10_000))

    async def main(health: Health, _: Hurried) -> None:
        health.attend(lambda: (next(count), 5, next(count), 6), lambda: FINE)
        await looks(HEARTBEAT_MISSES + 1)
        check = of(health, "packet-threads")
        assert check.is_failure
        assert check.evidence == f"thread 1, 3 has made no iteration for {STUCK_S:.0f} s or more"
        assert not health.is_ready
        assert not of(health, "event-loop").is_failure

    hurried(main)


@pytest.mark.parametrize(
    ("script", "breaks"),
    [
        ([()], "no packet thread: the reference engine"),
        ([(1,), (1,), (1,), (), (1,), (1,), (1,), (), (1,)], "the device was made again"),
        ([(1,), (1,), (1,), (2,), (2,), (2,), (3,)], "slow, but turning"),
        ([(1, 1), (1,), (1, 1), (1,), (1, 1), (1,)], "another number of threads"),
    ],
)
def test_what_is_not_stuck(script: list[tuple[Any, ...] | tuple[int]], breaks: str) -> None:
    threads = Threads(*script)

    async def main(health: Health, _: Hurried) -> None:
        health.attend(threads.pulse, lambda: FINE)
        for _round in script[1:]:
            await looks(1)
            assert health.is_alive, breaks

    hurried(main)


def test_threads_that_take_turns_at_being_late_are_not_stuck() -> None:
    """No one thread is where it was for HEARTBEAT_MISSES looks."""
    script = [(number // 2, (number + 1) // 2) for number in range(20)]
    threads = Threads(*script)

    async def main(health: Health, _: Hurried) -> None:
        health.attend(threads.pulse, lambda: FINE)
        for _round in range(len(script) // 2):
            await looks(1)
            assert health.is_alive, of(health, "packet-threads").evidence

    hurried(main)


# The loop


def test_a_loop_that_is_late_is_not_alive_and_recovers() -> None:
    async def main(health: Health, loop: Hurried) -> None:
        await looks(3)
        assert not of(health, "event-loop").is_failure
        loop.now += LAG_MAX_S + HEARTBEAT_S + 0.5  # what a callback that blocks does to the clock
        check = of(health, "event-loop")
        assert check.is_failure
        assert "late by" in check.evidence
        assert not health.is_alive
        await looks(2)
        assert health.is_alive

    hurried(main)


def test_each_pause_of_the_loop_says_how_late_it_ended() -> None:
    async def main(health: Health, loop: Hurried) -> None:
        found: list[float] = []
        health.on_lag = found.append
        await looks(3)
        loop.now += HEARTBEAT_S + 0.5
        await looks(2)
        assert found == pytest.approx([0, 0, 0, *found[3:]], abs=0.01)
        assert max(found[3:]) == pytest.approx(0.5 + HEARTBEAT_S, abs=HEARTBEAT_S)
        assert max(found[3:]) >= 0.5

    hurried(main)


def test_a_loop_that_is_a_little_late_is_alive() -> None:
    async def main(health: Health, loop: Hurried) -> None:
        await looks(3)
        for _round in range(5):
            loop.now += LAG_MAX_S / 2
            assert health.is_alive
            await looks(1)
            assert health.is_alive

    hurried(main)


# Ready


def test_ready_says_what_it_waits_for() -> None:
    async def main(health: Health, _: Hurried) -> None:
        assert not health.is_ready
        assert health.is_alive
        assert must_hold("start", False, "waiting for start-up to begin") in health.ready()
        health.waits_for("a lease")
        assert must_hold("start", False, "waiting for a lease") in health.ready()
        checks = list(BAD)
        health.attend(lambda: (), lambda: checks)
        assert not health.is_ready
        assert [check.id for check in health.ready()] == [
            "event-loop",
            "packet-threads",
            "lease",
            "device",
        ]
        assert health.is_alive
        # Back and forth: flannel's readyz never goes back to 503.
        for _round in range(3):
            checks[0] = FINE[0]
            assert health.is_ready
            checks[0] = BAD[0]
            assert not health.is_ready

    hurried(main)


# systemd's watchdog


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """A notify socket; calling it gives the datagrams that came since."""
    with (
        # A unix socket's path has room for 107 bytes, which tmp_path may exceed.
        tempfile.TemporaryDirectory(prefix="sdn") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        sock.bind(os.path.join(directory, "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", sock.getsockname())
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

        def received() -> list[str]:
            found = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    found.append(sock.recv(4096).decode())
            return found

        yield received


async def fed(received: Callable[[], list[str]], loop: Hurried, *, for_s: float) -> list[float]:
    """Times, from now, at which the watchdog was fed, to a quarter of a second."""
    start = loop.time()
    times = []
    while loop.time() < start + for_s:
        await asyncio.sleep(0.25)
        for text in received():
            assert text == "WATCHDOG=1"
            times.append(loop.time() - start)
    return times


@pytest.mark.parametrize("interval_s", [1, 3, 30, 120])
def test_the_watchdog_is_fed_twice_an_interval(
    monkeypatch: pytest.MonkeyPatch, systemd: Any, interval_s: int
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(interval_s * 1_000_000))

    async def main(health: Health, loop: Hurried) -> None:
        times = await fed(systemd, loop, for_s=interval_s * 10)
        gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
        assert len(times) >= 18
        # sd_watchdog_enabled(3) recommends half of the interval.
        assert max(gaps) <= interval_s / 2 + 0.25

    hurried(main)


def test_the_watchdog_is_fed_before_there_is_a_node(systemd: Any) -> None:
    """A start may wait for etcd for hours; systemd must not end it."""

    async def main(health: Health, loop: Hurried) -> None:
        health.waits_for("the network config")
        assert systemd() == ["STATUS=waiting for the network config"]
        assert len(await fed(systemd, loop, for_s=300)) >= 20

    hurried(main)


def test_a_stuck_thread_starves_the_watchdog(systemd: Any) -> None:
    moving = True
    count = iter(range(10_000))

    def pulse() -> tuple[int, ...]:
        return (next(count) if moving else -1,)

    async def main(health: Health, loop: Hurried) -> None:
        nonlocal moving
        health.attend(pulse, lambda: FINE)
        assert await fed(systemd, loop, for_s=60)
        moving = False
        await looks(HEARTBEAT_MISSES + 1)
        systemd()
        assert await fed(systemd, loop, for_s=60) == []
        moving = True
        assert await fed(systemd, loop, for_s=60)

    hurried(main)


def test_a_node_that_is_not_ready_is_not_killed(systemd: Any) -> None:
    async def main(health: Health, loop: Hurried) -> None:
        health.attend(lambda: (), lambda: BAD)
        assert not health.is_ready
        assert len(await fed(systemd, loop, for_s=60)) >= 4

    hurried(main)


@pytest.mark.parametrize(
    ("variables", "breaks"),
    [
        ({"WATCHDOG_PID": "1"}, "meant for another process"),
        ({"WATCHDOG_USEC": ""}, "no watchdog"),
        ({"WATCHDOG_USEC": "0"}, "no watchdog"),
        ({"WATCHDOG_USEC": "x"}, "rubbish"),
        ({"WATCHDOG_USEC": "-1"}, "rubbish"),
    ],
)
def test_no_watchdog_no_datagrams(
    monkeypatch: pytest.MonkeyPatch, systemd: Any, variables: dict[str, str], breaks: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    async def main(health: Health, loop: Hurried) -> None:
        assert await fed(systemd, loop, for_s=120) == [], breaks

    hurried(main)


def test_a_watchdog_in_a_hurry_calls_no_thread_stuck_early(
    monkeypatch: pytest.MonkeyPatch, systemd: Any
) -> None:
    """An engine's pulse means something a second later, not a quarter of one."""
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    loops: list[Hurried] = []

    def pulse() -> tuple[int, ...]:
        return (int(loops[0].time() / (HEARTBEAT_S * 0.9)),)

    async def main(health: Health, loop: Hurried) -> None:
        loops.append(loop)
        health.attend(pulse, lambda: FINE)
        for _round in range(100):
            await asyncio.sleep(0.1)
            assert health.is_alive

    hurried(main)


# Over HTTP


class Sham(Health):
    """Health whose two verdicts are given."""

    def __init__(self, alive: list[Finding], checks: list[Finding]) -> None:
        super().__init__()
        self._given = alive
        self.attend(lambda: (), lambda: checks)

    def alive(self) -> list[Finding]:
        return self._given


ALIVE = [must_hold("event-loop", True, "late by 0 ms")]
DEAD = [must_hold("event-loop", False, "late by 5000 ms")]


@pytest.mark.parametrize(
    ("health", "path", "status", "body"),
    [
        (Sham(ALIVE, FINE), "/healthz", 200, "flanneld is running"),
        (Sham(ALIVE, BAD), "/healthz", 200, "flanneld is running"),
        (Sham(DEAD, FINE), "/healthz", 503, "flanneld is not running"),
        (Sham(ALIVE, FINE), "/readyz", 200, "flanneld is ready"),
        (Sham(ALIVE, BAD), "/readyz", 503, "flanneld is not ready yet"),
        (Sham(DEAD, FINE), "/readyz", 503, "flanneld is not ready yet"),
        (Health(), "/healthz", 200, "flanneld is running"),
        (Health(), "/readyz", 503, "flanneld is not ready yet"),
        (Sham(ALIVE, FINE), "/", 404, None),
        (Sham(ALIVE, FINE), "/healthz/", 404, None),
        (Sham(ALIVE, FINE), "/metrics", 404, None),
    ],
)
async def test_answers(health: Sham | Health, path: str, status: int, body: str | None) -> None:
    port = free_port()
    async with (
        serve_health(listener(port), health),
        ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        assert response.status == status
        if body is not None:
            assert await response.text() == body
            assert response.content_type == "text/plain"


async def test_verbose_calls_ok_only_what_was_seen_to_be() -> None:
    port = free_port()
    found = [
        Finding(id="a", verdict=Verdict.WARN, evidence="drops packets", next_step="let them"),
        Finding(id="b", verdict=Verdict.UNKNOWN, evidence="not looked for"),
        Finding(id="c", verdict=Verdict.NOTE, evidence="by the way"),
    ]
    async with (
        serve_health(listener(port), Sham(ALIVE, found)),
        ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/readyz?verbose") as response,
    ):
        assert response.status == 200
        assert (await response.text()).splitlines() == [
            "[+]event-loop ok: late by 0 ms",
            "[!]a warning: drops packets; let them",
            "[?]b unknown: not looked for",
            "[.]c note: by the way",
            "flanneld is ready",
        ]


async def test_verbose_is_a_line_a_check() -> None:
    checks = [*BAD, must_hold("firewall", False, "rules\nare gone", next_step="look at nft")]
    port = free_port()
    async with (
        serve_health(listener(port), Sham(ALIVE, checks)),
        ClientSession() as session,
    ):
        for query in ("verbose", "verbose=", "verbose=1"):
            async with session.get(f"http://127.0.0.1:{port}/readyz?{query}") as response:
                assert response.status == 503
                assert response.content_type == "text/plain"
                assert await response.text() == (
                    "[+]event-loop ok: late by 0 ms\n"
                    "[-]lease failed: 192.0.2.9 holds it now\n"
                    "[+]device ok: flannel0\n"
                    "[-]firewall failed: rules are gone; look at nft\n"
                    "flanneld is not ready yet\n"
                )
        async with session.get(f"http://127.0.0.1:{port}/healthz?verbose") as response:
            assert response.status == 200
            assert await response.text() == (
                "[+]event-loop ok: late by 0 ms\nflanneld is running\n"
            )


@pytest.mark.parametrize(
    ("query", "accept"),
    [
        ("?format=json", "*/*"),
        ("?verbose&format=json", "*/*"),
        ("", "application/json"),
        ("?verbose", "text/html, application/json;q=0.9"),
    ],
)
async def test_json_names_every_check(query: str, accept: str) -> None:
    port = free_port()
    async with (
        serve_health(listener(port), Sham(ALIVE, BAD)),
        ClientSession(headers={"Accept": accept}) as session,
        session.get(f"http://127.0.0.1:{port}/readyz{query}") as response,
    ):
        assert response.status == 503
        assert response.content_type == "application/json"
        assert await response.json() == {
            "ok": False,
            "status": "flanneld is not ready yet",
            "failing": ["lease"],
            "checks": [
                {
                    "name": "event-loop",
                    "ok": True,
                    "verdict": "ok",
                    "detail": "late by 0 ms",
                    "next_step": "",
                },
                {
                    "name": "lease",
                    "ok": False,
                    "verdict": "fail",
                    "detail": "192.0.2.9 holds it now",
                    "next_step": "",
                },
                {
                    "name": "device",
                    "ok": True,
                    "verdict": "ok",
                    "detail": "flannel0",
                    "next_step": "",
                },
            ],
        }


async def test_answers_follow_the_node() -> None:
    port = free_port()
    checks = list(BAD)
    async with (
        serve_health(listener(port), Sham(ALIVE, checks)),
        ClientSession() as session,
    ):
        for is_ok, status in ((False, 503), (True, 200), (False, 503)):
            checks[0] = FINE[0] if is_ok else BAD[0]
            async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
                assert response.status == status


async def test_metrics_are_served() -> None:
    port = free_port()
    metrics = Metrics(lambda: FINE)
    async with (
        serve_metrics(listener(port), metrics),
        ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        assert response.status == 200
        assert response.headers["Content-Type"] == CONTENT_TYPE
        assert "tundp_ready 1.0" in await response.text()


async def test_off_is_off() -> None:
    before = os.listdir("/proc/self/fd")
    async with serve_health(None, Health()), serve_metrics(None, Metrics(lambda: FINE)):
        assert os.listdir("/proc/self/fd") == before, "a socket was opened"


def listener(port: int) -> socket.socket:
    return open_listener("127.0.0.1", port, "--flag")


def test_a_port_in_use_names_the_flag() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(PlatformError) as caught:
            open_listener("127.0.0.1", port, "--metrics-addr")
    assert f"cannot listen on 127.0.0.1:{port}" in str(caught.value)
    assert "--metrics-addr" in str(caught.value)
    assert caught.value.errno == errno.EADDRINUSE


def test_an_address_that_is_not_here_names_the_flag() -> None:
    with pytest.raises(PlatformError, match="--healthz-ip"):
        open_listener("192.0.2.77", free_port(), "--healthz-ip and --healthz-port")


async def test_the_port_is_free_again_afterwards() -> None:
    port = free_port()
    for _ in range(2):
        async with serve_health(listener(port), Health()):
            pass
