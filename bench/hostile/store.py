"""Hostile values, and hostile orders of events, under the prefix in etcd v3.

Lasting harm to a lease is done to the last node's alone: who can rewrite a lease can redirect
its packets, and honest ones run between the first two nodes. What touches all leases is
announced as a fault.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import random
import socket
from typing import Any, Final

from bench.hostile.common import Score, deck
from bench.hostile.packets import World
from tundp.errors import LabError
from tundp.lab.lab import finish
from tundp.lab.overlay import PREFIX, STORE_ADDRESS

GOOD_CONFIG: Final = json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}})
SUBNETS: Final = f"{PREFIX}/subnets/"
STRANGER: Final = '{"PublicIP":"192.0.2.66"}'
KINDS: Final = (
    *("broken_json", "huge_value", "deep_json", "wrong_types", "odd_public_ip", "overlapping"),
    *("own_subnet", "own_public_ip", "odd_keys", "flapping", "broken_config", "all_deleted"),
    *("expiring", "lease_rewritten", "lease_deleted", "lease_expires", "compaction", "many"),
)
LOSS_S: Final = 4.0
"""After all leases are deleted: each node creates its own again, and the others learn of it."""


class Gateway:
    """etcd's JSON gateway over one connection from the switch; requests one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._connection = http.client.HTTPConnection(STORE_ADDRESS, 2379, timeout=20)
        self._connection.sock = sock
        self._lock = asyncio.Lock()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    async def ask(self, method: str, **body: Any) -> dict[str, Any]:
        """One call; LabError with etcd's words if it refuses."""
        async with self._lock:
            # To its end even if cancelled: the connection serves the next request, too.
            return await finish(asyncio.to_thread(self._ask, method, json.dumps(body).encode()))

    def _ask(self, method: str, body: bytes) -> dict[str, Any]:
        self._connection.request("POST", f"/v3/{method}", body)
        with self._connection.getresponse() as response:
            text = response.read()
            if response.status != 200:
                raise LabError(f"etcd refused {method}: {text[:200]!r}")
        answer: dict[str, Any] = json.loads(text)
        return answer

    async def put(self, key: str, value: str | bytes, etcd_lease: str = "0") -> None:
        """Write a key."""
        data = value if isinstance(value, bytes) else value.encode()
        await self.ask(
            "kv/put", key=_text(key), value=base64.b64encode(data).decode(), lease=etcd_lease
        )

    async def delete(self, key: str, *, is_prefix: bool = False) -> None:
        """Delete a key, or all that begin with it."""
        body = {"key": _text(key)}
        if is_prefix:
            body["range_end"] = _text(key[:-1] + chr(ord(key[-1]) + 1))
        await self.ask("kv/deleterange", **body)

    async def read(self, key: str, *, is_prefix: bool = False) -> dict[str, str]:
        """The key and its value; all that begin with it."""
        body = {"key": _text(key)}
        if is_prefix:
            body["range_end"] = _text(key[:-1] + chr(ord(key[-1]) + 1))
        answer = await self.ask("kv/range", **body)
        return {
            base64.b64decode(kv["key"]).decode(errors="replace"): base64.b64decode(
                kv.get("value", "")
            ).decode(errors="replace")
            for kv in answer.get("kvs", [])
        }

    async def revision(self) -> str:
        """The store's revision."""
        return str((await self.ask("kv/range", key=_text(PREFIX)))["header"]["revision"])


class StoreAttack:
    """One kind after another; each method is a kind."""

    def __init__(
        self, score: Score, world: World, gateway: Gateway, leases: dict[str, str]
    ) -> None:
        self.score = score
        self.gateway = gateway
        self.world = world
        self.leases = leases
        """Every node's own key under `subnets` and its PublicIP, the victim's last."""
        self.victim = list(leases)[-1]
        self.rng: random.Random = score.rng("store")

    async def run(self, pause_s: float) -> None:
        """Until cancelled; what is harmful in the long run is undone even then."""
        for kind in deck(self.rng, KINDS):
            self.score.done["store", kind] += 1
            await getattr(self, kind)()
            await asyncio.sleep(self.rng.uniform(0, pause_s))

    async def restore(self) -> None:
        """Remove what is nobody's, and write the network config."""
        await self.gateway.put(f"{PREFIX}/config", GOOD_CONFIG)
        for key, value in (await self.gateway.read(PREFIX, is_prefix=True)).items():
            name = key.removeprefix(SUBNETS)
            is_own = name in self.leases and self.leases[name] in value
            if key != f"{PREFIX}/config" and not is_own:
                await self.gateway.delete(key)

    def free(self) -> str:
        """A subnet of those above all that nodes draw."""
        return f"10.5.{self.rng.randrange(150, 250)}.0-24"

    async def leave(self, name: str, value: str | bytes) -> None:
        """Write a key, and delete it again half the time."""
        await self.gateway.put(SUBNETS + name, value)
        if self.rng.random() < 0.5:
            await self.gateway.delete(SUBNETS + name)

    async def broken_json(self) -> None:
        for _ in range(10):
            cut = self.rng.randrange(len(STRANGER))
            await self.leave(
                self.free(),
                self.rng.choice(
                    (
                        STRANGER[:cut].encode(),
                        self.rng.randbytes(40),
                        b"\xff\xfe{}",
                        b"",
                        b"\0" * 9,
                        STRANGER.encode() * 2,
                    )
                ),
            )

    async def huge_value(self) -> None:
        size = self.rng.choice((10_000, 200_000, 1_000_000))
        filler = self.rng.choice(
            ('"' + "x" * size + '"', "[" + "1," * (size // 2) + "1]", "9" * size)
        )
        await self.leave(
            self.free(),
            self.rng.choice(
                (
                    filler,
                    '{"PublicIP":"192.0.2.66","Extra":' + filler + "}",
                    '{"PublicIP":' + filler + "}",
                )
            ),
        )

    async def deep_json(self) -> None:
        depth = self.rng.choice((100, 990, 10_000, 100_000))
        form = self.rng.choice(("[%s]", '{"a":%s}'))
        left, right = form.split("%s")
        deep = left * depth + "1" + right * depth
        await self.leave(
            self.free(),
            self.rng.choice((deep, '{"PublicIP":"192.0.2.66","BackendData":' + deep + "}")),
        )

    async def wrong_types(self) -> None:
        for value in (
            "null",
            "[]",
            "7",
            '{"PublicIP":7}',
            '{"PublicIP":{}}',
            '{"PublicIP":["192.0.2.66"]}',
            '{"PublicIP":"192.0.2.66","BackendType":[]}',
            '{"PublicIP":"::1"}',
            "NaN",
            "1e999",
            '{"PublicIP":"192.0.2.66","BackendData":"' + "\\u0000\\ud800" + '"}',
        ):
            await self.leave(self.free(), value)

    async def odd_public_ip(self) -> None:
        for address in (
            "127.0.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "192.0.2.255",
            "192.0.2.254",
            "10.5.1.1",
            "169.254.1.1",
            "192.0.2.66",
        ):
            await self.leave(self.free(), json.dumps({"PublicIP": address}))

    async def overlapping(self) -> None:
        for name in (
            "0.0.0.0-0",
            "10.5.0.0-16",
            "10.0.0.0-8",
            "10.5.200.0-20",
            "10.5.201.128-25",
            "10.5.201.128-31",
            "10.5.201.7-24",
            "10.5.201.0-24",
            "10.6.1.0-24",
            "10.5.0.0-17",
        ):
            await self.leave(name, STRANGER)

    async def own_subnet(self) -> None:
        """Leases for the victim's subnet, spelled otherwise or inside it."""
        address = self.victim.partition("-")[0]
        base = address.rpartition(".")[0]
        for name in (
            f"{address}-25",
            f"{base}.128-25",
            f"{base}.5-24",
            f"{base}.0-31",
            f"{address}-24&fd00::-64",
        ):
            await self.gateway.put(SUBNETS + name, STRANGER)
            await asyncio.sleep(self.rng.uniform(0, 0.2))
            await self.gateway.delete(SUBNETS + name)

    async def own_public_ip(self) -> None:
        """Free subnets in every node's name, as a flannel of the host would have."""
        for public_ip in self.leases.values():
            name = self.free()
            await self.gateway.put(SUBNETS + name, json.dumps({"PublicIP": public_ip}))
            await asyncio.sleep(self.rng.uniform(0, 0.3))
            await self.gateway.delete(SUBNETS + name)

    async def odd_keys(self) -> None:
        for name in (
            "\n",
            "\x1b[31mred",
            "10.5.170.0-24\n",
            "a" * 5000,
            "..",
            "%2f",
            "\u202e",
            "/",
            "10.5.171.0-24/x",
            "\x00",
            "-",
            "10.5.1.0-99",
            "999.1.1.1-24",
            "\u0661\u0660.5.1.0-24",
        ):
            await self.leave(name, STRANGER)
        for key in (
            f"{PREFIX}/subnets",
            f"{PREFIX}/subnetsX/10.5.9.0-24",
            f"{PREFIX}/junk",
            f"{PREFIX}/config/x",
        ):
            await self.gateway.put(key, STRANGER)
            await self.gateway.delete(key)

    async def flapping(self) -> None:
        """A lease that comes, moves and goes a hundred times in a second."""
        name = self.free()
        for number in range(50):
            value = json.dumps({"PublicIP": f"192.0.2.{100 + number}"})
            await self.gateway.put(SUBNETS + name, value)
            if number % 2:
                await self.gateway.delete(SUBNETS + name)
            await asyncio.sleep(0.01)

    async def broken_config(self) -> None:
        for _ in range(3):
            value = self.rng.choice(
                (
                    "",
                    "{",
                    "null",
                    "[]",
                    '{"Network":7}',
                    '{"Network":"10.5.0.0/99"}',
                    "9" * 100_000,
                    '{"Network":"10.6.0.0/16"}',
                    '{"Network":"10.5.0.0/16","SubnetLen":4}',
                    "[" * 100_000,
                    '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}',
                )
            )
            await self.gateway.put(f"{PREFIX}/config", value)
            await asyncio.sleep(self.rng.uniform(0, 0.3))
            if self.rng.random() < 0.3:
                await self.gateway.delete(f"{PREFIX}/config")
        await self.gateway.put(f"{PREFIX}/config", GOOD_CONFIG)

    async def all_deleted(self) -> None:
        self.score.fault("all leases deleted", LOSS_S)
        await self.gateway.delete(PREFIX, is_prefix=True)
        await asyncio.sleep(self.rng.uniform(0, 0.5))
        await self.gateway.put(f"{PREFIX}/config", GOOD_CONFIG)

    async def expiring(self) -> None:
        """Leases of strangers that etcd ends after a second."""
        etcd_lease = (await self.gateway.ask("lease/grant", TTL=1))["ID"]
        for _ in range(5):
            await self.gateway.put(SUBNETS + self.free(), STRANGER, etcd_lease)

    async def lease_rewritten(self) -> None:
        """The victim's own lease in a stranger's name, in nobody's, unreadable; then gone."""
        with contextlib.suppress(LabError):
            for value in (STRANGER, "{", '{"PublicIP":"192.0.2.1"}'):
                await self.gateway.put(SUBNETS + self.victim, value)
                await asyncio.sleep(self.rng.uniform(0, 0.5))
        await self.gateway.delete(SUBNETS + self.victim)

    async def lease_deleted(self) -> None:
        for _ in range(5):
            await self.gateway.delete(SUBNETS + self.victim)
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    async def lease_expires(self) -> None:
        """The victim's own value under an etcd lease of one second."""
        found = await self.gateway.read(SUBNETS + self.victim)
        if SUBNETS + self.victim in found:
            etcd_lease = (await self.gateway.ask("lease/grant", TTL=1))["ID"]
            await self.gateway.put(SUBNETS + self.victim, found[SUBNETS + self.victim], etcd_lease)

    async def compaction(self) -> None:
        with contextlib.suppress(LabError):  # compacted already
            await self.gateway.ask("kv/compaction", revision=await self.gateway.revision())

    async def many(self) -> None:
        """Three hundred leases at once, and their end."""
        for number in range(100):
            await self.gateway.put(f"{SUBNETS}10.5.{number + 150}.0-24", STRANGER)
        await self.gateway.delete(f"{SUBNETS}10.5.1", is_prefix=False)
        for number in range(100):
            await self.gateway.delete(f"{SUBNETS}10.5.{number + 150}.0-24")


def _text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
