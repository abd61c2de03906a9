"""This node's claim on one subnet: acquires the lease, then keeps it, through a Store.

`acquire` is a procedure: plan (lease/allocate.py), challenge (subnet/challenge.py), write.
`keep` drives the state machine of lease/claim.py, which alone decides what is written and
when: this file does its I/O, gives it the time and random numbers, and logs its notices.
Why one room: one claim's life from its first try to its end, half of it imports and docstrings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address
from typing import Final

from tundp.backoff import Backoff, Outage, Pace, Ration
from tundp.blocking import off_loop
from tundp.errors import Conflict, DuplicateNode, LeaseError, LeaseLost, StoreError
from tundp.lease.allocate import Keep, Take, overlap, plan_claim
from tundp.lease.claim import RETRY_S, ClaimMachine, ClaimRules
from tundp.lease.claim_io import (
    Ask,
    Challenged,
    Create,
    Failing,
    GiveUp,
    GiveWay,
    Input,
    LeaseGoneElsewhere,
    LeaseState,
    Look,
    Looked,
    LookFailed,
    Notice,
    Observed,
    Offered,
    Renew,
    Renewed,
    StateChanged,
    Unanswered,
    Unreadable,
    WaitUntil,
    Working,
    WriteConflicted,
    WriteFailed,
    WrittenByAnother,
    Wrote,
)
from tundp.lease.identity import Identity, identity_of, signed
from tundp.lease.model import Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.network import NetworkConfig
from tundp.lease.table import keys_of
from tundp.store.base import Store
from tundp.subnet.challenge import CHALLENGE_S, Challenger, Sleep

_log = logging.getLogger("tundp.subnet.claim")

ATTEMPTS: Final = 10
"""Lost races after which `acquire` gives up, as flannel does."""
RACE_PAUSE_S: Final = 0.2
"""Wait after the first lost race; the n-th is n times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimSettings:
    """What a claim goes by, constant for its life."""

    network_config: NetworkConfig
    attributes: LeaseAttributes
    """What the lease shall say at first; `Claim.offer` changes it."""
    lease_ttl_s: int
    margin_s: float
    """Seconds before its expiry at which the lease is renewed."""
    previous: LeaseKey | None = None
    """The subnet this node had before (subnet.env): preferred if it is free."""
    identity: Identity | None = None
    """None: leases are told apart by PublicIP only, as flannel does."""
    is_forced: bool = False
    """Take a lease over even from a live node."""
    exits_when_lost: bool = False
    """`keep` raises LeaseLost instead of creating a lost lease again."""
    retry_s: float = RETRY_S
    """Longest wait between two tries, and between two checks of a conflict."""
    race_pause_s: float = RACE_PAUSE_S
    challenge_s: float = CHALLENGE_S


class Claim:
    """This node's claim on one subnet. Call `acquire` (or `resume`) once, then run `keep`."""

    def __init__(
        self,
        store: Store,
        settings: ClaimSettings,
        *,
        rng: random.Random,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`sleep`: what `acquire` waits with, between tries and during a challenge."""
        self.origin = "from the lease cache"
        """How we came by the lease, for the log."""
        self.waiting_for = ""
        """Why `acquire` has not returned yet; else empty."""
        self._store = store
        self._settings = settings
        self._offer = settings.attributes
        self._former_ips: set[IPv4Address] = set()
        self._rng = rng
        self._sleep = sleep
        self._machine: ClaimMachine | None = None
        self._outage = Outage(_log, "lease")
        self._challenges, self._losses, self._conflicts = Ration(1), Ration(), Ration(1)
        self._is_loss_said: bool | None = None
        """Whether the log says that the lease is not held; None before the first word of it."""
        self._looks, self._wake = Pace(), asyncio.Event()
        self._challenger = Challenger(
            store=store,
            identity=settings.identity,
            token=f"{rng.getrandbits(64):016x}",
            lease_ttl_s=settings.lease_ttl_s,
            is_forced=settings.is_forced,
            challenge_s=settings.challenge_s,
            sleep=sleep,
            report=self._wait_for,
        )

    # What others may know

    @property
    def lease(self) -> Lease:
        """The lease as last written or seen; kept, to be regained, when lost."""
        return self._required.lease

    @property
    def state(self) -> LeaseState:
        """Whether the subnet is ours right now."""
        return LeaseState.LOST if self._machine is None else self._machine.state

    @property
    def why(self) -> str:
        """Why the lease is LOST or in CONFLICT; empty while HELD."""
        return self.waiting_for if self._machine is None else self._machine.why

    @property
    def conflict(self) -> str:
        """Who has our subnet, in CONFLICT; else empty."""
        return self.why if self.state is LeaseState.CONFLICT else ""

    @property
    def expires_in_s(self) -> float | None:
        """Seconds until the lease expires, negative once it has; None if it never does."""
        expires_at = None if self._machine is None else self._machine.expires_at
        return None if expires_at is None else expires_at - _now()

    # What the daemon reports

    def offer(self, attributes: LeaseAttributes) -> None:
        """Change what our lease says; it is renewed as soon as possible.

        A lease that still bears a former PublicIP and our node id stays ours.
        """
        if attributes.public_ip != self._offer.public_ip:
            self._former_ips.add(self._offer.public_ip)
        self._offer = attributes
        if self._machine is not None:
            self._apply(Offered(attributes))

    def observe(self, lease: Lease | None) -> None:
        """Apply what the watch shows under our key: a lease, or None when it is gone.

        Events may be older than our last write, or its echo. LeaseError before `acquire`
        or `resume`.
        """
        self._apply(Observed(lease))

    def observe_unreadable(self, why: str) -> None:
        """Our key has a value that cannot be read: nobody can tell whose it is."""
        self._apply(Unreadable(why))

    def observe_gone_elsewhere(self) -> None:
        """The lease of another key was deleted or expired: a conflict may be over."""
        self._apply(LeaseGoneElsewhere())

    # Acquiring

    def resume(self, key: LeaseKey, public_ip: IPv4Address) -> None:
        """Claim the subnet from the lease cache, without asking the store.

        public_ip: what our lease said when it was cached. The claim is LOST until the store
        shows more: created again, found to be ours, or CONFLICT.
        """
        self._former_ips.add(public_ip)
        self._machine = self._make_machine(key)

    def take_over(self, lease: Lease, *, is_held: bool, expires_in_s: float | None) -> None:
        """Go on for the process before us, whose identity and run are ours. Writes nothing.

        lease: as that process last knew it. It must keep it no more when `keep` begins.
        """
        self.origin = "taken over with its process's place"
        self._machine = self._make_machine(lease.key)
        expires_at = None if expires_in_s is None else _now() + expires_in_s
        self._machine.taken_over(lease, is_held=is_held, expires_at=expires_at, now=_now())
        self._machine.notices.clear()
        self._is_loss_said = not is_held

    async def acquire(self) -> tuple[Lease, Snapshot]:
        """Get a lease; waits for the store as long as it takes.

        Returns the lease, and the leases read meanwhile with ours as written among them.
        OutOfSubnets when no subnet is free, DuplicateNode when a live node has our PublicIP
        or node id, LeaseError after ATTEMPTS lost races.
        """
        backoff = Backoff(1.0, self._settings.retry_s, self._rng.random)
        races = 0
        try:
            while True:
                offer = self._offer
                try:
                    lease, snapshot = await self._try_acquire(offer)
                except Conflict as error:
                    races += 1
                    if races == ATTEMPTS:
                        raise LeaseError(
                            f"max retries reached trying to acquire a subnet: {ATTEMPTS} times"
                            f" another node was faster, last: {error}"
                        ) from None
                    self._wait_for(f"a subnet; another node was faster: {error}")
                    await self._sleep(self._settings.race_pause_s * (races + self._rng.random()))
                except StoreError as error:
                    self._outage.failed(error, now=_now())
                    self._wait_for(str(error))
                    await self._sleep(backoff.next_s())
                else:
                    self._outage.ended(now=_now())
                    self._machine = self._make_machine(lease.key)
                    self._machine.acquired(lease, offer=offer, now=_now())
                    self._log_notices()
                    return lease, snapshot
        finally:
            self.waiting_for = ""

    async def _try_acquire(self, offer: LeaseAttributes) -> tuple[Lease, Snapshot]:
        settings = self._settings
        snapshot = await self._store.snapshot()
        plan = await off_loop(
            partial(
                plan_claim,
                snapshot.leases,
                unreadable=keys_of(snapshot.bad),
                network_config=settings.network_config,
                public_ip=offer.public_ip,
                node_id="" if settings.identity is None else settings.identity.node_id,
                previous=settings.previous,
                rng=self._rng,
            ),
            len(snapshot.leases),
        )
        gone = await self._challenger.delete_dead_duplicates(
            snapshot,
            kept=plan.lease.key if isinstance(plan, Keep) else None,
            public_ip=offer.public_ip,
        )
        match plan:
            case Keep(found):
                origin = _origin(found, settings.identity)
                found = await self._challenger.require_dead_or_ours(found, offer.public_ip)
                lease = await self._store.update(
                    found.key,
                    signed(offer, settings.identity, found.attributes),
                    None if found.is_reservation else settings.lease_ttl_s,
                    revision=found.revision,
                )
            case Take(key, stale):
                for each in stale:
                    _log.info("lease %s no longer fits the network config: deleting it", each.key)
                    await self._store.delete(each.key, revision=each.revision)
                gone |= {each.key for each in stale}
                origin = "the subnet of last time" if key == settings.previous else "new"
                lease = await self._store.create(
                    key, signed(offer, settings.identity, offer), settings.lease_ttl_s
                )
                if key.v6 is not None:
                    snapshot = await self._yield_to_earlier(lease)
        self.origin = origin
        others = [each for each in snapshot.leases if each.key not in gone | {lease.key}]
        return lease, replace(snapshot, leases=(*others, lease))

    async def _yield_to_earlier(self, lease: Lease) -> Snapshot:
        """Delete our new dual-stack lease, Conflict, if an earlier one shares either subnet.

        Creating is exclusive by key, and two keys may name one IPv4 subnet with two IPv6
        ones: both nodes would have it. The lower revision was there first. Returns the
        leases read for that.
        """
        snapshot = await self._store.snapshot()
        for other in snapshot.leases:
            if (
                other.key != lease.key
                and other.revision < lease.revision
                and overlap(other.key, lease.key)
            ):
                await self._store.delete(lease.key, revision=lease.revision)
                raise Conflict(f"{other.key} was there before {lease.key}")
        return snapshot

    # Keeping

    async def keep(self) -> None:
        """Renew the lease for ever, and regain it when it is lost. Ends by cancellation.

        LeaseLost when the lease is gone and the settings say to exit then; DuplicateNode (at
        another PublicIP: CloneAlive) when a live node had it before us.
        """
        while True:
            self._wake.clear()
            action = self._required.next(now=_now())
            self._log_notices()
            match action:
                case WaitUntil(at):
                    await self._wait_until(at)
                case GiveWay(why):
                    raise DuplicateNode(why)
                case GiveUp(why):
                    raise LeaseLost(why)
                case _:
                    self._apply(await self._do(action))

    async def _do(self, action: Look | Create | Renew | Ask) -> Input:
        """Do `action`; the machine's input that says how it ended."""
        failed = LookFailed if isinstance(action, Look) else WriteFailed
        try:
            match action:
                case Look():
                    return Looked(await self._looks.run(self._store.snapshot))
                case Create(key, attributes, ttl_s):
                    return Wrote(await self._store.create(key, attributes, ttl_s))
                case Renew(lease, attributes, ttl_s):
                    return Wrote(
                        await self._store.update(
                            lease.key, attributes, ttl_s, revision=lease.revision
                        )
                    )
                case Ask(lease):
                    public_ip = self._offer.public_ip
                    return Unanswered(await self._challenger.require_dead_or_ours(lease, public_ip))
        except StoreError as error:
            if isinstance(error, Conflict) and not isinstance(action, Look):
                return WriteConflicted(str(error), self._rng.random())
            return failed(str(error), self._rng.random())
        except BaseException:
            # Cancelled: `keep` may be called again, and the answer will never come.
            self._required.apply(failed("interrupted"), now=_now())
            self._required.notices.clear()
            raise
        finally:
            self.waiting_for = ""

    async def _wait_until(self, at: float | None) -> None:
        """Return at `at` (loop time), or as soon as the machine has had an input."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(at):
                await self._wake.wait()

    # The machine

    @property
    def _required(self) -> ClaimMachine:
        if self._machine is None:
            raise LeaseError("no lease yet: acquire() has not returned")
        return self._machine

    def _make_machine(self, key: LeaseKey) -> ClaimMachine:
        settings = self._settings
        rules = ClaimRules(
            identity=settings.identity,
            lease_ttl_s=settings.lease_ttl_s,
            margin_s=settings.margin_s,
            exits_when_lost=settings.exits_when_lost,
            retry_s=settings.retry_s,
        )
        return ClaimMachine(rules, offer=self._offer, key=key, former_ips=self._former_ips)

    def _apply(self, given: Input) -> None:
        self._required.apply(given, now=_now())
        self._log_notices()
        self._wake.set()

    def _wait_for(self, what: str) -> None:
        self.waiting_for = what

    def _log_notices(self) -> None:
        notices = self._required.notices
        while notices:
            self._log_notice(notices.pop(0))

    def _log_notice(self, notice: Notice) -> None:
        match notice:
            case StateChanged():
                self._log_state(notice)
            case Challenged(key) if self._challenges.take(_now()):
                _log.warning(
                    "lease %s: another node with our PublicIP or node id asks whether we are"
                    " alive; answering%s",
                    key,
                    self._challenges.withheld_words(),
                )
            case WrittenByAnother(key, public_ip):
                _log.warning(
                    "lease %s was written by somebody else with our PublicIP %s: if another node"
                    " advertises this address too, give one of them another --iface or --public-ip",
                    key,
                    public_ip,
                )
            case Renewed(key):
                _log.debug("lease %s renewed", key)
            case Failing(why):
                self._outage.failed(why, now=_now())
            case Working():
                self._outage.ended(now=_now())

    def _log_state(self, change: StateChanged) -> None:
        """One line a change; a lease that somebody deletes or takes again and again has two."""
        key, why = change.key, change.why
        match change.after:
            case LeaseState.HELD:
                if self._is_loss_said:
                    self._losses.spend(_now())
                if self._is_loss_said is not False:
                    _log.info("lease %s held", key)
                self._is_loss_said = False
            case LeaseState.LOST if self._losses.take(_now()):
                _log.warning(
                    "lease %s lost: %s; trying to get the same subnet again%s",
                    key,
                    why,
                    self._losses.withheld_words(),
                )
                self._is_loss_said = True
            case LeaseState.CONFLICT if self._conflicts.take(_now()):
                _log.error(
                    "lease %s CONFLICT: %s. Packets to known peers still flow, but two nodes may"
                    " now use this subnet: stop one, or delete that entry to give it back to"
                    " this one%s",
                    key,
                    why,
                    self._conflicts.withheld_words(),
                )
                self._is_loss_said = True


def _now() -> float:
    return asyncio.get_running_loop().time()


def _origin(lease: Lease, identity: Identity | None) -> str:
    """Where a lease that is kept comes from, for the log."""
    holder = identity_of(lease)
    public_ip = lease.attributes.public_ip
    if holder is None:
        return f"taken over from a flannel with PublicIP {public_ip}, or a reservation"
    if identity is not None and holder.node_id == identity.node_id:
        return "ours from before"
    return f"taken over from node {holder}"
