"""The kernel's own drops of the overlay's packets, each with reason, function, device and header.

A BPF program at the tracepoint skb:kfree_skb (include/trace/events/skb.h), which runs only when a
packet is dropped, copies the IPv4 header of packets from or to the overlay's network, and of UDP
datagrams of its port, into a ring. The tracepoint itself has no addresses, so tracefs cannot
choose packets; where their header lies is read from the kernel's BTF. The program goes with the
process that loaded it, also on kill -9: there is nothing to clean up. It needs linux 5.8, and 5.17
for reasons.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final

from tundp.errors import Unsupported
from tundp.linux import bpf_program, uapi
from tundp.linux.bpf_program import FP, R0, R1, R2, R3, R6, R7, R8, R9, Assembler, Ring
from tundp.linux.btf import Btf
from tundp.linux.kallsyms import functions_of

LOOK_S: Final = 0.05
MOST: Final = 100
"""Drops that are shown of one look: 2,000 a second. Of more, the rest is counted as lost."""
HEAD_LEN: Final = 96
"""Bytes copied of a packet: an outer header, an inner one with options, and ports."""
_RING_LEN: Final = 1 << 16
_NAMESPACE: Final = Path("/proc/thread-self/ns/net")
_RECORD: Final = struct.Struct(f"=QQIIIHHI16s4x{HEAD_LEN}s")
"""Monotonic time, location, reason, device's index, tail, network header, 0, place, device's name,
packet."""
_PREFIX: Final = "SKB_DROP_REASON_"
_UDP: Final = 17
_IPV4: Final = int.from_bytes(b"\x08\x00", sys.byteorder)
_TRACEPOINT: Final = "kfree_skb"
_NAMES: Final = (
    *("sk_buff", "net_device", "sock", "net", "skb_drop_reason", "btf_trace_kfree_skb"),
)


class Place(IntEnum):
    """Whose network namespace."""

    UNKNOWN = 0
    """Nothing tells: neither a device nor a socket is there any more."""
    HERE = 1
    """Ours."""
    POD = 2
    """That at the other end of a veth of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkbDrop:
    """One packet the kernel dropped."""

    time_ns: int
    """Unix time."""
    reason: str
    """As enum skb_drop_reason has it, without its prefix: NETFILTER_DROP; `NOT_SPECIFIED` where
    the kernel gives none."""
    function: str | None
    """That of the kernel which dropped it; None if the kernel keeps its addresses to itself."""
    device: str
    """The packet's device then: that it came in by, on output that it was to leave by; empty if
    it had none any more."""
    place: Place
    """Whose network namespace it was dropped in."""
    packet: bytes
    """From its IPv4 header on, as far as it lay in one piece; at most HEAD_LEN bytes."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Offsets in bytes, of the running kernel."""

    head: int
    tail: int
    network_header: int
    protocol: int
    dev: int
    sk: int
    dev_net: int
    dev_name: int
    dev_index: int
    dev_private: int | None
    """Where a veth has the address of its peer (drivers/net/veth.c: its first member); None if
    BTF does not tell (before 6.12)."""
    sock_net: int
    net_inum: int
    has_reason: bool
    has_socket: bool

    @classmethod
    def of(cls, btf: Btf) -> _Layout:
        """Unsupported if this kernel lacks one."""
        arguments = btf.arguments("btf_trace_kfree_skb")
        return cls(
            head=btf.offset("sk_buff", "head"),
            tail=btf.offset("sk_buff", "tail"),
            network_header=btf.offset("sk_buff", "network_header"),
            protocol=btf.offset("sk_buff", "protocol"),
            dev=btf.offset("sk_buff", "dev"),
            sk=btf.offset("sk_buff", "sk"),
            dev_net=btf.offset("net_device", "nd_net", "net"),
            dev_name=btf.offset("net_device", "name"),
            dev_index=btf.offset("net_device", "ifindex"),
            dev_private=_private(btf),
            sock_net=btf.offset("sock", "__sk_common", "skc_net", "net"),
            net_inum=btf.offset("net", "ns", "inum"),
            # void *__data, skb, location, reason (5.17), rx_sk (6.11)
            has_reason=arguments >= 4,
            has_socket=arguments >= 5,
        )


def _private(btf: Btf) -> int | None:
    try:
        return btf.offset("net_device", "priv")
    except Unsupported:
        return None


# The stack: the first 24 bytes of the packet, and words of 8 bytes.
_HEADER_AT, _WORD, _DEV, _NET, _INUM, _SOCK_INUM, _REASON, _LOCATION, _PEER_INUM, _PLACE = (
    *(-24, -32, -40, -48, -56, -64, -72, -80, -88, -96),
)


class _Program(Assembler):
    """What runs in the kernel at each drop. R6: the packet, R7: its IPv4 header, R9: arguments."""

    def read(self, to: int, size: int, base: int, offset: int) -> None:
        """Copy kernel memory to the stack; zeros if it is not there."""
        self._probe(FP, to, size, base, offset)

    def read_out(self, to: int, size: int, base: int, offset: int) -> None:
        """Copy kernel memory to the record."""
        self._probe(R8, to, size, base, offset)

    def _probe(self, target: int, to: int, size: int, base: int, offset: int) -> None:
        self.move(R3, base)
        if offset:
            self.add(R3, offset)
        self.move(R1, target)
        self.add(R1, to)
        self.set(R2, size)
        self.call(uapi.BPF_FUNC_probe_read_kernel)

    def inum_of(self, pointer: int, net_offset: int, inum_offset: int, to: int) -> None:
        """The number of the network namespace that the object at `pointer` belongs to, or 0."""
        self.store_value(FP, to, 0, 8)
        self.load(R1, FP, pointer, 8)
        self.read(_NET, 8, R1, net_offset)
        self.load(R1, FP, _NET, 8)
        self.read(to, 4, R1, inum_offset)


def _choose(code: _Program, at: _Layout, network: IPv4Network, port: int) -> None:
    """Go to `out` but for IPv4 packets of the network, and datagrams of the port."""
    code.read(_WORD, 2, R6, at.protocol)
    code.load(R1, FP, _WORD, 2)
    code.if_not_equal(R1, _IPV4, "out")
    code.read(_WORD, 8, R6, at.head)
    code.load(R7, FP, _WORD, 8)
    code.read(_WORD, 2, R6, at.network_header)
    code.load(R1, FP, _WORD, 2)
    code.add_register(R7, R1)
    code.read(_HEADER_AT, 24, R7, 0)
    mask, wanted = (
        int.from_bytes(address.packed, sys.byteorder)
        for address in (network.netmask, network.network_address)
    )
    for place in (12, 16):
        code.load(R1, FP, _HEADER_AT + place, 4)
        code.and_32(R1, mask)
        code.if_equal(R1, wanted, "chosen")
    code.load(R1, FP, _HEADER_AT + 9, 1)
    code.if_not_equal(R1, _UDP, "out")
    ends = int.from_bytes(port.to_bytes(2, "big"), sys.byteorder)
    for place in (20, 22):
        code.load(R1, FP, _HEADER_AT + place, 2)
        code.if_equal(R1, ends, "chosen")
    code.jump("out")
    code.label("chosen")


def _choose_namespace(code: _Program, at: _Layout, inum: int) -> None:
    """Note whose namespace it is; go to `out` for those of nobody we care for."""
    code.store_value(FP, _PLACE, Place.HERE, 4)
    code.read(_DEV, 8, R6, at.dev)
    code.inum_of(_DEV, at.dev_net, at.net_inum, _INUM)
    code.load(R1, FP, _INUM, 4)
    code.if_equal(R1, inum, "here")
    if at.has_socket:
        code.load(R1, R9, 24, 8)
        code.store(FP, _WORD, R1, 8)
        code.if_zero(R1, "sender")
        code.jump("socket")
        code.label("sender")
    code.read(_WORD, 8, R6, at.sk)
    code.label("socket")
    code.inum_of(_WORD, at.sock_net, at.net_inum, _SOCK_INUM)
    code.load(R1, FP, _SOCK_INUM, 4)
    code.if_equal(R1, inum, "here")
    if at.dev_private is not None:
        code.store_value(FP, _PLACE, Place.POD, 4)
        code.load(R1, FP, _DEV, 8)
        code.read(_WORD, 8, R1, at.dev_private)
        code.inum_of(_WORD, at.dev_net, at.net_inum, _PEER_INUM)
        code.load(R1, FP, _PEER_INUM, 4)
        code.if_equal(R1, inum, "here")
    code.store_value(FP, _PLACE, Place.UNKNOWN, 4)
    code.load(R1, FP, _SOCK_INUM, 4)
    code.load(R2, FP, _INUM, 4)
    code.or_register(R1, R2)
    code.if_not_equal(R1, 0, "out")
    code.label("here")


def program(
    at: _Layout, *, network: IPv4Network, port: int, inum: int, consumed: int, maps: tuple[int, int]
) -> bytes:
    """The instructions. maps: ring, and array of one counter of what found no room in it."""
    ring, lost = maps
    code = _Program()
    code.move(R9, R1)
    code.load(R6, R9, 0, 8)
    code.set(R1, 0)
    if at.has_reason:
        code.load(R1, R9, 16, 8)
        code.if_equal(R1, consumed, "out")
    code.store(FP, _REASON, R1, 4)
    code.load(R1, R9, 8, 8)
    code.store(FP, _LOCATION, R1, 8)
    _choose(code, at, network, port)
    _choose_namespace(code, at, inum)
    code.map(R1, ring)
    code.set(R2, _RECORD.size)
    code.set(R3, 0)
    code.call(uapi.BPF_FUNC_ringbuf_reserve)
    code.if_zero(R0, "lost")
    code.move(R8, R0)
    code.call(uapi.BPF_FUNC_ktime_get_ns)
    code.store(R8, 0, R0, 8)
    for word, place, size in ((_LOCATION, 8, 8), (_REASON, 16, 4), (_PLACE, 32, 4)):
        code.load(R1, FP, word, size)
        code.store(R8, place, R1, size)
    code.store_value(R8, 28, 0, 4)
    code.store_value(R8, 52, 0, 4)
    code.read_out(24, 4, R6, at.tail)
    code.read_out(28, 2, R6, at.network_header)
    code.load(R9, FP, _DEV, 8)
    code.read_out(20, 4, R9, at.dev_index)
    code.read_out(36, 16, R9, at.dev_name)
    code.read_out(56, HEAD_LEN, R7, 0)
    code.move(R1, R8)
    code.set(R2, uapi.BPF_RB_NO_WAKEUP)
    code.call(uapi.BPF_FUNC_ringbuf_submit)
    code.jump("out")
    code.label("lost")
    code.store_value(FP, _WORD, 0, 4)
    code.map(R1, lost)
    code.move(R2, FP)
    code.add(R2, _WORD)
    code.call(uapi.BPF_FUNC_map_lookup_elem)
    code.if_zero(R0, "out")
    code.set(R1, 1)
    code.atomic_add(R0, 0, R1)
    code.label("out")
    code.set(R0, 0)
    code.exit()
    return code.code()


class SkbDrops:
    """The drops while it is open."""

    def __init__(self, network: IPv4Network, port: int) -> None:
        """Load and attach the program. Unsupported with the reason; nothing is left on then.

        network: of inner packets. port: of outer datagrams, either end's. Takes 0.2 s.
        """
        btf = Btf.of_kernel(_NAMES)
        layout = _Layout.of(btf)
        self.has_reasons = layout.has_reason
        self.has_pods = layout.dev_private is not None
        names = btf.enum("skb_drop_reason")
        self._names = {value: name.removeprefix(_PREFIX) for value, name in names.items()}
        consumed = next((value for value, name in names.items() if name == "SKB_CONSUMED"), -1)
        self._functions: dict[int, str | None] = {}
        self._unread = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._final = 0
        self._unix_ns = time.time_ns() - time.monotonic_ns()
        self.heard_ns = 0
        """Unix time up to which `batches` has given all drops."""
        with contextlib.ExitStack() as stack:
            self._ring = Ring(_RING_LEN)
            stack.callback(self._ring.close)
            lost = bpf_program.create_map(
                uapi.BPF_MAP_TYPE_ARRAY, key=4, value=8, entries=1, flags=uapi.BPF_F_MMAPABLE
            )
            stack.callback(os.close, lost)
            self._lost = stack.enter_context(mmap.mmap(lost, mmap.PAGESIZE, prot=mmap.PROT_READ))
            code = program(
                layout,
                network=network,
                port=port,
                inum=_NAMESPACE.stat().st_ino,
                consumed=consumed,
                maps=(self._ring.descriptor, lost),
            )
            for descriptor in bpf_program.attach(code, _TRACEPOINT):
                stack.callback(os.close, descriptor)
            self._stack = stack.pop_all()

    @property
    def lost(self) -> int:
        """Drops that were too many to be shown, so far."""
        return self._unread + (self._final if self._is_closed else self._count())

    def read(self) -> list[SkbDrop]:
        """The drops since the last look, at most MOST, oldest first; none once it is closed."""
        with self._lock:
            if self._is_closed:
                return []
            records = [_RECORD.unpack(each[: _RECORD.size]) for each in self._ring.read(MOST)]
            if len(records) == MOST:
                self._unread += self._ring.skip()
        unknown = {record[1] for record in records} - self._functions.keys()
        if unknown:
            found = functions_of(unknown)
            self._functions |= {address: found.get(address) for address in unknown}
        return [drop for record in records if (drop := self._drop(record)) is not None]

    def close(self) -> None:
        """Detach and free everything."""
        with self._lock:
            self._is_closed = True
            self._final = self._count()
            self._stack.close()

    def _count(self) -> int:
        return int(struct.unpack_from("@Q", self._lost)[0])

    def _drop(
        self, record: tuple[int, int, int, int, int, int, int, int, bytes, bytes]
    ) -> SkbDrop | None:
        monotonic_ns, location, reason, index, tail, network_header, _, place, name, head = record
        packet = head[: max(0, tail - network_header)]
        if not packet or packet[0] >> 4 != 4:
            return None
        return SkbDrop(
            time_ns=monotonic_ns + self._unix_ns,
            reason=self._reason(reason),
            function=self._functions.get(location),
            device=name.split(b"\0")[0].decode(errors="replace") if index else "",
            place=Place(place),
            packet=packet,
        )

    def _reason(self, number: int) -> str:
        if number in self._names and number:
            return self._names[number]
        if number >> 16:
            return f"SUBSYSTEM_{number >> 16}_{number & 0xFFFF}"
        return f"REASON_{number}" if number else "NOT_SPECIFIED"


@contextlib.asynccontextmanager
async def skb_drops(network: IPv4Network, port: int) -> AsyncIterator[SkbDrops]:
    """Follow the kernel's drops while the block lasts. Unsupported with the reason."""
    found = await asyncio.to_thread(SkbDrops, network, port)
    try:
        yield found
    finally:
        found.close()


async def batches(drops: SkbDrops) -> AsyncIterator[list[SkbDrop]]:
    """What is dropped, as it comes; never an empty list."""
    while True:
        before_ns = time.time_ns()
        if found := await asyncio.to_thread(drops.read):
            yield found
        drops.heard_ns = before_ns
        await asyncio.sleep(LOOK_S)
