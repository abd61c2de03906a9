"""Challenges: asking whether another node with our PublicIP or node id is alive.

A challenge is a random token written into that node's lease (TundpChallenge, see
lease/identity.py). A live holder sees it by its watch and renews its lease, which takes the
token out and moves the revision; a dead one does not, and after CHALLENGE_S its lease may be
written over or deleted. Answering a challenge is the claim's business (lease/claim.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from tundp.blocking import off_loop
from tundp.errors import CloneAlive, Conflict, DuplicateNode
from tundp.lease.identity import Holder, Identity, challenge_in, challenged, identity_of, whose
from tundp.lease.model import Lease, LeaseKey, Snapshot
from tundp.store.base import Store

_log = logging.getLogger(__name__)

CHALLENGE_S: Final = 8.0
"""Time a holder has to answer. Its watch shows the challenge within milliseconds, but one that
waits for a store to come back tries only every 5 s. A node cut off from the store for longer
does not answer, and loses the lease."""
CHALLENGE_LOOKS: Final = 32
"""Snapshots read meanwhile."""

NAMED: Final = 3
"""Leases one line names."""

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenger:
    """One node that is about to take a lease, and asks other nodes first."""

    store: Store
    identity: Identity | None
    """None: nobody is asked; leases are told apart by PublicIP only, as flannel does."""
    token: str
    """What the challenge says: random, 16 hexadecimal digits."""
    lease_ttl_s: int
    is_forced: bool = False
    """--force-takeover: do not ask, take."""
    challenge_s: float = CHALLENGE_S
    sleep: Sleep = asyncio.sleep
    report: Callable[[str], None] = lambda what: None
    """Told what is being waited for."""

    async def require_dead_or_ours(self, lease: Lease, public_ip: IPv4Address) -> Lease:
        """`lease` at the revision at which it may be written over.

        A lease with our PublicIP and our node id, or with no node id, is ours. The holder of
        any other is challenged first: if it answers, CloneAlive where it has our node id, else
        DuplicateNode. Conflict if the lease goes away, or another node challenges it, meanwhile.
        """
        kind = whose(lease, public_ip=public_ip, identity=self.identity)
        holder = identity_of(lease)
        if self.identity is None or holder is None or kind is Holder.OURS:
            return lease
        has_our_id = kind is Holder.CLONE
        if self.is_forced:
            if not has_our_id:
                _log.warning("lease %s taken over from node %s, as told", lease.key, holder)
            return lease
        if has_our_id:
            _log.info(
                "lease %s is ours by node id, at %s until now: asking whether a clone is alive",
                lease.key,
                lease.attributes.public_ip,
            )
        else:
            _log.info(
                "lease %s was written by node %s: asking whether it is alive", lease.key, holder
            )
        (asked,) = await self._require_dead([lease], public_ip)
        return asked

    async def _require_dead(self, leases: Sequence[Lease], public_ip: IPv4Address) -> list[Lease]:
        """These leases as challenged, in order, once no holder has answered in time.

        All are asked at once, and read by one snapshot each time: many dead ones take as long as
        one. CloneAlive or DuplicateNode for the first that answers.
        """
        keys = ", ".join(str(lease.key) for lease in leases[:NAMED])
        rest = f" and {len(leases) - NAMED} more" if len(leases) > NAMED else ""
        who = f"node {identity_of(leases[0])}" if len(leases) == 1 else f"{len(leases)} nodes"
        self.report(f"an answer of {who} to the challenge in lease {keys}{rest}")
        asked = [await self._ask(lease) for lease in leases]
        answered = await self._answer_to(asked)
        for lease in leases:
            holder = identity_of(lease)
            has_our_id = whose(lease, public_ip=public_ip, identity=self.identity) is Holder.CLONE
            if answered is not None and answered.key == lease.key and holder is not None:
                raise (CloneAlive if has_our_id else DuplicateNode)(
                    self._explain(answered, holder, public_ip)
                )
            if answered is None and not has_our_id:
                _log.warning("lease %s: node %s does not answer", lease.key, holder)
        return asked

    async def delete_dead_duplicates(
        self, snapshot: Snapshot, *, kept: LeaseKey | None, public_ip: IPv4Address
    ) -> frozenset[LeaseKey]:
        """Challenge the holders of other leases with our PublicIP; delete those of dead nodes.

        We are about to advertise this address: with two nodes that do, one of them gets no
        packets. `kept`: the lease we shall write over, not considered. Returns the keys
        deleted; DuplicateNode if a holder is alive.
        """
        if self.identity is None or self.is_forced:
            return frozenset()
        identity = self.identity
        found = await off_loop(
            lambda: [
                lease
                for lease in snapshot.leases
                if lease.key != kept
                and whose(lease, public_ip=public_ip, identity=identity) is Holder.DUPLICATE
            ],
            len(snapshot.leases),
        )
        if not found:
            return frozenset()
        deleted = set()
        for asked in await self._require_dead(found, public_ip):
            if asked.is_reservation:
                continue  # made by hand: not ours to delete
            _log.warning("lease %s of a node that is no more: deleting it", asked.key)
            await self.store.delete(asked.key, revision=asked.revision)
            deleted.add(asked.key)
        return frozenset(deleted)

    async def _ask(self, lease: Lease) -> Lease:
        return await self.store.update(
            lease.key,
            challenged(lease.attributes, self.token),
            None if lease.is_reservation else self.lease_ttl_s,
            revision=lease.revision,
        )

    async def _answer_to(self, asked: Sequence[Lease]) -> Lease | None:
        """A lease once its holder has written it again; None if none did in time."""
        for _ in range(CHALLENGE_LOOKS):
            await self.sleep(self.challenge_s / CHALLENGE_LOOKS)
            leases = {lease.key: lease for lease in (await self.store.snapshot()).leases}
            for each in asked:
                now = leases.get(each.key)
                if now is None:
                    raise Conflict(f"lease {each.key} went away")
                other = challenge_in(now)
                if other is not None and other != self.token:
                    # Two challengers would interrupt each other for ever: the lower token goes on.
                    if other < self.token:
                        await self.sleep(self.challenge_s + 1)
                    raise Conflict(f"somebody else asks after lease {each.key}, too")
                if now.revision != each.revision:
                    return now
        return None

    def _explain(self, lease: Lease, holder: Identity, public_ip: IPv4Address) -> str:
        where = f"lease {lease.key}, PublicIP {lease.attributes.public_ip}"
        if self.identity is not None and holder.node_id == self.identity.node_id:
            return (
                f"another node has our node id {holder.node_id} and is alive ({where}, host"
                f" {holder.host}): is this machine a clone of it?"
            )
        return (
            f"PublicIP {public_ip} belongs to node {holder}, which is alive"
            f" ({where}); this is node {self.identity}. Two nodes cannot share an address:"
            " give one of them another --iface, --iface-can-reach or --public-ip, or use"
            " --force-takeover if that node must go"
        )
