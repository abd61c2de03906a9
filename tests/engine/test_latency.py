"""How long packets are in each engine: one batch in eight is measured, from the first on."""

from __future__ import annotations

import itertools
from typing import Any

from tests.engine.test_contract import (
    APP_PORT,
    NOWHERE,
    OF_PEER,
    every_engine,
    every_layout,
    inner,
    receive,
    world,
)
from tests.nodes import PORT
from tests.wait import until
from tundp.choices import Engine, Layout
from tundp.engine.counters import DirectionCounters

BOUNDS_NS = [0, *(1000 * 2**number for number in range(21)), float("inf")]


def check_sum(counted: DirectionCounters) -> None:
    """The sum of all times lies between what the buckets allow."""
    pairs = itertools.pairwise(BOUNDS_NS)
    least, most = 0.0, 0.0
    for (low, high), count in zip(pairs, counted.latency, strict=True):
        least += low * count
        most += high * count if count else 0
    assert least <= counted.latency_ns <= most
    assert counted.latency_ns > 0


@every_layout
async def test_one_packet_in_eight_is_measured_if_each_is_alone(
    make_lab: Any, engine: Engine, layout: Layout
) -> None:
    async with world(make_lab, engine, layout=layout) as here:
        for number in range(17):
            here.app.sendto(b"out", (NOWHERE if number == 8 else OF_PEER, APP_PORT))
            await here.until_read(number + 1, number)
            here.peer.sendto(inner(b"in", ttl=1 if number == 16 else 64), ("192.0.2.1", PORT))
            await here.until_read(number + 1, number + 1)
        # A batch is counted after its packets.
        await until(
            lambda: (
                sum((counted := here.engine.counters()).encap.latency) == 3
                and sum(counted.decap.latency) == 3
            ),
            "packets 1, 9 and 17 of each direction to be measured",
        )
        check_sum(here.engine.counters().encap)
        check_sum(here.engine.counters().decap)


@every_engine
async def test_all_packets_of_a_measured_batch_are_counted(make_lab: Any, engine: Engine) -> None:
    """Forty wait in the queue: batch engines read them at once, the others in forty batches."""
    async with world(make_lab, engine, is_attached=False) as here:
        for number in range(40):
            here.app.sendto(bytes([number]) * 20, (OF_PEER, APP_PORT))
        here.engine.attach(here.node.tun)
        expected = 40 if engine in (Engine.GSO, Engine.MMSG) else 5
        await until(
            lambda: sum(here.engine.counters().encap.latency) == expected,
            f"{expected} packets to be measured",
        )
        check_sum(here.engine.counters().encap)
        before = here.engine.counters().encap.latency_ns
        here.engine.detach()
        here.engine.attach(here.node.tun)
        here.app.sendto(b"again", (OF_PEER, APP_PORT))
        await receive(here.peer)
        assert here.engine.counters().encap.latency_ns >= before
