"""`Backend` of the network config for the udp backend: {"Type": "udp", "Port": 8285}."""

from __future__ import annotations

from typing import Any, Final

from tundp.errors import ConfigError
from tundp.lease import gojson
from tundp.lease.network import BackendConfig

NAME: Final = "udp"
DEFAULT_PORT: Final = 8285


def udp_config(port: int = DEFAULT_PORT) -> BackendConfig:
    """The udp backend on `port`. flannel's udp leases have no BackendType."""
    return BackendConfig(
        name=NAME, lease_type="", lease_types=frozenset({"", NAME}), peer_port=port
    )


def parse(fields: gojson.Fields) -> BackendConfig:
    """The members of the Backend object; ConfigError."""
    return udp_config(_parse_port(fields.get("Port")))


def _parse_port(port: Any) -> int:
    if port is gojson.MISSING or port is None:
        return DEFAULT_PORT
    if isinstance(port, bool) or not isinstance(port, int):
        raise ConfigError(
            f"error decoding UDP backend config: Backend.Port is {gojson.describe(port)},"
            " not a whole number"
        )
    if not 1 <= port <= 65535:
        raise ConfigError(f"Backend.Port is {port}: a UDP port is 1 to 65535")
    return port
