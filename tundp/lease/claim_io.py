"""What goes into the state machine of a claim (lease/claim.py), and what comes out. Values only.

input    what the watch shows, what the daemon offers, how a write or a snapshot ended
action   what the driver (subnet/claim_driver.py) does next
notice   what happened, for the log
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address

from tundp.lease.model import Lease, LeaseAttributes, LeaseKey, Snapshot


class LeaseState(Enum):
    """Whether the subnet is ours."""

    HELD = "held"
    LOST = "lost"
    CONFLICT = "conflict"


# Inputs


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. `ClaimMachine.next` applies it."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The watch shows our key with `lease` under it; None: deleted or expired."""

    lease: Lease | None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The watch shows our key with a value that cannot be read."""

    why: str


@dataclass(frozen=True, slots=True)
class LeaseGoneElsewhere:
    """The watch shows that another key was deleted or expired; it may have overlapped ours."""


@dataclass(frozen=True, slots=True)
class Offered:
    """The attributes our lease shall have from now on; an earlier PublicIP stays known as ours."""

    attributes: LeaseAttributes


@dataclass(frozen=True, slots=True)
class Wrote:
    """The write in flight succeeded; `lease` is what the store has now."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class WriteConflicted:
    """The guard of the write in flight failed: the key was changed since it was read."""

    why: str
    jitter: float = 0.0
    """0 to 1, random: shortens the wait before the next try by up to a half."""


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """The write in flight has no answer; it may have happened."""

    why: str
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Nobody answered the challenge in flight; `lease` is what the store has since, with it."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Looked:
    """The snapshot asked for."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class LookFailed:
    """The snapshot could not be read."""

    why: str
    jitter: float = 0.0


Event = Observed | Unreadable
Input = (
    Tick
    | Event
    | LeaseGoneElsewhere
    | Offered
    | Wrote
    | WriteConflicted
    | WriteFailed
    | Unanswered
    | Looked
    | LookFailed
)


# Actions


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Call `next` again at `at`, or after any input; None: after an input only."""

    at: float | None


@dataclass(frozen=True, slots=True)
class Look:
    """Read a snapshot; answer with Looked or LookFailed."""


@dataclass(frozen=True, slots=True)
class Create:
    """Create the lease if its key is absent; answer with Wrote, WriteConflicted or WriteFailed."""

    key: LeaseKey
    attributes: LeaseAttributes
    lease_ttl_s: int


@dataclass(frozen=True, slots=True)
class Renew:
    """Write over `lease` if the store still has its revision; answers as for Create."""

    lease: Lease
    attributes: LeaseAttributes
    lease_ttl_s: int | None
    """None: no expiry. A reservation stays one."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Challenge whoever wrote `lease`; answer with Unanswered, WriteConflicted or WriteFailed.

    It bears our node id and another PublicIP than ours, and no write of this process is known. An
    answer to the challenge ends the claim: the driver raises CloneAlive.
    """

    lease: Lease


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The lease is not ours any more, and the settings say to exit then."""

    why: str


@dataclass(frozen=True, slots=True)
class GiveWay:
    """Another live process has our node id and our PublicIP, and had the lease before us."""

    why: str


Action = WaitUntil | Look | Create | Renew | Ask | GiveUp | GiveWay


# Notices


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The lease state changed; `why` is empty for HELD."""

    key: LeaseKey
    before: LeaseState
    after: LeaseState
    why: str


@dataclass(frozen=True, slots=True)
class Challenged:
    """Another node with our PublicIP or node id asks whether we are alive; a renewal answers."""

    key: LeaseKey


@dataclass(frozen=True, slots=True)
class WrittenByAnother:
    """Our lease was written as ours, but not by us: a duplicate node, a stock flanneld, a hand."""

    key: LeaseKey
    public_ip: IPv4Address


@dataclass(frozen=True, slots=True)
class Renewed:
    """A renewal succeeded."""

    key: LeaseKey


@dataclass(frozen=True, slots=True)
class Failing:
    """A try failed and will be repeated."""

    why: str


@dataclass(frozen=True, slots=True)
class Working:
    """A try succeeded; failures before it are over."""


Notice = StateChanged | Challenged | WrittenByAnother | Renewed | Failing | Working
