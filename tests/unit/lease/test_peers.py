"""Which leases become peers, and the one reason for each that does not."""

import random
from ipaddress import IPv4Address, IPv4Network

import pytest

from tundp.lease.codec import parse_key
from tundp.lease.fib import row_of
from tundp.lease.model import Lease, LeaseAttributes, Peer
from tundp.lease.peers import PeerSet, PeerTable, Refusal, RefusedLease, select_peers
from tundp.lease.table import Change

OWN = "10.5.1.0-24"
OWN_ADDRESS = IPv4Address("192.0.2.1")


def lease(key: str, ip: str = "192.0.2.7", backend: str = "") -> Lease:
    return Lease(
        key=parse_key(key),
        attributes=LeaseAttributes(public_ip=IPv4Address(ip), backend_type=backend),
        revision=1,
        lease_ttl_s=60.0,
    )


def select(*leases: Lease) -> PeerSet:
    return select_peers(
        leases,
        network=IPv4Network("10.5.0.0/16"),
        own_key=parse_key(OWN),
        own_addresses=[OWN_ADDRESS, IPv4Address("198.51.100.1")],
    )


def peer(subnet: str, ip: str = "192.0.2.7") -> Peer:
    return Peer(IPv4Network(subnet), IPv4Address(ip))


@pytest.mark.parametrize(
    ("given", "subnet", "breaks"),
    [
        (lease("10.5.2.0-24"), "10.5.2.0/24", "the usual lease"),
        (lease("10.5.2.9-24"), "10.5.2.0/24", "host bits are masked off"),
        (lease("10.5.2.0-24", backend="udp"), "10.5.2.0/24", "udp by name"),
        (lease("10.5.2.0-24", backend="UDP"), "10.5.2.0/24", "in any case"),
        (lease("10.5.0.0-16"), "10.5.0.0/16", "all of the network: longer leases win"),
        (lease("10.5.0.0-23"), "10.5.0.0/23", "around our own subnet: ours is longer, and wins"),
        (lease("10.5.2.0-24", "223.255.255.254"), "10.5.2.0/24", "the last unicast address"),
        (lease("10.5.2.0-24", "10.6.2.1"), "10.5.2.0/24", "private addresses are usual"),
        (lease("10.5.2.0-24", "169.254.1.1"), "10.5.2.0/24", "link-local underlays exist"),
        (lease("10.5.2.0-24&fd00::-64"), "10.5.2.0/24", "the IPv4 half of a dual-stack lease"),
    ],
)
def test_peers(given, subnet, breaks):
    chosen = select(given)
    assert chosen == PeerSet((Peer(IPv4Network(subnet), given.attributes.public_ip),), ()), breaks


@pytest.mark.parametrize(
    ("given", "refusal", "breaks"),
    [
        (lease("10.5.2.0-24", "0.0.0.0"), Refusal.NO_PUBLIC_IP, "flannel sends it to itself"),
        (lease("10.5.2.0-24", "192.0.2.1"), Refusal.OWN_PUBLIC_IP, "a loop"),
        (lease("10.5.2.0-24", "198.51.100.1"), Refusal.OWN_PUBLIC_IP, "any of our addresses"),
        (lease("10.5.2.0-24", "224.0.0.1"), Refusal.NOT_UNICAST, "multicast"),
        (lease("10.5.2.0-24", "239.255.255.255"), Refusal.NOT_UNICAST, "multicast"),
        (lease("10.5.2.0-24", "255.255.255.255"), Refusal.NOT_UNICAST, "broadcast"),
        (lease("10.5.2.0-24", "240.0.0.1"), Refusal.NOT_UNICAST, "reserved"),
        (lease("10.5.2.0-24", "127.0.0.1"), Refusal.NOT_UNICAST, "loopback"),
        (lease("10.5.2.0-24", "0.0.0.1"), Refusal.NOT_UNICAST, "this network"),
        (lease("10.5.2.0-24", "10.5.2.1"), Refusal.INSIDE_NETWORK, "the tunnel in itself"),
        (lease("10.5.2.0-24", "10.5.9.1"), Refusal.INSIDE_NETWORK, "any overlay address"),
        (lease("10.6.2.0-24"), Refusal.OUTSIDE_NETWORK, "beside the network"),
        (lease("10.4.0.0-15"), Refusal.OUTSIDE_NETWORK, "around the network"),
        (lease("0.0.0.0-0"), Refusal.OUTSIDE_NETWORK, "everything: a hijack of the default route"),
        (lease("10.5.1.128-25"), Refusal.INSIDE_OWN_SUBNET, "half of ours would be hijacked"),
        (lease("10.5.1.9-31"), Refusal.INSIDE_OWN_SUBNET, "one pod of ours would be hijacked"),
        (lease("10.5.1.5-24"), Refusal.INSIDE_OWN_SUBNET, "ours under another spelling"),
        (lease("10.5.1.0-24&fd00::-64"), Refusal.INSIDE_OWN_SUBNET, "ours with an IPv6 half"),
        (lease("10.5.2.0-24", backend="vxlan"), Refusal.OTHER_BACKEND, "nobody listens there"),
        (lease("10.5.2.0-24", backend="alloc"), Refusal.OTHER_BACKEND, "nor there"),
    ],
)
def test_refused(given, refusal, breaks):
    assert select(given) == PeerSet((), (RefusedLease(given, refusal),)), breaks


def test_every_refusal_is_a_sentence_for_an_operator():
    assert len({refusal.value for refusal in Refusal}) == len(Refusal) == 8
    for refusal in Refusal:
        assert len(refusal.value.split()) >= 4


def test_our_own_lease_is_neither_peer_nor_refused():
    assert select(lease(OWN, "192.0.2.1")) == PeerSet((), ())
    assert select(lease(OWN, "192.0.2.99")) == PeerSet((), ()), "whatever its address says"


def test_nothing():
    assert select() == PeerSet((), ())


def test_one_refusal_does_not_touch_the_others():
    chosen = select(lease("10.5.2.0-24"), lease("10.5.3.0-24", "0.0.0.0"), lease("10.5.4.0-24"))
    assert chosen.peers == (peer("10.5.2.0/24"), peer("10.5.4.0/24"))
    assert [one.refusal for one in chosen.refused] == [Refusal.NO_PUBLIC_IP]


def test_peers_are_sorted_by_subnet_not_by_text():
    leases = [lease(f"10.5.{n}.0-24") for n in (10, 9, 2, 200, 100)]
    subnets = [str(one.subnet) for one in select(*leases).peers]
    assert subnets == [f"10.5.{n}.0/24" for n in (2, 9, 10, 100, 200)]


def test_duplicates_are_the_same_whatever_the_order():
    aligned = lease("10.5.2.0-24", "192.0.2.7")
    low = lease("10.5.2.5-24", "192.0.2.8")
    high = lease("10.5.2.7-24", "192.0.2.9")
    dual = lease("10.5.2.0-24&fd00::-64", "192.0.2.10")
    leases = [aligned, low, high, dual]
    for seed in range(20):
        random.Random(seed).shuffle(leases)
        chosen = select(*leases)
        assert chosen.peers == (peer("10.5.2.0/24", "192.0.2.7"),)
        assert {one.refusal for one in chosen.refused} == {Refusal.DUPLICATE_SUBNET}
        assert len(chosen.refused) == 3


def test_among_unaligned_duplicates_the_lower_wins():
    low = lease("10.5.2.5-24", "192.0.2.8")
    high = lease("10.5.2.7-24", "192.0.2.9")
    for order in ((low, high), (high, low)):
        assert select(*order).peers == (peer("10.5.2.0/24", "192.0.2.8"),)


def test_a_refused_lease_does_not_shadow_a_good_duplicate():
    bad = lease("10.5.2.0-24", "0.0.0.0")
    good = lease("10.5.2.5-24", "192.0.2.8")
    chosen = select(bad, good)
    assert chosen.peers == (peer("10.5.2.0/24", "192.0.2.8"),)
    assert chosen.refused == (RefusedLease(bad, Refusal.NO_PUBLIC_IP),)


def test_different_lengths_are_not_duplicates():
    chosen = select(lease("10.5.2.0-24"), lease("10.5.2.0-25", "192.0.2.8"))
    assert set(chosen.peers) == {peer("10.5.2.0/24"), peer("10.5.2.0/25", "192.0.2.8")}


# The table, kept up to date by changes


NETWORK = IPv4Network("10.5.0.0/16")


def table() -> PeerTable:
    return PeerTable(network=NETWORK, own_key=parse_key(OWN), own_addresses=[OWN_ADDRESS])


def put(new: Lease, old: Lease | None = None) -> Change:
    return Change(new.key, old, new)


def gone(old: Lease) -> Change:
    return Change(old.key, old, None)


def test_changes_tell_what_came_and_went():
    made = table()
    first, second = lease("10.5.2.0-24"), lease("10.5.3.0-24", "192.0.2.8")
    assert made.apply([put(first), put(second)]) == (
        [],
        [peer("10.5.2.0/24"), peer("10.5.3.0/24", "192.0.2.8")],
    )
    moved = lease("10.5.2.0-24", "192.0.2.9")
    assert made.apply([put(moved, first)]) == (
        [peer("10.5.2.0/24")],
        [peer("10.5.2.0/24", "192.0.2.9")],
    )
    assert made.apply([gone(second)]) == ([peer("10.5.3.0/24", "192.0.2.8")], [])
    assert dict(made.peers) == {moved.key.subnet: peer("10.5.2.0/24", "192.0.2.9")}


def test_what_cancels_out_in_one_batch_is_no_change():
    made = table()
    one = lease("10.5.2.0-24")
    made.apply([put(one)])
    assert made.apply([gone(one), put(one)]) == ([], [])
    other = lease("10.5.3.0-24")
    assert made.apply([put(other), gone(other)]) == ([], [])
    assert made.apply([]) == ([], [])


def test_our_own_lease_is_no_change():
    made = table()
    assert made.apply([put(lease(OWN, "192.0.2.9"))]) == ([], [])
    assert (dict(made.peers), made.refused) == ({}, [])
    assert made.apply([gone(lease(OWN, "192.0.2.9"))]) == ([], [])


def test_what_was_never_there_goes_without_a_trace():
    made = table()
    assert made.apply([gone(lease("10.5.2.0-24")), gone(lease("10.9.2.0-24"))]) == ([], [])
    assert made.refused == []


def test_the_next_of_two_takes_over_when_the_first_goes():
    made = table()
    first, second = lease("10.5.2.0-24"), lease("10.5.2.5-24", "192.0.2.8")
    made.apply([put(second)])
    assert made.apply([put(first)]) == (
        [peer("10.5.2.0/24", "192.0.2.8")],
        [peer("10.5.2.0/24", "192.0.2.7")],
    )
    assert made.refused == [RefusedLease(second, Refusal.DUPLICATE_SUBNET)]
    assert made.apply([gone(first)]) == (
        [peer("10.5.2.0/24", "192.0.2.7")],
        [peer("10.5.2.0/24", "192.0.2.8")],
    )
    assert made.refused == []


def test_a_lease_that_becomes_bad_is_no_peer_any_more_and_back():
    made = table()
    good, bad = lease("10.5.2.0-24"), lease("10.5.2.0-24", "0.0.0.0")
    made.apply([put(good)])
    assert made.apply([put(bad, good)]) == ([peer("10.5.2.0/24")], [])
    assert made.refused == [RefusedLease(bad, Refusal.NO_PUBLIC_IP)]
    assert made.apply([put(good, bad)]) == ([], [peer("10.5.2.0/24")])
    assert made.refused == []


def test_our_addresses_come_and_go():
    made = table()
    one, other = lease("10.5.2.0-24"), lease("10.5.3.0-24", "192.0.2.8")
    made.apply([put(one), put(other)])
    assert made.set_own_addresses([OWN_ADDRESS, IPv4Address("192.0.2.7")]) == (
        [peer("10.5.2.0/24")],
        [],
    )
    assert made.refused == [RefusedLease(one, Refusal.OWN_PUBLIC_IP)]
    assert made.set_own_addresses([OWN_ADDRESS, IPv4Address("192.0.2.7")]) == ([], [])
    assert made.set_own_addresses([IPv4Address("192.0.2.8")]) == (
        [peer("10.5.3.0/24", "192.0.2.8")],
        [peer("10.5.2.0/24")],
    )
    assert made.set_own_addresses([]) == ([], [peer("10.5.3.0/24", "192.0.2.8")])
    assert made.refused == []


def test_peers_cannot_be_changed_from_outside():
    made = table()
    with pytest.raises(TypeError):
        made.peers[NETWORK] = peer("10.5.0.0/16")  # type: ignore[index]


def test_rows_are_the_peers_however_many_come_and_go():
    made = table()
    rng = random.Random(5)
    present: dict[str, Lease] = {}
    for _ in range(3000):
        key = f"10.5.{rng.randrange(2, 250)}.0-24"
        if key in present and rng.random() < 0.4:
            made.apply([gone(present.pop(key))])
        else:
            made.apply([put(lease(key, f"192.0.2.{rng.randrange(2, 250)}"), present.get(key))])
            present[key] = lease(key, str(made.peers[parse_key(key).subnet].address))
    assert len(present) > 100
    assert sorted(map(tuple, made.rows.tolist())) == sorted(map(row_of, made.peers.values()))
    made.apply([gone(one) for one in present.values()])
    assert len(made.rows) == 0
    made.apply([put(lease("10.5.2.0-24"))])
    assert made.rows.tolist() == [list(row_of(peer("10.5.2.0/24")))]
