"""The identity of a lease's holder: a node id in fields of the lease value that flannel ignores.

flannel identifies a node by its PublicIP, so duplicate nodes, two with one address (cloned
machines, a NAT in front, Vagrant's 10.0.2.15), share one lease and overwrite each other's. A
lease value here also names the node that wrote it:

    "TundpNode": "7c1f..."      the node id, kept on that node's disk
    "TundpHost": "kube2"        its host name, for people
    "TundpRun": "5e01..."       that node's process: another one for each start
    "TundpAnswer": "77aa..."    to a process that took the lease over: its holder is alive
    "TundpChallenge": "1f..."   a challenge: another node asks whether the holder is alive

A node that finds its PublicIP, or its node id, in a lease another node may hold writes a
challenge into it and waits (subnet/challenge.py); a live holder answers by writing its lease
without it (lease/claim.py). So a dead holder's lease is taken over without an operator, and a
live holder's is not while it reaches the store. A lease without a node id, from a stock flanneld
or written by hand, is attributed by its PublicIP: `whose` is the one place that judges.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import Enum, unique
from ipaddress import IPv4Address
from typing import Final

from tundp.lease.model import UNSPECIFIED, Lease, LeaseAttributes

NODE: Final = "TundpNode"
HOST: Final = "TundpHost"
RUN: Final = "TundpRun"
ANSWER: Final = "TundpAnswer"
CHALLENGE: Final = "TundpChallenge"
_NAME: Final = re.compile(r"[0-9A-Za-z._-]{1,64}", re.ASCII)
_NOT_NAME: Final = re.compile(r"[^0-9A-Za-z._-]", re.ASCII)


@dataclass(frozen=True, slots=True)
class Identity:
    """A node: identified by `node_id`; `host` is for people."""

    node_id: str
    host: str = ""
    run: str = field(default="", compare=False)
    """Which process of that node, random for each start; empty if it does not tell.

    It tells our own writes from those of a clone with our node id and PublicIP.
    """

    def __str__(self) -> str:
        return f"{self.node_id} (host {self.host})" if self.host else self.node_id


def identity_of(lease: Lease) -> Identity | None:
    """The node that wrote `lease`; None if a stock flanneld or a person did."""
    node_id = lease.attributes.extra.get(NODE)
    if not isinstance(node_id, str) or _NAME.fullmatch(node_id) is None:
        return None
    host, run = lease.attributes.extra.get(HOST), lease.attributes.extra.get(RUN)
    return Identity(
        node_id,
        clean_host(host) if isinstance(host, str) else "",
        run if isinstance(run, str) and _NAME.fullmatch(run) else "",
    )


def clean_host(name: str) -> str:
    """`name` without the characters that have no place in a log or a lease value, 64 at most."""
    return _NOT_NAME.sub("?", name)[:64]


def challenge_in(lease: Lease) -> str | None:
    """The token of the challenge in `lease`, if there is one."""
    challenge = lease.attributes.extra.get(CHALLENGE)
    return challenge if isinstance(challenge, str) else None


def answer_in(lease: Lease) -> str:
    """Which process `lease` tells that its holder is alive; empty for none."""
    answer = lease.attributes.extra.get(ANSWER)
    return answer if isinstance(answer, str) else ""


def signed(
    attributes: LeaseAttributes,
    identity: Identity | None,
    kept: LeaseAttributes,
    *,
    answer: str = "",
) -> LeaseAttributes:
    """`attributes` with our identity and the unknown fields of `kept`, and without a challenge.

    answer: the process to tell that we are alive, empty for none.
    """
    ours = (NODE, HOST, RUN, ANSWER, CHALLENGE)
    extra = {name: value for name, value in kept.extra.items() if name not in ours}
    if identity is not None:
        extra[NODE] = identity.node_id
        if identity.host:
            extra[HOST] = identity.host
        if identity.run:
            extra[RUN] = identity.run
    if answer:
        extra[ANSWER] = answer
    return replace(attributes, extra=extra)


def challenged(attributes: LeaseAttributes, challenge: str) -> LeaseAttributes:
    """`attributes` with a challenge added and nothing else changed."""
    return replace(attributes, extra={**attributes.extra, CHALLENGE: challenge})


def is_written_by(lease: Lease, identity: Identity | None) -> bool:
    """Whether this very process wrote `lease`; False if that cannot be told."""
    return bool(identity and identity.run) and _run_of(lease, identity) == ""


def other_run(lease: Lease, identity: Identity | None) -> str:
    """The other process with our node id that wrote `lease`; empty if we did, or none is told."""
    return _run_of(lease, identity) or ""


def _run_of(lease: Lease, identity: Identity | None) -> str | None:
    """The run that `lease` bears beside our node id, empty if it is ours; None if it has none."""
    writer = identity_of(lease)
    if writer is None or identity is None or writer.node_id != identity.node_id:
        return None
    if not writer.run or not identity.run:
        return None
    return "" if writer.run == identity.run else writer.run


@unique
class Holder(Enum):
    """Whose a lease is, as seen by one node; the value is for people."""

    OURS = "this node"
    """Our node id, and our PublicIP or one we had."""
    LEFTOVER = "this node before it had a node id, or a stock flanneld"
    """Our PublicIP and no node id: written by a stock flanneld of this host, or by hand. A
    stock flanneld elsewhere that advertises our address by mistake looks the same."""
    DUPLICATE = "another node with our PublicIP"
    """Our PublicIP and another node id."""
    CLONE = "this node at another address, or a clone of it"
    """Our node id, and an address we never had."""
    OTHER = "another node"


def whose(
    lease: Lease,
    *,
    public_ip: IPv4Address,
    identity: Identity | None,
    former_ips: Collection[IPv4Address] = (),
) -> Holder:
    """Whose `lease` is, as seen by the node with this PublicIP and identity.

    The one judgement that claim, allocation, challenge, ledger and readiness go by. Pure:
    whether that holder is alive, a challenge tells. identity None: a signed lease is another's.
    """
    writer = identity_of(lease)
    writer_ip = lease.attributes.public_ip
    is_our_ip = writer_ip == public_ip != UNSPECIFIED
    if writer is None:
        return Holder.LEFTOVER if is_our_ip else Holder.OTHER
    if identity is None or writer.node_id != identity.node_id:
        return Holder.DUPLICATE if is_our_ip else Holder.OTHER
    return Holder.OURS if is_our_ip or writer_ip in former_ips else Holder.CLONE


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
    """Whether the node with this PublicIP and identity may write `lease`, by `whose`.

    Without an identity of ours the PublicIP decides, as in flannel.
    """
    holder = whose(lease, public_ip=public_ip, identity=identity, former_ips=former_ips)
    if holder is Holder.OURS:
        return Ours(is_signed=True)
    if holder is Holder.LEFTOVER or (identity is None and holder is Holder.DUPLICATE):
        return Ours(is_signed=identity is None)
    writer, writer_ip = identity_of(lease), lease.attributes.public_ip
    if writer is None or identity is None or holder is Holder.CLONE:
        return Other(str(writer_ip))
    return Other(f"node {writer} at {writer_ip}")
