"""The header that tells which cluster answers, and what follows where a proxy takes it out."""

from __future__ import annotations

import logging
from typing import Final

_log = logging.getLogger(__name__)

CLUSTER_ID: Final = "X-Etcd-Cluster-Id"
"""Header of every answer (etcd server/etcdserver/api/v2http)."""
_explained: Final[set[str]] = set()
"""Endpoints without it that the log has named."""


def explain_no_cluster_id(url: str) -> None:
    """Log once for each endpoint that its answers do not bear the header."""
    if url in _explained:
        return
    _explained.add(url)
    _log.warning(
        "etcd at %s: its answers have no header %s, which a proxy takes out: another cluster"
        " behind it is noticed only if its index is lower; name etcd itself in --etcd-endpoints",
        url,
        CLUSTER_ID,
    )
