"""The policy rules the kernel starts with. Network managers delete them as foreign ones."""

from __future__ import annotations

from typing import Final

from tundp.finding import Finding, Verdict
from tundp.linux import uapi
from tundp.linux.netlink import Netlink
from tundp.linux.policy_rules import decode_table, rules_request

ID: Final = "obstacle.route"
_RULES: Final = {"local": (uapi.RT_TABLE_LOCAL, 0), "main": (uapi.RT_TABLE_MAIN, 32766)}
"""Their tables and priorities (net/ipv4/fib_rules.c: fib_default_rules_init)."""


async def findings(netlink: Netlink) -> list[Finding]:
    """Those that are gone. PlatformError if the kernel refuses to list rules."""
    tables = await netlink.dump("list policy rules", rules_request(), decode_table)
    found = []
    for name, (table, priority) in _RULES.items():
        if table in tables:
            continue
        command = f"ip rule add priority {priority} lookup {name}"
        found.append(
            Finding(
                id=ID,
                verdict=Verdict.WARN,
                evidence=f"no policy rule leads every packet to the table {name}, as the kernel's"
                " own does: its routes are not used, or for some packets only (ip rule)",
                next_step=f"{command}  (systemd-networkd deletes such rules unless"
                " ManageForeignRoutingPolicyRules=no)",
                facts={"command": command},
            )
        )
    return found
