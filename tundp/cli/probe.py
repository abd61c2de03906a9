"""`tundp probe`: what this kernel offers."""

from __future__ import annotations

from dataclasses import dataclass

from tundp.cli.command import Command, Given
from tundp.cli.output import EXIT_OK, print_json, print_parts
from tundp.settings.declare import option


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """What `tundp probe` can be told."""

    json: bool = option(default=False, help="print the findings as JSON")


def probe(given: Given[ProbeOptions]) -> int:
    """Print what the kernel has, and which engine `auto` is here."""
    from tundp.engine.choose import probe_machine
    from tundp.show import probe_parts

    found = probe_machine()
    if given.options.json:
        print_json(found.as_dict())
    else:
        print_parts(probe_parts(found))
    return EXIT_OK


COMMAND = Command(
    name="probe",
    summary="what this kernel offers, and which engine that means",
    description="""\
Ask the kernel by doing: a TUN device in a network namespace of the probe's own, sockets on
its loopback. Nothing on the host changes. Without root the TUN device is not tried.""",
    run=probe,
    options=ProbeOptions,
    examples=(("tundp probe", ""), ("tundp probe --json", "for programs")),
)
