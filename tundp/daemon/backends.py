"""The backend the network config asks for, made with the operator's settings."""

from __future__ import annotations

from tundp.backend.base import Backend, BackendContext, Given, PacketSettings
from tundp.backend.choose import kind_of
from tundp.engine.native.engine import EngineSettings
from tundp.lease.network import BackendConfig
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings


def make_backend(
    config: BackendConfig, settings: Settings, netlink: Netlink, given: Given
) -> Backend:
    """The backend `config` names. `given` is its own from here on."""
    packets = PacketSettings(
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
    )
    return kind_of(config).make(
        config, BackendContext(netlink=netlink, packets=packets, given=given)
    )
