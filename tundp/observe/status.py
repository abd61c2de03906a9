"""What a running daemon says of itself: the answer of the admin socket, typed.

`to_json` and `from_json` are the wire format, `status.schema.json` beside this file describes
it (`python -m tundp.cli.docs` writes that). STATUS_SCHEMA goes up when a member changes
meaning, changes type or goes; new members come without notice, and readers pass over those
they do not know.

Why one room: it is the list of all that is said, and read as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final, Generic, TypeVar, overload

from tundp.choices import Measuring, MtuOrigin
from tundp.engine import latency
from tundp.finding import Finding, failures
from tundp.observe import codec
from tundp.observe.codec import Malformed

STATUS_SCHEMA: Final = 2

ItemT = TypeVar("ItemT")


class Lazy(Sequence[ItemT], Generic[ItemT]):
    """A sequence whose length is known and whose items are made when first asked for.

    There may be 65,000 of them, and most who ask want to know how many. `make` may be called
    in another thread than the one this was made in.
    """

    def __init__(self, count: int, make: Callable[[], Sequence[ItemT]]) -> None:
        self._count = count
        self._make = make
        self._made: Sequence[ItemT] | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ItemT]:
        return iter(self._items)

    @overload
    def __getitem__(self, index: int) -> ItemT: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ItemT]: ...
    def __getitem__(self, index: int | slice) -> ItemT | Sequence[ItemT]:
        return self._items[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as a list: it is compared by its items

    @property
    def _items(self) -> Sequence[ItemT]:
        if self._made is None:
            self._made = self._make()
            self._count = len(self._made)
        return self._made


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStatus:
    """This node's lease."""

    key: str
    """As the store spells it: 10.5.1.0-24."""
    state: str
    """`held`, `lost` or `conflict`."""
    conflict: str = ""
    """Who has our subnet, in `conflict`."""
    expires_in_s: int | None = None
    """Negative once it has expired; null for a reservation, or while unknown."""
    expires_at: int | None = None
    """The same as Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """The lease store, and how current what we know of it is."""

    description: str
    is_answering: bool
    is_from_cache: bool
    """Whether the leases are still those of the lease cache on disk."""
    revision: int
    synced_at: float | None = None
    """When the leases were last known to be those of the store, Unix time; null for never."""
    age_s: int | None = None
    """Seconds since then, 0 while the store answers; null if it never has."""
    is_cached: bool = False
    """Whether the leases are kept on disk, for a start without the store."""
    cached_at: float | None = None
    """When those on disk were last known to be the store's, Unix time; null for not yet."""
    cache_error: str = ""
    """Why they cannot be written; empty if they can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceStatus:
    """The interface to the other nodes."""

    name: str
    address: IPv4Address
    """What the sockets are bound to, and packets leave from."""
    mtu: int
    why: str
    """What spoke for it when it was chosen."""
    others: Sequence[str] = ()
    """Each other usable address, and what spoke against it."""
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """The backend's own network device."""

    name: str
    """Empty while it does not exist."""
    mtu: int
    """Bytes of an inner packet."""
    queue_len: int | None = None
    """Packets each of its queues holds while the engine does not read; null while it does not
    exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """What carries packets between subnets."""

    type: str
    """As leases spell it in BackendType: `udp`, `host-gw`."""
    interface: InterfaceStatus
    mtu: int | None = None
    """Bytes of the largest inner packet: FLANNEL_MTU of subnet.env."""
    port: int | None = None
    """UDP port of this node; null for a backend without one."""
    routes: int | None = None
    """Kernel routes to peers it keeps; null for a backend that needs but one."""
    receive_buffer: int | None = None
    """Bytes each UDP socket may hold while the engine does not read, as the kernel charges them
    (SO_RCVBUF as it is read back); null for a backend without one."""
    device: DeviceStatus | None = None
    """Null for a backend that sends by the interface itself."""
    path_probes: int | None = None
    """Datagrams sent to peers to measure paths and to ask who answers, beside
    `encap.packets_out`; they are received as any packet. Null for a backend that sends none."""
    peer_messages: int | None = None
    """Questions and answers sent to other nodes, likewise beside `encap.packets_out`; null for a
    backend that sends none."""
    paths_in_use: Mapping[str, int] | None = None
    """How many paths carried large packets lately, by what measuring has come to:
    MeasuringStatus.state. Null likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DisabledOffload:
    """An offload that is not used."""

    name: str
    reason: str
    since: float | None = None
    """Unix time; null if it never was in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What moves packets between the TUN and the UDP socket."""

    name: str
    """What `--engine` calls it."""
    uses: str
    """A sentence on what it uses, and does without."""
    offloads_in_use: Sequence[str] = ()
    """Right now."""
    offloads_disabled: Sequence[DisabledOffload] = ()
    hop_sockets: int = 0
    """Send sockets that single peers have now, because the shared one was full of what waits."""
    readers: int = 0
    """Who watches packets now: a trace, a capture. None costs nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStatus:
    """What the kernel lost before it reached the engine, since the daemon started."""

    tun_queue_drops: int | None = None
    """Packets routed into the device while its queue was full; null for a backend without one.
    With `encap.packets_in` they are all that was routed into it."""
    udp_errors: int = 0
    """UDP datagrams of the network namespace lost on receipt, ours and others' (InErrors)."""
    udp_checksum_errors: int = 0
    """Those of them whose checksum was wrong (InCsumErrors)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallStatus:
    """The firewall rules the daemon keeps."""

    flavour: str
    """`iptables` or `nftables`; empty if no rules are wanted."""
    missing: str
    """What is wrong with them; empty if all were there at the last look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxStatus:
    """What the daemon's process is held to since its start (--sandbox)."""

    landlock_abi: int
    """The ABI of Landlock that restricts files and programs; 0: nothing does."""
    seccomp: bool
    """Whether system calls and socket families are refused that nothing needs."""
    missing: Sequence[str]
    """What does not hold although it was wanted, and why."""
    gaps: Sequence[str]
    """What is left open because these settings need it, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStatus:
    """The table packets are sent by, in numbers."""

    generation: int
    """Counts the tables made since the start."""
    peers: int
    refused: int
    """Leases that are no peers."""
    bad_entries: int
    """Entries of the store nobody can read."""
    narrow_paths: int = 0
    """Peers to whom less than the device's MTU fits."""
    no_gso_paths: int = 0
    """Peers to whom datagrams go one by one, without UDP_SEGMENT."""
    silent_peers: int | None = None
    """Peers that do not answer, or that the kernel refuses to send to, among those that were sent
    packets lately; null for a backend that cannot tell."""
    narrow_by_origin: Mapping[str, int] = field(default_factory=dict)
    """The narrow paths, by who says so: PathStatus.mtu_origin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathStatus:
    """What was learnt of the path to one peer."""

    inner_mtu: int | None = None
    """Bytes of the largest inner packet that arrives; null if the device's MTU does."""
    mtu_origin: MtuOrigin | None = None
    """Who says so: the device it leaves by, the operator's route, or what was answered; null if the
    device's MTU arrives."""
    no_gso: bool = False
    """Whether datagrams go one by one, without UDP_SEGMENT."""
    since: float
    """When that was learnt, Unix time."""
    origin: str = ""
    """What it was learnt from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuringStatus:
    """What measuring the path to one peer has come to."""

    state: Measuring
    """`measured`, `pending` (not measured yet) or `no-answer`: the peer's kernel, or a firewall
    there, answers no echo request, so nothing is known."""
    since: float
    """Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTraffic:
    """What was exchanged with one peer's endpoint; bytes are those of inner packets.

    Peers at the same endpoint have these figures in common.
    """

    packets_out: int
    bytes_out: int
    packets_in: int
    bytes_in: int
    drops: int
    """Packets for this peer that were dropped."""
    queue_full: int = 0
    """Those of them dropped because too much for it waited in the kernel: hop_queue_full."""
    last_heard: float | None = None
    """When the last datagram came from it, Unix time; null for never."""
    last_errno: str | None = None
    """The name of the last error the kernel returned for a datagram to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IcmpStatus:
    """ICMP errors about datagrams to a peer. Anybody can forge them: a hint, no proof."""

    text: str
    """`port unreachable`, `host unreachable`, ..."""
    said_by: IPv4Address
    count: int
    last: float
    """Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachStatus:
    """Whether a peer answers, and what the kernel knows of the way to it."""

    standing: str
    """`answers`; `one-way`: packets go to it and none comes back, but it answers echo requests;
    `waiting`: the same, and it is being asked; `unheard`: the same, and nobody can ask it;
    `silent`: echo requests are not answered either; `refused`: this kernel refuses the sends."""
    since: float
    """Unix time: of the first packet without an answer; with `answers`, of the last one."""
    unanswered_packets: int = 0
    """Packets sent to it since then."""
    echo_requests: int = 0
    """Echo requests sent to it since then, beside them."""
    echo_missed: int = 0
    """The last so many of them were not answered."""
    rtt_ms: float | None = None
    """Of the last echo request that was answered."""
    device: str = ""
    """What datagrams to it leave by; empty while it answers: not looked up."""
    gateway: IPv4Address | None = None
    """Through whom; null for a neighbour."""
    is_default_route: bool = False
    """Whether it is the default route that leads there."""
    neighbour: str = ""
    """The next hop's state in the neighbour table, as `ip neigh` spells it, lower case."""
    icmp: IcmpStatus | None = None
    evidence: str = ""
    """What was seen, in a sentence; empty if it answers."""
    next_step: str = ""
    """What that means, and what to do."""

    @property
    def is_trouble(self) -> bool:
        """Whether an operator should look."""
        return self.standing in ("silent", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """Another node packets are sent to."""

    subnet: IPv4Network
    public_ip: IPv4Address
    port: int | None = None
    backend_type: str = ""
    identity: str | None = None
    """Which node it is, as its lease says; null for stock flannel's."""
    path: PathStatus | None = None
    """Null: nothing narrower than the device was met."""
    measuring: MeasuringStatus | None = None
    """Null: no large packets were sent to it lately, or the backend measures no path."""
    traffic: PeerTraffic | None = None
    """Null for a backend that does not count by peer."""
    reach: ReachStatus | None = None
    """Null: it was not asked, and nothing it was sent lately is without an answer."""

    @property
    def endpoint(self) -> str:
        """Where its packets go: 192.0.2.7:8285."""
        return str(self.public_ip) if self.port is None else f"{self.public_ip}:{self.port}"

    @property
    def is_silent(self) -> bool:
        """Whether it is known not to answer, or sends to it are refused."""
        return self.reach is not None and self.reach.is_trouble

    @property
    def urgency(self) -> int:
        """What comes first is the lowest: silent, else unanswered or never heard, the others."""
        if self.is_silent:
            return 0
        if self.reach is not None and self.reach.standing != "answers":
            return 1
        traffic = self.traffic
        is_unheard = traffic is not None and traffic.packets_out and not traffic.packets_in
        return 1 if is_unheard else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedStatus:
    """A lease that is no peer."""

    key: str
    public_ip: IPv4Address
    reason: str
    means: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BadEntryStatus:
    """An entry of the store that cannot be read."""

    name: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingStatus:
    """One setting in force; passwords are blanked."""

    value: str = field(metadata={codec.AS_IT_IS: True})
    origin: str
    """`--flag`, a variable's name, a file's path, or `default`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionStatus:
    """One direction; bytes are those of inner packets."""

    packets_in: int = 0
    bytes_in: int = 0
    packets_out: int = 0
    bytes_out: int = 0
    reads: int = 0
    """TUN reads, or receives, that brought something."""
    writes: int = 0
    """Sends, or TUN writes, that took something."""
    super_in: int = 0
    """Reads that brought more than one packet."""
    super_out: int = 0
    """Writes that took more than one packet."""
    latency_ns: int = 0
    """Nanoseconds the packets of measured batches, one in 8, were in the engine."""
    latency: Sequence[int] = ()
    """Their packets by the time they were in the engine: up to 1, 2, 4 ... 2^20 us, and longer."""
    drops: Mapping[str, int] = field(default_factory=dict)
    """By reason; only reasons that occurred."""

    @property
    def dropped(self) -> int:
        """Packets dropped for any reason."""
        return sum(self.drops.values())

    def latency_us(self, share: float) -> int | None:
        """See latency.quantile_us."""
        return latency.quantile_us(self.latency, share)

    @property
    def is_conserved(self) -> bool:
        """Whether every packet that came in is accounted for."""
        return self.packets_in == self.packets_out + self.dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class CountersStatus:
    """Everything an engine counts.

    In JSON the members of `totals` and `by_reason` stand beside `encap` and `decap`, so that
    a counter more in the engine's table is a member more here, and no edit.
    """

    encap: DirectionStatus = field(default_factory=DirectionStatus)
    """TUN to UDP."""
    decap: DirectionStatus = field(default_factory=DirectionStatus)
    """UDP to TUN."""
    totals: Mapping[str, int] = field(default_factory=dict)
    """Counters of both directions together, by name."""
    by_reason: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Counters broken down by a reason; only reasons that occurred."""

    @property
    def directions(self) -> tuple[tuple[str, DirectionStatus], ...]:
        """Both, with their names."""
        return ("encap", self.encap), ("decap", self.decap)

    @property
    def is_conserved(self) -> bool:
        """Whether both directions are."""
        return self.encap.is_conserved and self.decap.is_conserved

    def to_json(self) -> dict[str, Any]:
        """See codec."""
        return {
            "encap": codec.to_json(self.encap),
            "decap": codec.to_json(self.decap),
            **self.totals,
            **{name: dict(counts) for name, counts in self.by_reason.items()},
            "conserved": self.is_conserved,
        }

    @classmethod
    def from_json(cls, document: Any, where: str = "counters") -> CountersStatus:
        """See codec."""
        if not isinstance(document, Mapping):
            raise Malformed(f"{where} is no object")
        directions, totals, by_reason = {}, {}, {}
        for name, value in document.items():
            if name in ("encap", "decap"):
                directions[name] = codec.from_json(DirectionStatus, value, f"{where}.{name}")
            elif isinstance(value, bool):
                continue  # `conserved`, which follows from the rest
            elif isinstance(value, int):
                totals[name] = value
            elif isinstance(value, Mapping):
                by_reason[name] = dict(value)
        return cls(**directions, totals=totals, by_reason=by_reason)

    @staticmethod
    def json_schema(of: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """See codec."""
        counts = {"type": "object", "additionalProperties": {"type": "integer"}}
        return {
            "type": "object",
            "description": "Everything an engine counts: both directions, and counters of the"
            " two together, some of them broken down by a reason.",
            "properties": {
                "encap": of(DirectionStatus) | {"description": "TUN to UDP."},
                "decap": of(DirectionStatus) | {"description": "UDP to TUN."},
                "conserved": {
                    "type": "boolean",
                    "description": "Whether packets_in equals packets_out and all drops, in both.",
                },
            },
            "required": ["encap", "decap", "conserved"],
            "additionalProperties": {"anyOf": [{"type": "integer"}, counts]},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosStatus:
    """Packets to one peer impaired on purpose by `tundp chaos`, now or once."""

    subnet: IPv4Network
    """One of the peer's; all of its subnets are concerned."""
    public_ip: IPv4Address
    port: int
    impairment: str
    """In words: loss 1%, delay 20ms."""
    slowest_s: float = 0.0
    """Seconds by which it makes a packet late, at most."""
    seed: int
    since: float
    """Unix time."""
    ends_at: float
    """Unix time."""
    ended_at: float | None = None
    """Unix time; null while it lasts."""
    why_ended: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Datagrams by what became of them: received + duplicated is sent + lost + too_big + overflow +
    refused + foreign + waiting; `own` is how many of the received were echo requests of tundp's."""
    conserved: bool = True
    """Whether that sum holds."""

    @property
    def is_active(self) -> bool:
        """Whether it lasts."""
        return self.ended_at is None

    @property
    def who(self) -> str:
        """The peer, in words."""
        return f"{self.subnet} at {self.public_ip}:{self.port}"

    @property
    def on_purpose(self) -> str:
        """What it does, as a sentence begins."""
        return f"tundp chaos impairs packets to {self.who} on purpose: {self.impairment}"

    @property
    def stop(self) -> str:
        """The command that ends it."""
        return f"tundp chaos stop {self.public_ip}"

    @property
    def fates(self) -> str:
        """What was done, in words."""
        return ", ".join(
            f"{count:,} {name.replace('_', ' ')}"
            for name, count in self.counts.items()
            if count and name not in ("received", "own")
        )


@unique
class DaemonState(Enum):
    """How far a daemon is."""

    STARTING = "starting"
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything `tundp status` shows. What is null is not there yet, or not with this backend."""

    schema: int = STATUS_SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    version: str
    pid: int
    state: DaemonState
    waiting_for: str = ""
    """What a start waits for, and why."""
    started_at: float
    """Unix time."""
    uptime_s: float
    loop: str = ""
    """The event loop: `uvloop` or `asyncio`."""
    node_id: str = ""
    network: IPv4Network | None = None
    """The whole overlay."""
    subnet: IPv4Network | None = None
    """This node's part of it."""
    public_ip: IPv4Address | None = None
    """What peers are told to send to."""
    lease: LeaseStatus | None = None
    store: StoreStatus | None = None
    backend: BackendStatus | None = None
    engine: EngineStatus | None = None
    """Null for a backend that leaves packets to the kernel."""
    kernel: KernelStatus | None = None
    firewall: FirewallStatus | None = None
    routing: RoutingStatus | None = None
    sandbox: SandboxStatus | None = None
    """Null with --sandbox=off."""
    findings: Sequence[Finding] = ()
    """What must hold for pods to use the overlay, and whether it does."""
    peers: Sequence[PeerStatus] = ()
    """By subnet."""
    refused: Sequence[RefusedStatus] = ()
    """The first 1,000; `routing.refused` is how many there are."""
    bad_entries: Sequence[BadEntryStatus] = ()
    """The first 1,000; `routing.bad_entries` is how many there are."""
    chaos: Sequence[ChaosStatus] = ()
    """What `tundp chaos` does to packets now, then the last 16 that ended, newest first."""
    chaos_totals: Mapping[str, int] = field(default_factory=dict)
    """All `counts` of chaos since the start."""
    counters: CountersStatus | None = None
    """Null for a backend that leaves packets to the kernel."""
    settings: Mapping[str, SettingStatus] = field(default_factory=dict)
    """Every setting in force, by the name of its flag."""

    @property
    def chaos_now(self) -> list[ChaosStatus]:
        """What is impaired on purpose now."""
        return [each for each in self.chaos if each.is_active]

    def chaos_to(self, address: IPv4Address, port: int | None) -> ChaosStatus | None:
        """What impairs the packets to a peer's endpoint now. port: None if it is not known."""
        for each in self.chaos_now:
            if each.public_ip == address and port in (None, each.port):
                return each
        return None

    @property
    def failing(self) -> list[Finding]:
        """What does not hold."""
        return failures(self.findings)

    def to_json(self) -> dict[str, Any]:
        """The document the admin socket answers with; makes what is lazy."""
        return codec.to_json(self)

    @classmethod
    def from_json(cls, document: Any) -> Status:
        """The reverse. Malformed, if the document is none of this schema."""
        if not isinstance(document, dict) or "schema" not in document:
            raise Malformed("this is no status of a daemon")
        if document["schema"] != STATUS_SCHEMA:
            raise Malformed(
                f"the status has schema {document['schema']}, and this tundp reads"
                f" {STATUS_SCHEMA}: the daemon is of another version"
            )
        return codec.from_json(cls, document)
