"""What `make test` leaves out is there, and `make labs` runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.thorough import LEFT_OUT, is_left_out

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", LEFT_OUT)
def test_each_is_a_test_of_its_file(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for name in LEFT_OUT[path]:
        assert re.search(rf"(?m)^(async )?def {re.escape(name.partition('[')[0])}\(", text), name


def test_labs_run_every_file() -> None:
    recipe = MAKEFILE.partition("\nlabs:")[2].partition("\n\n")[0]
    assert "LABS=all" in recipe
    assert "$(LABS)" in recipe
    listed = re.search(r"(?m)^LABS := .*addsuffix .py,((?:.|\\\n)*?)\)\)", MAKEFILE)
    assert listed is not None
    files = {f"tests/netns/test_{name}.py" for name in listed[1].replace("\\\n", " ").split()}
    assert set(LEFT_OUT) <= files


def test_a_name_without_parameters_stands_for_all_of_them() -> None:
    path = "tests/netns/test_top.py"
    assert is_left_out(f"{path}::test_stop_and_continue")
    assert is_left_out(f"{path}::test_a_terminal_that_cannot_have_a_screen_gets_lines[a-b]")
    sums = f"{path}::test_rounds_add_up_to_the_packets_that_were_sent"
    assert is_left_out(f"{sums}[reference]")
    assert not is_left_out(f"{sums}[gso]")
    assert not is_left_out("tests/netns/test_life.py::test_stop_and_continue")
