"""The whole exception tree.

    TundpError
    ├── ConfigError        (also ValueError)   a flag, variable, file or network config is wrong
    │   └── FilterError                        a packet filter is wrong: where, and why
    ├── LeaseError                             a lease cannot be had
    │   ├── LeaseFormatError (also ValueError) one lease key or value cannot be read
    │   ├── DuplicateNode                      a live node has our PublicIP or our node id
    │   │   └── CloneAlive                     our node id: this machine is a clone of it
    │   ├── LeaseLost                          ours is gone, and --on-lease-lost=exit
    │   └── OutOfSubnets                       every subnet of the network is leased
    ├── StoreError                             the lease store said no
    │   ├── StoreUnavailable                   nobody answered, or not in time: try again
    │   ├── AccessDenied                       credentials or permissions are wrong
    │   ├── ConfigNotFound                     the store answers, but holds no network config
    │   ├── Compacted                          the events asked for are gone: take a snapshot
    │   └── Conflict                           a guarded write lost: somebody else wrote first
    ├── PlatformError      (also OSError)      the kernel refused; keeps errno
    │   └── Unsupported                        the kernel, or this build, does not have it
    ├── LabError                               a demo or test lab cannot be built
    └── Interrupted                            a signal ended a demo or bench; all is torn down

Bad packets are not here: they are `wire.Drop` values, because a packet from the
wire must never unwind the stack of the loop that carries everybody else's.

Every message says what was attempted, on what, and what to try.
"""

from __future__ import annotations

import errno as numbers
from typing import Final

# ruff: noqa: N818  (names say what happened; an Error suffix on each would say less)


SCARCE: Final = frozenset({numbers.EMFILE, numbers.ENFILE, numbers.ENOBUFS, numbers.ENOMEM})
"""Errnos of what this process or the host is short of for the moment."""
FILES_STEP: Final = (
    "allow more open files: LimitNOFILE= of the unit, --ulimit nofile= of the container, ulimit -n"
)
"""The next step after EMFILE, whatever it kept from being opened."""
NOT_SEEN: Final = SCARCE | {
    numbers.EIO,
    numbers.EINTR,
    numbers.ENOSYS,
    numbers.EPERM,
    numbers.ESTALE,
    numbers.ETIMEDOUT,
}
"""Errnos of a look at a file that tell nothing of the file: neither that it is there nor that it
is gone or another one."""
_SHOWN: Final = 70
_SHOWN_BEFORE: Final = 40
"""Characters of a wrong filter that are shown, and those of them before the wrong one."""


class TundpError(Exception):
    """Anything tundp raises on purpose."""


class ConfigError(TundpError, ValueError):
    """A setting is wrong; the message names the setting, its value and the rule."""


class FilterError(ConfigError):
    """A packet filter cannot be read. The message names the place; `lines` also points at it."""

    def __init__(self, message: str, position: int, text: str) -> None:
        super().__init__(f"{message} (at character {position + 1} of the filter)")
        self.reason = message
        """What is wrong, and what was expected."""
        self.position = position
        """Index into the text of the first character that is wrong; its length for the end."""
        self.text = text

    def lines(self) -> tuple[str, str, str]:
        """What is wrong; the filter around the place, on one line; a caret under the place."""
        start = max(0, self.position - _SHOWN_BEFORE)
        shown = self.text[start : start + _SHOWN]
        shown = "".join(each if each.isascii() and each.isprintable() else "?" for each in shown)
        left, right = "..." * (start > 0), "..." * (start + _SHOWN < len(self.text))
        place = " " * (len(left) + self.position - start)
        return self.reason, f"{left}{shown}{right}", f"{place}^"


class LeaseError(TundpError):
    """A lease cannot be had, kept or understood."""


class LeaseFormatError(LeaseError, ValueError):
    """One lease key or value cannot be read; its neighbours are unaffected."""


class DuplicateNode(LeaseError):
    """Another node with our PublicIP, or our node id, is alive; the message names both."""


class CloneAlive(DuplicateNode):
    """A live node at another PublicIP has our node id, as after cloning a machine's disk."""


class LeaseLost(LeaseError):
    """Our lease is gone and we were told to exit then, as flannel does."""


class OutOfSubnets(LeaseError):
    """Every subnet between SubnetMin and SubnetMax overlaps a lease."""


class StoreError(TundpError):
    """The lease store refused, or answered something that makes no sense."""


class StoreUnavailable(StoreError):
    """No endpoint answered in time. The operation may or may not have happened."""


class AccessDenied(StoreError):
    """The store answered, and turned our credentials away."""


class ConfigNotFound(StoreError):
    """The store answered, and there is no network config under the prefix."""


class Compacted(StoreError):
    """The events asked for are no longer kept: take a snapshot and go on from there."""


class Conflict(StoreError):
    """A guarded write lost: the key exists, is gone, or was written by somebody else."""


class PlatformError(TundpError, OSError):
    """The kernel refused. `errno` is kept where there is one."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class Unsupported(PlatformError):
    """This kernel, or this build, lacks what was asked for."""


class TooManyReaders(TundpError):
    """As many readers of events as there can be are there already."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} readers of events are there already: end one of them first")


class UnknownPeer(TundpError):
    """No lease of another node covers what was asked for."""


class TooBusy(TundpError):
    """As much of this as there can be at once is under way already."""


class Interrupted(TundpError):
    """A signal ended what was asked for, and everything built for it is gone."""


class LabError(TundpError):
    """A lab of network namespaces cannot be built; nothing of it is left behind."""
