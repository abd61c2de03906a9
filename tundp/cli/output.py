"""Exit codes, and where the program prints. Nothing outside tundp/cli prints or exits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from tundp.printable import LINE_MAX, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""


def print_error(text: object, program: str = "tundp") -> None:
    """One line on stderr."""
    print(f"{program}: {printable(str(text), LINE_MAX)}", file=sys.stderr)


def print_line(text: str) -> None:
    """One line on stdout, names of devices, chains and files in it."""
    print(printable(text, LINE_MAX))


def print_json(value: Any) -> None:
    """A value for programs."""
    print(json.dumps(value, indent=2))


def print_parts(parts: Iterable[RenderableType]) -> None:
    """Print what `tundp.show` makes. It fits itself to the terminal: nothing may be cropped."""
    console = terminal()
    for part in parts:
        console.print(part, crop=False)


def terminal() -> Console:
    """Where tables go: colours and widths of a terminal, or plain text in a pipe."""
    from rich.console import Console  # 0.1 s that --help need not wait for

    return Console(highlight=False)
