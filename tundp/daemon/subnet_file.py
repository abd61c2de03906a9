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
        self._contest = Contest(_log)
        self._text = ""
        """What the file must hold."""

    @property
    def error(self) -> str:
        """Why the file is not right, or who else writes it; empty if it is and stays right."""
        return self._failure or self._contest.words(now=self._clock())

    def write(self, env: SubnetEnv) -> None:
        """Write `env`, now and whenever `check` finds something else."""
        self._text = subnet_env.render(env)
        self._write()

    def check(self) -> None:
        """Write it again if somebody removed or changed it, or once it can be written."""
        if not self._text:
            return
        if not self._failure:
            if read_text(self.path) == self._text:
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
    """The file's text; empty if it cannot be read or cannot be a subnet.env."""
    try:
        return read_regular(path, most_len=SMALL_LEN)
    except OSError:
        return ""
