"""`tundp leases`: who has which subnet and who had it, from a real etcd to the command line."""

from __future__ import annotations

import json
import re
import signal
import sys
from typing import Any

from tests.nodes import MakeOverlay, has_peer
from tests.wait import until
from tundp.lab.lab import stop_process
from tundp.lab.overlay import LabNode

TUNDP = (sys.executable, "-m", "tundp")
LEASE = "subnets/10.5.177.0-24"


async def leases(node: LabNode, *arguments: str) -> str:
    """What `tundp leases ...` prints."""
    done = await node.host.run(*TUNDP, "leases", *arguments, f"--admin-socket={node.admin_socket}")
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_who_has_and_who_had_a_subnet(make_overlay: MakeOverlay) -> None:
    async with make_overlay(store="etcd") as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        followed = overlay.directory / "followed"
        with followed.open("wb") as log:
            follower = await one.host.popen(
                [*TUNDP, "leases", "history", "-f", f"--admin-socket={one.admin_socket}"], log=log
            )
            await overlay.write_etcd(LEASE, json.dumps({"PublicIP": "192.0.2.77"}))
            await until(lambda: has_peer(one, "10.5.177.0/24", "192.0.2.77"))
            found = json.loads(await leases(one, "--json"))
            by_key = {each["key"]: each for each in found["leases"]}
            own = found["own_key"]
            assert by_key[own]["state"] == "own"
            assert by_key[own]["public_ip"] == one.public_ip
            assert by_key[own]["ttl_s"] > 0
            assert len(by_key[own]["node_id"]) >= 16
            (other,) = (each for each in by_key.values() if each["public_ip"] == two.public_ip)
            assert other["state"] == "peer"
            assert by_key["10.5.177.0-24"]["node_id"] == ""
            assert re.search(r"(?m)^10\.5\.177\.0-24 +192\.0\.2\.77 +peer", await leases(one))

            await overlay.write_etcd(LEASE, json.dumps({"PublicIP": "192.0.2.78"}))
            await until(lambda: has_peer(one, "10.5.177.0/24", "192.0.2.78"))
            await overlay.delete_etcd(LEASE)
            refused = {"PublicIP": "192.0.2.79", "BackendType": "vxlan"}
            await overlay.write_etcd("subnets/10.5.179.0-24", json.dumps(refused))

            async def events() -> list[dict[str, Any]]:
                document = json.loads(await leases(one, "history", "--json"))
                return [each for each in document["events"] if each["key"] != other["key"]]

            async def are_told() -> bool:
                found = await events()
                # A table may be published some moments later, on a busy machine.
                is_waiting = any(each["applied_ms"] is None for each in found[1:4])
                return not is_waiting and any(each["kind"] == "refused" for each in found)

            await until(are_told, "the history to have the refused lease and all times")
            found_events = await events()
            about = [(each["kind"], each["key"], each["public_ip"]) for each in found_events]
            assert about[0] == ("snapshot", "", None)
            assert about[1:] == [
                ("come", "10.5.177.0-24", "192.0.2.77"),
                ("moved", "10.5.177.0-24", "192.0.2.78"),
                ("gone", "10.5.177.0-24", "192.0.2.78"),
                ("come", "10.5.179.0-24", "192.0.2.79"),
                ("refused", "10.5.179.0-24", "192.0.2.79"),
            ]
            assert found_events[2]["before"] == "192.0.2.77"
            revisions = [each["revision"] for each in found_events]
            assert revisions == sorted(revisions)
            assert all(each["applied_ms"] >= 0 for each in found_events[1:4])
            assert found_events[4]["applied_ms"] is None
            assert "belongs to another backend" in found_events[5]["text"]

            async def is_followed() -> bool:
                return "refused 10.5.179.0-24" in followed.read_text()

            await until(is_followed, "history -f to print the last event")
            follower.send_signal(signal.SIGINT)
            await stop_process(follower)
        kinds = re.findall(r"(?m)rev \d+ (\w+) 10\.5\.17[79]\.0-24", followed.read_text())
        assert kinds == ["come", "moved", "gone", "come", "refused"]
        # An answer that is none, and a question that is none.
        status = await one.host.run(
            *("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"),
            *("--unix-socket", str(one.admin_socket), "http://tundp/v1/leases?since=x"),
        )
        assert status.stdout == "400"
