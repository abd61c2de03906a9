"""subnet.env: what Docker and CNI learn this node's subnet from, written and kept.

A file that cannot be written is a warning, as in flannel: packets flow all the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from tundp.backoff import Contest, Outage
from tundp.daemon import lock
from tundp.errors import NOT_SEEN, SCARCE, PlatformError
from tundp.files import SMALL_LEN, read_regular, write_replacing
from tundp.instance import Instance
from tundp.lease import subnet_env
from tundp.lease.subnet_env import SubnetEnv
from tundp.linux import sandbox

_log = logging.getLogger(__name__)


class SubnetFile:
    """An instance's file. `error` says why it cannot be written; empty when it is right."""

    def __init__(self, instance: Instance, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = instance.subnet_file
        self._instance = instance
        self._clock = clock
        self._failure = "not written yet"
        self._outage = Outage(
            _log, f"cannot write {self.path}, and Docker and CNI will not learn this node's subnet"
        )
        self._unseen = Outage(_log, f"cannot look at {self.path}, which is taken to be as it was")
        self._contest = Contest(_log)
        self._text = ""
        """What the file must hold."""

    @property
    def unseen(self) -> str:
        """Why nobody can say how the file is now; empty if the last look went well."""
        return self._unseen.error

    @property
    def error(self) -> str:
        """Why the file is not right, or who else writes it; empty if it is and stays right."""
        return self._failure or self._contest.words(now=self._clock())

    def write(self, env: SubnetEnv) -> None:
        """Write `env`, now and whenever `check` finds something else."""
        self._text = subnet_env.render(env)
        self._write()

    def take_over(self, env: SubnetEnv) -> None:
        """Keep the file of a predecessor: it is written only if it does not hold `env`."""
        self._text = subnet_env.render(env)
        self._failure = ""
        self.check()

    def check(self) -> None:
        """Write it again if somebody removed or changed it, or once it can be written.

        A look that fails for lack of descriptors or memory tells nothing of the file; nor does an
        error of the disk, unless a link leads there: then the file is another one.
        """
        if not self._text:
            return
        if not self._failure:
            try:
                is_right = _read(self.path) == self._text
            except OSError as error:
                if error.errno in SCARCE or not self.path.is_symlink():
                    self._unseen.failed(error.strerror or error, now=self._clock())
                    return
                is_right = False
            self._unseen.ended(now=self._clock())
            if is_right:
                return
            self._contest.undone(
                f"{self.path} was removed or changed: writing it again", now=self._clock()
            )
        self._write()

    def _write(self) -> None:
        try:
            write_replacing(self.path, self._text)
        except OSError as error:
            self._failure = f"{error.strerror or error}{sandbox.hint(error.errno)}"
            self._outage.failed(self._failure, now=self._clock())
        else:
            self._failure = ""
            self._outage.ended(now=self._clock())
            lock.stamp(self._instance)


def read_text(path: Path) -> str:
    """The file's text; empty if it cannot be read or cannot be a subnet.env.

    PlatformError if descriptors or memory are too scarce to look: it says which subnet to keep.
    """
    try:
        return _read(path)
    except OSError as error:
        if error.errno not in SCARCE:
            return ""
        raise PlatformError(f"cannot read {path}: {error.strerror}", error.errno) from None


def _read(path: Path) -> str:
    """The same; OSError if the look tells nothing of the file."""
    try:
        return read_regular(path, most_len=SMALL_LEN)
    except OSError as error:
        if error.errno in NOT_SEEN:
            raise
        return ""
