"""The backend the network config asks for, made from the operator's settings."""

from __future__ import annotations

from tundp.backend.base import Backend, Given
from tundp.backend.hostgw import HostGwBackend
from tundp.backend.udp.backend import UdpBackend, UdpSettings
from tundp.engine.native.engine import EngineSettings
from tundp.lease.network import BackendConfig, HostGwConfig, UdpConfig
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings


def make_backend(
    config: BackendConfig, settings: Settings, netlink: Netlink, given: Given
) -> Backend:
    """The backend `config` names. `given` is its own from here on."""
    match config:
        case UdpConfig():
            return UdpBackend(
                config,
                UdpSettings(
                    tun_name=settings.tun_name,
                    engine=settings.engine,
                    workers=settings.workers,
                    source_check=settings.source_check,
                    engine_settings=EngineSettings(
                        disabled=frozenset(settings.disable_offloads),
                        cpus=settings.cpus,
                        spin_us=settings.spin_us,
                        layout=settings.layout,
                    ),
                ),
                netlink=netlink,
                given=given,
            )
        case HostGwConfig():
            given.close()
            return HostGwBackend(config, netlink=netlink)
