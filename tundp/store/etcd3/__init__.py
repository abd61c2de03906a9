"""Leases in etcd over its v3 API."""

from tundp.store.etcd3.store import Etcd3Store as Etcd3Store
