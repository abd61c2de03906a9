"""`tundp matrix`: three daemons that tell how they reach each other, and breaks between them."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.json_schema import validate
from tests.nodes import MakeOverlay, must_run
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.lab.traffic import PingStream
from tundp.observe import schema

TUNDP = (sys.executable, "-m", "tundp")
SCHEMA = json.loads(Path(schema.__file__).with_name("matrix.schema.json").read_text())
QUICK = ("-c", "2", "-i", "20ms", "-W", "500ms")


async def output(node: LabNode, *arguments: str, code: int | None = None) -> str:
    """What `tundp matrix` prints."""
    socket = f"--admin-socket={node.admin_socket}"
    done = await node.host.run(*TUNDP, "matrix", *QUICK, *arguments, socket)
    assert code is None or done.returncode == code, f"{done.returncode}: {done}"
    assert done.stderr == ""
    return done.stdout


async def matrix(node: LabNode, code: int | None = None) -> dict[str, Any]:
    """The same as JSON."""
    found: dict[str, Any] = json.loads(await output(node, "-o", "json", code=code))
    validate(found, SCHEMA)
    return found


def subnet(node: LabNode) -> str:
    return str(node.gateway.network)


def cell(found: dict[str, Any], one: LabNode, other: LabNode) -> str:
    """What `one` says of `other`."""
    (row,) = (row for row in found["rows"] if row["subnet"] == subnet(one))
    reached = row["reached"].get(subnet(other))
    return "unknown" if reached is None else str(reached["cell"])


@contextlib.asynccontextmanager
async def talking(*pairs: tuple[LabNode, LabNode]) -> AsyncIterator[None]:
    """Pings from the first to the second of each pair: what exchanges nothing knows nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for one, other in pairs:
            await stack.enter_async_context(PingStream(one.host, other.tunnel_address, pause_s=0.2))
        yield


async def nodes_of(overlay: OverlayLab) -> tuple[LabNode, LabNode, LabNode]:
    return overlay.nodes[1], overlay.nodes[2], overlay.nodes[3]


async def test_all_nodes_and_a_dead_one(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = await nodes_of(overlay)
        found = await matrix(one, code=0)
        both = sorted([subnet(two), subnet(three)], key=IPv4Network)
        assert [each["subnet"] for each in found["peers"]] == both
        for each in found["peers"]:
            assert each["is_asked"]
            assert each["underlay_rtt_ms"] > 0
            assert each["overlay_rtt_ms"] > 0
            assert (each["sent"], each["received"], each["path_mtu"]) == (2, 2, 1472)
            assert re.fullmatch(r"tundp \d\S*", each["implementation"])
        assert [row["is_told"] for row in found["rows"]] == [True] * 3
        assert cell(found, one, two) == cell(found, one, three) == "heard"

        text = await output(one, code=0)
        assert re.search(rf"(?m)^2 +{subnet(two)} +192\.0\.2\.2 ", text) or re.search(
            rf"(?m)^3 +{subnet(two)} +192\.0\.2\.2 ", text
        )
        assert re.search(rf"(?m)^1 {subnet(one)} +- +[\d.]+ +[\d.]+$", text), text
        assert "\x1b" not in text
        assert text.splitlines()[-1].startswith("ok: 2 of 2 peers asked answer")

        metrics = await output(one, "-o", "metrics", code=0)
        samples = {
            (each.name, *each.labels.values()): each.value
            for family in text_string_to_metric_families(metrics)
            for each in family.samples
        }
        assert samples["tundp_matrix_peers", "answers"] == 2
        assert samples["tundp_matrix_peer_reached", three.public_ip] == 1
        assert 0 < samples["tundp_matrix_peer_rtt_seconds", two.public_ip] < 5

        assert await three.stop_daemon() == 0
        found = await matrix(one, code=1)
        worst = found["peers"][0]
        assert (worst["subnet"], worst["received"]) == (subnet(three), 0)
        assert worst["underlay_rtt_ms"] > 0
        assert any(f"{subnet(three)} at 192.0.2.3 does not answer" in s for s in found["sentences"])
        (row,) = (row for row in found["rows"] if row["subnet"] == subnet(three))
        assert (row["is_told"], row["why_not"]) == (False, "does not answer")


async def test_a_break_of_one_direction_between_two_peers_is_named(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=3) as overlay:
        one, two, three = await nodes_of(overlay)
        async with talking((two, three), (three, two)):

            async def is_whole() -> bool:
                found = await matrix(one)
                return cell(found, two, three) == cell(found, three, two) == "heard"

            await until(is_whole, "both to say that they hear each other", poll_s=0.2)
            # What 192.0.2.2 sends to 192.0.2.3 is lost; the other way round all arrives.
            await must_run(
                three.host,
                *("iptables", "-t", "raw", "-I", "PREROUTING", "-s", two.public_ip, "-j", "DROP"),
            )
            began = time.monotonic()
            wanted = f"one way: {subnet(two)} hears {subnet(three)}, but {subnet(three)} does not"
            last: list[str] = []

            async def is_named() -> bool:
                last[:] = (await matrix(one))["sentences"]
                return any(each.startswith(wanted) for each in last)

            try:
                await until(is_named, wanted, poll_s=0.2)
            except AssertionError as error:
                error.add_note("\n".join(last))
                raise
            print(f"named {time.monotonic() - began:.1f} s after the rule was made")
            assert any("datagrams from 192.0.2.2 to 192.0.2.3 are lost" in each for each in last)


async def test_peers_left_when_time_is_over_are_named_as_not_asked(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay() as overlay:
        one = overlay.nodes[1]
        found = json.loads(await output(one, "--timeout", "10ms", "-o", "json", code=3))
        assert [each["is_asked"] for each in found["peers"]] == [False]
        assert found["notes"] == ["1 of 1 peers not asked: no time left after 0.01 s (--timeout)"]
        assert await one.stop_daemon() == 0
        done = await one.host.run(*TUNDP, "matrix", f"--admin-socket={one.admin_socket}")
        assert (done.returncode, done.stdout) == (1, "")
        assert "no daemon answers on" in done.stderr
