"""The backend the network config asks for, and what our lease says of this node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tundp.backend.base import Backend, BackendContext, Given, PacketSettings, Switch
from tundp.backend.choose import kind_of
from tundp.choices import OnLeaseLost, PeerTools
from tundp.engine.counters import Counters
from tundp.engine.native.engine import EngineSettings
from tundp.engine.taps import Recorder
from tundp.lease.model import LeaseAttributes
from tundp.lease.network import BackendConfig, NetworkConfig
from tundp.linux.iface import Interface
from tundp.linux.netlink import Netlink
from tundp.settings.settings import Settings


def make_backend(
    config: BackendConfig,
    settings: Settings,
    netlink: Netlink,
    given: Given,
    recorder: Recorder | None = None,
    on_descriptors: Callable[[], object] = bool,
    *,
    switch: Switch | None = None,
    totals: Counters | None = None,
) -> Backend:
    """The backend `config` names. `given` is its own from here on, `recorder` is borrowed.

    on_descriptors, switch, totals: see BackendContext.
    """
    packets = PacketSettings(
        tun_name=settings.tun_name,
        engine=settings.engine,
        workers=settings.workers,
        source_check=settings.source_check,
        admitted=settings.source_admit,
        # Whoever would exit without a lease starts with none.
        why_no_early=(
            "--on-lease-lost=exit starts with none"
            if settings.on_lease_lost is OnLeaseLost.EXIT
            else ""
        ),
        has_peer_tools=settings.peer_tools is PeerTools.ON,
        engine_settings=EngineSettings(
            disabled=frozenset(settings.disable_offloads),
            cpus=settings.cpus,
            spin_us=settings.spin_us,
            layout=settings.layout,
        ),
    )
    return kind_of(config).make(
        config,
        BackendContext(
            netlink=netlink,
            packets=packets,
            given=given,
            recorder=recorder,
            on_descriptors=on_descriptors,
            switch=switch,
            totals=totals,
        ),
    )


def lease_offer(
    backend: Backend, settings: Settings, network_config: NetworkConfig, interface: Interface
) -> LeaseAttributes:
    """All our lease shall say with this interface. ConfigError if the backend cannot use it."""
    return replace(
        backend.offer(interface),
        public_ipv6=settings.public_ipv6 if network_config.pool6 is not None else None,
    )
