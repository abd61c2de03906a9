"""The admin socket: what a daemon answers is what the client reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, UnixConnector, web

from tundp.admin import STATUS_PATH, fetch_document, fetch_ledger, fetch_status, serve_admin
from tundp.engine.taps import Tap, TapRequest
from tundp.errors import PlatformError, Unsupported
from tundp.observe.events import Hello
from tundp.observe.ledger import Ledger, LedgerRow
from tundp.observe.status import STATUS_SCHEMA, DaemonState, Lazy, PeerStatus, Status

STATUS = Status(
    version="0.2.0",
    pid=4242,
    state=DaemonState.RUNNING,
    started_at=1.5,
    uptime_s=2.0,
    node_id='"\\\N{SNOWMAN}',
    network=IPv4Network("10.5.0.0/16"),
)


@pytest.fixture
def path() -> Iterator[Path]:
    # A unix socket's path has room for 107 bytes, which tmp_path may exceed.
    with tempfile.TemporaryDirectory(prefix="adm") as directory:
        yield Path(directory) / "admin.sock"


def peers(count: int) -> list[PeerStatus]:
    return [
        PeerStatus(
            subnet=IPv4Network((0x0A000000 + (number << 8), 24)),
            public_ip=IPv4Address("192.0.2.2"),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 2000])
async def test_what_the_daemon_has_is_what_the_client_reads(path: Path, count: int) -> None:
    status = replace(STATUS, peers=Lazy(count, lambda: peers(count)))
    async with serve_admin(path, lambda: status, lambda: b""):
        assert await fetch_status(path) == replace(STATUS, peers=tuple(peers(count)))
        assert await fetch_document(path) == status.to_json()
    assert not path.exists()


async def test_a_daemon_of_another_schema_is_named(path: Path) -> None:
    newer = replace(STATUS, schema=STATUS_SCHEMA + 1)
    async with serve_admin(path, lambda: newer, lambda: b""):
        with pytest.raises(PlatformError, match=rf"\(schema {STATUS_SCHEMA + 1}\)") as caught:
            await fetch_status(path)
        assert str(path) in str(caught.value)
        assert (await fetch_document(path))["schema"] == STATUS_SCHEMA + 1


@pytest.mark.parametrize(
    ("body", "content_type"),
    [("rubbish", "application/json"), ("rubbish", "text/plain"), ("[]", "application/json")],
)
async def test_an_answer_that_is_no_status_is_an_error(
    path: Path, body: str, content_type: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body, content_type=content_type)

    app = web.Application()
    app.router.add_get(STATUS_PATH, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path)).start()
        with pytest.raises(PlatformError, match=str(path)):
            await fetch_status(path)
    finally:
        await runner.cleanup()


async def test_no_daemon_is_named(path: Path) -> None:
    with pytest.raises(PlatformError, match="no daemon answers on"):
        await fetch_status(path)


async def test_a_ledger_about_addresses(path: Path) -> None:
    row = LedgerRow(subnet=IPv4Network("10.5.2.0/24"), public_ip=IPv4Address("192.0.2.2"))
    rows = [replace(row, subnet=IPv4Network((int(row.subnet[0]) + n * 256, 24))) for n in range(9)]
    whole = Ledger(leases=tuple(rows), revision=7)
    async with serve_admin(path, lambda: STATUS, lambda: b"", looker=OfLedger(whole)):
        assert await fetch_ledger(path) == whole
        part = await fetch_ledger(path, [IPv4Address("10.5.4.9")])
        assert part == whole.about([IPv4Address("10.5.4.9")])
        assert (len(part.leases), part.count) == (2, 9)
        async with ClientSession(connector=UnixConnector(str(path))) as session:
            for query in ("address=here", "address=", "address=1.2.3.4&address=::1"):
                async with session.get(f"http://tundp/v1/ledger?{query}") as response:
                    assert (response.status, list(await response.json())) == (400, ["error"])


class OfLedger:
    """A daemon that shows a ledger and nothing else."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def open_tap(self, _: TapRequest) -> Tap:
        raise Unsupported("no packets")

    def hello(self) -> Hello:
        raise Unsupported("no packets")

    def blackbox(self) -> Mapping[str, Any]:
        raise Unsupported("no recorder")

    def ledger(self) -> Callable[[], Ledger]:
        return lambda: self._ledger


async def test_a_daemon_without_a_lease_table_is_named(path: Path) -> None:
    async with serve_admin(path, lambda: STATUS, lambda: b""):
        with pytest.raises(
            PlatformError, match=r"needs tundp 0\.2\.0 on the daemon's side, it is"
        ) as caught:
            await fetch_ledger(path)
        assert str(path) in str(caught.value)
    with pytest.raises(PlatformError, match="no daemon answers"):
        await fetch_ledger(path)
