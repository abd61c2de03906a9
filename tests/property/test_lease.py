"""FIB against a linear scan, the lease table against a dict, codec and config on any text."""

from __future__ import annotations

import contextlib
import json
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.routes import PORT, fib_of
from tundp.backend.choose import parse_network_config
from tundp.errors import ConfigError, LeaseFormatError
from tundp.lease import codec, subnet_env
from tundp.lease.model import (
    BadEntry,
    Events,
    Gone,
    Lease,
    LeaseAttributes,
    LeaseKey,
    Put,
    Snapshot,
)
from tundp.lease.table import LeaseTable

SETTINGS = settings(max_examples=200, deadline=None)

# FIB

# Half of the prefixes lie in one /16, so that they overlap.
ADDRESSES = st.one_of(st.integers(0, 2**32 - 1), st.integers(0x0A050000, 0x0A05FFFF))


@st.composite
def subnets(draw: st.DrawFn) -> IPv4Network:
    length = draw(st.one_of(st.integers(0, 31), st.integers(16, 28)))
    return IPv4Network((draw(ADDRESSES) >> (32 - length) << (32 - length), length))


@SETTINGS
@given(
    routes=st.dictionaries(subnets(), st.integers(1, 4), max_size=12),
    own=st.none() | subnets(),
    probes=st.lists(ADDRESSES, max_size=30),
)
@example(routes={IPv4Network("0.0.0.0/0"): 1}, own=None, probes=[0, 2**32 - 1])
@example(
    routes={IPv4Network("0.0.0.0/0"): 1, IPv4Network("10.5.1.2/31"): 2},
    own=IPv4Network("10.5.0.0/16"),
    probes=[0x0A050101, 0x0A050102, 0x0A050104],
)
def test_fib_is_a_longest_prefix_scan(
    routes: dict[IPv4Network, int], own: IPv4Network | None, probes: list[int]
) -> None:
    if own is not None:
        routes.pop(own, None)
    fib = fib_of(*((subnet, IPv4Address(0xC0000200 + n)) for subnet, n in routes.items()), own=own)
    scan: list[tuple[IPv4Network, int | None]] = [
        (subnet, 0xC0000200 + n) for subnet, n in routes.items()
    ]
    if own is not None:
        scan.append((own, None))
    scan.sort(key=lambda entry: entry[0].prefixlen, reverse=True)
    edges = [
        address
        for subnet, _ in scan
        for address in (
            int(subnet.network_address) - 1,
            int(subnet.network_address),
            int(subnet.broadcast_address),
            int(subnet.broadcast_address) + 1,
        )
        if 0 <= address < 2**32
    ]
    for address in probes + edges:
        hop = fib.lookup(address)
        match = next(
            (entry for entry in scan if IPv4Address(address) in entry[0]),
            None,
        )
        if match is None:
            assert hop is None
        elif match[1] is None:
            assert hop is not None
            assert hop.is_local
        else:
            assert hop is not None
            assert (hop.address, hop.is_local) == (match[1], False)
        targets = {target for _, target in scan if target}
        expected = (address if address in targets else None) if match is None else match[1] or 0
        assert fib.holder(address) == (
            None if expected is None else (expected, PORT if expected else 0)
        )
        assert fib.is_node(address) is (address in targets)


# Lease table

KEYS = [codec.parse_key(f"10.5.{n}.0-24") for n in range(5)]
LEASES = st.builds(
    lambda key, ip, revision: Lease(
        key=key,
        attributes=LeaseAttributes(public_ip=IPv4Address(0xC0000200 + ip)),
        revision=revision,
        lease_ttl_s=60.0,
    ),
    st.sampled_from(KEYS),
    st.integers(1, 3),
    st.integers(1, 3),
)
BAD = st.builds(
    BadEntry,
    st.sampled_from([*(str(key) for key in KEYS), "rubbish", "10.5.1.0-24hi"]),
    st.just(""),
)
UPDATES: st.SearchStrategy[tuple[str, list[Any], list[BadEntry]]] = st.one_of(
    st.builds(
        lambda leases, bad: ("snapshot", leases, bad),
        st.lists(LEASES, unique_by=lambda lease: str(lease.key)),
        st.lists(BAD, max_size=3),
    ),
    st.builds(
        lambda events: ("events", events, []),
        st.lists(
            st.one_of(st.builds(Put, LEASES), st.builds(Gone, st.sampled_from(KEYS)), BAD),
            max_size=6,
        ),
    ),
)


@SETTINGS
@given(st.lists(UPDATES, max_size=8))
def test_table_is_a_dict(updates: list[Any]) -> None:
    table = LeaseTable()
    model: dict[LeaseKey, Lease] = {}
    replayed: dict[LeaseKey, Lease] = {}
    for revision, (kind, items, bad) in enumerate(updates, 1):
        if kind == "snapshot":
            kept = {str(key): lease for key, lease in model.items()}
            model = {lease.key: lease for lease in items}
            for entry in bad:
                if entry.name in kept:
                    model.setdefault(kept[entry.name].key, kept[entry.name])
            changes = table.apply(Snapshot(tuple(items), revision, tuple(bad)))
        else:
            for event in items:
                if isinstance(event, Put):
                    model[event.lease.key] = event.lease
                elif isinstance(event, Gone):
                    model.pop(event.key, None)
            changes = table.apply(Events(tuple(items), revision))
        assert dict(table.leases) == model
        assert table.revision == revision
        # The changes alone tell the whole story to whoever follows them.
        for change in changes:
            assert replayed.get(change.key) == change.old
            assert change.old != change.new
            if change.new is None:
                del replayed[change.key]
            else:
                replayed[change.key] = change.new
        assert replayed == model


# Codec

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KNOWN = {"publicip", "publicipv6", "backendtype", "backenddata", "backendv6data"}
ATTRIBUTES = st.builds(
    LeaseAttributes,
    public_ip=st.integers(0, 2**32 - 1).map(IPv4Address),
    public_ipv6=st.none() | st.integers(0, 2**128 - 1).map(IPv6Address),
    backend_type=st.text(st.characters(codec="utf-8"), max_size=8),
    backend_data=JSON,
    backend_v6_data=JSON,
    extra=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda k: k.lower() not in KNOWN),
        JSON,
        max_size=3,
    ),
)


@SETTINGS
@given(ATTRIBUTES)
def test_value_round_trip(attributes: LeaseAttributes) -> None:
    text = codec.encode_value(attributes)
    assert codec.parse_value(text) == attributes
    assert json.loads(text.encode())
    assert not set("<>&") & set(text)


@SETTINGS
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 31),
    st.none() | st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 127)),
)
def test_key_round_trip(v4: int, length: int, v6: tuple[int, int] | None) -> None:
    half = None
    # Of the mapped addresses Python and Go write different text; nobody leases them.
    if v6 is not None and not IPv6Address(v6[0]).ipv4_mapped:
        half = IPv6Interface(v6)
    key = LeaseKey(IPv4Interface((v4, length)), half)
    assert codec.parse_key(str(key)) == key


TEXTS = st.one_of(
    st.text(max_size=40),
    JSON.map(json.dumps),
    st.dictionaries(
        st.sampled_from(
            ["PublicIP", "publicip", "PublicIPv6", "BackendType", "BackendData", "x", "X"]
        ),
        JSON | st.sampled_from(["192.0.2.1", "2001:db8::1"]),
    ).map(json.dumps),
)


@SETTINGS
@given(st.text(max_size=40) | st.from_regex(r"[0-9.]{0,12}-[0-9]{0,3}(&[0-9a-f:]*-[0-9]*)?"))
def test_parse_key_raises_nothing_else(text: str) -> None:
    with contextlib.suppress(LeaseFormatError):
        assert isinstance(codec.parse_key(text), LeaseKey)


@SETTINGS
@given(TEXTS)
def test_parse_value_raises_nothing_else_and_what_it_reads_it_can_write(text: str) -> None:
    try:
        attributes = codec.parse_value(text)
    except LeaseFormatError:
        return
    again = codec.parse_value(codec.encode_value(attributes))
    assert again == attributes


# Network config

NETWORK_KEYS = st.sampled_from(
    [
        *("Network", "network", "SubnetLen", "SubnetMin", "SubnetMax", "Backend", "EnableIPv4"),
        *("EnableIPv6", "EnableNFTables", "IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin"),
        *("IPv6SubnetMax", "Unknown"),
    ]
)
NETWORK_VALUES = st.one_of(
    JSON,
    st.sampled_from(["10.5.0.0/16", "10.5.1.0", "10.5.9.0", "0.0.0.0/0", "2001:db8::/48"]),
    st.sampled_from(["2001:db8:0:1::", "0.0.0.0", "::", "10.5.0.0/31", "2001:db8::/127"]),
    st.integers(-1, 130),
    st.fixed_dictionaries({"Type": st.just("udp")}, optional={"Port": JSON}),
)


@SETTINGS
@given(
    st.one_of(
        st.text(max_size=40),
        JSON.map(json.dumps),
        st.dictionaries(NETWORK_KEYS, NETWORK_VALUES).map(json.dumps),
        st.dictionaries(NETWORK_KEYS, NETWORK_VALUES)
        .map(lambda config: {"Network": "10.5.0.0/16"} | config)
        .map(json.dumps),
    )
)
def test_network_config_raises_nothing_but_config_errors(text: str) -> None:
    try:
        config = parse_network_config(text, "origin")
    except ConfigError as error:
        assert "origin" in str(error)
        return
    assert config.backend.name == "host-gw" or 1 <= config.backend.peer_port <= 65535
    for pool in (config.pool, config.pool6):
        if pool is None:
            continue
        assert pool.network.prefixlen + 2 <= pool.subnet_len <= pool.network.max_prefixlen - 2
        for edge in (pool.subnet_min, pool.subnet_max):
            assert edge in pool.network
            assert int(edge) % (1 << (pool.network.max_prefixlen - pool.subnet_len)) == 0


# subnet.env


@SETTINGS
@given(
    st.text(max_size=60)
    | st.text(max_size=30).map(lambda text: f"FLANNEL_SUBNET={text}")
    | st.from_regex(r"(export )?FLANNEL_(IPV6_)?SUBNET[=:] ?[\"']?[0-9a-f.:%/,]{0,30}[\"']?")
)
def test_previous_key_never_raises(text: str) -> None:
    found = subnet_env.previous_key(text)
    assert found is None or (isinstance(found, LeaseKey) and found.is_aligned)


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(68, 65507), st.booleans())
def test_subnet_env_round_trip(base: int, length: int, mtu: int, masq: bool) -> None:
    subnet = IPv4Network((base >> (32 - length) << (32 - length), length))
    key = LeaseKey(IPv4Interface(str(subnet)))
    env = subnet_env.SubnetEnv(network=subnet, key=key, network6=None, mtu=mtu, ip_masq=masq)
    assert subnet_env.previous_key(subnet_env.render(env)) == key
