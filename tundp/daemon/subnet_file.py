"""subnet.env: what Docker and CNI learn this node's subnet from, written and kept.

A file that cannot be written is a warning, as in flannel: packets flow all the same.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from tundp.daemon import lock
from tundp.files import read_regular, write_atomically
from tundp.instance import Instance
from tundp.lease import subnet_env
from tundp.lease.subnet_env import SubnetEnv

_log = logging.getLogger(__name__)

MOST_LEN: Final = 1 << 20
"""Bytes of a file that is looked at as a subnet.env, which has 200."""


class SubnetFile:
    """An instance's file. `error` says why it cannot be written; empty when it is right."""

    def __init__(self, instance: Instance) -> None:
        self.path = instance.subnet_file
        self._instance = instance
        self.error = "not written yet"
        self._text = ""
        """What the file must hold."""

    def write(self, env: SubnetEnv) -> None:
        """Write `env`, now and whenever `check` finds something else."""
        self._text = subnet_env.render(env)
        self._write()

    def check(self) -> None:
        """Write it again if somebody removed or changed it, or once it can be written."""
        if not self._text:
            return
        if not self.error:
            if read_text(self.path) == self._text:
                return
            _log.warning("%s was removed or changed: writing it again", self.path)
        elif not os.access(self.path.parent, os.W_OK):
            return
        self._write()

    def _write(self) -> None:
        try:
            write_atomically(self.path, self._text)
        except OSError as error:
            self.error = error.strerror or str(error)
            _log.warning(
                "cannot write %s: %s; Docker and CNI will not learn this node's subnet",
                self.path,
                error.strerror,
            )
        else:
            self.error = ""
            lock.stamp(self._instance)


def read_text(path: Path) -> str:
    """The file's text; empty if it cannot be read or cannot be a subnet.env."""
    try:
        return read_regular(path, most_len=MOST_LEN)
    except OSError:
        return ""
