"""The command line: parsing, printing and exit codes, one file a command.

`main` and `flanneld` begin the early start (tundp/early.py) before they import the rest: what a
daemon takes to import is what packets would wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tundp import early

__all__ = ["flanneld", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. See program.py."""
    given = sys.argv[1:] if arguments is None else arguments
    early.begin(given)
    from tundp.cli import program

    return program.main(given)


def flanneld(arguments: Sequence[str] | None = None) -> int:
    """The script of that name: `tundp run`, with flannel's own tolerance for stray arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    early.begin([early.COMMAND, *given])
    from tundp.cli import program

    return program.flanneld(given)
