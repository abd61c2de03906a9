"""Offloads of a veth: what makes a lab's frames as small as a real wire's."""

from __future__ import annotations

from typing import Final

from pyroute2.ethtool import Ethtool

from tundp.errors import LabError
from tundp.lab.lab import Host

SENDING_OFFLOADS: Final = (
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-generic-segmentation",
    "tx-udp-segmentation",
    "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation",
    "tx-gso-list",
    "tx-checksum-ip-generic",
)
"""Off, the kernel segments and sums in software before the frame enters the wire."""
GRO: Final = "rx-gro"


async def make_wire_like(host: Host, device: str) -> None:
    """Frames out of `device` have MTU size and finished checksums; GRO works on what comes in."""
    changes = dict.fromkeys(SENDING_OFFLOADS, False) | {GRO: True}
    await host.call(_set_features, device, changes)


async def set_checksum_offload(host: Host, device: str, *, is_on: bool) -> None:
    """Whether `device` is trusted to finish checksums (a veth is, and does not)."""
    await host.call(_set_features, device, {"tx-checksum-ip-generic": is_on})


def _set_features(device: str, changes: dict[str, bool]) -> None:
    ethtool = Ethtool()
    try:
        features = ethtool.get_features(device)
        for name, is_on in changes.items():
            if name in features.features:
                features.features[name].enable = is_on
        ethtool.set_features(device, features)
        now = ethtool.get_features(device).features
        wrong = [
            name for name, is_on in changes.items() if name in now and now[name].enable != is_on
        ]
    finally:
        ethtool.close()
    if wrong:
        raise LabError(f"offloads of {device} cannot be changed: {', '.join(wrong)}")
