"""The identity of a lease's holder: a node id in fields of the lease value that flannel ignores.

flannel identifies a node by its PublicIP, so duplicate nodes, two with one address (cloned
machines, a NAT in front, Vagrant's 10.0.2.15), share one lease and overwrite each other's. A
lease value here also names the node that wrote it:

    "TundpNode": "7c1f..."      the node id, kept on that node's disk
    "TundpHost": "kube2"        its host name, for people
    "TundpChallenge": "1f..."   a challenge: another node asks whether the holder is alive

A node that finds its PublicIP, or its node id, in a lease another node may hold writes a
challenge into it and waits (subnet/challenge.py); a live holder answers by writing its lease
without it (lease/claim.py). So a dead holder's lease is taken over without an operator, and a
live holder's is not while it reaches the store. A lease without a node id, from a stock flanneld
or written by hand, is attributed by its PublicIP.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from typing import Final

from tundp.lease.model import Lease, LeaseAttributes

NODE: Final = "TundpNode"
HOST: Final = "TundpHost"
CHALLENGE: Final = "TundpChallenge"
_NAME: Final = re.compile(r"[0-9A-Za-z._-]{1,64}", re.ASCII)
_NOT_NAME: Final = re.compile(r"[^0-9A-Za-z._-]", re.ASCII)


@dataclass(frozen=True, slots=True)
class Identity:
    """A node: identified by `node_id`; `host` is for people."""

    node_id: str
    host: str = ""

    def __str__(self) -> str:
        return f"{self.node_id} (host {self.host})" if self.host else self.node_id


def identity_of(lease: Lease) -> Identity | None:
    """The node that wrote `lease`; None if a stock flanneld or a person did."""
    node_id = lease.attributes.extra.get(NODE)
    if not isinstance(node_id, str) or _NAME.fullmatch(node_id) is None:
        return None
    host = lease.attributes.extra.get(HOST)
    return Identity(node_id, clean_host(host) if isinstance(host, str) else "")


def clean_host(name: str) -> str:
    """`name` without the characters that have no place in a log or a lease value, 64 at most."""
    return _NOT_NAME.sub("?", name)[:64]


def challenge_in(lease: Lease) -> str | None:
    """The token of the challenge in `lease`, if there is one."""
    challenge = lease.attributes.extra.get(CHALLENGE)
    return challenge if isinstance(challenge, str) else None


def signed(
    attributes: LeaseAttributes, identity: Identity | None, kept: LeaseAttributes
) -> LeaseAttributes:
    """`attributes` with our identity and the unknown fields of `kept`, and without a challenge."""
    extra = {name: value for name, value in kept.extra.items() if name not in (NODE, HOST)}
    extra.pop(CHALLENGE, None)
    if identity is not None:
        extra[NODE] = identity.node_id
        if identity.host:
            extra[HOST] = identity.host
    return replace(attributes, extra=extra)


def challenged(attributes: LeaseAttributes, challenge: str) -> LeaseAttributes:
    """`attributes` with a challenge added and nothing else changed."""
    return replace(attributes, extra={**attributes.extra, CHALLENGE: challenge})


@dataclass(frozen=True, slots=True)
class Ours:
    """The lease is this node's."""

    is_signed: bool
    """Whether it bears our node id; without it another node with our PublicIP may take it."""


@dataclass(frozen=True, slots=True)
class Other:
    """The lease is another node's."""

    who: str
    """That node, for people: its identity if it has one, and its PublicIP."""


def holder_of(
    lease: Lease,
    *,
    public_ip: IPv4Address,
    identity: Identity | None,
    former_ips: Collection[IPv4Address] = (),
) -> Ours | Other:
    """Whose `lease` is, as seen by the node with this PublicIP and identity.

    A node id decides where both sides have one: another id is another node, whatever the
    address. A lease with our id must also bear our PublicIP or one we had (`former_ips`), else
    a clone of this machine wrote it. Without an id (stock flanneld, or by hand) the PublicIP
    decides, as in flannel.
    """
    writer = identity_of(lease)
    writer_ip = lease.attributes.public_ip
    has_our_id = False
    if identity is not None and writer is not None:
        if writer.node_id != identity.node_id:
            return Other(f"node {writer} at {writer_ip}")
        has_our_id = True
    if writer_ip == public_ip or (has_our_id and writer_ip in former_ips):
        return Ours(is_signed=identity is None or has_our_id)
    return Other(str(writer_ip))
