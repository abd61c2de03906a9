"""What `tundp doctor` found, as a document with a schema, and the exit code it means."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tundp.finding import Finding, Verdict
from tundp.observe.codec import json_schema, to_json

SCHEMA: Final = 1
PATH: Final = Path(__file__).with_name("doctor.schema.json")
"""`python -m tundp.cli.docs` writes it."""
WORST_FIRST: Final = (Verdict.FAIL, Verdict.WARN, Verdict.UNKNOWN, Verdict.NOTE, Verdict.OK)
EXIT_CODES: Final[Mapping[Verdict, int]] = {
    Verdict.OK: 0,
    Verdict.NOTE: 0,
    Verdict.FAIL: 1,
    Verdict.WARN: 3,
    Verdict.UNKNOWN: 4,
}
"""Of the worst finding; 2 is wrong usage, as of any command."""
COMMAND: Final = "command"
"""The fact of a finding that is a shell command which mends it."""
HOST: Final = "on"
"""The fact of a finding that names the host its command is for; none: this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One thing that was found."""

    id: str
    """Stable: docs/debugging.md has them all."""
    check: str
    """The check that found it."""
    verdict: Verdict
    title: str
    evidence: str
    """What was seen."""
    meaning: str = ""
    next_step: str = ""
    """What to do about it, in words; begins with the command, if there is one."""
    command: str = ""
    """The shell command that mends it; empty if no single one does."""
    on: str = ""
    """The host the command is for; empty: this one."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts by name."""

    @classmethod
    def of(cls, finding: Finding, check: str) -> Named:
        """A finding of one check."""
        facts = dict(finding.facts)
        return cls(
            id=finding.id,
            check=check,
            verdict=finding.verdict,
            title=finding.title,
            evidence=finding.evidence,
            meaning=finding.meaning,
            next_step=finding.next_step,
            command=facts.pop(COMMAND, ""),
            on=facts.pop(HOST, ""),
            facts=facts,
        )

    @property
    def is_runnable(self) -> bool:
        """Whether its command may be run here."""
        return bool(self.command) and not self.on


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything `tundp doctor` prints."""

    schema: int = SCHEMA
    """Goes up when a member changes meaning, changes type or goes."""
    version: str
    verdict: Verdict
    """The worst one."""
    exit_code: int
    daemon: str
    """In words, which daemon was asked, or why none was."""
    looked_at: Sequence[str]
    """The checks that looked and found nothing to report, by name."""
    not_looked_at: Sequence[str]
    """The checks that could not look, or not at everything, by name; findings tell why."""
    took_s: float
    findings: Sequence[Named]
    """The worst first."""

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return to_json(self)


def diagnose(
    named: Iterable[Named], *, version: str, daemon: str, checks: Sequence[str], took_s: float
) -> Diagnosis:
    """The document of what `checks` found."""
    ordered = sorted(named, key=lambda each: WORST_FIRST.index(each.verdict))
    worst = ordered[0].verdict if ordered else Verdict.UNKNOWN
    found = {each.check for each in ordered if each.verdict is not Verdict.OK}
    ran = {each.check for each in ordered}
    blind = {each.check for each in ordered if each.verdict is Verdict.UNKNOWN}
    return Diagnosis(
        version=version,
        verdict=worst,
        exit_code=EXIT_CODES[worst],
        daemon=daemon,
        looked_at=[name for name in checks if name in ran - found],
        not_looked_at=[name for name in checks if name in blind],
        took_s=round(took_s, 1),
        findings=ordered,
    )


def schema_text() -> str:
    """What the file at `PATH` must hold."""
    title = f"tundp doctor, schema {SCHEMA}"
    return json.dumps(json_schema(Diagnosis, title=title), indent=2) + "\n"
