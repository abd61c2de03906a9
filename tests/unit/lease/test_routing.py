"""The routing ledger: which leases become peers, why others do not, what an update changes."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.routes import verdict
from tundp.backend.choose import parse_network_config
from tundp.backend.hostgw import host_gw_config
from tundp.backend.udp.config import udp_config
from tundp.lease import hops
from tundp.lease.codec import parse_key
from tundp.lease.fib import FIRST_HOP_ID, row_of
from tundp.lease.identity import NODE, Identity
from tundp.lease.model import (
    BadEntry,
    BadEntryGone,
    Endpoint,
    Events,
    Gone,
    Lease,
    LeaseAttributes,
    LeaseKey,
    Peer,
    Put,
    Snapshot,
)
from tundp.lease.routing import (
    OwnGone,
    OwnSeen,
    OwnUnreadable,
    Refusal,
    RefusedLease,
    RouteAnswer,
    Routing,
    RoutingDelta,
    merged,
)

OWN = "10.5.1.0-24"
OWN_ADDRESS = IPv4Address("192.0.2.1")
NO_LEASES = IPv4Address("203.0.113.255")
"""A PublicIP no lease has."""
NETWORK = IPv4Network("10.5.0.0/16")


def lease(
    key: str, ip: str = "192.0.2.7", backend: str = "", revision: int = 1, node: str = ""
) -> Lease:
    return Lease(
        key=parse_key(key),
        attributes=LeaseAttributes(
            public_ip=IPv4Address(ip), backend_type=backend, extra={NODE: node} if node else {}
        ),
        revision=revision,
        lease_ttl_s=60.0,
    )


def ledger(*leases: Lease, addresses: tuple[str, ...] = ("192.0.2.1",)) -> Routing:
    made = Routing(
        network=NETWORK,
        backend=udp_config(),
        own_key=parse_key(OWN),
        own_addresses=[IPv4Address(address) for address in addresses],
        public_ip=OWN_ADDRESS,
        identity=Identity("us"),
    )
    if leases:
        made.apply(Snapshot(leases, 1))
    return made


def routes(made: Routing) -> dict[str, str]:
    return {str(s): str(peer.endpoint.address) for s, peer in sorted(made.peers.items())}


def refusals(made: Routing) -> dict[str, Refusal]:
    return {str(key): refused.refusal for key, refused in made.refused.items()}


def put(made: Routing, *leases: Lease) -> RoutingDelta:
    return made.apply(Events(tuple(Put(each) for each in leases), made.revision + 1))


def delete(made: Routing, *keys: str) -> RoutingDelta:
    return made.apply(Events(tuple(Gone(parse_key(key)) for key in keys), made.revision + 1))


def came(delta: RoutingDelta) -> dict[str, str]:
    return {str(peer.subnet): str(peer.endpoint.address) for peer in delta.come}


def went(delta: RoutingDelta) -> dict[str, str]:
    return {str(peer.subnet): str(peer.endpoint.address) for peer in delta.gone}


def moved(delta: RoutingDelta) -> dict[str, tuple[str, str]]:
    return {
        str(new.subnet): (str(old.endpoint.address), str(new.endpoint.address))
        for old, new in delta.moved
    }


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
        (lease("10.5.2.0-24", "240.10.0.2"), "10.5.2.0/24", "class E is unicast"),
        (lease("10.5.2.0-24", "255.255.255.254"), "10.5.2.0/24", "the last of class E"),
        (lease("10.5.2.0-24", "10.5.9.1"), "10.5.2.0/24", "inside the network: the kernel decides"),
        (lease("10.5.2.0-24", "100.64.0.9"), "10.5.2.0/24", "carrier-grade NAT"),
        (lease("10.5.2.0-24&fd00::-64"), "10.5.2.0/24", "the IPv4 half of a dual-stack lease"),
    ],
)
def test_lease_that_is_a_peer(given: Lease, subnet: str, breaks: str) -> None:
    made = ledger(given)
    assert routes(made) == {subnet: str(given.attributes.public_ip)}, breaks
    assert not made.refused


@pytest.mark.parametrize(
    ("given", "refusal", "breaks"),
    [
        (lease("10.5.2.0-24", "0.0.0.0"), Refusal.NO_PUBLIC_IP, "flannel sends it to itself"),
        (lease("10.5.2.0-24", "192.0.2.1", node="them"), Refusal.OWN_PUBLIC_IP, "a duplicate"),
        (lease("10.5.2.0-24", "192.0.2.1"), Refusal.LEFTOVER, "a stock flanneld's, or by hand"),
        (lease("10.5.2.0-24", "192.0.2.1", node="us"), Refusal.LEFTOVER, "of an earlier life"),
        (lease("10.5.2.0-24", "198.51.100.1"), Refusal.HOST_ADDRESS, "any of our addresses"),
        (lease("10.5.2.0-24", "198.51.100.1", node="us"), Refusal.HOST_ADDRESS, "whoever signed"),
        (lease("10.5.2.0-24", "224.0.0.1"), Refusal.NOT_UNICAST, "multicast"),
        (lease("10.5.2.0-24", "239.255.255.255"), Refusal.NOT_UNICAST, "multicast"),
        (lease("10.5.2.0-24", "255.255.255.255"), Refusal.NOT_UNICAST, "broadcast"),
        (lease("10.5.2.0-24", "127.0.0.1"), Refusal.NOT_UNICAST, "loopback"),
        (lease("10.5.2.0-24", "0.0.0.1"), Refusal.NOT_UNICAST, "this network"),
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
def test_lease_that_is_refused(given: Lease, refusal: Refusal, breaks: str) -> None:
    made = ledger(given, addresses=("192.0.2.1", "198.51.100.1"))
    assert not made.peers
    assert dict(made.refused) == {given.key: RefusedLease(given, refusal)}, breaks


def test_a_public_ip_that_the_kernel_misroutes_is_refused_while_it_does() -> None:
    inside, broadcast, good = "10.5.9.1", "192.0.2.255", "192.0.2.9"
    first, second = lease("10.5.2.0-24", inside), lease("10.5.3.0-24", broadcast)
    third = lease("10.5.4.0-24", good)
    made = ledger(first, second, third)
    assert len(made.peers) == 3
    into, no_host = Refusal.ROUTED_INTO_OVERLAY, Refusal.NOT_UNICAST
    delta = made.set_misrouted({IPv4Address(inside): into, IPv4Address(broadcast): no_host})
    assert [str(peer.subnet) for peer in delta.gone] == ["10.5.2.0/24", "10.5.3.0/24"]
    assert {each.lease.key: each.refusal for each in delta.newly_refused} == {
        first.key: into,
        second.key: no_host,
    }
    assert routes(made) == {"10.5.4.0/24": good}
    assert not made.set_misrouted(dict(made.misrouted)).moves_packets
    # A lease that comes meanwhile is judged alike, and all that name it when the route changes.
    fourth = lease("10.5.5.0-24", inside)
    made.apply(Events((Put(fourth),), 8))
    assert made.refused[fourth.key].refusal is into
    delta = made.set_misrouted({IPv4Address(broadcast): no_host})
    assert {str(peer.subnet) for peer in delta.come} == {"10.5.2.0/24", "10.5.5.0/24"}
    assert not delta.gone
    assert set(made.refused) == {second.key}


@pytest.mark.parametrize(
    ("key", "refusal"),
    [
        ("10.5.205.0-16", Refusal.TOO_WIDE),  # would take every unleased packet
        ("10.5.0.0-16", Refusal.TOO_WIDE),
        ("10.5.0.0-23", Refusal.TOO_WIDE),  # around our own
        ("10.5.40.0-22", Refusal.TOO_WIDE),  # around the leases of others
        ("10.5.40.128-25", None),  # inside one: the longer prefix wins, as with flannel
        # A reservation, or of before the config was changed: flannel sends there, too.
        ("10.5.0.0-24", None),
        ("10.5.201.0-24", None),
        ("10.5.1.7-24", Refusal.INSIDE_OWN_SUBNET),
        ("10.5.1.0-24&fd00::-64", Refusal.INSIDE_OWN_SUBNET),
        ("10.5.40.9-24", Refusal.DUPLICATE_SUBNET),
        ("10.5.200.0-24", None),
        # flannel's udp backend masks host bits off (proxy_amd64.c, process_cmd).
        ("10.5.41.9-24", None),
    ],
)
def test_only_what_a_node_of_this_network_may_hold_is_a_peer(
    key: str, refusal: Refusal | None
) -> None:
    config = parse_network_config(
        '{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.200.0"}', "test"
    )
    made = Routing(
        network=config.network,
        pool=config.pool,
        backend=udp_config(),
        own_key=parse_key(OWN),
        own_addresses=[OWN_ADDRESS],
    )
    made.apply(Snapshot((lease("10.5.40.0-24", "192.0.2.40"), lease(key)), 1))
    assert refusals(made) == ({} if refusal is None else {key: refusal})
    assert made.why(IPv4Address("10.5.40.7")).peer == made.peers[IPv4Network("10.5.40.0/24")]
    assert made.why(IPv4Address("10.5.99.1")).peer is None


def test_every_refusal_is_a_sentence_for_an_operator() -> None:
    assert len({refusal.value for refusal in Refusal}) == len(Refusal) == 12
    for refusal in Refusal:
        assert len(refusal.value.split()) >= 4


def test_our_own_lease_is_neither_peer_nor_refused() -> None:
    for address in ("192.0.2.1", "192.0.2.99"):
        made = ledger(lease(OWN, address))
        assert not made.peers
        assert not made.refused
        assert len(made.leases) == 1


def test_host_gw_peers_are_host_gw_leases_and_gateways_without_a_port() -> None:
    made = Routing(
        network=NETWORK,
        backend=host_gw_config(),
        own_key=parse_key(OWN),
        own_addresses=[OWN_ADDRESS],
        public_ip=OWN_ADDRESS,
    )
    made.apply(
        Snapshot(
            (
                lease("10.5.2.0-24", "192.0.2.2", "host-gw"),
                lease("10.5.3.0-24", "192.0.2.3", "Host-GW"),
                lease("10.5.4.0-24", "192.0.2.4"),
                lease("10.5.5.0-24", "192.0.2.5", "udp"),
            ),
            1,
        )
    )
    assert routes(made) == {"10.5.2.0/24": "192.0.2.2", "10.5.3.0/24": "192.0.2.3"}
    assert {peer.endpoint.port for peer in made.peers.values()} == {0}
    assert set(refusals(made).values()) == {Refusal.OTHER_BACKEND}
    fib = made.fib()
    assert fib.peer_array.tolist() == [int(IPv4Address("192.0.2.2")), int(IPv4Address("192.0.2.3"))]


def test_one_refusal_does_not_touch_the_others() -> None:
    made = ledger(lease("10.5.2.0-24"), lease("10.5.3.0-24", "0.0.0.0"), lease("10.5.4.0-24"))
    assert routes(made) == {"10.5.2.0/24": "192.0.2.7", "10.5.4.0/24": "192.0.2.7"}
    assert refusals(made) == {"10.5.3.0-24": Refusal.NO_PUBLIC_IP}


def test_duplicates_are_the_same_whatever_the_order() -> None:
    leases = [
        lease("10.5.2.0-24", "192.0.2.7"),
        lease("10.5.2.5-24", "192.0.2.8"),
        lease("10.5.2.7-24", "192.0.2.9"),
        lease("10.5.2.0-24&fd00::-64", "192.0.2.10"),
    ]
    for seed in range(20):
        random.Random(seed).shuffle(leases)
        made = ledger()
        for each in leases:
            put(made, each)
        assert routes(made) == {"10.5.2.0/24": "192.0.2.7"}
        assert set(refusals(made).values()) == {Refusal.DUPLICATE_SUBNET}
        assert len(made.refused) == 3


def test_of_unaligned_duplicates_the_lower_wins() -> None:
    low = lease("10.5.2.5-24", "192.0.2.8")
    high = lease("10.5.2.7-24", "192.0.2.9")
    for order in ((low, high), (high, low)):
        assert routes(ledger(*order)) == {"10.5.2.0/24": "192.0.2.8"}


def test_a_refused_lease_does_not_shadow_a_good_duplicate() -> None:
    made = ledger(lease("10.5.2.0-24", "0.0.0.0"), lease("10.5.2.5-24", "192.0.2.8"))
    assert routes(made) == {"10.5.2.0/24": "192.0.2.8"}
    assert refusals(made) == {"10.5.2.0-24": Refusal.NO_PUBLIC_IP}


def test_different_lengths_are_not_duplicates() -> None:
    made = ledger(lease("10.5.2.0-24"), lease("10.5.2.0-25", "192.0.2.8"))
    assert routes(made) == {"10.5.2.0/24": "192.0.2.7", "10.5.2.0/25": "192.0.2.8"}


# Deltas


def test_delta_names_peers_that_came_moved_and_went() -> None:
    made = ledger()
    first, second = lease("10.5.2.0-24"), lease("10.5.3.0-24", "192.0.2.8")
    assert came(put(made, first, second)) == {
        "10.5.2.0/24": "192.0.2.7",
        "10.5.3.0/24": "192.0.2.8",
    }
    delta = put(made, lease("10.5.2.0-24", "192.0.2.9"))
    assert moved(delta) == {"10.5.2.0/24": ("192.0.2.7", "192.0.2.9")}
    assert not delta.come and not delta.gone and delta.moves_packets
    delta = delete(made, "10.5.3.0-24")
    assert went(delta) == {"10.5.3.0/24": "192.0.2.8"}
    assert not delta.has_overlap_gone, "no conflict about our subnet is over by it"
    put(made, lease("10.5.1.128-25", "192.0.2.9"))
    assert delete(made, "10.5.1.128-25").has_overlap_gone
    assert routes(made) == {"10.5.2.0/24": "192.0.2.9"}


def test_what_cancels_out_in_one_batch_moves_nothing() -> None:
    made = ledger(lease("10.5.2.0-24"))
    one, other = lease("10.5.2.0-24"), lease("10.5.3.0-24")
    there_again = made.apply(Events((Gone(one.key), Put(one)), 2))
    never_there = made.apply(Events((Put(other), Gone(other.key)), 3))
    nothing = made.apply(Events((), 4))
    for delta in (there_again, never_there, nothing):
        assert not delta.moves_packets
    assert there_again.changed_leases == 2
    assert nothing == RoutingDelta()


def test_a_renewal_changes_a_lease_and_moves_nothing() -> None:
    made = ledger(lease("10.5.2.0-24"))
    delta = put(made, lease("10.5.2.0-24", revision=9))
    assert (delta.changed_leases, delta.moves_packets) == (1, False)
    assert made.leases[parse_key("10.5.2.0-24")].revision == 9


def test_what_was_never_there_goes_without_a_trace() -> None:
    assert delete(ledger(), "10.5.2.0-24", "10.9.2.0-24") == RoutingDelta()


def test_the_next_of_two_takes_over_when_the_first_goes() -> None:
    made = ledger(lease("10.5.2.5-24", "192.0.2.8"))
    delta = put(made, lease("10.5.2.0-24"))
    assert moved(delta) == {"10.5.2.0/24": ("192.0.2.8", "192.0.2.7")}
    assert refusals(made) == {"10.5.2.5-24": Refusal.DUPLICATE_SUBNET}
    assert [each.lease.key for each in delta.newly_refused] == [parse_key("10.5.2.5-24")]
    delta = delete(made, "10.5.2.0-24")
    assert moved(delta) == {"10.5.2.0/24": ("192.0.2.7", "192.0.2.8")}
    assert not made.refused


def test_a_lease_that_becomes_bad_is_no_peer_any_more_and_back() -> None:
    made = ledger(lease("10.5.2.0-24"))
    delta = put(made, lease("10.5.2.0-24", "0.0.0.0"))
    assert went(delta) == {"10.5.2.0/24": "192.0.2.7"}
    assert [each.refusal for each in delta.newly_refused] == [Refusal.NO_PUBLIC_IP]
    again = put(made, lease("10.5.2.0-24", "0.0.0.0", revision=5))
    assert not again.newly_refused, "a renewal of a refused lease is no news"
    assert came(put(made, lease("10.5.2.0-24"))) == {"10.5.2.0/24": "192.0.2.7"}
    assert not made.refused


def test_our_addresses_come_and_go() -> None:
    made = ledger(lease("10.5.2.0-24"), lease("10.5.3.0-24", "192.0.2.8"))

    def own(*addresses: str) -> RoutingDelta:
        return made.set_own_addresses([IPv4Address(address) for address in addresses], OWN_ADDRESS)

    assert went(own("192.0.2.1", "192.0.2.7")) == {"10.5.2.0/24": "192.0.2.7"}
    assert refusals(made) == {"10.5.2.0-24": Refusal.HOST_ADDRESS}
    assert not made.duplicates
    assert own("192.0.2.1", "192.0.2.7") == RoutingDelta()
    delta = own("192.0.2.8")
    assert (went(delta), came(delta)) == (
        {"10.5.3.0/24": "192.0.2.8"},
        {"10.5.2.0/24": "192.0.2.7"},
    )
    assert came(own()) == {"10.5.3.0/24": "192.0.2.8"}
    assert not made.refused and not made.duplicates


def test_whoever_renews_a_leftover_is_a_duplicate_node() -> None:
    """A stock flanneld elsewhere with our address by mistake looks like our own leftover."""
    made = ledger(lease("10.5.2.0-24", "192.0.2.1"), lease("10.5.3.0-24", "192.0.2.1", node="us"))
    key = parse_key("10.5.2.0-24")
    assert not made.duplicates
    made.apply(Snapshot(tuple(made.leases.values()), 7))
    assert not made.duplicates, "a snapshot that shows the same revisions is no renewal"
    older = lease("10.5.2.0-24", "192.0.2.1", revision=0)
    made.apply(Events((Put(older),), 8))
    assert not made.duplicates, "an older revision is a store restored, and no renewal"
    delta = put(made, lease("10.5.2.0-24", "192.0.2.1", revision=9))
    assert list(made.duplicates) == [key]
    assert [each.refusal for each in delta.newly_refused] == [Refusal.OWN_PUBLIC_IP]
    assert not put(made, lease("10.5.2.0-24", "192.0.2.1", revision=10)).newly_refused
    assert refusals(made)["10.5.3.0-24"] is Refusal.LEFTOVER
    delete(made, "10.5.2.0-24")
    assert not made.duplicates
    put(made, lease("10.5.2.0-24", "192.0.2.1", revision=12))
    assert not made.duplicates, "a new one, which nobody has renewed yet"


def test_which_address_is_advertised_decides_who_is_a_duplicate() -> None:
    made = ledger(lease("10.5.2.0-24", "192.0.2.8", node="them"))
    assert routes(made) == {"10.5.2.0/24": "192.0.2.8"}
    both = [OWN_ADDRESS, IPv4Address("192.0.2.8")]
    made.set_own_addresses(both, OWN_ADDRESS)
    assert refusals(made) == {"10.5.2.0-24": Refusal.HOST_ADDRESS}
    delta = made.set_own_addresses(both, IPv4Address("192.0.2.8"))
    assert [each.refusal for each in delta.newly_refused] == [Refusal.OWN_PUBLIC_IP]
    assert list(made.duplicates) == [parse_key("10.5.2.0-24")]
    made.set_own_addresses(both, OWN_ADDRESS)
    assert not made.duplicates


def test_views_cannot_be_changed_from_outside() -> None:
    made = ledger(lease("10.5.2.0-24"))
    for view in (made.peers, made.leases, made.refused, made.bad_entries):
        with pytest.raises(TypeError):
            view["x"] = "y"  # type: ignore[index]


# Our own lease


@pytest.mark.parametrize(
    ("update", "own", "breaks"),
    [
        (Events((Put(lease(OWN, "192.0.2.1", revision=7)),), 7), "seen 7", "a renewal of ours"),
        (Events((Put(lease("10.5.2.0-24")),), 7), "", "another's is no news of ours"),
        (Events((Gone(parse_key(OWN)),), 7), "gone", "deleted"),
        (Events((BadEntry(OWN, "no JSON"),), 7), "unreadable no JSON", "written over"),
        (Snapshot((), 7), "gone", "a snapshot without it"),
        (Snapshot((), 7, (BadEntry(OWN, "odd"),)), "unreadable odd", "there, but unreadable"),
        (Snapshot((lease(OWN, "192.0.2.1"),), 7), "", "as it was"),
        (
            Events((Gone(parse_key(OWN)), Put(lease(OWN, "192.0.2.9", revision=6))), 7),
            "gone, seen 6",
            "in order",
        ),
    ],
)
def test_own_lease(update: Events | Snapshot, own: str, breaks: str) -> None:
    made = ledger(lease(OWN, "192.0.2.1"))
    words = []
    for each in made.apply(update).own:
        match each:
            case OwnSeen(found):
                words.append(f"seen {found.revision}")
            case OwnGone():
                words.append("gone")
            case OwnUnreadable(why):
                words.append(f"unreadable {why}")
    assert ", ".join(words) == own, breaks


def test_each_snapshot_without_our_lease_says_so() -> None:
    made = ledger(lease("10.5.2.0-24"))
    for revision in (5, 6):
        delta = made.apply(Snapshot((lease("10.5.2.0-24"),), revision))
        assert delta.own == (OwnGone(),), "also when it was not there before"


# Unreadable entries


def test_unreadable_entries_are_named_once_and_touch_nothing() -> None:
    made = ledger(lease("10.5.2.0-24"))
    bad = BadEntry("10.5.2.0-24", "no JSON")
    assert made.apply(Events((bad,), 2)).newly_bad == (bad,)
    assert made.apply(Events((bad,), 3)).newly_bad == ()
    other = BadEntry("10.5.2.0-24", "half of it is missing")
    assert made.apply(Events((other,), 4)).newly_bad == (other,)
    assert routes(made) == {"10.5.2.0/24": "192.0.2.7"}, "a known lease stays as it was"
    assert dict(made.bad_entries) == {"10.5.2.0-24": other}
    put(made, lease("10.5.2.0-24", revision=5))
    assert not made.bad_entries
    rubbish = BadEntry("rubbish", "not a subnet")
    made.apply(Events((rubbish,), 6))
    made.apply(Events((BadEntryGone("rubbish"),), 7))
    assert not made.bad_entries
    assert made.apply(Snapshot((), 8, (rubbish,))).newly_bad == (rubbish,)
    assert made.apply(Snapshot((), 9, (rubbish,))).newly_bad == ()
    assert made.apply(Snapshot((), 10)).newly_bad == ()
    assert not made.bad_entries


# Hop ids


def hop_of(made: Routing, subnet: str) -> int:
    return made.peers[IPv4Network(subnet)].hop_id


def test_one_hop_id_for_an_endpoint_across_subnets_and_generations() -> None:
    made = ledger(
        lease("10.5.2.0-24", "192.0.2.2"),
        lease("10.5.3.0-24", "192.0.2.3"),
        lease("10.5.4.0-24", "192.0.2.2"),
    )
    two, three = hop_of(made, "10.5.2.0/24"), hop_of(made, "10.5.3.0/24")
    assert hop_of(made, "10.5.4.0/24") == two != three
    assert min(two, three) == FIRST_HOP_ID
    delete(made, "10.5.2.0-24")
    assert hop_of(made, "10.5.4.0/24") == two
    put(made, lease("10.5.1.0-23", "192.0.2.9"), lease("10.5.2.0-24", "192.0.2.2"))
    assert (hop_of(made, "10.5.2.0/24"), hop_of(made, "10.5.3.0/24")) == (two, three)
    fib = made.fib()
    assert fib.hop_array["address"][two] == int(IPv4Address("192.0.2.2"))
    assert fib.hop_array["address"][three] == int(IPv4Address("192.0.2.3"))


def test_a_peer_that_comes_back_finds_its_hop_id_and_it_is_not_assigned_anew() -> None:
    made = ledger()
    assigned = put(made, lease("10.5.2.0-24", "192.0.2.2")).hops_assigned
    assert assigned == (hop_of(made, "10.5.2.0/24"),)
    made.fib()
    delete(made, "10.5.2.0-24")
    made.fib()
    made.note_seen(2)
    delta = put(made, lease("10.5.9.0-24", "192.0.2.2"))
    assert delta.hops_assigned == ()
    assert hop_of(made, "10.5.9.0/24") == assigned[0]


def test_a_hop_id_is_given_to_another_only_after_its_last_fib_went_out_of_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hops, "KEPT_ENDPOINTS", 0)
    made = ledger(lease("10.5.2.0-24", "192.0.2.2"))
    first = hop_of(made, "10.5.2.0/24")
    made.fib()  # generation 1 has it
    delete(made, "10.5.2.0-24")
    made.fib()  # generation 2 has not
    made.note_seen(1)
    delta = put(made, lease("10.5.3.0-24", "192.0.2.3"))
    assert hop_of(made, "10.5.3.0/24") != first, "a thread may still send by generation 1"
    assert delta.hops_assigned == (hop_of(made, "10.5.3.0/24"),)
    made.note_seen(2)
    delta = put(made, lease("10.5.4.0-24", "192.0.2.4"))
    assert hop_of(made, "10.5.4.0/24") == first
    assert delta.hops_assigned == (first,), "what was kept of it is the former endpoint's"


def test_endpoints_without_a_lease_are_kept_up_to_a_number() -> None:
    made = ledger()
    for count in range(hops.KEPT_ENDPOINTS + 50):
        key, address = "10.5.2.0-24", f"198.51.{100 + count // 250}.{1 + count % 250}"
        put(made, lease(key, address))
        made.note_seen(made.fib().generation)
        delete(made, key)
        made.note_seen(made.fib().generation)
    assert len(made.fib().hop_array) <= FIRST_HOP_ID + hops.KEPT_ENDPOINTS + 2


def test_no_hop_id_left_is_a_refusal_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops, "HOPS_MAX", FIRST_HOP_ID + 2)
    made = ledger(*(lease(f"10.5.{n}.0-24", f"192.0.2.{n}") for n in (2, 3, 4)))
    assert len(made.peers) == 2
    assert list(refusals(made).values()) == [Refusal.TOO_MANY_PEERS]
    put(made, lease("10.5.9.0-24", "192.0.2.2"))
    assert len(made.peers) == 3, "a subnet more of a known endpoint needs no id"


def test_who_was_refused_for_want_of_a_hop_id_gets_the_next_free_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hops, "HOPS_MAX", FIRST_HOP_ID + 2)
    made = ledger(*(lease(f"10.5.{n}.0-24", f"192.0.2.{n}") for n in (2, 3, 4)))
    made.fib()
    delete(made, "10.5.2.0-24")
    assert len(made.peers) == 1, "a packet thread may still use the id"
    made.note_seen(made.fib().generation)
    # Any update will do.
    delta = put(made, lease("10.5.3.0-24", "192.0.2.3", revision=99))
    assert [str(peer.subnet) for peer in delta.come] == ["10.5.4.0/24"]
    assert delta.hops_assigned == (delta.come[0].hop_id,)
    assert refusals(made) == {}


def test_fib_rows_are_the_peers_however_many_come_and_go() -> None:
    made = ledger()
    rng = random.Random(5)
    present: set[str] = set()
    for _ in range(2000):
        key = f"10.5.{rng.randrange(2, 250)}.0-24"
        if key in present and rng.random() < 0.4:
            present.remove(key)
            delete(made, key)
        else:
            present.add(key)
            put(made, lease(key, f"192.0.2.{rng.randrange(2, 250)}"))
        if rng.random() < 0.05:
            made.note_seen(made.fib().generation)
    fib = made.fib()
    for peer in made.peers.values():
        start, _length, hop_id = row_of(peer)
        assert fib.index(start) == hop_id
        assert fib.hop_array["address"][hop_id] == int(peer.endpoint.address)
    assert sorted(fib.peer_hops.tolist()) == sorted({p.hop_id for p in made.peers.values()})
    delete(made, *present)
    assert made.fib().peer_array.tolist() == []


def test_generations_count_up() -> None:
    made = ledger()
    assert [made.fib().generation for _ in range(3)] == [1, 2, 3] == [1, 2, made.generation]


# Why a packet goes where it goes


def test_why_names_the_lease_that_decides() -> None:
    made = ledger(
        lease("10.5.0.0-16", "192.0.2.9"),
        lease("10.5.2.0-24", "192.0.2.2"),
        lease("10.5.3.0-24", "0.0.0.0"),
        lease(OWN, "192.0.2.1"),
    )

    def why(address: str) -> RouteAnswer:
        return made.why(IPv4Address(address))

    def key(address: str) -> LeaseKey:
        found = why(address).lease
        assert found is not None
        return found.key

    assert key("10.5.2.77") == parse_key("10.5.2.0-24")
    peer = why("10.5.2.77").peer
    assert peer is not None
    assert peer.endpoint == Endpoint(IPv4Address("192.0.2.2"), 8285)
    assert key("10.5.3.1") == parse_key("10.5.0.0-16"), "a refused one decides nothing"
    assert why("10.5.1.5").is_own and key("10.5.1.5") == parse_key(OWN)
    delete(made, "10.5.0.0-16")
    assert why("10.5.3.1") == RouteAnswer(
        lease=made.leases[parse_key("10.5.3.0-24")], refusal=Refusal.NO_PUBLIC_IP
    )
    assert why("10.5.200.1") == RouteAnswer() == why("203.0.113.1")


# Two deltas as one


def test_merged_deltas_are_the_net_effect() -> None:
    made = ledger(lease("10.5.2.0-24", "192.0.2.2"), lease("10.5.3.0-24", "192.0.2.3"))
    before = dict(made.peers)
    one = put(made, lease("10.5.2.0-24", "192.0.2.22"), lease("10.5.4.0-24", "192.0.2.4"))
    two = delete(made, "10.5.4.0-24", "10.5.3.0-24")
    three = put(made, lease("10.5.2.0-24", "192.0.2.2"), lease("10.5.5.0-24", "192.0.2.5"))
    both = merged(merged(one, two), three)
    assert went(both) == {"10.5.3.0/24": "192.0.2.3"}
    assert came(both) == {"10.5.5.0/24": "192.0.2.5"}
    assert not both.moved
    assert len(both.hops_assigned) == 3
    rebuilt = {s: p for s, p in before.items() if p not in both.gone}
    rebuilt |= {p.subnet: p for p in both.come} | {n.subnet: n for _, n in both.moved}
    assert rebuilt == dict(made.peers)


def test_random_updates_are_judged_as_a_verdict_over_all_leases() -> None:
    rng = random.Random(11)
    made = ledger()
    known: dict[LeaseKey, Lease] = {}
    told: dict[IPv4Network, Peer] = {}
    keys = [f"10.5.{n}.0-24" for n in range(1, 12)] + ["10.5.2.5-24", "10.5.0.0-16", "10.9.0.0-24"]
    addresses = ["192.0.2.1", "192.0.2.7", "192.0.2.8", "0.0.0.0", "10.5.3.3", "224.0.0.1"]
    own = [OWN_ADDRESS]
    made.set_own_addresses(own, NO_LEASES)
    misrouted: set[IPv4Address] = set()
    for revision in range(2, 400):
        key = rng.choice(keys)
        if rng.random() < 0.1:
            own = [IPv4Address(a) for a in rng.sample(addresses[:3], rng.randrange(3))]
            delta = made.set_own_addresses(own, NO_LEASES)
        elif rng.random() < 0.1:
            misrouted = {IPv4Address(a) for a in rng.sample(addresses[1:5:3], rng.randrange(3))}
            delta = made.set_misrouted(dict.fromkeys(misrouted, Refusal.ROUTED_INTO_OVERLAY))
        elif rng.random() < 0.3:
            known.pop(parse_key(key), None)
            delta = delete(made, key)
        else:
            one = lease(key, rng.choice(addresses), rng.choice(["", "", "vxlan"]), revision)
            known[one.key] = one
            delta = put(made, one)
        for gone in delta.gone:
            assert told.pop(gone.subnet) == gone
        for old, new in delta.moved:
            assert told[old.subnet] == old
            told[new.subnet] = new
        for new in delta.come:
            assert new.subnet not in told
            told[new.subnet] = new
        peers, refused = verdict(
            known.values(),
            network=NETWORK,
            own_key=parse_key(OWN),
            misrouted=misrouted,
            own_addresses=own,
        )
        assert {s: p.endpoint.address for s, p in told.items()} == dict(peers)
        assert told == dict(made.peers)
        assert {key: each.refusal for key, each in made.refused.items()} == dict(refused)
        assert not made.duplicates
