"""The network config: the JSON an operator stores under `<prefix>/config`.

Parsed as flannel's Go code parses it and validated in flannel's order. Each error is flannel's
message followed by the key, its value and the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final

from tundp.errors import ConfigError, LeaseFormatError
from tundp.lease import gojson
from tundp.printable import quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendConfig:
    """`Backend` of the network config: what leases and routes depend on."""

    name: str
    """The backend's name, lower case: `Backend.Type`."""
    lease_type: str
    """BackendType of our own lease."""
    lease_types: frozenset[str]
    """BackendType of the leases that are peers, lower case."""
    peer_port: int = 0
    """UDP port of every peer's endpoint, 1 to 65535; 0 for a backend without one."""


ParseBackend = Callable[[str, gojson.Fields], BackendConfig]
"""Name (as given, not empty) and members of the Backend object to its config; ConfigError."""
DEFAULT_BACKEND: Final = "udp"
"""What a network config without Backend means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An address family: the spelling of its config keys and its limits."""

    prefix: str
    bits: int
    default_subnet_len: int
    network_type: type[IPv4Network | IPv6Network]
    address_type: type[IPv4Address | IPv6Address]

    def key(self, name: str) -> str:
        """The config key, e.g. `IPv6SubnetLen`."""
        return self.prefix + name


_V4: Final = Family(
    prefix="", bits=32, default_subnet_len=24, network_type=IPv4Network, address_type=IPv4Address
)
_V6: Final = Family(
    prefix="IPv6",
    bits=128,
    default_subnet_len=64,
    network_type=IPv6Network,
    address_type=IPv6Address,
)


_SUBNET_BITS_MIN: Final = 2
"""A subnet's prefix is at least so much longer than the network's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubnetPool:
    """The subnets one family may lease: subnet_min to subnet_max, step one subnet."""

    network: IPv4Network | IPv6Network
    subnet_len: int
    subnet_min: IPv4Address | IPv6Address
    subnet_max: IPv4Address | IPv6Address

    def admits(self, subnet: IPv4Network | IPv6Network) -> bool:
        """Whether a lease of `subnet` may be kept or taken again (flannel's "compatible").

        Both families' address types order only among themselves; callers never mix them.
        """
        base = int(subnet.network_address)
        return subnet.prefixlen == self.subnet_len and int(self.subnet_min) <= base <= int(
            self.subnet_max
        )

    def may_hold(self, subnet: IPv4Network | IPv6Network) -> bool:
        """Whether a node may hold a lease of `subnet`, with whatever SubnetLen flannel allows.

        A network is divided into at least four subnets: anything wider is nobody's.
        """
        return subnet.prefixlen >= self.network.prefixlen + _SUBNET_BITS_MIN


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The network config with every default applied. IPv4 is always on."""

    pool: SubnetPool
    pool6: SubnetPool | None
    backend: BackendConfig
    enable_nftables: bool

    @property
    def network(self) -> IPv4Network:
        """The overlay's IPv4 prefix."""
        assert isinstance(self.pool.network, IPv4Network)
        return self.pool.network

    @property
    def network6(self) -> IPv6Network | None:
        """The overlay's IPv6 prefix, None where IPv6 is off."""
        if self.pool6 is None:
            return None
        assert isinstance(self.pool6.network, IPv6Network)
        return self.pool6.network


def parse_network_config(text: str, origin: str, parse_backend: ParseBackend) -> NetworkConfig:
    """Parse and validate; ConfigError names `origin`, the key, its value and the rule.

    parse_backend: backend.choose's, which knows every backend.
    """
    try:
        return _parse(text, parse_backend)
    except (LeaseFormatError, ConfigError) as error:
        raise ConfigError(f"{error} (network config in {origin})") from None


def _parse(text: str, parse_backend: ParseBackend) -> NetworkConfig:
    fields = gojson.parse_object(text, "network config")
    enable_ipv4 = _flag(fields, "EnableIPv4", default=True)
    enable_ipv6 = _flag(fields, "EnableIPv6", default=False)
    enable_nftables = _flag(fields, "EnableNFTables", default=False)
    v4 = _read_family(fields, _V4)
    v6 = _read_family(fields, _V6)
    if not enable_ipv4:
        raise ConfigError(
            "EnableIPv4 is false: tundp carries IPv4 only, so an overlay without IPv4 has"
            " nothing to send; remove EnableIPv4"
        )
    return NetworkConfig(
        pool=_validate(v4, _V4),
        pool6=_validate(v6, _V6) if enable_ipv6 else None,
        backend=_read_backend(fields.get("Backend"), parse_backend),
        enable_nftables=enable_nftables,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """The values of one family as decoded; None or 0 where they are absent."""

    network: Any
    subnet_len: int
    subnet_min: Any
    subnet_max: Any


def _read_family(fields: gojson.Fields, family: Family) -> _Given:
    length = fields.get(family.key("SubnetLen"))
    return _Given(
        network=_read_network(fields, family),
        subnet_len=(
            0
            if length is gojson.MISSING or length is None
            else gojson.expect_uint(length, family.key("SubnetLen"))
        ),
        subnet_min=_read_address(fields, family, "SubnetMin"),
        subnet_max=_read_address(fields, family, "SubnetMax"),
    )


def _read_network(fields: gojson.Fields, family: Family) -> IPv4Network | IPv6Network | None:
    name = family.key("Network")
    value = fields.get(name)
    if value is gojson.MISSING or (value is None and family is _V6):
        return None
    text = gojson.expect_string(value, name)
    try:
        # Go accepts a prefix length only, Python also a netmask and an IPv6 zone.
        if not text.rpartition("/")[2].isdecimal() or "%" in text:
            raise ValueError
        return family.network_type(text, strict=False)
    except ValueError:
        example = "10.5.0.0/16" if family is _V4 else "fd00:5::/56"
        raise ConfigError(f"{name} is {quoted(text)}, not a CIDR such as {example}") from None


def _read_address(
    fields: gojson.Fields, family: Family, name: str
) -> IPv4Address | IPv6Address | None:
    name = family.key(name)
    value = fields.get(name)
    if value is gojson.MISSING or (value is None and family is _V6):
        return None
    text = gojson.expect_string(value, name)
    try:
        address = family.address_type(text.replace("%", "/"))
    except ValueError:
        kind = "IPv4" if family is _V4 else "IPv6"
        raise ConfigError(f"{name} is {quoted(text)}, not an {kind} address") from None
    return None if int(address) == 0 else address


def _validate(given: _Given, family: Family) -> SubnetPool:
    """Flannel's seven rules, in flannel's order and words."""
    key = family.key
    network = given.network
    if network is None or (network.prefixlen == 0 and int(network.network_address) == 0):
        raise ConfigError(
            f"please define a correct {key('Network')} parameter in the flannel config:"
            f" {key('Network')} is {'absent' if network is None else network}"
        )
    longest = family.bits - 2
    if given.subnet_len > longest:
        raise ConfigError(
            f"SubnetLen must be less than /{longest + 1}:"
            f" {key('SubnetLen')} is {given.subnet_len}, the most is {longest}"
        )
    if given.subnet_len:
        if given.subnet_len < network.prefixlen + 2:
            raise ConfigError(
                "network must be able to accommodate at least four subnets:"
                f" {key('SubnetLen')} is {given.subnet_len} in {key('Network')} {network},"
                f" the least is {network.prefixlen + 2}"
            )
        subnet_len = given.subnet_len
    else:
        if network.prefixlen > longest - 2:
            raise ConfigError(
                f"{'network' if family is _V4 else 'IPv6Network'} is too small."
                f" Minimum useful network prefix is /{longest - 2}:"
                f" {key('Network')} is {network}"
            )
        default = family.default_subnet_len
        subnet_len = default if network.prefixlen <= default - 2 else network.prefixlen + 2
    step = 1 << (family.bits - subnet_len)
    base = int(network.network_address)
    subnet_min = given.subnet_min
    subnet_max = given.subnet_max
    for name, address in (("SubnetMin", subnet_min), ("SubnetMax", subnet_max)):
        if address is not None and address not in network:
            raise ConfigError(
                f"{key(name)} is not in the range of the {key('Network')}:"
                f" {key(name)} is {address}, {key('Network')} is {network}"
            )
    for name, address in (("SubnetMin", subnet_min), ("SubnetMax", subnet_max)):
        if address is not None and int(address) % step:
            nearest = family.address_type(int(address) // step * step)
            raise ConfigError(
                f"{key(name)} is not on a SubnetLen boundary: {address}"
                f" ({key('SubnetLen')} is {subnet_len}; {nearest} would be)"
            )
    return SubnetPool(
        network=network,
        subnet_len=subnet_len,
        subnet_min=subnet_min or family.address_type(base + step),
        subnet_max=subnet_max or family.address_type(base + network.num_addresses - step),
    )


def _read_backend(value: Any, parse: ParseBackend) -> BackendConfig:
    """The Backend object by its backend's own parser."""
    if value is gojson.MISSING:
        return parse(DEFAULT_BACKEND, gojson.Fields([]))
    if value is not None and not isinstance(value, gojson.Fields):
        raise ConfigError(
            "error decoding Backend property of config:"
            f" Backend is {gojson.describe(value)}, not a JSON object"
        )
    fields = gojson.Fields([]) if value is None else value
    given = fields.get("Type")
    name = "" if given is gojson.MISSING or given is None else given
    if not isinstance(name, str):
        raise ConfigError(
            "error decoding Backend property of config:"
            f" Backend.Type is {gojson.describe(name)}, not a string"
        )
    return parse(name, fields)


def _flag(fields: gojson.Fields, name: str, *, default: bool) -> bool:
    value = fields.get(name)
    if value is gojson.MISSING or value is None:
        return default
    return gojson.expect_bool(value, name)
