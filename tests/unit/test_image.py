"""The image of an early start: whole or refused, whenever its writer dies."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import pytest

import tundp
from tests.routes import fib_of
from tundp import early
from tundp.backend.udp.image_keeper import ImageKeeper, content
from tundp.engine import image as images
from tundp.engine.base import EarlyPlan
from tundp.engine.image import ImageWriter, Unfit
from tundp.engine.native import library
from tundp.engine.native.early import EarlyWorkers
from tundp.lease.fib import Fib

SECTIONS = {"one": b"1" * 100, "two": bytes(range(256)) * 300, "none": b""}
KILLS = 40


@pytest.fixture
def fd() -> Iterator[int]:
    fd = images.make()
    yield fd
    os.close(fd)


def test_what_was_written_is_read(fd: int) -> None:
    writer = ImageWriter(fd)
    for number in range(1, 6):
        sections = {name: data * number for name, data in SECTIONS.items()}
        writer.write({"number": number}, sections)
        found = images.read(fd)
        assert (found.generation, found.about) == (number, {"number": number})
        assert found.sections == {name: data for name, data in sections.items() if data}
    # Two writers in turn, as in a handover that is withdrawn: the newest stays while one writes.
    for number, each in enumerate((ImageWriter(fd), writer, writer, ImageWriter(fd)), 6):
        each.write({"number": number}, SECTIONS)
        found = images.read(fd)
        assert (found.generation, found.about) == (number, {"number": number})


def test_an_image_that_was_touched_is_refused_for_the_one_before(fd: int) -> None:
    writer = ImageWriter(fd)
    writer.write({"number": 1}, SECTIONS)
    older = os.pread(fd, 1 << 20, 0).ljust(1 << 20, b"\0")
    writer.write({"number": 2}, SECTIONS)
    whole = os.pread(fd, 1 << 20, 0)
    changed = [at for at, byte in enumerate(whole) if byte != older[at]]
    rng = random.Random(1)
    for at in [*rng.sample(changed, 200), *changed[:64]]:
        os.pwrite(fd, bytes([whole[at] ^ 0x10]), at)
        found = images.read(fd)
        assert found.about["number"] == 1, at
        assert found.sections["two"] == SECTIONS["two"]
        os.pwrite(fd, whole[at : at + 1], at)
    assert images.read(fd).about["number"] == 2


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "empty"),
        (bytes(9000), "empty"),
        (b"tundpimg" + b"\x02" + bytes(9000), "schema 2, this tundp 1"),
        (b"tundpimg" + b"\x01" + bytes(9000), "checksum is wrong"),
        (b"tundpimg\x01\0\0\0" + b"\xff" * 9000, "checksum is wrong"),
    ],
)
def test_what_is_no_image_is_refused(fd: int, data: bytes, text: str) -> None:
    os.pwrite(fd, data, 0)
    with pytest.raises(Unfit, match=text):
        images.read(fd)
    ImageWriter(fd).write({}, SECTIONS)
    assert images.read(fd).sections["one"] == SECTIONS["one"]


def plan() -> EarlyPlan:
    size = library.require().ffi.sizeof("struct tundp_worker_config")
    return EarlyPlan(about={"engine": "gso", "workers": []}, workers=bytes(size))


def contents(fib: Fib) -> tuple[dict[str, Any], dict[str, bytes]]:
    about, sections = content(plan(), fib, {"why_not": "", "queues": 1})
    return about, {name: bytes(data) for name, data in sections.items() if len(data)}


def test_a_writer_killed_at_any_moment_leaves_a_whole_image(fd: int) -> None:
    """Routes change between two tables as fast as they can be written; kill -9, again and again."""
    tables = [
        contents(fib_of(*((f"10.{a}.{b}.0/24", IPv4Address(f"192.0.2.{peer}")) for b in range(n))))
        for a, peer, n in ((5, 2, 200), (6, 3, 90))
    ]
    ImageWriter(fd).write(*tables[0])
    seen: set[int] = set()
    rng = random.Random(13)
    generation = 0
    for _ in range(KILLS):
        writing = os.fork()
        if not writing:
            writer = ImageWriter(fd)
            while True:
                for table in tables:
                    writer.write(*table)
        time.sleep(rng.uniform(0.001, 0.02))
        os.kill(writing, signal.SIGKILL)
        os.waitpid(writing, 0)
        found = images.read(fd)
        assert found.generation >= generation, "never an older one than was whole before"
        generation = found.generation
        seen.add(which := [dict(about) for about, _ in tables].index(dict(found.about)))
        assert found.sections in [sections for _, sections in tables], which
        EarlyWorkers(found, [], []).close()  # C takes it for a FIB
    assert generation > KILLS, "it was written meanwhile"


def test_a_fib_that_c_would_run_out_of_is_refused(fd: int) -> None:
    about, sections = contents(fib_of(("10.5.2.0/24", IPv4Address("192.0.2.2"))))
    for name, data, text in (
        ("table", b"\xff" * len(sections["table"]), "not what C expects"),
        ("table", sections["table"][:-4], "lacks table"),
        ("hops", b"", "lacks hops"),
        ("fib", sections["fib"][:-1], "has no FIB"),
    ):
        ImageWriter(fd).write(about, {**sections, name: data})
        with pytest.raises(Unfit, match=text):
            EarlyWorkers(images.read(fd), [], [])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": "0.0.9"}, f"of tundp 0.0.9, this is {tundp.__version__}"),
        ({"sizes": {"abi": 1}}, "C structs are"),
        ({"why_not": "--on-lease-lost=exit"}, "--on-lease-lost=exit"),
        ({"queues": 2}, "of 2 queues, given are 1"),
        ({}, "the TUN device lo is gone"),
    ],
)
def test_another_tundps_image_is_refused(fd: int, change: dict[str, Any], text: str) -> None:
    about, sections = contents(fib_of())
    about |= {"version": tundp.__version__, "tun": "lo", "has_vnet_header": False}
    about |= {"address": "127.0.0.1", "port": 1}
    ImageWriter(fd).write({**about, **change}, sections)
    with pytest.raises(Unfit, match=text):
        early.check(images.read(fd), [fd], [fd])


@pytest.mark.parametrize(
    ("arguments", "environ", "forbids"),
    [
        (["run"], {}, False),
        (["run", "--on-lease-lost=exit"], {}, True),
        (["run", "-on-lease-lost", "exit"], {}, True),
        (["run", "--on-lease-lost=reacquire", "--iface=exit0"], {}, False),
        (["run"], {"TUNDP_ON_LEASE_LOST": "exit"}, True),
    ],
)
def test_no_early_start_where_none_may_be_without_the_store(
    arguments: list[str], environ: dict[str, str], forbids: bool
) -> None:
    assert bool(early._exits_without_lease(arguments, environ)) is forbids


def test_a_successor_that_was_refused_leaves_the_image_of_the_daemon_that_goes_on(fd: int) -> None:
    writer = ImageWriter(fd)
    writer.write({"number": 1}, SECTIONS)
    successor = ImageKeeper(os.dup(fd))
    writer.write({"number": 2}, SECTIONS)
    successor.leave()
    successor.finish(None)
    successor.close()
    assert images.read(fd).about == {"number": 2}
