"""Clocks that jump, under a running daemon: see docs/tried-cases.md.

The daemon's libc is asked through a shim that adds the seconds in a file, so that no clock of
this machine moves. A suspension is the same in reverse: CLOCK_MONOTONIC falls behind.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from tests.netns.test_tried_process import start
from tests.nodes import MakeOverlay, answers, lease_is, readiness
from tests.stopped import stop
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab

YEAR_S = 365 * 86400
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static const int64_t *shift; /* [0] wall clock, [1] monotonic clocks; seconds */

__attribute__((constructor)) static void map_file(void)
{
	int fd = open(getenv("CLOCK_SHIFT"), O_RDONLY | O_CLOEXEC);
	shift = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	static int (*real)(clockid_t, struct timespec *);
	int result;

	if (!real)
		real = dlsym(RTLD_NEXT, "clock_gettime");
	result = real(clock, now);
	if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
		now->tv_sec += shift[0];
	else if (clock == CLOCK_MONOTONIC || clock == CLOCK_MONOTONIC_COARSE)
		now->tv_sec += shift[1];
	return result;
}

time_t time(time_t *where)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return where ? (*where = now.tv_sec) : now.tv_sec;
}
"""


class Clocks:
    """The shim of one process and its shifts."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler is not None, "no C compiler"
        self._file = directory / "shift"
        self._library = directory / "shim.so"
        source = directory / "shim.c"
        source.write_text(SHIM)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(source), "-ldl"],
            check=True,
        )
        self._file.write_bytes(bytes(4096))

    def shift(self, *, wall_s: int = 0, monotonic_s: int = 0) -> None:
        with self._file.open("r+b") as file:
            file.write(struct.pack("=qq", wall_s, monotonic_s))

    async def start(self, overlay: OverlayLab, node: LabNode, *flags: str) -> None:
        wrapper = ["env", f"LD_PRELOAD={self._library}", f"CLOCK_SHIFT={self._file}"]
        await start(overlay, node, wrapper, *flags)


@pytest.mark.parametrize("store", ["etcd", "file"])
async def test_the_wall_clock_jumps(make_overlay: MakeOverlay, tmp_path: Path, store: str) -> None:
    """A board without a clock of its own starts in 1970; NTP steps; somebody mistypes a year."""
    clocks = Clocks(tmp_path)
    async with make_overlay(store=store, start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        clocks.shift(wall_s=-50 * YEAR_S)
        # One wall clock a machine: the file store's daemons share it.
        for node in (one, two) if store == "file" else (one,):
            await clocks.start(overlay, node, "--lease-ttl=60", "--healthz-port=10256")
        if store == "etcd":
            await overlay.start_daemon(two)
        await overlay.wait_ready()
        subnet = one.gateway
        for wall_s in (0, YEAR_S, -YEAR_S):
            clocks.shift(wall_s=wall_s)
            await asyncio.sleep(0.5)
            await until(lambda: lease_is(one, "held"), f"clock at {wall_s}")
            await until(lambda: answers(one.host, two.tunnel_address), f"clock at {wall_s}")
            await until(lambda: answers(two.host, one.tunnel_address), f"clock at {wall_s}")
        assert one.gateway == subnet
        assert (await readiness(one)).status == 200
        assert len(await overlay.read_leases()) == 2


async def test_a_suspension_keeps_the_subnet(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    """CLOCK_MONOTONIC stands still meanwhile, so that no timer knows how long the night was."""
    clocks = Clocks(tmp_path)
    async with make_overlay(store="etcd", start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await clocks.start(overlay, one, "--lease-ttl=5")
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        subnet = one.gateway
        stop(one.daemon.pid)
        await asyncio.sleep(3)
        clocks.shift(monotonic_s=-3)
        one.daemon.send_signal(signal.SIGCONT)
        await until(lambda: answers(one.host, two.tunnel_address))
        # By its own clock the renewal may be due when etcd has let the lease go already.
        await asyncio.sleep(5)
        await until(lambda: lease_is(one, "held"))
        assert len(await overlay.read_leases()) == 2
        await until(lambda: answers(two.host, one.tunnel_address))
        assert one.gateway == subnet
