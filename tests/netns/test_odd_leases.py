"""Keys and values under `subnets` that no node of this network writes: each is named or used."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

from tests.nodes import MakeOverlay, answers
from tests.wait import until

GOOD = '{"PublicIP":"192.0.2.200"}'

# Above 10.5.100.0: what a node draws is one of the first hundred free subnets.
PEERS = {
    "10.5.0.0-24": GOOD,  # below SubnetMin: a reservation may be
    "10.5.147.64-26": GOOD,  # of another SubnetLen, as while nodes are restarted one by one
    "10.5.140.0-24": GOOD,
    "10.5.141.0-24": '{"publicip":"192.0.2.201","PublicIPv6":null}',
    "10.5.142.0-24": '{"PublicIP":"192.0.2.9","PublicIP":"192.0.2.202"}',  # the last one counts
    "10.5.143.0-24": '{"PublicIP":"192.0.2.203","BackendType":"UDP","Zone":7}',
    "10.5.144.0-24&fd00:44::-64": '{"PublicIP":"192.0.2.204","PublicIPv6":"2001:db8::1"}',
    "10.5.145.9-24": '{"PublicIP":"192.0.2.205","BackendData":{"VtepMAC":"aa:bb:cc:dd:ee:ff"}}',
    "10.5.146.0-24": '{"PublicIP":"192.0.2.206","BackendType":null,"BackendData":null}',
}
REFUSED = {
    "10.5.205.0-16": (GOOD, "too_wide"),
    "10.5.0.0-16": (GOOD, "too_wide"),
    "10.5.208.0-20": (GOOD, "too_wide"),
    "10.5.140.7-24": (GOOD, "duplicate_subnet"),
    "10.6.1.0-24": (GOOD, "outside_network"),
    "0.0.0.0-0": (GOOD, "outside_network"),
    "10.5.160.0-24": ("{}", "no_public_ip"),
    "10.5.161.0-24": ('{"PublicIP":"0.0.0.0"}', "no_public_ip"),
    "10.5.162.0-24": (
        '{"PublicIP":"192.0.2.62","BackendType":"vxlan","BackendData":{"VNI":1}}',
        "other_backend",
    ),
    "10.5.163.0-24": ('{"PublicIP":"192.0.2.63","BackendType":"alloc"}', "other_backend"),
    "10.5.164.0-24": ('{"PublicIP":"192.0.2.64","BackendType":"carrier-pigeon"}', "other_backend"),
    "10.5.165.0-24": ('{"PublicIP":"224.0.0.5"}', "not_unicast"),
}
UNREADABLE = {
    "10.5.170.0-24": "null",
    "10.5.171.0-24": '{"PublicIP":3221226112}',
    "10.5.172.0-24": '{"PublicIP":null}',
    "10.5.173.0-24": '{"PublicIP":"192.0.2.73"',
    "10.5.174.0-24": '"192.0.2.74"',
    "10.5.175.0-24": '["192.0.2.75"]',
    "10.5.176.0-24": '{"PublicIP":"2001:db8::76"}',
    "10.5.177.0-24": '{"PublicIP":"192.0.2.77","BackendType":{}}',
    "10.5.178.0-24": "",
    "10.5.179.0-24 ": GOOD,
    "10.5.180.0%2d24": GOOD,
    "10.5.181.0-024": GOOD,
    "010.5.182.0-24": GOOD,
    "10.5.183.0-32": GOOD,
    "10.5.184.0/24": GOOD,  # a key below the key 10.5.184.0; in v2 a directory
    "10.5.185.0-24/extra": GOOD,
    "10.5.186.0-24&FD00:86::-64": GOOD,
    "fd00:87::-64": GOOD,
    "10.5.188.0": GOOD,
    "10.5.0x59.0-24": GOOD,
    "LEASE": GOOD,
}


def named(document: dict[str, Any]) -> dict[str, str]:
    """What the status names as no peer, and why. A v2 snapshot has the directory of a key."""
    found = {entry["name"].split("/")[0]: "unreadable" for entry in document["bad_entries"]}
    return found | {each["key"]: each["reason"] for each in document["refused"]}


@pytest.mark.parametrize("api", ["v3", "v2"])
async def test_each_odd_entry_is_named_or_used(make_overlay: MakeOverlay, api: str) -> None:
    """Seen as events by the first node, in a snapshot by the second."""
    async with make_overlay(start=False) as overlay:
        await overlay.start_etcd({"Network": "10.5.0.0/16"}, api=api)
        flags = (f"--etcd-api={api}", "--iptables-forward-rules=false")
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(one, *flags)
        await one.wait_for_peers(0)
        entries = PEERS | {key: value for key, (value, _) in REFUSED.items()} | UNREADABLE
        for key, value in entries.items():
            name = quote(key, safe="/&:") if api == "v2" else key
            await overlay.write_etcd(f"subnets/{name}", value)
        await overlay.start_daemon(two, *flags)
        wanted = {key: reason for key, (_, reason) in REFUSED.items()}
        wanted |= dict.fromkeys([key.split("/")[0] for key in UNREADABLE], "unreadable")

        for node in (one, two):
            await node.wait_for_peers(len(PEERS) + 1)

            async def has_named_all(node: Any = node) -> bool:
                return len(named(await node.status_document())) >= len(wanted)

            await until(has_named_all)
            document = await node.status_document()
            assert named(document) == wanted
            assert {peer["public_ip"] for peer in document["peers"]} >= {
                f"192.0.2.{200 + number}" for number in range(7)
            }
            assert document["lease"]["state"] == "held"
            # The log names the first twenty of a kind and counts the rest.
            log = node.log_path.read_text()
            named_in_log = [key for key in wanted if key in log]
            assert len(named_in_log) == len(wanted) or "more entries are ignored" in log
            assert len(named_in_log) >= len(wanted) - 2
        # The daemons go on, with each other above all.
        await until(
            lambda: answers(one.host, two.environment["FLANNEL_SUBNET"].rsplit(".", 1)[0] + ".0")
        )
