"""Random histories of a lease store: tables, peers, claims and the union of two stores.

The store is in memory and obeys the Store contract; the clock goes to the next timer by
itself. So a history of hours, with nodes that are cut off, crash and come back, takes
milliseconds, and the same numbers always give the same history.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.clock import Hurried
from tests.lease_plane import LeasePlane
from tests.routes import verdict
from tundp.backend.choose import parse_network_config
from tundp.backoff import Backoff, Outage
from tundp.errors import Compacted, Conflict, LeaseError, StoreUnavailable
from tundp.lease import codec
from tundp.lease.claim import LeaseState
from tundp.lease.identity import CHALLENGE, HOST, NODE, Identity, challenge_in, identity_of
from tundp.lease.model import (
    BadEntry,
    BadEntryGone,
    Events,
    Gone,
    Lease,
    LeaseAttributes,
    LeaseEvent,
    LeaseKey,
    Peer,
    Put,
    Snapshot,
)
from tundp.lease.routing import Routing, RoutingDelta
from tundp.store.both import BothStore
from tundp.store.follow import follow
from tundp.subnet.challenge import CHALLENGE_S
from tundp.subnet.claim_driver import Claim

SETTINGS = settings(max_examples=100, deadline=None)
NETWORK = IPv4Network("10.5.0.0/16")
OWN = codec.parse_key("10.5.1.0-24")
CONFIG = parse_network_config('{"Network": "10.5.0.0/16"}', "test")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """What these nodes have to say would fill the memory of the log."""
    logger = logging.getLogger("tundp")
    before, logger.disabled = logger.level, True
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.disabled = False
    logger.setLevel(before)


T = TypeVar("T")


# A clock without waiting


def hurried(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=Hurried) as runner:
        runner.run(main)


# A store in memory


@dataclass(frozen=True, slots=True)
class Entry:
    """What is under one name: attributes, or None where it cannot be read."""

    attributes: LeaseAttributes | None
    revision: int
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """One write that succeeded."""

    who: str
    at: float
    name: str
    before: Entry | None
    after: Entry | None


@dataclass(slots=True)
class World:
    """The one truth: entries, their history, and who wrote what."""

    entries: dict[str, Entry] = field(default_factory=dict)
    revision: int = 1
    compacted: int = 0
    history: list[tuple[int, LeaseEvent]] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(
        self, name: str, attributes: LeaseAttributes | None, ttl_s: float | None, who: str = ""
    ) -> Entry:
        loop = asyncio.get_running_loop()
        self.revision += 1
        expires_at = None if ttl_s is None else loop.time() + ttl_s
        entry = Entry(attributes, self.revision, expires_at)
        self._record(who, name, entry)
        if expires_at is not None:
            loop.call_at(expires_at, self._expire, name, entry)
        if attributes is None:
            self._happened(BadEntry(name, "rubbish"))
        else:
            self._happened(Put(self.lease(name, entry)))
        return entry

    def remove(self, name: str, who: str = "") -> None:
        if name not in self.entries:
            return
        self.revision += 1
        self._record(who, name, None)
        try:
            self._happened(Gone(codec.parse_key(name)))
        except LeaseError:
            self._happened(BadEntryGone(name))

    def compact(self) -> None:
        self.compacted = self.revision
        self.history.clear()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def leases(self) -> dict[LeaseKey, Lease]:
        found = [
            self.lease(name, entry)
            for name, entry in self.entries.items()
            if entry.attributes is not None
        ]
        return {lease.key: lease for lease in found}

    def bad(self) -> tuple[BadEntry, ...]:
        return tuple(
            BadEntry(name, "rubbish")
            for name, entry in self.entries.items()
            if entry.attributes is None
        )

    @staticmethod
    def lease(name: str, entry: Entry) -> Lease:
        assert entry.attributes is not None
        left_s = None
        if entry.expires_at is not None:
            left_s = entry.expires_at - asyncio.get_running_loop().time()
        return Lease(
            key=codec.parse_key(name),
            attributes=entry.attributes,
            revision=entry.revision,
            lease_ttl_s=left_s,
        )

    def _expire(self, name: str, entry: Entry) -> None:
        if self.entries.get(name) == entry:
            self.remove(name)

    def _record(self, who: str, name: str, after: Entry | None) -> None:
        at = asyncio.get_running_loop().time()
        self.writes.append(Write(who, at, name, self.entries.get(name), after))
        if after is None:
            del self.entries[name]
        else:
            self.entries[name] = after

    def _happened(self, event: LeaseEvent) -> None:
        self.history.append((self.revision, event))
        self.wake()


class MemoryStore:
    """One node's way to a World: it takes time, and it can be cut."""

    api = ""
    warnings = ()

    def __init__(
        self, world: World, rng: random.Random, who: str = "", *, hurry: bool = False
    ) -> None:
        self._world = world
        self._rng = rng
        self._who = who
        self._is_instant = hurry
        self.is_cut = False
        self.write_response_s: float | None = None

    @property
    def description(self) -> str:
        return "memory"

    @property
    def round_s(self) -> float:
        return 1.0

    async def choose_api(self, api: str) -> None:
        """There is none."""

    async def network_config(self) -> str:
        return '{"Network": "10.5.0.0/16"}'

    async def snapshot(self) -> Snapshot:
        def look() -> Snapshot:
            leases = list(self._world.leases().values())
            self._rng.shuffle(leases)
            return Snapshot(tuple(leases), self._world.revision, self._world.bad())

        return await self._call(look, is_write=False)

    async def wait(self, after: int) -> Events | Snapshot:
        while True:
            self._check()
            if after < self._world.compacted:
                raise Compacted(f"{after} is gone")
            news = [(at, event) for at, event in self._world.history if at > after]
            if news:
                break
            await self._world.changed.wait()
        if not self._is_instant:
            await asyncio.sleep(self._rng.uniform(0, 0.05))
            self._check()
            way = self._rng.random()
            if way < 0.1:
                raise Compacted("so it goes")
            if way < 0.2:
                return await self.snapshot()
            if way < 0.3:
                return Events((), after)
            news = news[: self._rng.randint(1, len(news))]
        events = tuple(event for _, event in news)
        if not self._is_instant and self._rng.random() < 0.2:
            events *= 2  # a member that tells everything twice, in order
        return Events(events, news[-1][0])

    async def create(
        self, key: LeaseKey, attributes: LeaseAttributes, lease_ttl_s: int | None
    ) -> Lease:
        def write() -> Lease:
            if str(key) in self._world.entries:
                raise Conflict(f"{key} exists")
            entry = self._world.put(str(key), attributes, lease_ttl_s, self._who)
            return self._world.lease(str(key), entry)

        return await self._call(write)

    async def update(
        self,
        key: LeaseKey,
        attributes: LeaseAttributes,
        lease_ttl_s: int | None,
        *,
        revision: int,
    ) -> Lease:
        def write() -> Lease:
            self._guard(key, revision)
            entry = self._world.put(str(key), attributes, lease_ttl_s, self._who)
            return self._world.lease(str(key), entry)

        return await self._call(write)

    async def delete(self, key: LeaseKey, *, revision: int) -> None:
        def write() -> None:
            self._guard(key, revision)
            self._world.remove(str(key), self._who)

        await self._call(write)

    def reconnect(self) -> None:
        """There is no connection."""

    async def close(self) -> None:
        return

    def cut(self) -> None:
        self.is_cut = True
        self._world.wake()

    def mend(self) -> None:
        self.is_cut = False

    def _guard(self, key: LeaseKey, revision: int) -> None:
        entry = self._world.entries.get(str(key))
        if entry is None or entry.revision != revision:
            raise Conflict(f"{key} was changed")

    def _check(self) -> None:
        if self.is_cut:
            raise StoreUnavailable("cut off")

    async def _call(self, do: Callable[[], T], *, is_write: bool = True) -> T:
        """Never an answer later than another's next request: see the race further down."""
        await asyncio.sleep(0 if self._is_instant else self._rng.uniform(0.02, 0.04))
        self._check()
        result = do()
        response_s = 0 if self._is_instant else self._rng.uniform(0, 0.02)
        if is_write and self.write_response_s is not None:
            response_s = self.write_response_s
        await asyncio.sleep(response_s)
        self._check()  # it happened, and nobody was told
        return result


@contextlib.asynccontextmanager
async def background(*coroutines: Coroutine[Any, Any, Any]) -> Any:
    """Tasks beside the body, cancelled after it."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        yield tasks
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Tables


KEYS = [
    "10.5.1.0-24",  # our own
    "10.5.2.0-24",
    "10.5.2.5-24",  # the same subnet by another name
    "10.5.2.0-24&fd00::-64",
    "10.5.2.0-25",
    "10.5.3.0-24",
    "10.5.1.8-31",  # inside our own
    "10.6.1.0-24",  # outside of the network
    "10.5.0.0-16",
]
PUBLIC_IPS = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "0.0.0.0", "10.5.3.1", "127.0.0.1"]
OWN_ADDRESSES = st.sets(st.sampled_from([IPv4Address(ip) for ip in PUBLIC_IPS[:3]]))
ATTRIBUTES = st.builds(
    lambda ip, backend: LeaseAttributes(public_ip=IPv4Address(ip), backend_type=backend),
    st.sampled_from(PUBLIC_IPS),
    st.sampled_from(["", "", "", "udp", "vxlan"]),
)
PEER_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(KEYS), ATTRIBUTES),
        st.tuples(st.just("put"), st.sampled_from(KEYS), ATTRIBUTES),
        st.tuples(st.just("delete"), st.sampled_from(KEYS)),
        st.tuples(st.just("rubbish"), st.sampled_from([*KEYS, "rubbish", "10.5.2.0-024"])),
        st.tuples(st.just("delete"), st.sampled_from(["rubbish", "10.5.2.0-024"])),
        st.tuples(st.just("addresses"), OWN_ADDRESSES),
        st.tuples(st.just("compact")),
        st.tuples(st.just("cut"), st.floats(0.01, 20)),
        st.tuples(st.just("sleep"), st.floats(0.01, 5)),
    ),
    min_size=5,
    max_size=30,
)


NO_LEASES = IPv4Address("203.0.113.255")
"""Our PublicIP, which no lease here has: whose a lease with it is depends on its history."""


class Follower:
    """The routing ledger fed by a store, judged after every update."""

    def __init__(self) -> None:
        self.addresses: frozenset[IPv4Address] = frozenset()
        self.routing = Routing(
            network=NETWORK,
            backend=CONFIG.backend,
            own_key=OWN,
            own_addresses=(),
            public_ip=NO_LEASES,
        )
        self.peers: dict[IPv4Network, Peer] = {}

    async def run(self, store: Any, rng: random.Random) -> None:
        outage = Outage(logging.getLogger("tundp"), "store")
        async for update in follow(store, outage, Backoff(0.2, 5.0, rng.random)):
            self.apply(update)

    def apply(self, update: Snapshot | Events) -> None:
        self.check(self.routing.apply(update))

    def move(self, addresses: frozenset[IPv4Address]) -> None:
        self.addresses = addresses
        self.check(self.routing.set_own_addresses(addresses, NO_LEASES))

    def check(self, delta: RoutingDelta) -> None:
        """The deltas alone tell the whole story, and the ledger agrees with a verdict over all."""
        for peer in delta.gone:
            assert self.peers.pop(peer.subnet) == peer
        for old, new in delta.moved:
            assert self.peers[old.subnet] == old
            self.peers[new.subnet] = new
        for peer in delta.come:
            assert peer.subnet not in self.peers
            self.peers[peer.subnet] = peer
        assert self.peers == dict(self.routing.peers)
        peers, refused = verdict(
            self.routing.leases.values(),
            network=NETWORK,
            own_key=OWN,
            own_addresses=self.addresses,
        )
        assert {s: p.endpoint.address for s, p in self.peers.items()} == dict(peers)
        assert {key: r.refusal for key, r in self.routing.refused.items()} == dict(refused)
        hops = {peer.hop_id: peer.endpoint for peer in self.peers.values()}
        assert len(hops) == len({peer.endpoint for peer in self.peers.values()})
        fib = self.routing.fib()
        self.routing.note_seen(fib.generation)
        for hop_id, endpoint in hops.items():
            assert fib.hop_array[hop_id]["address"] == int(endpoint.address)
        for subnet, peer in self.peers.items():
            longer = [s for s in (*self.peers, OWN.subnet) if s != subnet and s.subnet_of(subnet)]
            if not any(subnet.network_address in s for s in longer):
                assert fib.index(int(subnet.network_address)) == peer.hop_id


@SETTINGS
@given(PEER_STEPS, st.integers(0, 2**32))
def test_tables_follow_any_history(steps: list[Any], seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        world = World()
        store = MemoryStore(world, rng)
        follower = Follower()
        once: dict[str, list[LeaseAttributes]] = {}
        async with background(follower.run(store, rng)):
            for step, *given_ in steps:
                if step == "put":
                    name, attributes = given_
                    once.setdefault(name, []).append(attributes)
                    world.put(name, attributes, rng.choice([None, 3.0, 60.0]))
                elif step == "delete":
                    world.remove(given_[0])
                elif step == "rubbish":
                    world.put(given_[0], None, None)
                elif step == "addresses":
                    follower.move(frozenset(given_[0]))
                elif step == "compact":
                    world.compact()
                elif step == "cut":
                    store.cut()
                    asyncio.get_running_loop().call_later(given_[0], store.mend)
                else:
                    await asyncio.sleep(given_[0])
            # Longer than any cut, its backoff, and every lease that expires.
            await asyncio.sleep(120)
        truth = world.leases()
        unreadable = {entry.name for entry in world.bad()}
        for key, lease in follower.routing.leases.items():
            if str(key) in unreadable:
                assert lease.attributes in once[str(key)], "a known lease stays as it was"
            else:
                assert lease == truth[key]
        assert truth.keys() <= follower.routing.leases.keys()

    hurried(main())


@settings(SETTINGS, max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.lists(
                st.tuples(st.sampled_from(KEYS), st.none() | ATTRIBUTES), min_size=1, max_size=5
            ),
            OWN_ADDRESSES,
        ),
        max_size=20,
    ),
    OWN_ADDRESSES,
)
def test_routing_ledger_without_a_store(steps: list[Any], addresses: list[IPv4Address]) -> None:
    """Every batch, and every set of our own addresses."""
    follower = Follower()
    follower.move(frozenset(addresses))
    for revision, step in enumerate(steps, 1):
        if isinstance(step, set):
            follower.move(frozenset(step))
            continue
        events: list[Put | Gone] = []
        for name, attributes in step:
            key = codec.parse_key(name)
            if attributes is None:
                events.append(Gone(key))
            else:
                events.append(
                    Put(Lease(key=key, attributes=attributes, revision=revision, lease_ttl_s=None))
                )
        follower.apply(Events(tuple(events), revision))
        follower.apply(Snapshot(tuple(follower.routing.leases.values()), revision))


# Claims


ADDRESS = IPv4Address("192.0.2.1")
OTHERS = LeaseAttributes(public_ip=IPv4Address("192.0.2.9"))


class Node:
    """The lease plane of a node with node id `name`, over a store in memory."""

    def __init__(
        self, world: World, name: str, rng: random.Random, public_ip: IPv4Address = ADDRESS
    ) -> None:
        self.name = name
        self.world = world
        self.store = MemoryStore(world, rng, name)
        self.plane = LeasePlane(
            self.store,
            public_ip,
            network_config=CONFIG,
            previous=OWN,
            lease_ttl_s=120,
            margin_s=60,
            rng=rng,
            identity=Identity(name),
        )
        self.gave_up: LeaseError | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def claim(self) -> Claim:
        return self.plane.claim

    @property
    def is_up(self) -> bool:
        return self._task is not None and not self._task.done()

    @property
    def is_holding(self) -> bool:
        return self.is_up and self.claim.state is LeaseState.HELD

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def check(self) -> None:
        """What the node itself did not expect."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def _run(self) -> None:
        try:
            await self.plane.run()
        except LeaseError as error:
            self.gave_up = error


def node_of(attributes: LeaseAttributes | None) -> str:
    return "" if attributes is None else str(attributes.extra.get(NODE, ""))


def check_writes(world: World, names: set[str]) -> None:
    """No write of a claim takes what another one holds, unless it was asked and did not answer."""
    asked_at: dict[tuple[str, int], float] = {}
    for write in world.writes:
        if write.who not in names:
            continue
        if write.after is None:
            # Only of a twin that was asked and did not answer.
            assert write.before is not None
            asked = asked_at.get((write.who, write.before.revision))
            assert asked is not None, f"{write.who} deleted {write.name}"
            assert write.at - asked >= CHALLENGE_S * 0.99
            continue
        assert write.after.attributes is not None
        if write.before is None:
            continue
        before = write.before.attributes
        assert before is not None, f"{write.who} wrote over what nobody can read"
        holder = node_of(before)
        if holder == write.who:
            continue
        challenge = write.after.attributes.extra.get(CHALLENGE)
        if challenge is not None:
            # It asked, and left the rest of the value as it was.
            unasked = {k: v for k, v in before.extra.items() if k != CHALLENGE}
            after = {k: v for k, v in write.after.attributes.extra.items() if k != CHALLENGE}
            assert replace(write.after.attributes, extra=after) == replace(before, extra=unasked)
            asked_at[write.who, write.after.revision] = write.at
            continue
        if not holder:
            assert before.public_ip == ADDRESS, f"{write.who} took {write.name} from a stranger"
            continue
        asked = asked_at.get((write.who, write.before.revision))
        assert asked is not None, f"{write.who} took {write.name} from {holder} without asking"
        assert write.at - asked >= CHALLENGE_S * 0.99


CLAIM_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from("ab")),
        st.tuples(st.just("cut"), st.sampled_from("ab")),
        st.tuples(st.just("mend"), st.sampled_from("ab")),
        st.tuples(st.just("crash"), st.sampled_from("ab")),
        st.tuples(st.just("delete")),
        st.tuples(st.just("rubbish")),
        st.tuples(st.just("foreign"), st.sampled_from([None, 30.0])),
        st.tuples(st.just("orphan"), st.sampled_from([None, 30.0])),
        st.tuples(st.just("compact")),
        st.tuples(st.just("sleep"), st.floats(0.001, 2)),
        st.tuples(st.just("sleep"), st.floats(2, 200)),
        st.tuples(st.just("sleep"), st.floats(2, 200)),
    ),
    min_size=4,
    max_size=25,
)
ORPHAN = LeaseAttributes(public_ip=ADDRESS, extra={NODE: "dead", HOST: "gone"})


@settings(SETTINGS, max_examples=300)
@given(CLAIM_STEPS, st.integers(0, 2**32))
@example([("start", "a"), ("sleep", 5.0), ("start", "b"), ("sleep", 5.0)], 0)
@example(
    [("start", "a"), ("sleep", 20.0), ("cut", "a"), ("start", "b"), ("sleep", 5.0), ("mend", "a")],
    0,
)
@example([("start", "a"), ("start", "b"), ("sleep", 5.0), ("delete",), ("sleep", 5.0)], 0)
@example(
    [
        *(("start", "b"), ("sleep", 1.0), ("delete",), ("start", "a")),
        *(("sleep", 2.46875), ("sleep", 157.84375)),
    ],
    0,
)
def test_two_nodes_with_one_address_never_both_hold_a_lease(steps: list[Any], seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        world = World()
        nodes = {name: Node(world, name, rng) for name in "ab"}
        for step, *given_ in steps:
            if step == "start":
                nodes[given_[0]].start()
            elif step == "cut":
                nodes[given_[0]].store.cut()
            elif step == "mend":
                nodes[given_[0]].store.mend()
            elif step == "crash":
                # Its successor has the same id; what it remembers is subnet.env.
                await nodes[given_[0]].stop()
                nodes[given_[0]] = Node(world, given_[0], rng)
            elif step == "delete":
                world.remove(str(OWN))
            elif step == "rubbish":
                world.put(str(OWN), None, None)
            elif step == "foreign":
                world.put(str(OWN), OTHERS, given_[0])
            elif step == "orphan":
                world.put(str(OWN), ORPHAN, given_[0])
            elif step == "compact":
                world.compact()
            else:
                await asyncio.sleep(given_[0])
            for node in nodes.values():
                node.check()
        for node in nodes.values():
            node.store.mend()
        # A conflict is looked at every minute; then everything has been observed.
        await asyncio.sleep(200)
        await no_renewal_is_under_way(world, list(nodes.values()))
        try:
            settled(world, list(nodes.values()))
        finally:
            for node in nodes.values():
                node.check()
                await node.stop()
        check_writes(world, set(nodes))

    hurried(main())


async def no_renewal_is_under_way(world: World, nodes: list[Node]) -> None:
    """Leases are renewed once a minute: for 0.06 s of it the store is ahead of its writer."""
    for _ in range(10):
        held = [node.claim.lease for node in nodes if node.is_holding]
        entries = [world.entries.get(str(lease.key)) for lease in held]
        if all(
            entry is not None and entry.revision == lease.revision
            for entry, lease in zip(entries, held, strict=True)
        ):
            return
        await asyncio.sleep(0.1)


def settled(world: World, nodes: list[Node]) -> None:
    """Once everybody has seen the latest state."""
    holding = [node for node in nodes if node.is_holding]
    keys = [node.claim.lease.key for node in holding]
    assert len(set(keys)) == len(keys), "two nodes hold one lease"
    for node in holding:
        entry = world.entries.get(str(node.claim.lease.key))
        assert entry is not None
        assert node_of(entry.attributes) == node.name, "held, but another's"
        assert entry.revision == node.claim.lease.revision
        assert entry.attributes == node.claim.lease.attributes
    for node in nodes:
        if node.is_up and not node.is_holding:
            # Somebody else has it, else it would have been regained by now.
            assert node.claim.state is LeaseState.CONFLICT, node.claim.state
            entry = world.entries.get(str(node.claim.lease.key))
            assert entry is not None
            assert node_of(entry.attributes) != node.name


@SETTINGS
@given(
    st.lists(st.tuples(st.sampled_from("bcd"), st.floats(0.0, 40)), min_size=1, max_size=6),
    st.floats(0, 300),
    st.integers(0, 2**32),
)
def test_a_live_node_is_never_ousted(
    newcomers: list[tuple[str, float]], head_start: float, seed: int
) -> None:
    """Whoever comes with its address, whenever, however many."""

    async def main() -> None:
        rng = random.Random(seed)
        world = World()
        holder = Node(world, "a", rng)
        holder.start()
        await asyncio.sleep(1 + head_start)
        assert holder.is_holding
        others = []
        for name, delay_s in newcomers:
            others.append(Node(world, name, rng))
            others[-1].start()
            await asyncio.sleep(delay_s)
        await asyncio.sleep(100)
        try:
            assert holder.is_holding
            assert node_of(world.entries[str(OWN)].attributes) == "a"
            await no_renewal_is_under_way(world, [holder, *others])
            settled(world, [holder, *others])
            for other in others:
                assert not other.is_up
                assert "is alive" in str(other.gave_up), "the reason would not be told"
        finally:
            for node in (holder, *others):
                node.check()
                await node.stop()
        check_writes(world, set("abcd"))
        for write in world.writes:
            assert write.after is not None
            assert node_of(write.after.attributes) == "a"

    hurried(main())


@SETTINGS
@given(st.integers(0, 2**32), st.sampled_from([None, 60.0]), st.booleans())
def test_a_dead_nodes_lease_is_taken_over_by_one(seed: int, ttl_s: int, together: bool) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        world = World()
        world.put(str(OWN), ORPHAN, ttl_s)
        nodes = [Node(world, name, rng) for name in "ab"]
        for node in nodes:
            node.start()
            await asyncio.sleep(0 if together else CHALLENGE_S + 4)
        await asyncio.sleep(200)
        try:
            await no_renewal_is_under_way(world, nodes)
            settled(world, nodes)
            holding = [node for node in nodes if node.is_holding]
            assert len(holding) <= 1
            if not together:
                assert holding == nodes[:1]
                assert holding[0].claim.lease.key == OWN
                assert holding[0].claim.lease.is_reservation is (ttl_s is None)
        finally:
            for node in nodes:
                node.check()
                await node.stop()
        check_writes(world, set("ab"))

    hurried(main())


def test_a_challenge_seen_while_our_own_write_is_under_way_is_answered() -> None:
    """The answer to a renewal may come later than what the watch has to tell of it."""

    async def main() -> None:
        rng = random.Random(1)
        world = World()
        holder, newcomer = Node(world, "a", rng), Node(world, "b", rng)
        holder.start()
        await asyncio.sleep(20)
        holder.store.write_response_s = 0.5
        first = holder.claim.lease.revision
        while world.entries[str(OWN)].revision == first:
            await asyncio.sleep(0.001)
        newcomer.start()  # between the write and its answer
        while challenge_in(world.leases()[OWN]) is None:
            await asyncio.sleep(0.001)
        assert holder.claim.lease.revision == first, "the answer came too early for this test"
        await asyncio.sleep(30)
        try:
            assert holder.is_holding
            assert node_of(world.entries[str(OWN)].attributes) == "a"
            assert newcomer.gave_up is not None
        finally:
            for node in (holder, newcomer):
                await node.stop()

    hurried(main())


def test_two_nodes_agree_whose_an_unsigned_lease_is() -> None:
    """Written by hand with their common address, it looks like each one's own."""

    async def main() -> None:
        rng = random.Random(1)
        world = World()
        one, other = Node(world, "a", rng), Node(world, "b", rng)
        one.start()
        await asyncio.sleep(20)
        one.store.cut()
        other.start()
        await asyncio.sleep(10)
        one.store.mend()
        await asyncio.sleep(10)
        assert one.claim.state is LeaseState.CONFLICT
        assert other.is_holding
        world.put(str(OWN), LeaseAttributes(public_ip=ADDRESS), 10_000)
        await asyncio.sleep(120)
        try:
            await no_renewal_is_under_way(world, [one, other])
            settled(world, [one, other])
        finally:
            for node in (one, other):
                await node.stop()

    hurried(main())


# Both stores


UNION_KEYS = ["10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24"]
UNION_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from([0, 1]), st.sampled_from(UNION_KEYS), ATTRIBUTES),
        st.tuples(st.just("remove"), st.sampled_from([0, 1]), st.sampled_from(UNION_KEYS)),
        st.tuples(st.just("rubbish"), st.sampled_from([0, 1]), st.sampled_from(UNION_KEYS)),
        st.tuples(st.just("compact"), st.sampled_from([0, 1])),
        st.tuples(st.just("create"), st.sampled_from(UNION_KEYS), ATTRIBUTES),
        st.tuples(st.just("update"), st.sampled_from(UNION_KEYS), ATTRIBUTES),
        st.tuples(st.just("stale update"), st.sampled_from(UNION_KEYS), ATTRIBUTES),
        st.tuples(st.just("delete"), st.sampled_from(UNION_KEYS)),
        st.tuples(st.just("look")),
    ),
    min_size=4,
    max_size=25,
)


def _at(public_ip: str) -> LeaseAttributes:
    return LeaseAttributes(public_ip=IPv4Address(public_ip))


@SETTINGS
@given(UNION_STEPS, st.integers(0, 2**32), st.booleans())
@example(
    # A refused write with another address must not change which lease counts as our own.
    [
        ("put", 0, "10.5.1.0-24", _at("192.0.2.1")),
        ("put", 0, "10.5.1.0-24", _at("192.0.2.1")),
        ("put", 0, "10.5.1.0-24", _at("192.0.2.1")),
        ("create", "10.5.2.0-24", _at("192.0.2.1")),
        ("stale update", "10.5.2.0-24", _at("192.0.2.2")),
        ("create", "10.5.1.0-24", _at("192.0.2.1")),
    ],
    3,
    True,
)
def test_both_stores_are_one(steps: list[Any], seed: int, watched: bool) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        worlds = (World(), World())
        v2, v3 = (MemoryStore(world, rng, "us", hurry=True) for world in worlds)
        both = BothStore(v2, v3, parse=parse_network_config)
        follower = Follower()
        seen: dict[LeaseKey, tuple[int, tuple[int | None, ...]]] = {}

        def revisions(name: str) -> tuple[int | None, ...]:
            entries = [world.entries.get(name) for world in worlds]
            return tuple(None if e is None or e.attributes is None else e.revision for e in entries)

        async def look() -> dict[LeaseKey, Lease]:
            snapshot = await both.snapshot()
            leases = {lease.key: lease for lease in snapshot.leases}
            old, new = (world.leases() for world in worlds)
            assert leases.keys() == old.keys() | new.keys()
            assert {entry.name for entry in snapshot.bad} == {
                entry.name for world in worlds for entry in world.bad()
            }
            for key, lease in leases.items():
                told = [lease.attributes for lease in (new.get(key), old.get(key)) if lease]
                # v3's, where the two differ; but never the one that is our own.
                own = None if both._own is None else both._own.public_ip
                is_contested = len({each.public_ip for each in told}) > 1
                expected = told[-1] if is_contested and told[0].public_ip == own else told[0]
                assert lease.attributes == expected
                now = (lease.revision, revisions(str(key)))
                before = seen.get(key)
                if before is not None and before[1] != now[1]:
                    assert now[0] > before[0], "another write, and no higher revision"
                seen[key] = now
            return leases

        async with background(*([follower.run(both, rng)] if watched else [])):
            for step, *given_ in steps:
                leases = await look()
                if step == "put":
                    number, name, attributes = given_
                    worlds[number].put(name, attributes, None)
                elif step == "remove":
                    worlds[given_[0]].remove(given_[1])
                elif step == "rubbish":
                    worlds[given_[0]].put(given_[1], None, None)
                elif step == "compact":
                    worlds[given_[0]].compact()
                elif step == "create":
                    await try_create(both, worlds, *given_)
                elif step == "update":
                    await try_update(both, worlds, leases, *given_)
                elif step == "stale update":
                    name, attributes = given_
                    lease = leases.get(codec.parse_key(name))
                    if lease is None:
                        continue
                    number = rng.choice([n for n in (0, 1) if lease.key in worlds[n].leases()])
                    theirs = worlds[number].put(name, LeaseAttributes(), None)
                    with pytest.raises(Conflict):
                        await both.update(lease.key, attributes, 60, revision=lease.revision)
                    assert worlds[number].entries[name] == theirs
                elif step == "delete":
                    lease = leases.get(codec.parse_key(given_[0]))
                    if lease is not None and given_[0] not in {
                        entry.name for world in worlds for entry in world.bad()
                    }:
                        with contextlib.suppress(Conflict):
                            await both.delete(lease.key, revision=lease.revision)
                            assert all(given_[0] not in world.entries for world in worlds)
                await asyncio.sleep(rng.choice([0.0, 0.1]))
            await asyncio.sleep(30)
            leases = await look()
            if watched:
                known = follower.routing.leases
                unreadable = {entry.name for world in worlds for entry in world.bad()}
                assert leases.keys() <= known.keys()
                for key, lease in known.items():
                    if str(key) in unreadable:
                        continue
                    assert lease.attributes == leases[key].attributes
        await both.close()

    hurried(main())


async def try_create(
    both: BothStore, worlds: tuple[World, World], name: str, attributes: LeaseAttributes
) -> None:
    """It is exclusive in both, and leaves nothing behind where it lost."""
    before = [dict(world.entries) for world in worlds]
    is_free = all(name not in entries for entries in before)
    try:
        lease = await both.create(codec.parse_key(name), attributes, 600)
    except Conflict:
        assert not is_free
        assert [dict(world.entries) for world in worlds] == before
    else:
        assert is_free
        assert lease.attributes == attributes
        for world in worlds:
            assert world.leases()[lease.key].attributes == attributes


async def try_update(
    both: BothStore,
    worlds: tuple[World, World],
    leases: dict[LeaseKey, Lease],
    name: str,
    attributes: LeaseAttributes,
) -> None:
    """What is missing in one of them is put there; what cannot be read is in the way."""
    lease = leases.get(codec.parse_key(name))
    if lease is None:
        return
    has_rubbish = any(name in {entry.name for entry in world.bad()} for world in worlds)
    before = [dict(world.entries) for world in worlds]
    try:
        now = await both.update(lease.key, attributes, 600, revision=lease.revision)
    except Conflict:
        if has_rubbish:
            for world, entries in zip(worlds, before, strict=True):
                if name in {entry.name for entry in world.bad()}:
                    assert world.entries[name] == entries[name]
    else:
        assert not has_rubbish
        assert now.revision > lease.revision
        for world in worlds:
            assert world.leases()[lease.key].attributes == attributes


@SETTINGS
@given(st.integers(0, 2**32), st.integers(2, 4), st.sampled_from([None, 0, 1]))
def test_creating_in_both_has_at_most_one_winner(seed: int, count: int, also_in: Any) -> None:
    """Nodes in both APIs, and perhaps a flannel that knows one of them."""

    async def main() -> None:
        rng = random.Random(seed)
        worlds = (World(), World())
        boths = [
            BothStore(
                *(MemoryStore(world, rng, str(number)) for world in worlds),
                parse=parse_network_config,
            )
            for number in range(count)
        ]
        creates = [
            both.create(OWN, LeaseAttributes(public_ip=ADDRESS + number), 600)
            for number, both in enumerate(boths)
        ]
        if also_in is not None:
            stock = MemoryStore(worlds[also_in], rng, "stock")
            creates.append(stock.create(OWN, OTHERS, 600))
        results = await asyncio.gather(*creates, return_exceptions=True)
        assert all(isinstance(result, Lease | Conflict) for result in results), results
        winners = [result for result in results if isinstance(result, Lease)]
        assert len(winners) <= 1
        for world in worlds:
            left = [lease.attributes for lease in world.leases().values()]
            if winners:
                assert left in ([winners[0].attributes], [])
            else:
                assert left == []
        if winners and winners[0].attributes != OTHERS:
            assert all(OWN in world.leases() for world in worlds)

    hurried(main())


def test_identities_are_read_as_written() -> None:
    """What these tests look at in values is what identity_of looks at."""
    lease = Lease(key=OWN, attributes=ORPHAN, revision=1, lease_ttl_s=None)
    assert identity_of(lease) == Identity("dead", "gone")
