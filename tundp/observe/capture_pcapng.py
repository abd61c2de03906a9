"""A capture as pcapng: which blocks stand in a file, in what order. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from tundp.observe.capture import Entry, Recorder
from tundp.observe.capture_words import meaning
from tundp.observe.events import PeerName
from tundp.wire import overhead, pcapng

NAMES_MAX: Final = 1024
"""Peers with a name in one file."""
NAMED_SUBNETS_MAX: Final = 8
"""Of one peer that get a name."""


@dataclass(slots=True)
class _Tally:
    """An interface of the file at hand."""

    index: int
    count: int = 0


@dataclass(slots=True)
class PcapngFile:
    """The blocks of one file, or of one after another."""

    recorder: Recorder
    started_ns: int
    """When the capture began, since 1970."""
    _interfaces: dict[str, _Tally] = field(default_factory=dict)
    _named: set[IPv4Address] = field(default_factory=set)
    _lost: int = 0

    def head(self) -> bytes:
        """The beginning of a file: its section, and the interfaces that are known beforehand."""
        about = self.recorder.about
        self._interfaces, self._named = {}, set()
        comments = [
            f"node {about.node}{f' ({about.host})' if about.host else ''}, network {about.network},"
            f" subnet {about.subnet}, {about.tun} mtu {about.mtu}, udp port {about.port},"
            f" engine {about.engine}",
        ]
        if about.filter:
            comments.append(f"filter: {about.filter}")
        if self.recorder.choice.is_wire_size:
            comments.append("super-packets are cut into the packets they stand for")
        section = pcapng.section_header(
            hardware=about.machine,
            os=about.kernel,
            program=f"tundp {about.version}",
            comments=comments,
        )
        described = [self._describe(*each) for each in self.recorder.stage_interfaces]
        self._named.add(about.node)
        own = [(int(about.node), "node-here"), (int(about.subnet.network_address), "tun-here")]
        return b"".join((section, *described, pcapng.names_block(own)))

    def packet(self, entry: Entry) -> bytes:
        """A packet, after what has to stand before it."""
        before = b""
        tally = self._interfaces.get(entry.interface)
        if tally is None:
            reason = entry.interface.removeprefix("drop/")
            before = self._describe(entry.interface, meaning(reason))
            tally = self._interfaces[entry.interface]
        if entry.event.peer is not None and entry.event.peer.address not in self._named:
            before += self._name(entry.event.peer)
        tally.count += 1
        lost, self._lost = self._lost, 0
        comments = [entry.comment]
        if lost:
            comments.append(f"{lost} events of all interfaces were lost before this packet")
        return before + pcapng.packet_block(
            tally.index,
            entry.time_ns,
            entry.data,
            entry.length,
            way=entry.way,
            packet_id=entry.packet_id,
            drop_count=lost,
            comments=comments,
        )

    def lost(self, count: int) -> None:
        """So many events more were lost because they were not read in time."""
        self._lost += count

    def tail(
        self, end_ns: int, *, lost: int = 0, os_dropped: Mapping[str, int] | None = None
    ) -> bytes:
        """The end of a file: statistics of each interface.

        lost: events lost in the capture so far, of all interfaces: the file's first one has them.
        os_dropped: packets the kernel lost meanwhile, by interface.
        """
        blocks = []
        for name, tally in self._interfaces.items():
            comments = []
            if lost and not tally.index:
                comments.append(
                    f"{lost} events, of all interfaces, were lost because they were not read in"
                    " time: they stand here as drops"
                )
            blocks.append(
                pcapng.statistics_block(
                    tally.index,
                    start_ns=self.started_ns,
                    end_ns=end_ns,
                    accepted=tally.count,
                    delivered=tally.count,
                    # Of which interface lost ones were is not known.
                    dropped=lost if tally.index == 0 or not lost else None,
                    os_dropped=(os_dropped or {}).get(name),
                    comments=comments,
                )
            )
        return b"".join(blocks)

    def _describe(self, name: str, description: str) -> bytes:
        self._interfaces[name] = _Tally(len(self._interfaces))
        # Room for an outer header: what is cut is the inner packet.
        snaplen = self.recorder.choice.snaplen + overhead.OVERHEAD
        return pcapng.interface_block(name, snaplen=snaplen, description=description)

    def _name(self, peer: PeerName) -> bytes:
        if len(self._named) >= NAMES_MAX or not peer.subnets:
            return b""  # not known yet, or no peer: its next packet may tell
        self._named.add(peer.address)
        subnets = peer.subnets[:NAMED_SUBNETS_MAX]
        named = [(int(each.network_address), f"tun-of-{peer.address}") for each in subnets]
        named.append((int(peer.address), f"node-of-{str(subnets[0]).replace('/', '-')}"))
        return pcapng.names_block(named)
