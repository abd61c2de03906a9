"""`tundp metrics`: alert rules and a dashboard for what the daemon exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tundp.cli.command import Command, Given, NoOptions
from tundp.cli.output import EXIT_OK

_FOLDER: Final = "data"


def _printer(name: str) -> Callable[[Given[NoOptions]], int]:
    """What prints one file of the package."""

    def run(_: Given[NoOptions]) -> int:
        from importlib import resources  # takes time that --help need not wait for

        file = resources.files("tundp.observe").joinpath(_FOLDER, name)
        print(file.read_text(encoding="utf-8"), end="")
        return EXIT_OK

    return run


RULES = Command(
    name="metrics rules",
    summary="print alert rules for Prometheus",
    description="""\
Print alert rules for a Prometheus that scrapes --metrics-addr of the nodes. They name the job
nowhere: whatever has these series is meant.""",
    run=_printer("alerts.yml"),
    options=NoOptions,
    examples=(("tundp metrics rules > /etc/prometheus/tundp.yml", ""),),
)
DASHBOARD = Command(
    name="metrics dashboard",
    summary="print a dashboard for Grafana",
    description="""\
Print a dashboard for Grafana (schema 36, Grafana 9 and newer), to be imported as JSON. It asks for
the data source, and for nodes by the label `instance`.""",
    run=_printer("dashboard.json"),
    options=NoOptions,
    examples=(("tundp metrics dashboard > tundp.json", ""),),
)
