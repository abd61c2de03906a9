"""The lease store the settings name."""

from __future__ import annotations

from tundp.config import Config
from tundp.store.access import EtcdAccess
from tundp.store.auto import V2, V3, AutoStore
from tundp.store.base import Store
from tundp.store.both import BothStore
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd3 import Etcd3Store
from tundp.store.file import FileStore


def open_store(config: Config) -> Store:
    """The store; nothing is read yet. ConfigError for settings that cannot be."""
    if config.store_path is not None:
        return FileStore(config.store_path)
    access = EtcdAccess(
        endpoints=config.etcd_endpoints,
        prefix=config.etcd_prefix,
        username=config.etcd_username,
        password=config.etcd_password,
        cafile=config.etcd_cafile,
        certfile=config.etcd_certfile,
        keyfile=config.etcd_keyfile,
    )
    match config.etcd_api:
        case "v2":
            return Etcd2Store(access)
        case "v3":
            return Etcd3Store(access)
        case "both":
            return BothStore(Etcd2Store(access), Etcd3Store(access))
        case _:
            return AutoStore(Etcd2Store(access), Etcd3Store(access))


def api_of(store: Store) -> str:
    """The one API of etcd that has the leases, as far as that is known; else empty."""
    match store:
        case AutoStore():
            return store.api
        case Etcd2Store():
            return V2
        case Etcd3Store():
            return V3
        case _:
            return ""
