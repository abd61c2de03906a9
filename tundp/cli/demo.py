"""`tundp demo`: the whole overlay on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tundp.choices import DemoStore
from tundp.cli.command import Command, Given, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, terminal
from tundp.settings.declare import option
from tundp.settings.parsers import parse_int

if TYPE_CHECKING:
    from rich.console import RenderableType


def _megabytes(text: str) -> int:
    value = parse_int(text)
    if value < 1:
        raise ValueError("is out of range: at least 1")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What `tundp demo` can be told."""

    keep: bool = option(
        default=False, help="leave it all running, and print commands to explore it"
    )
    clean: bool = option(default=False, help="remove what an earlier --keep left")
    store: DemoStore = option(
        choice=DemoStore,
        default=DemoStore.AUTO,
        help="where the leases live; auto is etcd where it is installed",
    )
    megabytes: int = option(
        parse=_megabytes, default=256, metavar="N", help="how much TCP payload to move and verify"
    )


def demo(given: Given[DemoOptions]) -> int:
    """Build, check, tear down; exit code 1 if a check failed."""
    from tundp.demo import DemoSettings, clean_demo, run_demo

    console = terminal()

    def show(part: RenderableType) -> None:
        console.print(part, crop=False, soft_wrap=isinstance(part, str))

    options = given.options
    if options.clean:
        return EXIT_OK if run_async(clean_demo(show)) else EXIT_FAILED
    settings = DemoSettings(
        store=options.store, payload_len=options.megabytes << 20, is_kept=options.keep
    )
    return EXIT_OK if run_async(run_demo(settings, show)) else EXIT_FAILED


COMMAND = Command(
    name="demo",
    summary="two nodes and their pods on this machine, checked end to end",
    description="""\
Build two nodes with a pod each from network namespaces, run a daemon on both, and verify
what crosses the overlay, also while one daemon is replaced by another. Takes about a minute, needs
root, and touches nothing outside its own namespaces.""",
    run=demo,
    options=DemoOptions,
    examples=(
        ("tundp demo", ""),
        ("tundp demo --keep", "then look around, and end it with tundp demo --clean"),
    ),
    notes="exit codes: 0 every check passed; 1 one failed; 2 wrong usage; 130 interrupted.",
)
