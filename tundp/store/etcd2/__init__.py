"""Leases in etcd over its v2 API."""

from tundp.store.etcd2.store import Etcd2Store as Etcd2Store
