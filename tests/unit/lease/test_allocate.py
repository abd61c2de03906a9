"""The plan of a claim: flannel's steps, and never another node's lease."""

from __future__ import annotations

import json
import random
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import pytest

from tundp.backend.choose import parse_network_config
from tundp.errors import OutOfSubnets
from tundp.lease.allocate import Keep, Take, is_compatible, plan_claim
from tundp.lease.codec import parse_key
from tundp.lease.identity import NODE
from tundp.lease.model import Lease, LeaseAttributes
from tundp.lease.network import NetworkConfig

US = "192.0.2.1"
THEM = "192.0.2.2"


def config(**keys: object) -> NetworkConfig:
    return parse_network_config(json.dumps({"Network": "10.5.0.0/16"} | keys), "test")


V4 = config()
DUAL = config(EnableIPv6=True, IPv6Network="2001:db8::/48")


def lease(
    key: str, ip: str = THEM, backend: str = "", ttl: float | None = 60.0, node: str = ""
) -> Lease:
    return Lease(
        key=parse_key(key),
        attributes=LeaseAttributes(
            public_ip=IPv4Address(ip),
            backend_type=backend,
            extra={NODE: node} if node else {},
        ),
        revision=1,
        lease_ttl_s=ttl,
    )


def plan(
    *leases: Lease,
    network: NetworkConfig = V4,
    previous: str | None = None,
    seed: int = 0,
    unreadable: tuple[str, ...] = (),
    node_id: str = "",
) -> Keep | Take:
    return plan_claim(
        leases,
        unreadable=[parse_key(key) for key in unreadable],
        network_config=network,
        public_ip=IPv4Address(US),
        node_id=node_id,
        previous=None if previous is None else parse_key(previous),
        rng=random.Random(seed),
    )


@pytest.mark.parametrize(
    ("ours", "network", "breaks"),
    [
        (lease("10.5.7.0-24", US), V4, "the usual restart"),
        (lease("10.5.1.0-24", US), V4, "SubnetMin itself"),
        (lease("10.5.255.0-24", US), V4, "SubnetMax itself"),
        (lease("10.5.7.9-24", US), V4, "alignment is not asked for"),
        (lease("10.5.7.0-24", US, backend="vxlan"), V4, "whatever its backend was"),
        (lease("10.5.7.0-24", US, ttl=None), V4, "a reservation"),
        (lease("10.5.7.0-24&2001:db8:0:7::-64", US), DUAL, "dual stack"),
    ],
)
def test_our_lease_is_kept(ours: Lease, network: NetworkConfig, breaks: str) -> None:
    others = (lease("10.5.2.0-24"), lease("10.5.3.0-24"))
    assert plan(*others, ours, network=network, previous="10.5.9.0-24") == Keep(ours), breaks


@pytest.mark.parametrize(
    ("ours", "network", "breaks"),
    [
        (lease("10.5.0.0-24", US), V4, "below SubnetMin"),
        (lease("10.6.1.0-24", US), V4, "another network"),
        (lease("10.5.7.0-25", US), V4, "another length"),
        (lease("10.5.7.0-24&2001:db8:0:7::-64", US), V4, "an IPv6 half while IPv6 is off"),
        (lease("10.5.7.0-24", US), DUAL, "no IPv6 half while IPv6 is on"),
        (lease("10.5.7.0-24&2001:db8:0:7::-63", US), DUAL, "IPv6 of another length"),
        (lease("10.5.7.0-24&2001:db9:0:7::-64", US), DUAL, "IPv6 of another network"),
    ],
)
def test_lease_of_ours_that_no_longer_fits_is_deleted(
    ours: Lease, network: NetworkConfig, breaks: str
) -> None:
    verdict = plan(lease("10.5.2.0-24"), ours, network=network)
    assert isinstance(verdict, Take), breaks
    assert verdict.stale == (ours,)
    assert is_compatible(verdict.key, network)


def test_fitting_lease_of_ours_is_kept_despite_a_stale_one() -> None:
    stale, fitting = lease("10.6.1.0-24", US), lease("10.5.7.0-24", US)
    assert plan(stale, fitting) == Keep(fitting)


def test_leases_in_our_name_are_not_compared_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10,000 of them, outside the network and unsigned, held the start for minutes."""
    compared = 0

    def equal(one: Lease, other: object) -> bool:
        nonlocal compared
        compared += 1
        return one is other

    leases = [lease(f"10.6.{number}.0-24", US) for number in range(200)]
    monkeypatch.setattr(Lease, "__eq__", equal)
    found = plan(*leases)
    assert isinstance(found, Take)
    assert len(found.stale) == 200
    assert compared <= 200


def test_all_stale_leases_of_ours_are_deleted_and_no_others() -> None:
    stale = (lease("10.6.1.0-24", US), lease("10.5.7.0-26", US))
    verdict = plan(lease("10.9.9.0-24", THEM), *stale)
    assert isinstance(verdict, Take)
    assert verdict.stale == stale


# The previous subnet


@pytest.mark.parametrize(
    ("previous", "network"),
    [
        ("10.5.33.0-24", V4),
        ("10.5.33.0-24&2001:db8:0:33::-64", DUAL),
    ],
)
def test_previous_subnet_is_taken_when_free(previous: str, network: NetworkConfig) -> None:
    for seed in range(5):
        assert plan(lease("10.5.2.0-24"), network=network, previous=previous, seed=seed) == Take(
            parse_key(previous)
        )


def test_previous_subnet_is_created_and_a_stale_lease_deleted() -> None:
    stale = lease("10.6.1.0-24", US)
    assert plan(stale, previous="10.5.33.0-24") == Take(parse_key("10.5.33.0-24"), (stale,))


@pytest.mark.parametrize(
    ("held", "breaks"),
    [
        ("10.5.33.0-24", "held by another: old flannel steals it"),
        ("10.5.33.9-24", "held under another spelling"),
        ("10.5.32.0-20", "inside somebody's larger lease"),
        ("10.5.33.128-25", "around somebody's smaller lease"),
    ],
)
def test_previous_subnet_is_not_taken_from_its_holder(held: str, breaks: str) -> None:
    for seed in range(5):
        verdict = plan(lease(held), previous="10.5.33.0-24", seed=seed)
        assert isinstance(verdict, Take)
        assert not verdict.key.subnet.overlaps(parse_key(held).subnet), breaks
        assert verdict.stale == ()


def test_previous_subnet_is_not_taken_if_its_ipv6_half_is_held() -> None:
    held = lease("10.5.2.0-24&2001:db8:0:33::-64")
    verdict = plan(held, network=DUAL, previous="10.5.33.0-24&2001:db8:0:33::-64")
    assert isinstance(verdict, Take)
    assert verdict.key.v6 is not None
    assert verdict.key.v6.network != IPv6Network("2001:db8:0:33::/64")


@pytest.mark.parametrize("previous", ["10.6.33.0-24", "10.5.33.0-25", "10.5.0.0-24"])
def test_previous_subnet_that_no_longer_fits_is_ignored(previous: str) -> None:
    verdict = plan(previous=previous)
    assert isinstance(verdict, Take)
    assert verdict.key != parse_key(previous)
    assert is_compatible(verdict.key, V4)


# The draw


def drawn(*leases: Lease, network: NetworkConfig = V4, seeds: int = 1500) -> set[IPv4Network]:
    subnets = set()
    for seed in range(seeds):
        verdict = plan(*leases, network=network, seed=seed)
        assert isinstance(verdict, Take)
        assert verdict.key.is_aligned
        subnets.add(verdict.key.subnet)
    return subnets


def test_draw_is_from_exactly_the_first_hundred_free_subnets() -> None:
    held = [lease(f"10.5.{n}.0-24") for n in range(5, 25)]
    free = {IPv4Network(f"10.5.{n}.0/24") for n in range(1, 256) if not 5 <= n < 25}
    first_hundred = set(sorted(free)[:100])
    assert drawn(*held) == first_hundred
    assert max(first_hundred) == IPv4Network("10.5.120.0/24")


def test_draw_is_from_all_free_subnets_if_fewer_than_a_hundred() -> None:
    network = config(SubnetMin="10.5.10.0", SubnetMax="10.5.13.0")
    held = lease("10.5.11.0-24")
    assert drawn(held, network=network, seeds=60) == {
        IPv4Network(f"10.5.{n}.0/24") for n in (10, 12, 13)
    }


@pytest.mark.parametrize(
    ("held", "free", "breaks"),
    [
        (["10.5.10.0-25"], (11, 12, 13), "a smaller lease spoils its whole subnet"),
        (["10.5.10.255-31"], (11, 12, 13), "at the very end of a subnet"),
        (["10.5.10.0-23"], (12, 13), "a larger lease spoils all it covers"),
        (["10.5.10.9-23"], (12, 13), "whatever its host bits"),
        (["10.5.0.0-21"], (10, 11, 12, 13), "a larger one below the range"),
        (["10.5.8.0-22"], (12, 13), "a larger one reaching into the range"),
        (["10.5.12.0-22"], (10, 11), "a larger one reaching out of the range"),
        (["10.5.10.0-24", "10.5.10.0-25", "10.5.12.0-24"], (11, 13), "overlapping leases"),
        (["10.5.9.0-24", "10.5.14.0-24"], (10, 11, 12, 13), "the neighbours of the range"),
        (["10.6.0.0-16"], (10, 11, 12, 13), "another network's leases"),
    ],
)
def test_subnet_that_overlaps_a_lease_is_not_drawn(
    held: list[str], free: tuple[Any, ...], breaks: str
) -> None:
    network = config(SubnetMin="10.5.10.0", SubnetMax="10.5.13.0")
    expected = {IPv4Network(f"10.5.{n}.0/24") for n in free}
    assert drawn(*(lease(key) for key in held), network=network, seeds=80) == expected, breaks


def test_same_seed_draws_the_same_subnet() -> None:
    assert plan(seed=4) == plan(seed=4)
    assert len({str(plan(seed=seed)) for seed in range(20)}) > 5


def test_dual_stack_draws_both_halves_independently() -> None:
    pairs = set()
    for seed in range(50):
        verdict = plan(network=DUAL, seed=seed)
        assert isinstance(verdict, Take)
        assert verdict.key.v6 is not None
        assert verdict.key.v6.network.subnet_of(IPv6Network("2001:db8::/48"))
        assert verdict.key.v6.network.prefixlen == 64
        pairs.add(
            (
                int(verdict.key.subnet.network_address) >> 8 & 0xFF,
                int(verdict.key.v6.network.network_address) >> 64 & 0xFFFF,
            )
        )
    assert any(low != high for low, high in pairs)
    assert all(1 <= high <= 100 for _, high in pairs)


def test_dual_stack_skips_held_ipv6_subnets() -> None:
    network = config(
        EnableIPv6=True,
        IPv6Network="2001:db8::/48",
        IPv6SubnetMin="2001:db8:0:1::",
        IPv6SubnetMax="2001:db8:0:2::",
    )
    held = lease("10.5.200.0-24&2001:db8:0:1::-64")
    for seed in range(10):
        verdict = plan(held, network=network, seed=seed)
        assert isinstance(verdict, Take)
        assert verdict.key.v6 is not None
        assert verdict.key.v6.network == IPv6Network("2001:db8:0:2::/64")


@pytest.mark.parametrize(
    ("network", "held", "breaks"),
    [
        (config(SubnetMin="10.5.1.0", SubnetMax="10.5.1.0"), ["10.5.1.0-24"], "the only one held"),
        (V4, [f"10.5.{n}.0-18" for n in (0, 64, 128, 192)], "four leases cover everything"),
        (config(SubnetMin="10.5.20.0", SubnetMax="10.5.10.0"), [], "reversed range"),
        (V4, [f"10.5.{n}.0-24" for n in range(1, 256)], "every single one held"),
    ],
)
def test_out_of_subnets(network: NetworkConfig, held: list[Any | str], breaks: str) -> None:
    with pytest.raises(OutOfSubnets) as caught:
        plan(*(lease(key) for key in held), network=network)
    message = str(caught.value)
    assert "out of subnets" in message, breaks
    assert str(network.pool.subnet_min) in message
    assert str(network.pool.subnet_max) in message
    assert "SubnetMin..SubnetMax" in message


@pytest.mark.parametrize("key", ["10.5.0.0-16", "10.5.205.0-16", "10.5.0.0-17", "0.0.0.0-0"])
@pytest.mark.parametrize("previous", [None, "10.5.33.0-24"])
def test_a_lease_that_no_node_can_hold_bars_nobody(key: str, previous: str | None) -> None:
    # One such key would keep every new node of the cluster from starting.
    found = plan(lease(key), lease("10.5.1.0-24"), previous=previous)
    assert isinstance(found, Take)
    if previous is not None:
        assert str(found.key) == previous


def test_out_of_ipv6_subnets() -> None:
    network = config(
        EnableIPv6=True,
        IPv6Network="2001:db8::/48",
        IPv6SubnetMin="2001:db8:0:2::",
        IPv6SubnetMax="2001:db8:0:1::",
    )
    with pytest.raises(OutOfSubnets, match="out of subnets: every /64 from 2001:db8:0:2::"):
        plan(network=network)


def test_subnet_of_an_unreadable_lease_is_held() -> None:
    network = config(SubnetMin="10.5.10.0", SubnetMax="10.5.11.0")
    for seed in range(10):
        verdict = plan(network=network, unreadable=("10.5.10.0-24",), seed=seed)
        assert verdict == Take(parse_key("10.5.11.0-24"))
    held = plan(network=network, unreadable=("10.5.10.0-24",), previous="10.5.10.0-24")
    assert held == Take(parse_key("10.5.11.0-24"))


def test_lease_with_unspecified_address_is_not_ours() -> None:
    unowned = lease("10.5.7.0-24", "0.0.0.0")
    verdict = plan_claim(
        [unowned],
        network_config=V4,
        public_ip=IPv4Address("0.0.0.0"),
        previous=None,
        rng=random.Random(0),
    )
    assert isinstance(verdict, Take)
    assert verdict.stale == ()


def test_last_free_subnet_is_found() -> None:
    held = [lease(f"10.5.{n}.0-24") for n in range(1, 255)]
    assert plan(*held) == Take(parse_key("10.5.255.0-24"))


def test_a_huge_lease_in_a_huge_pool_is_skipped_in_one_step() -> None:
    # /30 subnets of a /8 are 4 million: walking them one by one would take minutes.
    network = parse_network_config(
        '{"Network": "10.0.0.0/8", "SubnetLen": 30, "SubnetMax": "10.128.0.0"}', "test"
    )
    held = (lease("10.0.0.0-10"), lease("10.64.0.0-10"))
    assert plan(*held, network=network) == Take(parse_key("10.128.0.0-30"))


# Node ids


FITS, STALE = "10.5.7.0-24", "10.6.7.0-24"


@pytest.mark.parametrize(
    ("leases", "kept", "breaks"),
    [
        ([lease(FITS, US, node="us")], 0, "the usual restart"),
        ([lease(FITS, THEM, node="us")], 0, "our address changed while we were down"),
        ([lease(FITS, US)], 0, "written by a stock flanneld, or by our predecessor"),
        ([lease(FITS, US, node="them")], 0, "for the caller to challenge"),
        ([lease("10.5.8.0-24", US), lease(FITS, THEM, node="us")], 1, "the id counts more"),
        ([lease("10.5.8.0-24", US, node="them"), lease(FITS, THEM, node="us")], 1, "and here"),
        ([lease("10.5.8.0-24", US, node="them"), lease(FITS, US, node="us")], 1, "and here"),
        ([lease(STALE, US, node="us"), lease(FITS, US)], 1, "the first no longer fits"),
        ([lease(STALE, US, node="us"), lease(FITS, US, node="them")], 1, "to be challenged"),
        ([lease(FITS, "0.0.0.0", node="us")], 0, "ours though its address is lost"),
    ],
)
def test_choice_among_several_leases_of_ours(leases: list[Lease], kept: int, breaks: str) -> None:
    others = [lease("10.5.2.0-24"), lease("10.5.3.0-24", node="them")]
    for order in (leases, leases[::-1]):
        verdict = plan(*others, *order, node_id="us", previous="10.5.9.0-24")
        assert verdict == Keep(leases[kept]), breaks


@pytest.mark.parametrize(
    ("leases", "kept", "breaks"),
    [
        ([lease("10.5.7.0-24", US), lease("10.5.9.0-24", US)], 1, "pods have its addresses"),
        ([lease("10.5.7.0-24", US, node="us"), lease("10.5.9.0-24", US)], 1, "though unsigned"),
        ([lease("10.5.7.0-24", US), lease("10.5.9.0-24", US, node="them")], 0, "a duplicate's"),
        ([lease("10.5.7.0-24", US, node="us"), lease("10.5.9.0-24", THEM)], 0, "another node's"),
        ([lease("10.5.7.0-24", US), lease("10.5.9.0-24", THEM, node="us")], 1, "ours has moved"),
    ],
)
def test_of_several_leases_of_ours_the_previous_subnet_is_kept(
    leases: list[Lease], kept: int, breaks: str
) -> None:
    for order in (leases, leases[::-1]):
        assert plan(*order, node_id="us", previous="10.5.9.0-24") == Keep(leases[kept]), breaks


def test_duplicate_nodes_lease_that_no_longer_fits_is_not_deleted() -> None:
    """Its PublicIP is ours, but another node says it wrote it: nobody asked that one."""
    duplicates = lease(STALE, US, node="them")
    verdict = plan(duplicates, node_id="us")
    assert isinstance(verdict, Take)
    assert verdict.stale == ()


def test_duplicate_nodes_lease_holds_its_subnet() -> None:
    network = config(SubnetMin="10.5.10.0", SubnetMax="10.5.11.0")
    half = lease("10.5.10.0-25", US, node="them")
    for seed in range(10):
        verdict = plan(half, network=network, node_id="us", seed=seed)
        assert verdict == Take(parse_key("10.5.11.0-24"))
        verdict = plan(half, network=network, node_id="us", previous="10.5.10.0-24", seed=seed)
        assert verdict == Take(parse_key("10.5.11.0-24"))


def test_stale_leases_of_ours_are_deleted_but_not_of_duplicates_or_clones() -> None:
    ours = (lease("10.6.8.0-24", US, node="us"), lease("10.6.9.0-24", US))
    rest = (
        lease("10.6.7.0-24", THEM, node="us"),  # perhaps a clone's
        lease("10.6.10.0-24", US, node="them"),
        lease("10.6.11.0-24", THEM),
    )
    verdict = plan(*ours, *rest, node_id="us")
    assert isinstance(verdict, Take)
    assert set(map(str, (one.key for one in verdict.stale))) == {str(one.key) for one in ours}


def test_stale_lease_of_ours_does_not_hold_its_subnet() -> None:
    network = config(SubnetMin="10.5.10.0", SubnetMax="10.5.10.0")
    half = lease("10.5.10.0-25", US)
    assert plan(half, network=network) == Take(parse_key("10.5.10.0-24"), (half,))
    assert plan(half, network=network, previous="10.5.10.0-24") == Take(
        parse_key("10.5.10.0-24"), (half,)
    )


def test_without_a_node_id_every_signed_lease_is_another_nodes() -> None:
    assert plan(lease(FITS, US, node="them")) == Keep(lease(FITS, US, node="them"))
    verdict = plan(lease(FITS, THEM, node="them"))
    assert isinstance(verdict, Take)
    verdict = plan(lease(STALE, US, node="them"))
    assert isinstance(verdict, Take)
    assert verdict.stale == ()


def test_lease_of_ours_by_address_and_by_id_is_deleted_once() -> None:
    stale = lease(STALE, US, node="us")
    verdict = plan(stale, node_id="us")
    assert isinstance(verdict, Take)
    assert verdict.stale == (stale,)


def test_lease_with_unspecified_address_and_another_id_is_not_ours() -> None:
    verdict = plan_claim(
        [lease(FITS, "0.0.0.0", node="them"), lease("10.5.8.0-24", "0.0.0.0")],
        network_config=V4,
        public_ip=IPv4Address("0.0.0.0"),
        node_id="us",
        previous=None,
        rng=random.Random(0),
    )
    assert isinstance(verdict, Take)
    assert verdict.stale == ()
    assert verdict.key not in (parse_key(FITS), parse_key("10.5.8.0-24"))
