"""Builds the C sources with warnings as errors, then with sanitizers, and runs their C test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "native" / "src").glob("*.c")),
    Path(__file__).with_name("test_native.c"),
]
WARNINGS = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("plain", ["-O3"]),
        ("asan-ubsan", ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]),
    ],
)
def test_c_sources(tmp_path: Path, name: str, flags: list[str]) -> None:
    program = tmp_path / name
    compiler = ["gcc", *WARNINGS, *flags, f"-I{ROOT}/native/include", "-o", str(program)]
    built = subprocess.run([*compiler, *map(str, SOURCES)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "flags", [["-O2"], ["-O1", "-g", "-fsanitize=thread"]], ids=["plain", "tsan"]
)
def test_sanitizers_find_no_fault_between_worker_and_controller(
    tmp_path: Path, flags: list[str]
) -> None:
    # Publication of FIBs, counters under the sequence lock, and stopping, all at once.
    program = tmp_path / "threads"
    sources = [*SOURCES[:-1], Path(__file__).with_name("test_threads.c")]
    if "-fsanitize=thread" in flags:
        # TSan does not know fences, and the sequence lock's copy is a race by design: what
        # it reads is thrown away when the sequence moved. Every other access is checked.
        flags = [*flags, "-Wno-tsan"]
    compiler = ["gcc", *WARNINGS, *flags, f"-I{ROOT}/native/include", "-pthread"]
    built = subprocess.run(
        [*compiler, "-o", str(program), *map(str, sources)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    suppressions = tmp_path / "suppressions"
    suppressions.write_text("race:tundp_worker_counters\n")
    ran = subprocess.run(
        [str(program)],
        capture_output=True,
        text=True,
        env={"TSAN_OPTIONS": f"suppressions={suppressions} halt_on_error=1"},
        timeout=100,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_sanitizers_are_awake(tmp_path: Path) -> None:
    # One byte past the end must be seen, or the test above proves nothing.
    source = tmp_path / "past.c"
    source.write_text(
        '#include <stdlib.h>\n#include "sums.h"\n'
        "int main(void) { uint8_t *p = calloc(1, 7); return sums_portable(p, 8) == 1; }\n"
    )
    program = tmp_path / "past"
    subprocess.run(
        [
            *(
                "gcc",
                "-g",
                "-D_GNU_SOURCE",
                "-fsanitize=address",
                f"-I{ROOT}/native/include",
                f"-I{ROOT}/native/src",
                "-o",
                str(program),
            ),
            *(str(source), str(ROOT / "native" / "src" / "checksum.c")),
        ],
        check=True,
    )
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "heap-buffer-overflow" in ran.stderr
