"""Broken labs against a doctor that is broken itself: each row has to fail.

    python -m tests.netns.labs_mutants [MUTANT] [WORDS OF A ROW ...]

MUTANT is `check`, a doctor whose check for the row's id finds nothing, or `command`, a doctor whose
commands do nothing; without one, both. Prints a line for each row and mutant; exit code 1 if a row
passed. A test that cannot fail shows nothing. Root; a quarter of an hour for all.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from tests.netns import broken_lab
from tests.netns.broken_lab import Broken, Runner
from tests.netns.broken_rows import ROWS, Row
from tests.wait import until

MUTANTS = ("check", "command")
_FOUND_S, _MENDED_S = 3.0, 4.0
"""Deadlines instead of the test's own: what is waited for never comes."""
_DOCTOR = """#!{python}
import sys
from dataclasses import replace
from tundp.doctor import diagnosis
from tundp.cli import main
kind, wanted = {kind!r}, {wanted!r}
of = diagnosis.Named.of.__func__
def mutated(cls, finding, check):
    made = of(cls, finding, check)
    if made.id != wanted:
        return made
    if kind == "check":
        return replace(made, id="device", verdict=diagnosis.Verdict.OK, command="")
    return replace(made, command="true", next_step="true") if made.command else made
diagnosis.Named.of = classmethod(mutated)
sys.exit(main(sys.argv[1:]))
"""


def _mutate(broken: Broken, kind: str, row: Row) -> None:
    """Let the lab run a doctor with this fault."""
    wanted = (row.mended_by if kind == "command" else "") or row.id
    path = broken.overlay.directory / "mutant"
    path.write_text(_DOCTOR.format(python=sys.executable, kind=kind, wanted=wanted))
    path.chmod(0o755)
    broken_lab.TUNDP = str(path)


async def _settled(broken: Broken, row: Row) -> None:
    """Mend what the row leaves to its command, by a doctor that is not broken."""
    if not row.undo and (hits := await broken.finds(row.at, row)):
        await broken.sh(broken.overlay.nodes[row.at].host, hits[0]["command"])
    await until(lambda: broken.passes("pods"), "packets pass again", deadline_s=40)


def _run(runner: Runner, kind: str, row: Row) -> str:
    """`failed`, with the reason, as it must; or `PASSED`; or `skipped`."""
    broken, intact = runner.broken, broken_lab.TUNDP
    _mutate(broken, kind, row)
    try:
        runner.run(broken_lab.plant_name_mend(broken, row))
    except AssertionError as error:
        return f"failed: {str(error).splitlines()[0]}"
    except pytest.skip.Exception as skipped:
        return f"skipped: {skipped}"
    finally:
        broken_lab.TUNDP = intact
        runner.run(_settled(broken, row))
    return "PASSED"


def main(arguments: list[str]) -> int:
    """Run the rows asked for, or all; the exit code."""
    kinds = [each for each in MUTANTS if each in arguments] or list(MUTANTS)
    words = [each for each in arguments if each not in MUTANTS]
    names = [name for name in ROWS if not words or any(word in name for word in words)]
    shorter: Any = broken_lab
    shorter.NAMED_S, shorter.MENDED_S = _FOUND_S, _MENDED_S
    shorter.FAULT_S = 10.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the lab is removed
    runner, passed = Runner(), 0
    try:
        runner.run(runner.broken.set_up())
        for name in names:
            for kind in kinds:
                if kind == "command" and not (ROWS[name].command or ROWS[name].mended_by):
                    continue
                came = _run(runner, kind, ROWS[name])
                passed += came == "PASSED"
                print(f"{kind:<8}{name}: {came}", flush=True)
    finally:
        runner.close()
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
