"""A diagnosis as people read it: lines; the worst first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from tundp.doctor.diagnosis import Diagnosis, Named
from tundp.finding import Verdict
from tundp.layout import Line

_COLOURS: Final = {
    Verdict.OK: "green",
    Verdict.NOTE: "cyan",
    Verdict.WARN: "yellow",
    Verdict.FAIL: "red",
    Verdict.UNKNOWN: "yellow",
}
_WORDS: Final = {Verdict.UNKNOWN: "?"}
_BLIND: Final = "not-looked."


def diagnosis_parts(found: Diagnosis, *, is_verbose: bool = False) -> Iterator[RenderableType]:
    """Every finding but those of what is fine, then what was looked at. is_verbose: those, too."""
    blind: dict[str, list[str]] = defaultdict(list)
    for each in found.findings:
        if each.id.startswith(_BLIND):
            blind[each.evidence].append(each.check)
        elif is_verbose or each.verdict is not Verdict.OK:
            yield from named_parts(each)
    for why, checks in blind.items():
        yield _line(Verdict.UNKNOWN, ", ".join(checks), why)
    yield _summary(found)


def named_parts(each: Named) -> Iterator[RenderableType]:
    """One finding: what was seen, and below it what to do."""
    yield _line(each.verdict, each.id, each.evidence)
    if each.is_runnable:
        words = each.next_step.removeprefix(each.command).strip()
        line = Text("     fix: ", _COLOURS[Verdict.OK]).append(each.command, "bold")
        if words:
            line.append(f"  {words}", "default")
        yield Line(line, indent=10)
    elif each.next_step:
        yield Line(
            Text("     do:  ", _COLOURS[Verdict.OK]).append(each.next_step, "default"), indent=10
        )
    if each.meaning and each.verdict is not Verdict.OK:
        yield Line(Text(f"     {each.meaning}"), indent=10)


def _line(verdict: Verdict, name: str, text: str) -> Line:
    word = _WORDS.get(verdict, verdict.value.upper())
    line = Text(f"{word:<5}", _COLOURS[verdict])
    line.append(name, "bold").append(f"  {text}", "default")
    return Line(line, indent=5)


def _summary(found: Diagnosis) -> Line:
    fine = ", ".join(found.looked_at) or "nothing"
    text = Text(f"{'ok':<5}", _COLOURS[Verdict.OK])
    text.append(f"nothing found by: {fine}", "default")
    if found.not_looked_at:
        text.append(f"; could not look, or not at all of it: {', '.join(found.not_looked_at)}")
    text.append(f"  (daemon: {found.daemon}; {found.took_s} s)")
    return Line(text, indent=5)
