"""The command that lets the overlay's packets pass a rule, and where it should be kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Final

from tundp.linux.obstacles.rules import Kind, Stop
from tundp.linux.obstacles.scene import Scene

DOCKER: Final = (
    "Docker makes its rules anew, so to keep it see docs/install.md, Docker 28 and later:"
    " dockerd --allow-direct-routing=true since 28.2, and an accept in DOCKER-USER"
)

_DOCKERS: Final = re.compile(r"! -i (docker0|br-[0-9a-f]{12}) -j DROP")
"""Its rules in the raw table, by the names of its bridges."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One match, as either program spells it."""

    iptables: str
    nft: str


Passes = Callable[[str], Condition]
"""What to accept at a hook, so that a trip's packets pass."""


def to_pods(scene: Scene) -> Passes:
    """What comes in over the device."""

    def at(hook: str) -> Condition:
        if hook in ("postrouting", "egress") or hook.startswith("bridge "):
            return _between(f"{scene.network}", f"{scene.subnet}")
        return _over("i", scene)

    return at


def from_pods(scene: Scene) -> Passes:
    """What goes out over the device."""

    def at(hook: str) -> Condition:
        if hook in ("prerouting", "ingress") or hook.startswith("bridge "):
            return _between(f"{scene.subnet}", f"{scene.network}")
        return _over("o", scene)

    return at


def inside(scene: Scene) -> Passes:
    """What goes from one address of the overlay to another."""
    return lambda _: _between(f"{scene.network}", f"{scene.network}")


def tunnel(scene: Scene) -> Passes:
    """The datagrams."""
    return lambda _: Condition(f"-p udp --dport {scene.port}", f"udp dport {scene.port}")


def neighbours(hook: str) -> Condition:
    """ARP. iptables has no part in it."""
    return Condition("", "" if hook.startswith("arp ") else "ether type arp")


def _over(way: str, scene: Scene) -> Condition:
    if scene.is_tunnel:
        return Condition(f"-{way} {quote(scene.device)}", f'{way}ifname "{scene.device}"')
    ends = [f"{scene.network}", f"{scene.subnet}"]
    return _between(*(ends if way == "i" else reversed(ends)))


def _between(source: str, destination: str) -> Condition:
    return Condition(f"-s {source} -d {destination}", f"ip saddr {source} ip daddr {destination}")


def command(stop: Stop, ways: Sequence[tuple[str, Passes]]) -> str:
    """The shell command that accepts the packets right before the rule, or policy, drops them.

    ways: the hook of each trip that ends here, and what would pass it.
    """
    commands = dict.fromkeys(_command(stop, passes(hook)) for hook, passes in ways)
    return " && ".join(commands)


def _command(stop: Stop, match: Condition) -> str:
    table, rule = stop.table, stop.rule
    if table.program == "nft":
        where = f"{table.family} {table.name} {stop.chain.name}"
        verb = "add" if rule is None else "insert"
        place = "" if rule is None else f" position {rule.place}"
        text = " ".join(f"{verb} rule {where}{place} {match.nft} accept".split())
        return f"nft {quote(text)}"
    chain = quote(stop.chain.name)
    where = f"-A {chain}" if rule is None else f"-I {chain} {rule.place}"
    return f"{table.program} -t {table.name} {where} {match.iptables} -j ACCEPT"


def lasting(stop: Stop, scene: Scene, text: str) -> str:
    """How to keep it, if the owner of the rule is known; else empty."""
    table, name = stop.table, stop.chain.name
    if stop.rule is not None and stop.rule.kind is Kind.DIVERT:
        return f"connections known keep their way: conntrack -D -p udp --dport {scene.port}"
    if name.startswith("DOCKER") or "docker" in table.name or _DOCKERS.search(text):
        return DOCKER
    is_tunnel = stop.base.hook in ("input", "output")
    if any(each.startswith("ufw-") for each in table.chains):
        if is_tunnel:
            return f"to keep it: ufw allow {scene.port}/udp"
        return (
            f"to keep it: ufw route allow in on {scene.device};"
            f" ufw route allow out on {scene.device}"
        )
    if table.name == "firewalld":
        what = f"--add-port={scene.port}/udp" if is_tunnel else ""
        return (
            f"to keep it: firewall-cmd --permanent"
            f" {what or f'--zone=trusted --add-interface={scene.device}'}; firewall-cmd --reload"
        )
    return ""
