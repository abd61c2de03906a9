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
def test_c_sources(tmp_path, name, flags):
    program = tmp_path / name
    compiler = ["gcc", *WARNINGS, *flags, f"-I{ROOT}/native/include", "-o", str(program)]
    built = subprocess.run([*compiler, *map(str, SOURCES)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_sanitizers_are_awake(tmp_path):
    # One byte past the end must be seen, or the test above proves nothing.
    source = tmp_path / "past.c"
    source.write_text(
        '#include <stdlib.h>\n#include "tundp.h"\n'
        "int main(void) { uint8_t *p = calloc(1, 7); return tundp_sum(p, 8) == 1; }\n"
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
