"""What `make test` leaves out is there, and `make labs` runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.thorough import DEBUGGING, LEFT_OUT, VARIANTS, is_left_out, is_of_labs

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
    assert "\nLABS = $(shell $(PY) -m tests.thorough)\n" in MAKEFILE
    done = subprocess.run(
        [sys.executable, "-m", "tests.thorough"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == {*DEBUGGING, *LEFT_OUT, *VARIANTS}
    assert all((ROOT / path).is_file() for path in done.stdout.split())


def test_what_is_left_out_and_the_debugging_commands_are_of_labs() -> None:
    life = "tests/netns/test_life.py::test_route_moves_while_traffic_flows"
    assert is_of_labs(f"{life}[reference]") and not is_of_labs(f"{life}[gso]")
    assert is_of_labs("tests/netns/test_doctor.py::test_anything")


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """Ids of all tests of the files of which something is left out."""
    files = sorted({*LEFT_OUT, *VARIANTS})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"LABS": "every"},
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_value_is_one_of_a_parameter(collected: list[str]) -> None:
    for path, values in VARIANTS.items():
        for value in values:
            pattern = re.compile(rf"^{re.escape(path)}::\w+\[(.*-)?{re.escape(value)}(-.*)?\]$")
            assert any(map(pattern.match, collected)), (path, value)


def test_of_a_test_that_is_left_out_by_a_value_others_remain(collected: list[str]) -> None:
    """Unless it is left out by name."""
    gone = {each.partition("[")[0] for each in collected if is_left_out(each)}
    left = {each.partition("[")[0] for each in collected if not is_left_out(each)}
    named = {f"{path}::{name}".partition("[")[0] for path in LEFT_OUT for name in LEFT_OUT[path]}
    assert gone - left <= named


def test_a_variant_is_a_whole_parameter() -> None:
    life = "tests/netns/test_life.py::test_deleted_tun_comes_back_idle_and_under_load"
    assert is_left_out(f"{life}[asyncio-reference]")
    assert not is_left_out(f"{life}[asyncio-gso]")
    assert not is_left_out(f"{life}[references]")
    assert not is_left_out("tests/netns/test_hostgw.py::test_anything[reference]")


def test_a_name_without_parameters_stands_for_all_of_them() -> None:
    path = "tests/netns/test_top.py"
    assert is_left_out(f"{path}::test_stop_and_continue")
    assert is_left_out(f"{path}::test_a_terminal_that_cannot_have_a_screen_gets_lines[a-b]")
    sums = f"{path}::test_rounds_add_up_to_the_packets_that_were_sent"
    assert is_left_out(f"{sums}[reference]")
    assert not is_left_out(f"{sums}[gso]")
    assert not is_left_out("tests/netns/test_life.py::test_stop_and_continue")
