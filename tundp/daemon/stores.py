"""The lease store the settings name."""

from __future__ import annotations

from collections.abc import Callable

from tundp.backend.choose import parse_network_config
from tundp.choices import EtcdApi
from tundp.daemon import logs
from tundp.daemon.subnet_file import read_text
from tundp.errors import ConfigError
from tundp.lease import subnet_env
from tundp.lease.identity import identity_of
from tundp.lease.model import Lease
from tundp.settings.settings import Settings
from tundp.settings.sources import read_again
from tundp.store.access import EtcdAccess
from tundp.store.auto import AutoStore
from tundp.store.base import Store
from tundp.store.both import BothStore
from tundp.store.etcd2 import Etcd2Store
from tundp.store.etcd3 import Etcd3Store
from tundp.store.file import FileStore
from tundp.store.tls import TlsFiles
from tundp.subnet.lease_cache import LeaseCache


def open_store(settings: Settings) -> Store:
    """The store; nothing is read yet. ConfigError for settings that cannot be."""
    if settings.store.path is not None:
        return FileStore(settings.store.path)
    access = EtcdAccess(
        endpoints=settings.etcd_endpoints,
        prefix=settings.etcd_prefix,
        username=settings.etcd_username,
        password=settings.etcd_password,
        cafile=settings.etcd_cafile,
        certfile=settings.etcd_certfile,
        keyfile=settings.etcd_keyfile,
    )
    if (read := _user_reader(settings)) is not None:
        access.user.follow(read, str(settings.config))
    # One for both APIs: a file that cannot be used is reported once.
    tls = TlsFiles(access)
    match settings.etcd_api:
        case EtcdApi.V2:
            return Etcd2Store(access, tls)
        case EtcdApi.V3:
            return Etcd3Store(access, tls)
        case EtcdApi.BOTH:
            return BothStore(
                Etcd2Store(access, tls), Etcd3Store(access, tls), parse=parse_network_config
            )
        case EtcdApi.AUTO:
            return AutoStore(
                Etcd2Store(access, tls),
                Etcd3Store(access, tls),
                is_ours=_is_ours_from_before(settings),
            )


def _user_reader(settings: Settings) -> Callable[[], tuple[str, str]] | None:
    """What reads user and password from the --config file; None if they are not from there."""
    names = ("etcd-username", "etcd-password")

    def read() -> tuple[str, str]:
        found = read_again(settings, names)
        if found is None:
            return settings.etcd_username, settings.etcd_password
        username, password = (str(found[name]) for name in names)
        logs.hide(username=username, password=password)
        return username, password

    try:
        return None if read_again(settings, names) is None else read
    except ConfigError:  # gone since it was read; it may come back
        return read


def _is_ours_from_before(settings: Settings) -> Callable[[Lease], bool]:
    """Whether a lease bears our node id, or is the one of subnet.env and bears none."""
    node_id = LeaseCache(settings.state_dir, settings.instance).known_node_id()
    previous = subnet_env.previous_key(read_text(settings.subnet_file))

    def is_ours(lease: Lease) -> bool:
        writer = identity_of(lease)
        if writer is None:
            return lease.key == previous
        return writer.node_id == node_id

    return is_ours


def store_name(settings: Settings) -> str:
    """Which leases these are, whatever endpoint answers: what the lease cache goes by."""
    if settings.store.path is not None:
        return str(settings.store)
    return f"etcd:{settings.etcd_prefix}"
