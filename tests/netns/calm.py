"""Hosts where nothing is wrong, although much is there: no word of it is due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.netns import rulesets


@dataclass(frozen=True, kw_only=True)
class Calm:
    """What is there, on node 2."""

    plant: str
    undo: str
    quick: bool = False


_FLUSH: Final = (
    "nft flush ruleset; for t in filter nat mangle raw; do"
    " printf '*%s\\nCOMMIT\\n' $t | iptables-legacy-restore; done;"
    " for c in INPUT FORWARD OUTPUT; do iptables-legacy -P $c ACCEPT; done"
)
"""The lab's own masquerading goes with it: whoever runs it makes that again."""


def _rules(program: str, text: str, *, quick: bool = False) -> Calm:
    return Calm(plant=f"{program} <<'END'\n{text}END", undo=_FLUSH, quick=quick)


def _switches(*names: str, value: int) -> Calm:
    """Sysctls of the node, back to 0 at the end."""
    paths = " ".join(f"/proc/sys/net/{name}" for name in names)
    return Calm(
        plant=f"for s in {paths}; do test -e $s || {{ echo no $s >&2; exit 77; }}; echo {value} >"
        " $s; done",
        undo=f"for s in {paths}; do echo 0 > $s; done",
    )


_IPTABLES: Final = {
    "kube-proxy": rulesets.KUBE_PROXY,
    "Docker 27": rulesets.DOCKER_27,
    "Docker 28": rulesets.DOCKER_28,
    "k3s": rulesets.K3S,
    "ufw": rulesets.UFW,
    "Calico": rulesets.CALICO,
    "fail2ban and a server's rules": rulesets.SERVER,
}
_NFT: Final = {
    "kube-proxy, nft": rulesets.KUBE_PROXY_NFT,
    "firewalld": rulesets.FIREWALLD,
    "Docker 29, nft": rulesets.DOCKER_29,
    "Calico, nft": rulesets.CALICO_NFT,
}
CALM: Final = {
    **{
        name: _rules("iptables-restore", text, quick=name == "ufw")
        for name, text in _IPTABLES.items()
    },
    **{
        f"{name}, legacy": _rules("iptables-legacy-restore", text, quick=name == "Calico")
        for name, text in _IPTABLES.items()
    },
    **{name: _rules("nft -f -", text) for name, text in _NFT.items()},
    "loose reverse path filter": _switches(
        "ipv4/conf/all/rp_filter", "ipv4/conf/flannel0/rp_filter", value=2
    ),
    "strict reverse path filter on the uplink": _switches("ipv4/conf/eth0/rp_filter", value=1),
    "bridged packets pass iptables": _switches("bridge/bridge-nf-call-iptables", value=1),
    "bridged packets pass iptables, ufw": Calm(
        plant="test -e /proc/sys/net/bridge || { echo no br_netfilter here >&2; exit 77; };"
        " echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables;"
        f" iptables-restore <<'END'\n{rulesets.UFW}END",
        undo=f"echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables; {_FLUSH}",
    ),
    "a VXLAN overlay beside": Calm(
        plant="ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472;"
        " ip addr add 10.6.1.0/32 dev flannel.1; ip link set flannel.1 up;"
        " ip route add 10.6.0.0/16 dev flannel.1",
        undo="ip link del flannel.1",
        quick=True,
    ),
    "Docker's bridge, down": Calm(
        plant="ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0",
        undo="ip link del docker0",
    ),
    "policy routing for others, and a second address": Calm(
        plant="ip rule add from 203.0.113.0/24 table 100 priority 100;"
        " ip route add default via 192.0.2.254 table 100;"
        " ip addr add 203.0.113.7/24 dev eth1; ip route add blackhole 198.51.100.0/24",
        undo="ip rule del priority 100; ip route flush table 100;"
        " ip addr del 203.0.113.7/24 dev eth1; ip route del blackhole 198.51.100.0/24",
    ),
}
