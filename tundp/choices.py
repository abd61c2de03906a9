"""Every choice with names: what flags, status, metrics and reports call the alternatives.

The bottom of the house: standard library only, importable before numpy or the C module. Each
value is the name an operator writes and reads; names never change, new ones come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique
from typing import Final


@unique
class Engine(Enum):
    """What moves packets between the TUN and the UDP socket; after AUTO the fastest first."""

    AUTO = "auto"
    """The fastest one this machine has."""
    GSO = "gso"
    """C, batches, super-packets where the kernel has them."""
    MMSG = "mmsg"
    """C, batches, no offload."""
    SIMPLE = "simple"
    """C, one packet a system call, as flannel's own proxy."""
    REFERENCE = "reference"
    """Python, one packet at a time: the specification, and for a machine without the C module."""


@unique
class Layout(Enum):
    """Which threads a C engine has for each queue of the TUN."""

    SHARED = "shared"
    """One for both directions."""
    SPLIT = "split"
    """One for each direction."""


@unique
class SourceCheck(Enum):
    """What to do with a datagram whose addresses do not fit the leases.

    Its outer source shall own the inner source, its inner destination shall be ours.
    """

    OFF = "off"
    COUNT = "count"
    ENFORCE = "enforce"


@unique
class ReplayWay(Enum):
    """Which direction `tundp replay` takes the packets of a file for."""

    AUTO = "auto"
    """By their headers and addresses, and the names of interfaces that `tundp capture` gives."""
    ENCAP = "encap"
    """Every packet is an inner one, read from the TUN."""
    DECAP = "decap"
    """Every UDP datagram for the overlay's port was received by this node."""


@unique
class Output(Enum):
    """How a command prints what it found."""

    TEXT = "text"
    JSON = "json"


@unique
class Offload(Enum):
    """One kernel feature the engine `gso` can use or do without."""

    TUN_TSO = "tun-tso"
    TUN_USO = "tun-uso"
    UDP_SEGMENT = "udp-segment"
    UDP_GRO = "udp-gro"
    TCP_COALESCE = "tcp-coalesce"
    UDP_COALESCE = "udp-coalesce"

    @property
    def meaning(self) -> OffloadMeaning:
        """What it does and since when."""
        return _OFFLOAD_MEANINGS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadMeaning:
    """An offload, for people: what it does, since which kernel, and what happens without it."""

    means: str
    since: str
    without: str


_OFFLOAD_MEANINGS: Final = {
    Offload.TUN_TSO: OffloadMeaning(
        means="TCP super-packets and unfinished checksums from the TUN (IFF_VNET_HDR, TSO)",
        since="2.6.27",
        without="the kernel cuts and sums every packet before we read it",
    ),
    Offload.TUN_USO: OffloadMeaning(
        means="UDP super-packets from the TUN and to it (USO)",
        since="6.2",
        without="UDP packets cross the TUN one by one",
    ),
    Offload.UDP_SEGMENT: OffloadMeaning(
        means="many datagrams in one send (UDP_SEGMENT)",
        since="4.18",
        without="sendmmsg: each datagram walks the stack alone",
    ),
    Offload.UDP_GRO: OffloadMeaning(
        means="many datagrams in one receive (UDP_GRO)",
        since="5.0",
        without="recvmmsg: each datagram walks the stack alone",
    ),
    Offload.TCP_COALESCE: OffloadMeaning(
        means="TCP packets from the wire merged into one TUN write",
        since="2.6.27",
        without="one TUN write per packet",
    ),
    Offload.UDP_COALESCE: OffloadMeaning(
        means="UDP packets from the wire merged into one TUN write",
        since="6.2",
        without="one TUN write per packet",
    ),
}


@unique
class Measuring(Enum):
    """What measuring the path to a peer has come to."""

    MEASURED = "measured"
    """The largest packet that arrives is known."""
    PENDING = "pending"
    """Not measured yet."""
    NO_ANSWER = "no-answer"
    """Cannot be measured: no echo request is answered."""


@unique
class EtcdApi(Enum):
    """Which API of etcd holds the leases."""

    AUTO = "auto"
    """The one that has the network config; v3 if both have."""
    V2 = "v2"
    V3 = "v3"
    BOTH = "both"
    """Registered in either, for a cluster of old and new flannels."""


@unique
class OnLeaseLost(Enum):
    """What a daemon does when its lease is lost."""

    REGAIN = "regain"
    """Keeps forwarding and gets the same subnet back."""
    EXIT = "exit"
    """Exits with code 0, as flannel does."""


@unique
class Loop(Enum):
    """Which event loop the daemon runs on."""

    AUTO = "auto"
    """uvloop where it is installed."""
    UVLOOP = "uvloop"
    ASYNCIO = "asyncio"


@unique
class PeerTools(Enum):
    """Whether a node asks other nodes, and answers them."""

    ON = "on"
    OFF = "off"


@unique
class Sandbox(Enum):
    """Whether a daemon gives up, after its start, what it has no use for."""

    AUTO = "auto"
    """As far as the kernel can."""
    ON = "on"
    """All of it, or no start."""
    OFF = "off"


@unique
class StoreKind(Enum):
    """What kind of store the leases live in."""

    ETCD = "etcd"
    FILE = "file"


@unique
class DemoStore(Enum):
    """Where the leases of `tundp demo` live."""

    AUTO = "auto"
    """etcd where it is installed."""
    ETCD = "etcd"
    FILE = "file"


@unique
class BenchProfile(Enum):
    """How much `tundp bench` measures."""

    QUICK = "quick"
    DEFAULT = "default"
    FULL = "full"


@unique
class Topology(Enum):
    """Where the traffic of `tundp bench` begins and ends."""

    HOST = "host"
    """On the nodes."""
    PODS = "pods"
    """In pods, behind bridges."""


@unique
class MtuOrigin(Enum):
    """Who says how large an inner packet a path carries."""

    DEVICE = "device"
    """The link it leaves by: a larger datagram is refused."""
    ROUTE = "route"
    """The operator: `ip route ... mtu`."""
    MEASURED = "measured"
    """Packets of this size were answered, larger ones were not."""
