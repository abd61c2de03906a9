"""A large update applied in parts says what it says as a whole, whatever was known before."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tundp.backend.choose import parse_network_config
from tundp.lease import parts
from tundp.lease.model import BadEntry, Events, Lease, LeaseAttributes, LeaseKey, Snapshot
from tundp.lease.parts import in_parts
from tundp.lease.routing import OwnGone, OwnSeen, OwnUnreadable, Routing

OWN = LeaseKey(IPv4Interface("10.5.9.0/24"))
ADDRESSES = [IPv4Address(f"192.0.2.{number}") for number in (1, 2, 3, 9)]
KEYS = [LeaseKey(IPv4Interface(f"10.5.{number}.0/24")) for number in range(12)]
ALIAS = LeaseKey(IPv4Interface("10.5.3.7/24"))
"""Another key for the subnet of one of KEYS: of two the aligned one wins."""


def lease(key: LeaseKey, address: IPv4Address, revision: int) -> Lease:
    attributes = LeaseAttributes(public_ip=address)
    return Lease(key=key, attributes=attributes, revision=revision, lease_ttl_s=60.0)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    leases: list[Lease] = []
    bad: list[BadEntry] = []
    for key in [*KEYS, ALIAS]:
        match draw(st.sampled_from(("absent", "lease", "unreadable"))):
            case "lease":
                address = draw(st.sampled_from(ADDRESSES))
                leases.append(lease(key, address, draw(st.integers(1, 3))))
            case "unreadable":
                why = draw(st.sampled_from(("no JSON", "no object")))
                bad.append(BadEntry(str(key), why))
    names = draw(st.sets(st.sampled_from(("x", "y", "config"))))
    bad += [BadEntry(name, "is not a subnet key", is_name_bad=True) for name in sorted(names)]
    return Snapshot(tuple(leases), draw(st.integers(1, 9)), tuple(bad))


def ledger() -> Routing:
    config = parse_network_config('{"Network": "10.5.0.0/16"}', "here")
    return Routing(
        network=IPv4Network("10.5.0.0/16"),
        backend=config.backend,
        own_key=OWN,
        own_addresses=[IPv4Address("192.0.2.9")],
        public_ip=IPv4Address("192.0.2.9"),
    )


def parts_for(routing: Routing, update: Snapshot | Events) -> list[Events]:
    return list(
        in_parts(
            update,
            leases=routing.leases,
            bad=routing.bad_entries,
            own_key=OWN,
            revision=routing.revision,
        )
    )


@pytest.mark.parametrize("part_len", [1, 2, 5, 100])
@settings(max_examples=60, deadline=None)
@given(history=st.lists(snapshots(), min_size=1, max_size=4))
def test_parts_are_the_whole(part_len: int, history: list[Snapshot]) -> None:
    known: dict[LeaseKey, Lease] = {}
    routing, whole = ledger(), ledger()
    with patch.object(parts, "PART_LEN", part_len):
        for snapshot in history:
            told = [routing.apply(part) for part in parts_for(routing, snapshot)]
            at_once = whole.apply(snapshot)
            # Written down here: what is known is the snapshot, and what only became unreadable.
            unread = {entry.name for entry in snapshot.bad}
            kept = {key: each for key, each in known.items() if str(key) in unread}
            known = kept | {each.key: each for each in snapshot.leases}
            assert dict(routing.leases) == known
            assert dict(routing.bad_entries) == {entry.name: entry for entry in snapshot.bad}
            assert routing.revision == snapshot.revision
            peers = {subnet: peer.endpoint for subnet, peer in routing.peers.items()}
            assert peers == {subnet: peer.endpoint for subnet, peer in whole.peers.items()}
            refused = {key: each.refusal for key, each in routing.refused.items()}
            assert refused == {key: each.refusal for key, each in whole.refused.items()}
            assert sum(each.changed_leases for each in told) == at_once.changed_leases
            # All that concerns our own lease comes last, and once.
            assert [each.own for each in told[:-1] if _is_news(each.own)] == []
            assert told[-1].own == at_once.own


def _is_news(own: tuple[OwnSeen | OwnGone | OwnUnreadable, ...]) -> bool:
    """That a key is still unreadable is said with every update."""
    return any(not isinstance(each, OwnUnreadable) for each in own)


def test_no_part_is_longer_than_one_and_the_revision_is_the_last_ones() -> None:
    routing = ledger()
    leases = tuple(lease(KEYS[0], ADDRESSES[0], 1) for _ in range(1)) + tuple(
        lease(LeaseKey(IPv4Interface((0x0A060000 + (number << 8), 24))), ADDRESSES[0], 1)
        for number in range(2000)
    )
    bad = tuple(BadEntry(f"bad-{number}", "no key", is_name_bad=True) for number in range(3000))
    found = parts_for(routing, Snapshot(leases, 7, bad))
    assert sum(len(each.events) for each in found) == 5001
    assert max(len(each.events) for each in found) <= parts.PART_LEN + 1
    assert {each.revision for each in found[:-1]} == {0}
    assert (found[-1].revision, found[-1].is_whole) == (7, True)


def test_an_update_that_says_nothing_new_has_one_part_that_is_whole() -> None:
    routing = ledger()
    snapshot = Snapshot((lease(KEYS[1], ADDRESSES[0], 1),), 5)
    for part in parts_for(routing, snapshot):
        routing.apply(part)
    (part,) = parts_for(routing, snapshot)
    assert part == Events((), 5, is_whole=True)
    # Our lease is not in it, which is an observation each time.
    assert routing.apply(part).own == (OwnGone(),)
