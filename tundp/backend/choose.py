"""Every backend there is, by the name the network config has for it.

A backend more is a module here and a line in BACKENDS.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from tundp.backend import hostgw, udp
from tundp.backend.base import BackendKind
from tundp.errors import ConfigError
from tundp.lease import gojson
from tundp.lease.network import BackendConfig, NetworkConfig
from tundp.lease.network import parse_network_config as _parse
from tundp.printable import printable, quoted

BACKENDS: Final[Mapping[str, BackendKind]] = MappingProxyType(
    {kind.name: kind for kind in (udp.KIND, hostgw.KIND)}
)
FLANNEL_BACKENDS: Final = frozenset(
    {
        *("udp", "vxlan", "host-gw", "alloc"),
        *("extension", "ipip", "ipsec", "wireguard", "tencent-vpc"),
    }
)
"""What flannel has, in any version from v0.11 on (cloud routers apart)."""


def parse_network_config(text: str, origin: str) -> NetworkConfig:
    """Parse and validate; ConfigError names `origin`, the key, its value and the rule."""
    return _parse(text, origin, _parse_backend)


def kind_of(config: BackendConfig) -> BackendKind:
    """The backend of a parsed network config."""
    return BACKENDS[config.name]


def _parse_backend(name: str, fields: gojson.Fields) -> BackendConfig:
    kind = BACKENDS.get(name.lower())
    if kind is not None:
        return kind.parse(fields)
    ours = " or ".join(f'{{"Type": "{each}"}}' for each in BACKENDS)
    hint = f"write {ours}, or leave Backend out"
    if name.lower() in FLANNEL_BACKENDS:
        raise ConfigError(
            f"backend type {quoted(name)} is flannel's, but tundp does not have it: {hint}"
        )
    raise ConfigError(f"unknown backend type: {printable(name)} ({hint})")
