"""An etcd with authentication, and its users."""

from __future__ import annotations

import base64
import contextlib
from typing import Final

from tests.store.support import Etcd3World, Raw3
from tundp.lab.etcd import PrivateEtcd
from tundp.store.base import Store

PASSWORD: Final = "p:ss w\u00f6rd \u2713"
PREFIX: Final = "/coreos.com/network"


class Locked:
    """An etcd with the users `tundp` (read, write), `reader`, `stranger`, and `root` for us."""

    def __init__(self, etcd: PrivateEtcd) -> None:
        self.etcd = etcd
        self.world = Etcd3World(etcd.url, PREFIX)
        raw = self.world.raw
        raw.put(f"{PREFIX}/config", '{"Network": "10.5.0.0/16"}')
        for user in ("root", "tundp", "reader", "stranger"):
            raw.call("auth/user/add", name=user, password=PASSWORD)
        raw.call("auth/role/add", name="root")
        self.grant("tundp", "READWRITE")
        self.grant("reader", "READ")
        for user in ("root", "tundp", "reader"):
            raw.call("auth/user/grant", user=user, role=user)
        raw.call("auth/enable")
        raw.close()
        self.login()

    def grant(self, role: str, permission: str) -> None:
        raw = self.world.raw
        with contextlib.suppress(AssertionError):
            raw.call("auth/role/add", name=role)
        end = PREFIX + "0"
        raw.call(
            "auth/role/grant",
            name=role,
            perm={"permType": permission, "key": b64(PREFIX + "/"), "rangeEnd": b64(end)},
        )

    def login(self) -> None:
        """A new token for root: the last one died with the server, or of age."""
        self.world.raw.close()
        self.world.raw = Raw3(self.etcd.url, "root", PASSWORD)

    def open(self, user: str = "tundp", password: str = PASSWORD) -> Store:
        access = {"username": user, "password": password} if user else {}
        return self.world.open_at(self.etcd.url, **access)

    def close(self) -> None:
        self.world.close()


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
