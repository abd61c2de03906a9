"""Lease stores: etcd over its v2 API, and one JSON file. Start reading at base.py."""
