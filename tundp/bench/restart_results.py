"""What `tundp bench restart` found: run by run, rows of them, and whether they can be trusted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from tundp.bench.plan import LABS
from tundp.errors import ConfigError
from tundp.files import write_atomically
from tundp.finding import Finding, Verdict, failures
from tundp.lab.losses import StreamsResult
from tundp.lab.restarts import NULL, RESTARTS, Restart

SCHEMA: Final = 1
FULL_TCP: Final = "tcp"
"""The load of one TCP stream at full speed, and no datagrams."""
RATE_MAX: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSettings:
    """What the command line asked for."""

    runs: int
    loads: tuple[str, ...]
    """Datagrams a second each way, or `tcp`."""
    only: tuple[str, ...]
    """Names of events and labs; of each kind none means all."""

    def __post_init__(self) -> None:
        """ConfigError names what is unknown, and what there is."""
        for load in self.loads:
            is_rate = load.isascii() and load.isdecimal() and 1 <= int(load) <= RATE_MAX
            if load != FULL_TCP and not is_rate:
                raise ConfigError(
                    f"--loads {load}: is neither {FULL_TCP} nor datagrams a second, 1 to {RATE_MAX}"
                )
        events = [each.name for each in RESTARTS]
        for name in self.only:
            if name not in (*events, *LABS):
                raise ConfigError(
                    f"--only {name}: no such event or lab; events: {', '.join(events)};"
                    f" labs: {', '.join(LABS)}"
                )

    @property
    def labs(self) -> tuple[str, ...]:
        """Those asked for."""
        return tuple(lab for lab in LABS if lab in self.only) or LABS

    @property
    def restarts(self) -> tuple[Restart, ...]:
        """Those asked for, the null test always."""
        chosen = [each for each in RESTARTS if each.name in self.only] or list(RESTARTS)
        return tuple(each for each in RESTARTS if each in chosen or each.name == NULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One event under one load, once."""

    lab: str
    event: str
    load: str
    round: int
    took_s: float
    """Until the new daemon was ready."""
    leaked: int
    leaks: str
    """What they were, in words."""
    error: str
    """Why the event failed; then `result` may be missing."""
    result: StreamsResult | None

    @property
    def is_sound(self) -> bool:
        """Whether it says something of the path."""
        return self.result is not None and not self.error and not self.result.faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All runs of one event under one load in one lab, or why there are none."""

    lab: str
    event: str
    label: str
    load: str
    why_not: str | None
    runs: tuple[Run, ...]

    @property
    def sound(self) -> list[StreamsResult]:
        """What came of the runs that say something."""
        return [run.result for run in self.runs if run.is_sound and run.result is not None]

    @property
    def lost(self) -> list[int]:
        """Datagrams lost, run by run."""
        return [result.lost for result in self.sound]

    @property
    def leaked(self) -> int:
        """Packets that went to the default gateway, in all runs, failed ones too."""
        return sum(run.leaked for run in self.runs)

    @property
    def resets(self) -> int:
        """TCP streams that did not live."""
        return sum(bool(each.stream and each.stream.error) for each in self.sound)

    @property
    def silences_s(self) -> list[float]:
        """The longest of each run: of datagrams, or of the stream where there are none."""
        return [
            each.longest_silence_s or (each.stream.longest_stall_s if each.stream else 0.0)
            for each in self.sound
        ]

    @property
    def verdict(self) -> str:
        """whole, loses, leaks, failed, not available, or not measured."""
        if self.why_not is not None:
            return "not available"
        if any(run.error for run in self.runs):
            return "failed"
        if self.leaked:
            return "leaks"
        if not self.sound:
            return "not measured"
        return "whole" if all(each.is_whole for each in self.sound) else "loses"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the runs."""
        sound = self.sound
        return {
            **{name: getattr(self, name) for name in ("lab", "event", "label", "load")},
            "verdict": self.verdict,
            "why_not": self.why_not,
            "runs": len(self.runs),
            "sound": len(sound),
            "errors": [run.error for run in self.runs if run.error],
            "sent": sum(each.sent for each in sound),
            "lost": spread(self.lost),
            "leaked": self.leaked,
            "longest_silence_s": spread(self.silences_s),
            "took_s": spread([run.took_s for run in self.runs if run.is_sound]),
            "duplicates": sum(each.duplicates for each in sound),
            "reordered": sum(each.reordered for each in sound),
            "resets": self.resets,
        }


@dataclass(slots=True)
class RestartResults:
    """All of one `tundp bench restart`."""

    settings: RestartSettings
    environment: dict[str, str]
    started: str
    why_not: dict[str, str]
    """Event to why this tundp cannot do it."""
    runs: list[Run] = field(default_factory=list)
    checks: list[Finding] = field(default_factory=list)
    is_partial: bool = True
    finished: str = ""

    @property
    def rows(self) -> list[Row]:
        """By lab and load, events in their order."""
        return [
            Row(
                lab=lab,
                event=restart.name,
                label=restart.label,
                load=load,
                why_not=self.why_not.get(restart.name),
                runs=tuple(
                    run
                    for run in self.runs
                    if (run.lab, run.event, run.load) == (lab, restart.name, load)
                ),
            )
            for lab in self.settings.labs
            for load in self.settings.loads
            for restart in self.settings.restarts
        ]

    @property
    def all_checks(self) -> list[Finding]:
        """Those of the machine, and those that follow from the runs."""
        return [*self.checks, *checks_of(self.runs)]

    @property
    def headline(self) -> str:
        """The first line of every report."""
        reds = failures(self.all_checks)
        words = []
        if reds:
            words.append("NOT COMPARABLE: " + "; ".join(f"{c.title} {c.evidence}" for c in reds))
        if self.is_partial:
            words.append("PARTIAL: the bench was interrupted")
        return " · ".join(words) or "comparable: every validity check passed"

    @property
    def is_comparable(self) -> bool:
        """Whether it ended by itself and every validity check passed."""
        return not self.is_partial and not failures(self.all_checks)

    def save(self, path: Path) -> None:
        """Write restart.json."""
        document = {
            "schema": SCHEMA,
            "headline": self.headline,
            "is_comparable": self.is_comparable,
            "is_partial": self.is_partial,
            "started": self.started,
            "finished": self.finished,
            "settings": asdict(self.settings),
            "environment": self.environment,
            "checks": [check.as_dict() for check in self.all_checks],
            "rows": [row.as_dict() for row in self.rows],
            "runs": [
                {
                    **{name: getattr(run, name) for name in _RUN_FIELDS},
                    "result": None if run.result is None else run.result.as_dict(),
                }
                for run in self.runs
            ],
        }
        write_atomically(path, json.dumps(document, indent=1) + "\n")


_RUN_FIELDS: Final = ("lab", "event", "load", "round", "took_s", "leaked", "leaks", "error")


def spread(values: list[int] | list[float]) -> dict[str, float] | None:
    """Median, maximum and sum; None of nothing."""
    if not values:
        return None
    return {"median": median(values), "max": max(values), "sum": sum(values)}


def checks_of(runs: list[Run]) -> list[Finding]:
    """What the runs say of the instrument itself."""
    faults = [
        f"{run.lab} {run.event} {run.load} run {run.round + 1}: {fault}"
        for run in runs
        if run.result is not None
        for fault in run.result.faults
    ]
    nulls = [run for run in runs if run.event == NULL]
    wrong = [
        f"{run.lab} {run.load} run {run.round + 1}:"
        f" {run.error or f'{run.result.lost if run.result else 0} lost, {run.leaked} leaked'}"
        for run in nulls
        if run.error or run.leaked or run.result is None or not run.result.is_whole
    ]
    return [
        Finding(
            id="senders",
            title="senders",
            evidence=_first_of(faults) or f"held their rate in {len(runs)} runs",
            verdict=Verdict.FAIL if faults else Verdict.OK,
            meaning="what was not sent cannot be lost, and bursts fill queues: such a run is left"
            " out of its row",
        ),
        Finding(
            id="null-test",
            title="null test",
            evidence=_first_of(wrong) or f"nothing lost in {len(nulls)} runs without a restart",
            verdict=Verdict.FAIL if wrong or not nulls else Verdict.OK,
            meaning="what is lost without a restart is not lost by one",
        ),
    ]


def _first_of(faults: list[str]) -> str:
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else ""
