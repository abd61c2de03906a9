"""What others write into the store, and what that costs a node that has its own lease.

[node1] [node2] eth0 -- [switch, etcd 192.0.2.254]
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest

from tests.netns.machine import TUNDP
from tests.nodes import HEALTH_PORT, MakeOverlay, answers, is_ready, must_run
from tests.wait import until
from tundp.lab.overlay import PREFIX, LabNode, OverlayLab

HEALTH = f"--healthz-port={HEALTH_PORT}"
QUIET = "--iptables-forward-rules=false"
METRICS_PORT = 9285
FORGED = "9999-01-01 00:00:00,000 I tundp: forged"
NASTY = f"a\x1b[2J\x9b31m\u202e\u2066\u2028\r\n{FORGED}\n\x7fb"
"""Escapes, bidirectional overrides, line separators, and a line of a log."""
LATIN = NASTY.encode("latin-1", "ignore").decode("latin-1")
HARMFUL = frozenset("\x00\x07\x1b\x7f\x85\x9b\r\t\u2028\u2029\u202e\u2066\ud800")


async def finding_of(node: LabNode, name: str) -> list[dict[str, str]]:
    """Every finding of this id in the node's status."""
    return [each for each in (await node.status_document())["findings"] if each["id"] == name]


async def test_leases_for_networks_of_this_host_make_no_node_unready(
    make_overlay: MakeOverlay,
) -> None:
    """The first peers of the table, which are asked about, are the store's to choose."""
    async with make_overlay(start=False) as overlay:
        await overlay.start_etcd({"Network": "10.5.0.0/16"})
        # Below SubnetMin, so that no node draws it; docker0 of each host has it.
        for number in range(8):
            value = {"PublicIP": f"192.0.2.{200 + number}", "PublicIPv6": None}
            await overlay.write_etcd(f"subnets/10.5.0.{number * 32}-27", json.dumps(value))
        one, two = overlay.nodes[1], overlay.nodes[2]
        for node in (two, one):
            await node.host.bridge("docker0")
            await node.host.configure("docker0", "10.5.0.1/24")
            await overlay.start_daemon(node, HEALTH, QUIET)
            await node.wait_for_peers(8)
        await one.wait_for_peers(9)

        async def has_looked() -> bool:
            (summary,) = await finding_of(one, "obstacles")
            return "peers" in summary["evidence"]

        await until(has_looked, "a look at what is in the way")
        found = await finding_of(one, "obstacle.route")
        assert found
        assert {each["verdict"] for each in found} == {"warn"}, found
        assert any("docker0" in each["evidence"] for each in found)
        assert await is_ready(one)
        assert await answers(one.host, two.tunnel_address, timeout_s=5)


# Text of others


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a JSON document, names of members too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from strings_in(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from strings_in(each)


async def outputs(node: LabNode) -> dict[str, str]:
    """All that people and programs read of a daemon, by where they read it."""

    async def program(*arguments: str) -> str:
        done = await node.host.run(TUNDP, *arguments, f"--admin-socket={node.admin_socket}")
        return done.stdout + done.stderr

    found = {
        "the log": node.log_path.read_text(),
        "tundp status": await program("status"),
        "tundp status -v": await program("status", "-v"),
        "tundp config check": await program("config", "check", "--running"),
        "readyz": (await node.get(HEALTH_PORT, "/readyz?verbose"))[1],
        "metrics": (await node.get(METRICS_PORT, "/metrics"))[1],
    }
    documents: dict[str, Any] = {
        "tundp status --json": json.loads(await program("status", "--json")),
        "tundp config check --json": json.loads(await program("config", "check", "--json")),
        "readyz as JSON": json.loads((await node.get(HEALTH_PORT, "/readyz?format=json"))[1]),
    }
    documents["tundp status --json"].pop("settings")
    return found | {name: "\n".join(strings_in(each)) for name, each in documents.items()}


def assert_harmless(found: dict[str, str]) -> None:
    for where, text in found.items():
        assert not HARMFUL & set(text), (where, ascii(text))
        assert not any(line.startswith("9999") for line in text.split("\n")), (where, text)
        longest = max(map(len, text.split("\n")))
        assert longest < 6000, (where, longest)


async def test_text_of_others_is_harmless_wherever_it_is_shown(make_overlay: MakeOverlay) -> None:
    """Planted: keys, values, hosts, node ids, backend types, interface names, a megabyte."""
    async with make_overlay(start=False) as overlay:
        await overlay.start_etcd({"Network": "10.5.0.0/16"})
        one, two = overlay.nodes[1], overlay.nodes[2]
        for node in (one, two):
            await must_run(node.host, "ip", "link", "add", "e\x1b[2J\u202ex", "type", "bridge")
            await must_run(
                node.host, "ip", "addr", "add", "198.51.100.9/24", "dev", "e\x1b[2J\u202ex"
            )
            await must_run(node.host, "ip", "link", "set", "e\x1b[2J\u202ex", "up")
        await overlay.start_daemon(two, HEALTH, QUIET, f"--metrics-addr=127.0.0.1:{METRICS_PORT}")
        await two.wait_for_peers(0)
        twin = {"PublicIP": "192.0.2.2", "TundpNode": "them", "TundpHost": NASTY}
        values: dict[str, Any] = {
            NASTY: {"PublicIP": "192.0.2.9"},
            f"10.5.201.0-24{NASTY}": {"PublicIP": "192.0.2.9"},
            "10.5.202.0-24": {"PublicIP": NASTY},
            "10.5.203.0-24": {"PublicIP": "192.0.2.9", "BackendType": NASTY},
            "10.5.204.0-24": {"PublicIP": "192.0.2.9", "TundpNode": NASTY, NASTY: NASTY},
            "10.5.205.0-24": twin,
            "10.5.206.0-24": {"PublicIP": "192.0.2.9", "PublicIPv6": "k" * 1_000_000},
            "k" * 100_000: {"PublicIP": "192.0.2.9"},
            "10.5.207.0-24": {"PublicIP": "\ud800"},
        }
        await overlay.switch.call(
            put_all, overlay.etcd.url, [(key, json.dumps(value)) for key, value in values.items()]
        )
        await until(lambda: is_told_of(two, bad=6, refused=2))
        await overlay.start_daemon(one, HEALTH, QUIET, f"--metrics-addr=127.0.0.1:{METRICS_PORT}")
        await until(lambda: is_told_of(one, bad=6, refused=1))
        for node in (one, two):
            found = await outputs(node)
            assert_harmless(found)
            assert r"a\x1b[2J\x9b31m\u202e" in found["the log"], "it is shown what it was"
            assert r"a\x1b[2J\x9b31m\u202e" in found["tundp status"]
            assert r"a\x1b[2J\x9b31m\u202e" in found["tundp status --json"]
        check = await one.host.run(TUNDP, "config", "check", "--iface=198.51.100.9", QUIET)
        assert_harmless({"config check of that interface": check.stdout + check.stderr})


async def is_told_of(node: LabNode, *, bad: int, refused: int) -> bool:
    """Whether the node counts so many unreadable entries, and at least so many refused leases."""
    try:
        document = await node.status_document()
    except OSError:
        return False
    routing = document["routing"]
    return bool(routing and routing["bad_entries"] == bad and routing["refused"] >= refused)


@pytest.mark.parametrize("api", ["v3", "v2"])
async def test_a_servers_words_and_a_network_config_are_harmless(
    make_overlay: MakeOverlay, api: str
) -> None:
    async with make_overlay(start=False) as overlay:
        await overlay.start_etcd({"Network": NASTY * 1000}, api=api)
        one, two = overlay.nodes[1], overlay.nodes[2]
        nasty = {"message": NASTY * 500, "cause": NASTY, "errorCode": 500, "index": 1}
        async with answering(overlay, json.dumps(nasty).encode()) as url:
            for node, flags in (
                (one, [f"--etcd-username={LATIN}", "--etcd-password=secret"] * (api == "v2")),
                (two, [f"--etcd-endpoints={url}"]),
            ):
                await overlay.start_daemon(node, *flags, HEALTH, f"--etcd-api={api}")

                async def waits(node: LabNode = node) -> bool:
                    with contextlib.suppress(OSError):
                        return ": " in (await node.status()).waiting_for
                    return False

                await until(waits, "why it waits for the network config")
                status = await node.host.run(TUNDP, "status", f"--admin-socket={node.admin_socket}")
                document = await node.status_document()
                document.pop("settings")
                assert_harmless(
                    {
                        "the log": node.log_path.read_text(),
                        "tundp status": status.stdout,
                        "status": "\n".join(strings_in(document)),
                        "readyz": (await node.get(HEALTH_PORT, "/readyz?verbose"))[1],
                    }
                )


@contextlib.asynccontextmanager
async def answering(overlay: OverlayLab, body: bytes) -> AsyncIterator[str]:
    """A server on the switch that answers everything with a failure in these words."""
    head = (
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
        b"X-Etcd-Index: 1\r\nContent-Length: %d\r\n\r\n" % len(body)
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(head + body)
                await writer.drain()
        writer.close()

    sock = await overlay.switch.socket(socket.SOCK_STREAM)
    sock.bind(("192.0.2.254", 4001))
    server = await asyncio.start_server(answer, sock=sock)
    try:
        yield "http://192.0.2.254:4001"
    finally:
        server.close()


def put_all(url: str, entries: Iterable[tuple[str, str]]) -> None:
    """Write keys under the prefix, a transaction each hundred."""
    puts = [
        {
            "requestPut": {
                "key": base64.b64encode(f"{PREFIX}/subnets/{key}".encode()).decode(),
                "value": base64.b64encode(value.encode()).decode(),
            }
        }
        for key, value in entries
    ]
    for at in range(0, len(puts), 100):
        body = json.dumps({"success": puts[at : at + 100]}).encode()
        with urllib.request.urlopen(f"{url}/v3/kv/txn", body, timeout=30):
            pass
