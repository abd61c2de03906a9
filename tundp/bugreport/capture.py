"""What a report holds of packets: headers, for some seconds, from a running daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from tundp.admin import open_events
from tundp.bugreport.host import Found
from tundp.bugreport.redact import Redactor
from tundp.observe.capture import CaptureAbout, CaptureChoice, Recorder
from tundp.observe.capture_pcapng import PcapngFile
from tundp.observe.events import Event, Hello

PACKETS_MAX: Final = 20_000
"""Packets of one capture: at a million a second more would burden the daemon, and the report."""
SNAP_LEN: Final = 128
"""Bytes asked of the daemon; the longest headers of IPv4 and TCP have 120."""


async def headers_captured(
    path: Path, redactor: Redactor, *, for_s: float, is_drops: bool
) -> Found:
    """A pcapng file of packets the daemon behind `path` moves, or only of those it drops.

    No payload is in it, and pseudonyms where the redactor has some. It ends after `for_s` seconds
    or PACKETS_MAX packets. PlatformError if no daemon shows packets.
    """
    choice = CaptureChoice(
        has_inner=not is_drops, has_outer=not is_drops, has_drops=True, snaplen=SNAP_LEN
    )
    stages: Sequence[str] = ("drop",) if is_drops else choice.stages
    query = {"stages": ",".join(stages), "snap": str(SNAP_LEN), "size": str(1 << 20)}
    began = time.monotonic()
    async with open_events(path, query) as stream:
        recorder = Recorder(_about(stream.hello, redactor), choice)
        unix_ns = stream.hello.unix_ns
        file = PcapngFile(recorder, time.monotonic_ns() + unix_ns)
        blocks, count = [file.head()], 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                async for event in stream:
                    for entry in recorder.entries(redacted(event, redactor)):
                        blocks.append(file.packet(entry))
                        count += 1
                    if count >= PACKETS_MAX:
                        break
        blocks.append(file.tail(time.monotonic_ns() + unix_ns, lost=stream.lost))
        note = f"{count} packets in {time.monotonic() - began:.1f} s, {stream.lost} events lost"
    if count >= PACKETS_MAX:
        note += f"; it ended at {PACKETS_MAX} packets"
    note += "; headers only, no payload"
    if redactor.pseudonyms is not None:
        note += "; addresses are pseudonyms, checksums of TCP, UDP and ICMP errors are 0"
    return Found(b"".join(blocks), note)


def redacted(event: Event, redactor: Redactor) -> Event:
    """An event without payload, and with pseudonyms if there are any."""
    record = replace(event.record, packet=redactor.packet(event.record.packet))
    peer = event.peer
    if (pseudonyms := redactor.pseudonyms) is not None:
        record = replace(record, outer=pseudonyms.ipv4(record.outer))
        if peer is not None:
            peer = replace(
                peer,
                address=IPv4Address(pseudonyms.ipv4(int(peer.address))),
                subnets=tuple(map(pseudonyms.network, peer.subnets)),
            )
    return replace(event, record=record, peer=peer)


def _about(hello: Hello, redactor: Redactor) -> CaptureAbout:
    node, network = IPv4Address(hello.node), IPv4Network(hello.network)
    subnet, system = IPv4Network(hello.subnet), os.uname()
    if (pseudonyms := redactor.pseudonyms) is not None:
        node = IPv4Address(pseudonyms.ipv4(int(node)))
        network, subnet = pseudonyms.network(network), pseudonyms.network(subnet)
    return CaptureAbout(
        version=hello.version,
        node=node,
        network=network,
        subnet=subnet,
        tun=hello.tun,
        mtu=hello.mtu,
        port=hello.port,
        engine=hello.engine,
        host=redactor.words(system.nodename),
        machine=system.machine,
        kernel=f"{system.sysname} {system.release}",
        filter="headers only: payload was cut off",
    )
